"""Corpora that are always there."""

import importlib.metadata
import itertools
import sysconfig
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.corpus.content import listing
from thunderhead.corpus.python_code import InstalledPackage, StandardLibrary


def test_the_default_corpus_is_the_published_one() -> None:
    """So that the losses in the documentation can be reproduced: by the version in constraints.txt."""
    [pinned] = [line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("sympy==")]
    if importlib.metadata.version("sympy") != pinned.split()[0].removeprefix("sympy=="):
        pytest.skip("another version of SymPy is installed")
    assert config.plain(config.compose())["data"]["sources"].keys() == {"sympy"}
    [settings] = config.values_of("data", "sympy")["sources"].values()
    source = InstalledPackage(package=settings["package"], sha256=settings["sha256"])
    assert listing(source._files())["sha256"] == settings["sha256"]
    assert source.notes() == []


def test_the_code_of_a_package() -> None:
    source = InstalledPackage(package="sympy.logic")
    source.check()
    documents = {document.id: document.text for document in source.documents()}
    assert "class And(" in documents["boolalg.py"]
    assert not any("tests" in Path(name).parts for name in documents)
    assert sum(len(text.encode()) for text in documents.values()) == pytest.approx(source.disk_bytes(), rel=0.01)


def test_another_version_is_told() -> None:
    [note] = InstalledPackage(package="sympy.logic", sha256="0" * 64).notes()
    assert f"sympy.logic {importlib.metadata.version('sympy')} is not the corpus" in note


@pytest.mark.parametrize("package", ["no_such_package", "sympy.no_such", "typing_extensions", ".x", ""])
def test_a_package_without_files_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match=f"package={package} is not installed"):
        InstalledPackage(package=package).check()


def test_the_standard_library() -> None:
    names = [
        document.id
        for document in itertools.islice(StandardLibrary(include_code=True, include_topics=False).documents(), 50)
    ]
    assert names[:1] == ["__future__.py"]
    assert names == sorted(names)
    code = StandardLibrary(include_code=True, include_topics=False)._files()
    both = StandardLibrary(include_code=True, include_topics=True)
    assert 600 < len(code) < 1000
    assert len(both._files()) == len(code) + 1  # the file of topics is prose, never code
    assert not any("test" in Path(name).parts or "site-packages" in name for name, _ in code)
    assert both.fingerprint()["python"].endswith(sysconfig.get_config_var("py_version"))
    assert 5e6 < both.disk_bytes() < 30e6


def test_the_topics_are_prose_one_document_each() -> None:
    source = StandardLibrary(include_code=False, include_topics=True)
    source.check()
    documents = {document.id: document.text for document in source.documents()}
    assert 50 < len(documents) < 200
    assert "assert" in documents["topics/assert"]
    assert not any("topics = {" in text for text in documents.values())


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="both false"):
        StandardLibrary(include_code=False, include_topics=False)
