"""What the machine can do, on machines made up by patching torch."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thunderhead.training import hardware


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def pretend(*, cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("asked", "cuda", "mps", "gives"),
    [
        ("auto", 0, False, "cpu"),
        ("auto", 2, False, "cuda"),
        ("auto", 0, True, "mps"),
        ("gpu", 1, False, "cuda"),
        ("gpu", 0, True, "mps"),
        ("cpu", 2, False, "cpu"),
        ("mps", 0, True, "mps"),
    ],
)
def test_accelerators(machine, asked: str, cuda: int, mps: bool, gives: str) -> None:
    machine(cuda=cuda, mps=mps)
    assert hardware.resolve_accelerator(asked) == gives


def test_accelerators_that_are_not_there(machine) -> None:
    machine()
    with pytest.raises(ValueError, match=r"^trainer.accelerator=gpu: PyTorch finds no cuda device here, only cpu"):
        hardware.resolve_accelerator("gpu")
    with pytest.raises(ValueError, match=r"^trainer.accelerator=mps: PyTorch finds no mps device here"):
        hardware.resolve_accelerator("mps")
    with pytest.raises(ValueError, match=r"^trainer.accelerator=tpu is unknown"):
        hardware.resolve_accelerator("tpu")


@pytest.mark.parametrize(
    ("asked", "accelerator", "count"),
    [(1, "cpu", 1), (2, "cpu", 2), ("auto", "cpu", 1), ("auto", "cuda", 4), (-1, "cuda", 4), ([0, 2], "cuda", 2)],
)
def test_device_counts(machine, asked: object, accelerator: str, count: int) -> None:
    machine(cuda=4)
    assert hardware.device_count(asked, accelerator) == count


@pytest.mark.parametrize("asked", [0, -2, True, "two", 1.5, []])
def test_device_counts_that_are_none(asked: object) -> None:
    with pytest.raises(ValueError, match=r"^trainer.devices="):
        hardware.device_count(asked, "cpu")


def test_measured_matmul_speed_is_that_of_a_computer() -> None:
    flops = hardware.measured_matmul_flops(torch.float32, size=128, seconds=0.01)
    assert 1e7 < flops < 1e16  # a clock in wrong units would be out by 1000 at least
    assert hardware.peak_flops("mps", torch.float32) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert hardware.keep_freed_memory() is False


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages here")
@pytest.mark.parametrize(("environment", "in_use"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_big_tensors_lie_in_huge_pages(environment: dict[str, str], in_use: bool) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    code = (
        "import thunderhead.training.hardware, torch; x = torch.zeros(2**24); x.fill_(1.0)\n"  # 64 MiB
        "print(open('/proc/self/smaps_rollup').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    (kib,) = re.findall(r"AnonHugePages:\s+(\d+) kB", done.stdout)
    if "[always]" not in HUGE_PAGES.read_text() or in_use:
        assert (int(kib) > 32 * 1024) is in_use


def test_the_cpu_has_a_name() -> None:
    assert hardware.device_name("cpu")


def test_as_many_devices_as_a_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of which each took itself for the only one would all train by themselves, into one folder."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "6"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    asked = {"accelerator": "cpu", "num_nodes": 2}
    for devices in ("auto", -1, 3):
        assert hardware.machine_of({**asked, "devices": devices}, must_be_here=True)["world_size"] == 6
    for world_size, devices, message in (("6", 1, "=1 on .*=2 are 2 .* 6 were started"), ("2", 3, "are 6 .* 2 were")):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        with pytest.raises(ValueError, match=message):
            hardware.machine_of({**asked, "devices": devices}, must_be_here=True)


def test_restarts_that_would_share_a_store_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = {"accelerator": "cpu", "devices": 2}
    with pytest.raises(ValueError, match=r"trainer.devices.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun"):
        hardware.machine_of(asked, must_be_here=True)
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "False"), ("TORCHELASTIC_MAX_RESTARTS", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert hardware.machine_of(asked, must_be_here=True)["world_size"] == 2
