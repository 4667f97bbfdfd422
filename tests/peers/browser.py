"""A headless Chromium, driven over chromedriver's own HTTP protocol (W3C WebDriver): the standard library is enough."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars""".split()
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {
    "right": "\ue014",
    "left": "\ue012",
    "home": "\ue011",
    "end": "\ue010",
    "tab": "\ue004",
    "enter": "\ue007",
}


def missing() -> str | None:
    """What is not there and how to get it, or None."""
    found = shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("chromium-browser"))
    return None if found else "no Chromium with its driver: apt-get install chromium chromium-driver"


class BrowserError(Exception):
    pass


class Browser:
    """One window. profile: a new folder for what the browser keeps."""

    def __init__(self, profile: Path, *flags: str):
        self._driver = subprocess.Popen(
            [shutil.which("chromedriver"), "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in self._driver.stdout:
            if match := re.search(r"started successfully on port (\d+)", line):
                break
        else:
            raise BrowserError("chromedriver did not start")
        self._url = f"http://127.0.0.1:{match[1]}/session"
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}", *flags]}
        wanted = {
            "capabilities": {
                "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            }
        }
        try:
            self._url += "/" + self._ask("POST", "", wanted)["sessionId"]
        except BaseException:
            self._driver.kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(20)

    def _ask(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise BrowserError(f"{value['error']}: {value['message']}") from None

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def resize(self, width: int, height: int) -> None:
        """The page's own size, whatever the window's frame takes; also narrower than a window may be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", metrics)

    def command(self, name: str, parameters: dict) -> Any:
        """One of Chromium's own (DevTools protocol)."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns, called with the arguments."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def _find(self, selector: str) -> str:
        return self._ask("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self._find(selector)}/click")

    def press(self, selector: str, *keys: str) -> None:
        """Keys by name (KEYS) or text, into an element that takes the focus."""
        text = "".join(KEYS.get(key, key) for key in keys)
        self._ask("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self._ask("GET", f"/element/{self._find(selector)}/text")

    def property(self, selector: str, name: str) -> Any:
        return self._ask("GET", f"/element/{self._find(selector)}/property/{name}")

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """The first true value of a condition."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise BrowserError(f"waited {seconds} s for {what}")
            time.sleep(0.05)
        return value

    def problems(self) -> list[str]:
        """What the page wrote to its console as an error or warning since the last call."""
        return [
            entry["message"]
            for entry in self._ask("POST", "/se/log", {"type": "browser"})
            if entry["level"] != "INFO"
        ]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.command("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))
