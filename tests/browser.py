"""A page in headless Chromium, through the DevTools protocol: opened, asked, photographed."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
DEEP = """
function deep(selector, root = document) {  // also in the shadows of web components
    const found = [...root.querySelectorAll(selector)];
    for (const each of root.querySelectorAll("*")) if (each.shadowRoot) found.push(...deep(selector, each.shadowRoot));
    return found;
}
"""


class Page:
    """One page; `errors` are those of its console since it was opened."""

    def __init__(self, socket: Any):
        self._socket, self._ids, self.errors = socket, itertools.count(), list[str]()
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self._socket.recv(timeout=60))
        event, params = told.get("method"), told.get("params", {})
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        if event == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(str(params["args"]))
        return told

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Load a page in a window of this size; one narrower than 600 is a phone's."""
        self.errors.clear()
        size = {"width": width, "height": height, "mobile": width < 600, "deviceScaleFactor": 1}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        self._ask("Page.navigate", url="about:blank")  # another place of the same page would load nothing
        self._ask("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def ask(self, expression: str) -> Any:
        """What an expression of JavaScript is, in which `deep` selects elements."""
        asked = {"expression": f"{DEEP}; {expression}", "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """What an expression is as soon as that is true."""
        end = time.monotonic() + seconds
        while not (found := self.ask(expression)):
            assert time.monotonic() < end, (
                f"not within {seconds:g} s: {expression}; {self.ask('document.body.innerText')}"
            )
            time.sleep(0.2)
        return found

    def text(self, selector: str) -> list[str]:
        """What elements say, also in the shadows of web components."""
        return list(self.ask(f"deep({json.dumps(selector)}).map(e => (e.innerText || e.textContent).trim())"))

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def pictures(self) -> list[list[int]]:
        """Width on the page, and its own, of each picture."""
        return list(self.ask("[...document.images].map(i => [i.clientWidth, i.naturalWidth])"))

    def print(self) -> bytes:
        """The page as a PDF."""
        return base64.b64decode(self._ask("Page.printToPDF")["data"])

    def photograph(self, file: Path, *, whole: bool = False) -> None:
        """Write a screenshot (.png) of the window, or of the whole page; it has to show something."""
        picture = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(picture))
        assert imread(file)[..., :3].std() > 0.01


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The one page of a browser of this session, with an empty profile."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    profile = tmp_path_factory.mktemp("chromium")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port, end = profile / "DevToolsActivePort", time.monotonic() + 60
            while not (port.is_file() and port.read_text().count("\n")):
                assert process.poll() is None, f"Chromium ended with {process.returncode}"
                assert time.monotonic() < end, "Chromium does not answer"
                time.sleep(0.1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list") as answer:
                [first] = [each for each in json.load(answer) if each["type"] == "page"]
            with connect(first["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
