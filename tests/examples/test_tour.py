"""examples/tour.ipynb, from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from thunderhead.training.record import REPOSITORY

TOUR = REPOSITORY / "examples" / "tour.ipynb"


@pytest.mark.filterwarnings("ignore:.*TCP without encryption:RuntimeWarning")
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the repository, but for where its runs go."""
    monkeypatch.setenv("TOUR", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Traceback" not in printed
    assert "error:" not in printed
    assert (tmp_path / "sweep" / "report.html").is_file()
    assert (tmp_path / "sweep" / "figures" / "results.png").is_file()
    assert "LlamaForCausalLM" in printed


def test_no_path_of_a_machine_is_in_it() -> None:
    """Its outputs are those of a run in a clone of its own."""
    text = TOUR.read_text(encoding="utf-8")
    assert str(REPOSITORY) not in text
    assert not any(f"/{place}/" in text for place in ("home", "Users", "work", "tmp", "root"))
