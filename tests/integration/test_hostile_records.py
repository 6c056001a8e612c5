"""Records of somebody else are data: whatever they say, nothing of it runs, and one line tells what was refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from thunderhead import command_line
from thunderhead.core import config, trust
from thunderhead.core.config import ConfigError
from thunderhead.lab.compare import compare_runs
from thunderhead.release.command import generate_text
from thunderhead.release.evaluate import evaluate
from thunderhead.release.export import export
from thunderhead.training.resume import find
from tiny import tiny, train_here

# Each would make the file MARKER if it were called, or imported.
MARKER = "{marker}"
PAYLOADS: dict[str, dict[str, Any]] = {
    "open": {"_target_": "builtins.open", "file": MARKER, "mode": "w"},
    "exec": {"_target_": "builtins.exec", "_args_": [f"open('{MARKER}', 'w')"]},
    "system": {"_target_": "os.system", "command": f"touch {MARKER}"},
    "popen": {"_target_": "subprocess.Popen", "args": ["touch", MARKER]},
    "path": {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [MARKER]}},
    "copy": {"_target_": "shutil.copy", "src": "/etc/hostname", "dst": MARKER},
    "pickle": {"_target_": "torch.load", "f": "{pickle}", "weights_only": False},
    "pickle through torch.nn": {
        "_target_": "torch.nn.modules.module.torch.load", "f": "{pickle}", "weights_only": False,
    },
    "pickle through Lightning": {
        "_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": "{pickle}", "weights_only": False,
    },
    "our own writer": {"_target_": "thunderhead.disk.write_text", "path": MARKER, "text": "x"},
    "ours, for another's": {"_target_": "thunderhead.core.components.build", "node": {"_target_": "builtins.open"}},
    "import": {"_target_": "payload.anything"},
}  # fmt: skip
PLACES = (
    ("attention",),
    ("model", "more"),
    ("optimizer",),
    ("precision",),
    ("callbacks", "progress"),
    ("data", "sources", "text", "deep"),
    ("tokenizer", "inside"),
    ("logger", "list", 0),
)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


@pytest.fixture(scope="module")
def finished(text_corpus: Path, shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_here(tiny(text_corpus, shards_dir, "callbacks=default"), folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run, in a process that trusts nobody; `payload` could be imported."""
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(Payload(str(tmp_path / "marker")), tmp_path / "payload.pt")
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def filled(payload: Any, folder: Path) -> Any:
    text = json.dumps(payload).replace(MARKER, str(folder / "marker"))
    return json.loads(text.replace("{pickle}", str(folder / "payload.pt")))


def put(content: dict[str, Any], place: tuple[str | int, ...], payload: Any) -> None:
    inner: Any = content
    for key in place[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = [None] if key == "list" else {}
        inner = inner[key]
    inner[place[-1]] = payload


def generate(folder: Path) -> None:
    generate_text(config.compose([f"run={config.quoted(str(folder))}"], "generate"))


def resume(folder: Path) -> None:
    train_here([f"resume={config.quoted(str(folder))}", "budget.steps=4"], folder.parent / "new" / "time")


def resume_auto(folder: Path) -> None:
    (folder / "summary.json").unlink(missing_ok=True)
    train_here(["resume=auto"], folder.parent / "time")


def resume_checkpoint(folder: Path) -> None:
    train_here([f"resume={config.quoted(str(folder / 'checkpoints' / 'last.ckpt'))}"], folder.parent / "new" / "time")


def export_run(folder: Path) -> None:
    export(config.compose([f"run={config.quoted(str(folder))}"], "export"))


def evaluate_run(folder: Path) -> None:
    text = Path(__file__).parents[2] / "README.md"
    asked = [f"run={config.quoted(str(folder))}", "data=text", f"data.path={config.quoted(str(text))}"]
    evaluate(config.compose(asked, "evaluate"))


READERS = {
    "generate": generate,
    "export": export_run,
    "evaluate": evaluate_run,
    "resume": resume,
    "auto": resume_auto,
    "checkpoint": resume_checkpoint,
}


def refused(reader: Callable[[Path], None], folder: Path) -> str:
    """What a reader says; it must have called nothing."""
    before = set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        reader(folder)
    assert not (folder.parent / "marker").exists()
    assert "payload" not in {*sys.modules} - before
    return str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_recorded_configuration_runs_nothing(reader: str, name: str, folder: Path, tell: Callable[..., None]) -> None:
    place = PLACES[(list(PAYLOADS).index(name) + list(READERS).index(reader)) % len(PLACES)]
    content = yaml.safe_load((folder / "config.yaml").read_text())
    put(content, place, filled(PAYLOADS[name], folder.parent))
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    message = refused(READERS[reader], folder)
    assert PAYLOADS[name]["_target_"] in message
    assert "trust=[" in message
    tell(saw=f"error: {message}")


@pytest.mark.parametrize("reader", ["generate", "resume"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_checkpoint_runs_nothing(reader: str, name: str, folder: Path) -> None:
    file = folder / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    group = ("attention", "norm", "scheduler", "parametrization")[list(PAYLOADS).index(name) % 4]
    content["hyper_parameters"]["config"][group] = filled(PAYLOADS[name], folder.parent)
    torch.save(content, file)
    for other in file.parent.glob("[!l]*.ckpt"):
        other.unlink()
    assert PAYLOADS[name]["_target_"] in refused(READERS[reader], folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_that_is_a_pickle_runs_nothing(reader: str, folder: Path) -> None:
    for file in (folder / "checkpoints").glob("*.ckpt"):
        shutil.copy(folder.parent / "payload.pt", file)
    if reader == "auto":  # there is no intact run to go on with, and so a new one would begin
        (folder / "summary.json").unlink()
        assert find("auto", folder.parent / "time").checkpoint is None
        assert not (folder.parent / "marker").exists()
    else:
        assert "damaged" in refused(READERS[reader], folder)


@pytest.mark.parametrize("name", ["payload.anything", "os.system", "torch.hub.load", "", "builtins.exec"])
def test_the_kind_of_a_tokenizer_runs_nothing(name: str, folder: Path) -> None:
    content = json.loads((folder / "data.json").read_text())
    content["tokenizer"]["name"] = name
    (folder / "data.json").write_text(json.dumps(content))
    assert "unknown kind of tokenizer" in refused(generate, folder)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(("plan.json", {"steps": value}) for value in (None, "2")),
        *(("environment.json", {"overrides": value}) for value in (None, [1], "x")),
        ("environment.json", {"git": "x"}),
        *(("summary.json", {"steps": value}) for value in (None, "2")),
    ],
)
def test_a_record_of_another_shape_is_damaged(
    name: str, changed: dict[str, Any], exported: bool, folder: Path, tell: Callable[..., None]
) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    reader = export_run if exported else resume if name == "summary.json" else resume_auto
    message = refused(reader, folder)
    assert f"{file} is damaged ({next(iter(changed))}" in message
    tell(saw=message)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(("plan.json", {name: None}) for name in ("tokens", "parameters", "flops")),
        ("plan.json", {"parameters": {}}),
        *(("summary.json", {"val_loss": value}) for value in (None, "low")),
        *(("summary.json", {"ledger": value}) for value in (None, {"text": None}, {"text": {"tokens": "x"}})),
        ("environment.json", {"git": {"commit": 5}}),
    ],
)
def test_a_model_card_needs_the_shape(name: str, changed: dict[str, Any], folder: Path) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert f"{file} is damaged ({next(iter(changed))}" in refused(export_run, folder)


@pytest.mark.filterwarnings("ignore:No artists with labels")  # arms that differ in `_target_` are called so
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_comparison_runs_nothing(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, other := folder.parent / "other")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    put(content, PLACES[list(PAYLOADS).index(name) % len(PLACES)], filled(PAYLOADS[name], folder.parent))
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(command_line, "output_dir", lambda: folder.parent / "report")
    compare_runs(config.compose([f"runs=[{folder},{other}]", "baseline=null"], "compare"))
    assert (folder.parent / "report" / "report.html").is_file()
    assert not (folder.parent / "marker").exists()


@pytest.mark.parametrize(
    "argument",
    [
        "+callbacks.x={_target_: builtins.open, file: marker, mode: w}",
        "+callbacks.x._target_=os.system",
        "hydra.sweeper._target_=os.system",
        "hydra.launcher.setup=[touch marker]",
        "+hydra.callbacks.x.y=1",
        "++hydra.job.chdir=true",
        "hydra.searchpath=[file:///tmp]",
        "hydra/launcher=../../tmp/x",
        "--config-dir=/tmp/x",
        "-cd",
        "trust=[os]",
        "+trust=[os]",
    ],
)
def test_a_recorded_sweep_runs_nothing(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"arguments": ["-m", "attention=mha,gqa", argument]}))
    with pytest.raises(SystemExit) as ended:
        command_line.repeated_sweep(["-m", f"resume={tmp_path}"])
    assert ended.value.code == 2
    assert {"-cd": "--config-dir"}.get(argument, argument) in "".join(capsys.readouterr().err.split("\n"))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"arguments": [5]}', '{"arguments"', "\u0000"])
def test_a_damaged_sweep_is_refused_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        command_line.repeated_sweep([f"resume={tmp_path}"])
    assert ended.value.code == 2
    assert "sweep.json is damaged (" in capsys.readouterr().err


def test_what_is_typed_again_beside_a_recorded_sweep_is_trusted(tmp_path: Path) -> None:
    recorded = ["-m", "--config-dir", "conf", "attention=mine,gqa", "hydra/launcher=slurm", "hydra.launcher.nodes=2"]
    (tmp_path / "sweep.json").write_text(json.dumps({"arguments": recorded}))
    told = command_line.repeated_sweep(["-m", f"resume={tmp_path}", "--config-dir", "conf"])
    assert told[:5] == [
        "-m",
        "attention=mine,gqa",
        "hydra/launcher=slurm",
        "hydra.launcher.nodes=2",
        "--config-dir=conf",
    ]


def test_what_a_user_trusts_is_called(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    put(content, ("logger", "list", 0), {"_target_": "payload.anything"})
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    generate_text(config.compose([f"run={config.quoted(str(folder))}", "trust=[payload]"], "generate"))
