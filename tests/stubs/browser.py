"""A headless Chromium by its own driver, over plain HTTP: no package, nothing left behind, no request of its own."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Browser", "open_browser", "why_no_browser"]

_HERE = "127.0.0.1"
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def why_no_browser() -> str:
    """Say why no browser can be driven here; "" where one can."""
    if not (shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")):
        return "there is no chromium here"
    if not shutil.which("chromedriver"):
        return "there is no chromedriver here"
    return ""


class Browser:
    """One page of one browser."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, page: Path) -> None:
        self.logs("browser")
        self._post("url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *words: object) -> Any:
        """Return what a function's body returns."""
        return self._post("execute/sync", {"script": script, "args": list(words)})

    def command(self, name: str, **params: object) -> Any:
        """Send a command of the DevTools protocol."""
        return self._post("goog/cdp/execute", {"cmd": name, "params": params})

    def resize(self, width: int, height: int) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def prefer(self, scheme: str) -> None:
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def press(self, key: str) -> None:
        """Press a key by its name, as a user would."""
        codes = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
        code, text = codes[key]
        for kind in ("keyDown", "keyUp"):
            words = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
            self.command("Input.dispatchKeyEvent", **words, **({"text": text} if text and kind == "keyDown" else {}))

    def logs(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._post("se/log", {"type": kind})
        return found

    def requests(self) -> list[str]:
        """Return every address that was asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self) -> bytes:
        shot = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.command("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _call("POST", f"{self._session}/{path}", body)


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start driver and browser with an empty profile in `folder`; both are ended."""
    with socket.socket() as free:
        free.bind((_HERE, 0))
        port = free.getsockname()[1]
    words = ["chromedriver", f"--port={port}"]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://{_HERE}:{port}"
    try:
        _wait(base)
        options = {"args": [*_FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = _call("POST", f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(f"{base}/session/{session}")
        finally:
            _call("DELETE", f"{base}/session/{session}", None)
    finally:
        driver.terminate()
        driver.wait(10)


def _wait(base: str) -> None:
    for _ in range(200):
        try:
            if _call("GET", f"{base}/status", None)["ready"]:
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.05)
    raise AssertionError("chromedriver did not answer within 10 s")


def _call(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is not for this machine's own
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {url}: {error.read().decode()[:500]}") from None
