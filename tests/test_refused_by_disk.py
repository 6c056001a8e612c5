"""What a disk refuses is told in one line, whoever tells it first."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead import disk
from thunderhead.core.config import ConfigError, Problem


class SafetensorError(Exception):
    """As safetensors has one."""


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL),
        OSError("2048 requested and 1584 written"),
        SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
        shutil.Error([("a", "b", f"[Errno 28] {FULL}: 'b'")]),
    ],
)
def test_a_full_disk_in_the_words_of_libraries(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"), disk.told(), disk.naming(tmp_path / "out"):
        raise error
    said = capsys.readouterr().err
    assert re.search(rf"{tmp_path}/out could not be written: {FULL} \([\d,]+ bytes free there\): make room", said)


@pytest.mark.parametrize(
    "error", [OSError("12 of 13 written"), ValueError("[Errno 2]"), ConfigError([Problem("", "[Errno 28]")])]
)
def test_what_is_no_disks_fault_stays(error: Exception, tmp_path: Path) -> None:
    assert disk.problem(error) is None
    with pytest.raises(type(error)) as caught, disk.told(), disk.naming(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("access", [Path.read_text, lambda path: disk.write_text(path, "text")])
def test_a_folder_in_the_place_of_a_file(access: Callable[[Path], object], tmp_path: Path) -> None:
    (file := tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match=rf"^{file} could not be .*: a folder is in the place"), disk.refusing():
        access(file)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (file := tmp_path / "file").symlink_to(file)
    with pytest.raises(ConfigError, match=rf"^{file} could not be .*: links there lead in a circle"), disk.refusing():
        file.read_text()
