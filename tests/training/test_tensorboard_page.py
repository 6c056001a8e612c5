"""What TensorBoard shows of runs, in a browser."""

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import programs
from browser import Page
from tiny import prepared

pytestmark = pytest.mark.slow  # two runs, a server and a browser: half a minute

WINDOW = (1400, 1100)


@pytest.fixture(scope="module")
def server(page: Page, text_corpus: Path, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard of two runs, of which the second is by steps."""
    folder = tmp_path_factory.mktemp("watched")
    prepared(text_corpus, shards_dir, ["tokenizer=byte"])
    lines = ["data=text", f"data.path={text_corpus}", f"data.shards_dir={shards_dir}", "tokenizer=byte", "debug=fast"]
    for chosen in (("attention=mqa", "optimizer=lion"), ("attention=mha", "logger.tensorboard.axis=steps")):
        ended = programs.run("train.py", *chosen, *lines, "trainer=cpu", "precision=fp32", cwd=folder)
        assert ended.returncode == 0, ended.stderr
    command = ("-m", "tensorboard.main", f"--logdir={folder / 'logs'}", "--host=127.0.0.1", "--port=0")
    with programs.start(*command, "--load_fast=false") as process:  # without a second server
        try:
            assert process.stdout is not None
            yield next(m[0] for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_charts(server: str, page: Page, tmp_path: Path) -> None:
    """Losses first, then speed, then optimization; each once; runs by what was chosen; by tokens, or by steps."""
    page.open(f"{server}#timeseries", 1400, 3600)  # what is out of sight is not drawn
    page.wait("deep('metrics-card-groups card-view line-chart').length")
    assert page.text("metrics-card-groups .group-title") == ["loss", "speed", "training", "usage"]
    page.ask("deep('metrics-card-group-toolbar button').slice(2).map(e => e.click())")  # the others are open
    cards = "deep('metrics-card-groups card-view')"
    page.wait(f"{cards}.length >= 14 && {cards}.every(e => deep('tb-truncated-path', e).length)")
    charts = page.ask("deep('metrics-card-groups scalar-card').map(e => deep('tb-truncated-path', e)[0].title)")
    assert len(page.text("metrics-card-groups image-card")) == 2  # the schedule of each run
    assert charts[:6] == [
        *("loss/train", "loss/val", "loss/val_bits_per_byte", "loss/val_perplexity"),
        *("speed/mfu", "speed/tokens_per_second"),
    ]
    assert len(charts) == len({*charts})
    assert {"training/lr", "training/grad_norm", "usage/flops"} <= {*charts}
    runs = [name.removeprefix("runs/pretrain/") for name in page.text("runs-data-table tb-data-table-content-row")]
    names = [re.sub(r"_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?$", "", run) for run in runs]
    assert names == ["mha-text-byte-fast-fp32", "mqa-lion-text-byte-fast-fp32"]
    last = page.wait("deep('card-view')[0].innerText.includes('2,560') && deep('card-view')[0].innerText").split()
    assert {"10", "2,560"} <= {*last}  # the last step of the first, the tokens that the second has seen

    page.open(f"{server}#timeseries", *WINDOW)
    page.wait("deep('metrics-card-groups card-view line-chart canvas').length")
    box = "(b => [b.left, b.top, b.right, b.bottom])(deep('line-chart canvas')[0].getBoundingClientRect())"
    for _ in range(60):
        page.photograph(tmp_path / "charts.png")
        left, top, right, bottom = map(int, page.ask(box))
        inside = imread(tmp_path / "charts.png")[top:bottom, left:right, :3]
        if is_drawn := (np.ptp(inside, axis=2) > 0.5).sum() > 100:  # the line of a run has a colour
            break
        time.sleep(0.5)
    assert is_drawn


def test_the_card_of_choices(server: str, page: Page, tmp_path: Path) -> None:
    page.open(f"{server}#text", *WINDOW)
    page.wait("deep('code').filter(e => e.innerText.startsWith('python train.py')).length == 2")
    commands = page.text("code")
    assert any(command.startswith("python train.py attention=mqa optimizer=lion ") for command in commands)
    cells = page.text("td")
    assert cells[cells.index("attention") + 1] in ("mha", "mqa")
    assert {"group", "choice (bold: no default)"} <= {*page.text("th")}
    assert {"mha", "mqa", "lion"} <= {*page.text("td strong")}
    page.photograph(tmp_path / "text.png")


def test_hyperparameters_of_single_runs(server: str, page: Page, tmp_path: Path) -> None:
    page.open(f"{server}#hparams", *WINDOW)
    page.wait("deep('vaadin-grid-cell-content').filter(e => e.innerText == 'mqa').length")
    cells = page.text("vaadin-grid-cell-content")
    assert {"attention", "loss/val", "loss/train", "speed/tokens_per_second", "mha", "mqa"} <= {*cells}
    losses = [float(cell) for cell in cells if re.fullmatch(r"\d\.\d+", cell)]
    assert len(losses) >= 4
    page.photograph(tmp_path / "hparams.png")
