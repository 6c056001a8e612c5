"""The loggers of services, each by its own package, offline or into files: what it holds afterwards."""

import importlib.util
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from tiny import train_here

pytestmark = pytest.mark.filterwarnings("ignore")  # what those packages warn of is theirs

SETTINGS = ("attention=mqa", "validation.every=2", "budget.steps=3")
KEYS = ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY", "MLFLOW_TRACKING_URI", "NETRC")
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml", "trackio": "trackio"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)


def as_in_a_sweep(folder: Path) -> None:
    """The folder above a run is that of a sweep."""
    (folder / "sweep.json").write_text(json.dumps({"arguments": ["-m", "attention=mha,mqa"], "looks": []}))


def test_wandb(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    as_in_a_sweep(tmp_path / "runs")
    folder = run("logger=wandb", "logger.wandb.offline=true", *SETTINGS)
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert (folder / "run_id").read_text() in file.name
    deadline = time.monotonic() + 60
    while not (records := wandb_records(file)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "W&B's process, which writes on when the run has ended, does not end"
        time.sleep(0.05)
    started = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert started.display_name == "0"  # the folder's, whose key is cut off where it has one
    assert started.run_group == f"{tmp_path.name}/runs"
    assert {"attention=mqa", "tokenizer=byte"} <= {*started.tags}
    assert "train.py -m attention=mha,mqa" in started.notes
    config = {item.key: json.loads(item.value_json) for record in records for item in record.run.config.update}
    config |= {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert config["attention"]["n_kv_heads"] == 1
    assert config["planned"]["steps"] == 3
    assert config["about"]["commit"]
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert axes["*"] == "tokens"
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records]
    losses = {row["tokens"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert list(losses) == [128, 256, 384]
    assert any("schedule/_type" in row for row in rows)
    assert any("sample/_type" in row for row in rows)


def wandb_records(file: Path) -> list[Any]:
    """What `wandb sync` would send: LevelDB's log of protobuf messages, in pieces that lie in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, records, message = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is empty
            at += 2**15 - at % 2**15
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):  # it is being written
            break
        message = (message if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            records.append(record)
    return records


@pytest.mark.parametrize("store", ["files", pytest.param("the default", marks=pytest.mark.slow)])  # makes a database
def test_mlflow_and_a_resumed_run(
    store: str, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/logs/mlflow.db"
    if store == "files":
        uri = f"file:{tmp_path}/mlruns"
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = run("logger=mlflow", "callbacks=default", *SETTINGS)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("thunderhead")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "0"
    assert found.info.status == "FINISHED"
    assert found.data.params["model.d_model"] == "32"
    assert found.data.params["planned.steps"] == "3"
    assert found.data.tags["attention"] == "mqa"
    assert len(found.data.tags["mlflow.source.git.commit"]) >= 7
    assert "| **attention** | **mqa" in found.data.tags["mlflow.note.content"]
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == [128, 256, 384]
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert files == {"schedule-0.png", "sample-3.txt"}

    with patch.object(command_line, "invocation_overrides", lambda: ["budget.steps=4"]):
        train_here([f"resume={folder}"], folder)
    (found,) = client.search_runs([experiment.experiment_id])  # the same one goes on
    assert client.get_metric_history(found.info.run_id, "train/loss")[-1].step == 512


def test_comet(run: Callable[..., Path]) -> None:
    folder = run("logger=comet", "logger.comet.offline=true", *SETTINGS)
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        messages = content.read("messages.json").decode()
        names = content.namelist()
    payloads = [json.loads(line)["payload"] for line in messages.splitlines()]
    metrics = [payload["metric"] for payload in payloads if payload.get("metric")]
    losses = [metric["step"] for metric in metrics if metric["metricName"] == "train/loss"]
    assert losses == [128, 256, 384]
    assert "model|d_model" in messages
    assert "attention=mqa" in messages
    assert '"commit"' in messages
    assert any("schedule" in str(payload) for payload in payloads)
    assert len(names) > 2


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    folder = run("logger=trackio", *SETTINGS)
    (name,) = SQLiteStorage.get_runs("thunderhead")
    assert name == f"0 {(folder / 'run_id').read_text()[:6]}"
    settings = SQLiteStorage.get_run_config("thunderhead", name)
    assert settings is not None
    assert (settings["model.d_model"], settings["planned.steps"], settings["about.tags"][0]) == (32, 3, "attention=mqa")
    logs = SQLiteStorage.get_logs("thunderhead", name)
    assert [(row["step"], row["train/loss"] > 0) for row in logs if "train/loss" in row] == [
        (128, True),
        (256, True),
        (384, True),
    ]
    assert {"choices", "schedule", "sample"} <= {key for row in logs for key in row}


@pytest.mark.parametrize("service", PACKAGES)
def test_a_missing_package_is_one_line(
    service: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    missing = PACKAGES[service]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else find(name, *_))
    with pytest.raises(ConfigError, match=rf"^logger\.{service}: needs the package {missing}: pip install '[\w-]+>="):
        run(f"logger={service}")
    assert not any((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("service", ["wandb", "comet"])
def test_without_a_key_nothing_is_begun(service: str, run: Callable[..., Path], tmp_path: Path) -> None:
    message = rf"^logger\.{service}: no API key: put {service.upper()}_API_KEY into .*offline=true$"
    with pytest.raises(ConfigError, match=message):
        run(f"logger={service}")
    assert not any((tmp_path / "runs").glob("*"))


def test_many_are_those_of_this_machine() -> None:
    composed = config.plain(config.compose(["logger=many"]))["logger"]
    assert {*composed} == {"csv", "tensorboard", "mlflow", "trackio"}
    assert yaml.safe_dump(composed).count("null") == 2  # neither a server nor a Space
