"""The report's files: what they say, that they stand alone, and how a browser shows them."""

import csv
import io
import re
from base64 import b64decode
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console
from scipy import stats
from simulated import write_arms, write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from browser import Page
from thunderhead.lab import figures, page
from thunderhead.lab.analysis import analyse
from thunderhead.lab.report import show_ranking, write_report
from thunderhead.lab.runs import Failure, Run, read_runs
from thunderhead.training import record

LOSSES = {
    "attention=mha": [3.0, 3.1, 3.2],
    "attention=mqa": [3.05, 3.16, 3.25],
    "attention=gqa": [3.0, 3.11, 3.2],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three arms with three seeds, a failure, and an unfinished run."""
    folder = tmp_path_factory.mktemp("sweep")
    write_arms(folder, LOSSES)
    write_run(folder / "9", ["attention=mla"], steps=40)
    failures = [Failure("mla seed=2", "exit status 1: <script>alert(1)</script>")]
    return write_report(folder, read_runs([folder]), failures=failures, notes=["The best lr lies on the edge."])


def text(html: str) -> str:
    return " ".join(unescape(re.sub(r"<(style|head).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)).split())


def table(html: str, section: str) -> list[list[str]]:
    """The rows of the last table of a section."""
    part = html.partition(f'id="{section}"')[2].partition("</section>")[0].rpartition("<tbody>")[2]
    return [[text(cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)] for row in part.split("<tr")[1:]]


def test_the_page_says_the_answer_first(report: Path) -> None:
    page = text(report.read_text())
    answer = page.index(
        "mqa − mha = +0.053 nats (95 % CI +0.037 … +0.070, 3 seeds, matched tokens, FLOPs and parameters): worse."
    )
    assert answer < 300
    assert page.index("The best lr lies on the edge.") < page.index("Results")


def test_the_tables(report: Path) -> None:
    html = report.read_text()
    assert table(html, "differences") == [["attention.n_kv_heads", "null", "1", "0.5"]]
    assert table(html, "curves")[0] == ["mha", "3", "1.00 ×", "1.00 ×", "1.00 ×"]
    assert [row[:2] for row in table(html, "inference")] == [["mha", "256"], ["gqa", "128"], ["mqa", "256"]]
    assert table(html, "training")[0][:5] == ["mha", "5,000", "1.00 ×", "20", "286.1 MiB"]
    assert table(html, "matching")[1] == ["mqa", "30 k (=)", "100 k (=)", "5 G (=)", "20 (=)", "nothing was solved for"]
    failed = table(html, "failures")
    assert failed[0] == ["mla seed=2", "exit status 1: <script>alert(1)</script>"]
    assert failed[1][1] == "unfinished: step 40 of 100"


def test_the_cost_to_reach_a_loss_lies_on_either_side_of_one(tmp_path: Path) -> None:
    """Simulated losses are L (100 / step) ^ 0.1: to the loss that all reach, an arm takes 100 (L / it) ^ 10 steps."""
    losses = {"attention=mha": [3.0, 3.1, 3.2], "attention=mqa": [3.05, 3.16, 3.25], "attention=gqa": [2.95, 3.05, 3.2]}
    html = write_report(tmp_path / "out", read_runs([write_arms(tmp_path / "runs", losses)])).read_text()
    mha, mqa, gqa = (np.array(values) for values in losses.values())
    for row, arm in zip(table(html, "curves"), (mha, mqa, gqa), strict=True):
        expected = float(np.exp(np.log((arm / mha) ** 10).mean()))
        found, _, between = row[2].partition(" ×")
        # a straight line lies above the curve: between validations, losses are reached up to 2 % earlier
        assert float(found) == pytest.approx(expected, rel=0.02)
        assert row[2:] == [row[2]] * 3
        if arm is not mha:
            low, high = map(float, between.strip(" ()").split(" … "))
            logs = np.log((arm / mha) ** 10)
            half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / 3**0.5
            assert (low, high) == pytest.approx(tuple(np.exp([logs.mean() - half, logs.mean() + half])), rel=0.04)
    assert float(table(html, "curves")[1][2].split()[0]) > 1 > float(table(html, "curves")[2][2].split()[0])


def test_what_was_matched(tmp_path: Path) -> None:
    match = {"by": "params", "target": 30_000, "reached": 29_970, "set": {"model.d_ff": 90}}
    write_run(tmp_path / "1", ["attention=mha"])
    write_run(tmp_path / "2", ["attention=mqa", "model.d_ff=90"], match=match, summary={"parameters": 29_970})
    html = write_report(tmp_path, read_runs([tmp_path])).read_text()
    row = table(html, "matching")[1]
    assert row[1] == "30 k (−0.10 %)"
    assert row[-1] == "params: 30 k of 30 k (−0.10 %) by model.d_ff=90"


def test_further_metrics_and_loss_terms_are_shown_by_name(tmp_path: Path) -> None:
    measured = {"metrics": {"top5": 0.25}, "loss_terms": {"loss": 3.0, "balance": 0.0125}}
    write_run(tmp_path / "1", ["attention=mha"], summary=measured)
    write_run(tmp_path / "2", ["attention=mqa"], summary={"accuracy": 0.5})
    path = write_report(tmp_path, read_runs([tmp_path]))
    html = path.read_text()
    assert '<th scope="col">top5</th><th scope="col">accuracy</th>' in html
    assert table(html, "training") == [["mha", "0.0125"], ["mqa", "–"]]
    with (tmp_path / "results.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["top5"], first["train/balance"], first["accuracy"]) == ("0.25", "0.0125", "")
    assert (second["top5"], second["train/balance"], second["accuracy"]) == ("", "", "0.5")


def test_without_a_run_no_empty_folder_is_left(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()  # as earlier reports left it
    write_report(tmp_path, [], failures=[Failure("mha seed=1", "a wire broke")])
    assert not (tmp_path / "figures").exists()
    assert "a wire broke" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("n_runs", "kind"), [(5, "svg+xml"), (50, "png")])
def test_the_lines_of_many_runs_are_embedded_as_pixels(n_runs: int, kind: str) -> None:
    """300 runs as lines made a page of 12 MB."""
    figure = Figure()
    figure.subplots().plot(np.zeros((300, n_runs)))
    embedded = page._embedded(figure)
    assert embedded.startswith(f"data:image/{kind};base64,")
    assert len(embedded) < 300_000


def test_the_page_stands_alone(report: Path) -> None:
    html = report.read_text()
    sources = re.findall(r'src="([^"]{0,40})', html)
    assert len(sources) == 4  # the figures
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    sections = re.findall(r'<section id="(\w+)"><h2>', html)
    assert re.findall(r'<a href="#(\w+)">', html) == sections != []  # the contents
    assert all((report.parent / link).is_file() for link in re.findall(r'href="([^#"]+)"', html))  # PNG and CSV
    assert "http" not in re.sub(r"base64,[^\"]+", "", html)
    assert "<script" not in html
    for encoded in re.findall(r"base64,([^\"]+)", html):
        assert not re.findall(r"(?:href|src)=[\"']http", b64decode(encoded).decode())


def test_results_csv_has_a_row_a_run(report: Path) -> None:
    with (report.parent / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], int(row["seed"]), float(row["val_loss"])) for row in rows] == [
        (name.partition("=")[2], seed, loss) for name, losses in LOSSES.items() for seed, loss in enumerate(losses, 1)
    ]
    assert rows[3]["attention.n_kv_heads"] == "1"
    assert rows[3]["kv_cache_bytes_per_token"] == "256"


def test_the_figures_are_pictures(report: Path) -> None:
    files = sorted((report.parent / "figures").glob("*.png"))
    assert [file.name for file in files] == ["curves.png", "differences.png", "pareto.png", "results.png"]
    for file in files:
        assert imread(file).std() > 0.05  # something is drawn


def test_the_figures_are_tables_too(report: Path) -> None:
    for file in (report.parent / "figures").glob("*.png"):
        assert f'href="figures/{file.stem}.csv"' in report.read_text()
    drawn = record.read_rows(report.parent / "figures" / "results.csv")[1]
    (panel, *_) = {row["panel"]: None for row in drawn}
    for name, losses in LOSSES.items():
        arm = name.partition("=")[2]
        seeds, mean, (low, high) = (
            [float(row["x"]) for row in drawn if (row["panel"], row["series"]) == (panel, f"{arm}: {what}")]
            for what in ("seeds", "mean", "mean: interval")
        )
        assert (seeds, mean) == (pytest.approx(losses), [pytest.approx(np.mean(losses))])
        assert low < min(losses) < max(losses) < high
    curves = record.read_rows(report.parent / "figures" / "curves.csv")[1]
    assert {row["panel"] for row in curves} == {"tokens", "FLOPs", "seconds of training"}
    assert {"mha", "mha: lowest to highest", "mha: validation"} <= {row["series"] for row in curves}


def test_tensorboard_finds_the_hyperparameters(report: Path) -> None:
    sessions = sorted((report.parent / "hparams").iterdir())
    assert len(sessions) == 9
    events = EventAccumulator(str(sessions[-1])).Reload()
    assert sessions[-1].name == "mqa-seed=3"
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    assert start.hparams["arm"].string_value == "mqa"
    assert start.hparams["seed"].number_value == 3
    assert start.hparams["attention.n_kv_heads"].string_value == "1"
    assert events.Scalars("final/val_loss")[0].value == pytest.approx(3.25)


def test_writing_again_replaces(tmp_path: Path) -> None:
    runs = read_runs([write_arms(tmp_path / "runs", LOSSES)])
    write_report(tmp_path / "out", runs)
    (tmp_path / "out" / "hparams" / "notes.txt").write_text("mine")
    path = write_report(tmp_path / "out", runs[:1])
    assert "There is nothing to compare: one arm has finished." in path.read_text()
    assert sorted(file.name for file in (tmp_path / "out" / "figures").iterdir()) == [
        *("curves.csv", "curves.png", "results.csv", "results.png")
    ]
    assert len(list((tmp_path / "out" / "hparams").rglob("events*"))) == 1
    assert (tmp_path / "out" / "hparams" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("what", ["nothing", "unfinished", "no metrics", "six arms", "bits per byte"])
def test_whatever_there_is_gives_a_report(tmp_path: Path, what: str) -> None:
    runs: list[Run] = []
    if what == "unfinished":
        runs = read_runs([write_run(tmp_path / "run", steps=20)])
    if what == "no metrics":
        write_arms(tmp_path / "runs", LOSSES)
        for file in tmp_path.rglob("metrics.csv"):
            file.unlink()
        runs = read_runs([tmp_path / "runs"])
    if what == "six arms":
        runs = read_runs(
            [write_arms(tmp_path / "runs", {f"optimizer.lr=0.0{i}": [3 + i / 100] for i in range(10, 16)})]
        )
    if what == "bits per byte":
        runs = read_runs([write_arms(tmp_path / "runs", LOSSES)])
    metric = "bits_per_byte" if what == "bits per byte" else "auto"
    page = text(write_report(tmp_path / "out", runs, metric=metric).read_text())  # type: ignore[arg-type]
    expected = {
        "nothing": "No finished run",
        "unfinished": "unfinished: step 20 of 100",
        "no metrics": "mqa − mha = +0.053 nats",
        "six arms": "one seed cannot resolve anything",
        "bits per byte": "mqa − mha = +0.027 bits a byte",
    }
    assert expected[what] in page


def test_the_ranking_on_the_terminal(report: Path) -> None:
    output = io.StringIO()
    console = Console(width=200, file=output)
    show_ranking(analyse(read_runs([report.parent]), notes=["careful [not markup]"]), report, console)
    lines = output.getvalue().splitlines()
    ranked = [line.split()[:3] for line in lines if re.match(r"\d ", line.strip())]
    assert ranked == [["1", "mha", "3"], ["2", "gqa", "3"], ["3", "mqa", "3"]]
    assert sum("mqa − mha = +0.053" in line for line in lines) == 1
    assert any("read with care: careful [not markup]" in line for line in lines)


def test_the_pareto_front() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 2.0), (1.5, 6.0)]
    assert figures.pareto_front(points) == [(1.0, 5.0), (2.0, 3.0), (4.0, 2.0)]


def test_a_band_is_the_mean_and_the_range_of_the_seeds(report: Path) -> None:
    curves = [run.curve("train/loss") for run in read_runs([report.parent])[:3]]
    x, mean, low, high = figures.band(curves, "tokens", 100_000)
    assert len(x) == 9  # the first of ten bins ends where the first point lies
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert low[-1] == pytest.approx(min(curve.loss[-2:].mean() for curve in curves), abs=0.03)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_shows_all_of_it(report: Path, page: Page, width: int) -> None:
    """Figures load, large enough; nothing runs out of the page, nor a table out of a phone; the answer comes first."""
    page.open(report.as_uri(), width, 800)
    assert [own > 0 and shown > 300 for shown, own in page.pictures()] == [True] * 4
    assert page.overflow() <= 0
    assert 0 < page.ask("document.querySelector('ul.answer li').getBoundingClientRect().bottom") < 800
    assert page.ask("getComputedStyle(document.querySelector('li.worse')).borderLeftColor") == "rgb(213, 94, 0)"
    wide = page.ask("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
    assert not wide
    assert not page.errors
    page.photograph(report.with_name(f"{width}.png"), whole=True)


def test_it_prints(report: Path, page: Page) -> None:
    page.open(report.as_uri())
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", page.print())) <= 8


def learning_rate_runs(folder: Path, losses: dict[tuple[str, int], dict[float, float]]) -> list[Run]:
    """A run for each (parametrization, width) and learning rate."""
    for (parametrization, width), by_rate in losses.items():
        for rate, loss in by_rate.items():
            overrides = [f"parametrization={parametrization}", f"model.d_model={width}", f"model.n_heads={width // 8}"]
            write_run(folder / f"{parametrization}-{width}-{rate}", [*overrides, f"optimizer.lr={rate}"], loss=loss)
    return read_runs([folder])


def test_learning_rates_have_a_panel_for_each_parametrization_and_a_line_for_each_width(tmp_path: Path) -> None:
    losses = {
        ("standard", 32): {0.001: 3.2, 0.002: 3.1, 0.004: 3.0},
        ("standard", 64): {0.001: 2.8, 0.002: 2.9, 0.004: 9.0},
        ("mup", 32): {0.001: 3.1, 0.002: 3.0, 0.004: 3.2},
        ("mup", 64): {0.001: 2.9, 0.002: 2.7, 0.004: 2.8},
    }
    figure = figures.learning_rates(analyse(learning_rate_runs(tmp_path, losses)))
    assert figure is not None
    found = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if len(line.get_xdata()) > 1:
                panel, label = axes.get_title().partition(":")[0], str(line.get_label())
                found[panel, label] = dict(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
    assert found == {
        ("standard", "d_model=32: best 0.004"): losses["standard", 32],
        ("standard", "d_model=64: best 0.001"): losses["standard", 64],
        ("mup", "d_model=32: best 0.002"): losses["mup", 32],
        ("mup", "d_model=64: best 0.002"): losses["mup", 64],
    }
    low, high = figure.axes[0].get_ylim()
    assert low < 2.7
    assert 3.2 < high < 9.0  # what went wrong does not flatten the rest


def test_learning_rates_are_drawn_only_where_nothing_else_varies(tmp_path: Path) -> None:
    assert figures.learning_rates(analyse([])) is None
    runs = learning_rate_runs(tmp_path, {("standard", 32): {0.001: 3.0}, ("standard", 64): {0.002: 2.9}})
    assert figures.learning_rates(analyse(runs)) is None
    more = learning_rate_runs(tmp_path / "more", {("standard", 64): {0.001: 3.2, 0.002: 2.9}})
    figure = figures.learning_rates(analyse(more))
    assert figure is not None
    assert len(figure.axes) == 1
    assert next(str(line.get_label()) for line in figure.axes[0].get_lines()) == "loss: best 0.002"
    low, high = figure.axes[0].get_ylim()
    assert low < 2.9
    assert high > 3.2  # an ordinary difference is not cut off
