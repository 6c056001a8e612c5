"""`export.py push=user/name`, against a stand-in for the hub on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release import hub
from thunderhead.release.export import export


class Hub(ThreadingHTTPServer):
    """Answers as the hub does for one upload, and keeps what it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}  # by sha256
        self.files: dict[str, str] = {}  # of the commit: path to sha256
        self.refuses_commits = False


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def answer(self) -> None:
        body, status = self.rfile.read(int(self.headers.get("Content-Length") or 0)), 200
        reply: dict[str, Any] = {}
        if self.path == "/api/whoami-v2":
            is_known = self.headers.get("Authorization") == "Bearer hf_right"
            status, reply = (200, {"name": "me", "type": "user"}) if is_known else (401, {"error": "Invalid token"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            reply = {"url": f"{self.server.url}/me/model"}
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            reply = {"files": files}
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = {each["oid"]: {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}} for each in objects}
            reply = {"transfer": "basic", "objects": [{**each, "actions": actions[each["oid"]]} for each in objects]}
        elif self.path.startswith("/lfs/"):
            self.server.stored[self.path.rpartition("/")[2]] = body
        elif self.path.endswith("/commit/main"):
            status = 403 if self.server.refuses_commits else 200
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    self.server.files[value["path"]] = hashlib.sha256(content).hexdigest()
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = value["oid"]
            reply = {"commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/model/commit/{'0' * 40}"}
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = answer  # noqa: N815 - as the library calls them

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as hub_here:
        thread = threading.Thread(target=hub_here.serve_forever)
        thread.start()
        yield hub_here
        hub_here.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _this_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and other variables say when a program starts."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def exported(run: Path, out: Path, *overrides: str) -> Path:
    return export(config.compose([f"run={run}", f"out={out}", "push=me/model", *overrides], "export"))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4 with httpx 0.28
def test_the_folder_is_uploaded_when_asked(
    run: Callable[..., Path], server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its files, as one commit, said before; and if the hub refuses, the folder stays."""
    folder = exported(run("callbacks=default"), tmp_path / "out")
    assert f"to {server.url}/me/model (private if it is new)" in capsys.readouterr().out
    assert server.created == [{"name": "model", "organization": "me", "visibility": "private"}]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    assert server.files == hashes
    assert {hashlib.sha256(content).hexdigest() for content in server.stored.values()} == server.stored.keys()
    assert server.stored.keys() == {hashes["model.safetensors"], hashes["loss.png"]}

    server.refuses_commits = True
    with pytest.raises(ConfigError, match=f"push: .*hf upload me/model {tmp_path / 'again'}"):
        exported(run("callbacks=default"), tmp_path / "again", "private=false")
    assert (tmp_path / "again" / "model.safetensors").is_file()
    assert server.created[-1]["visibility"] == "public"


@pytest.mark.parametrize(
    ("token", "reason"), [("hf_wrong", "the hub does not let you in"), ("", "no token of huggingface.co is saved")]
)
def test_nothing_is_written_where_the_hub_would_refuse(
    token: str, reason: str, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the run is looked for."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=f"push: {reason}"):
        exported(tmp_path / "no run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not server.created


@pytest.mark.parametrize("name", ["model", "me/a/b", "me/", "me/mo del", "https://huggingface.co/me/model", "mé/model"])
def test_names_that_are_no_repository(name: str) -> None:
    [problem] = hub.problems(name)
    assert problem.path == "push"
    assert "user/name" in problem.message
