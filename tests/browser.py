"""A headless Chromium for tests, controlled by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str:
    """Return the path of the browser; skip the test if there is none."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None or sys.platform == "win32":
        pytest.skip("no Chromium is installed")
    return found


class Browser:
    """One page in its own browser; a context manager.

    Attributes:
        events: events of the page: errors, dialogs, requests and their failures.
    """

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._profile = tempfile.TemporaryDirectory(
            prefix="chromium", ignore_cleanup_errors=True
        )  # its children end later
        command_read, command_write = os.pipe()
        result_read, result_write = os.pipe()

        def connect() -> None:  # the browser reads from 3 and writes to 4
            low_read, low_write = os.dup(command_read), os.dup(result_write)
            read, write = os.dup(low_read), os.dup(low_write)  # so that neither is 3 or 4 itself
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [find_browser(), "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu"]
        command += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, close_fds=False, preexec_fn=connect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(command_read)
        os.close(result_write)
        self._commands, self._results = os.fdopen(command_write, "wb"), os.fdopen(result_read, "rb")
        self._number, self._rest, self._session = 0, b"", ""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._results.fileno(), 1 << 16)
            assert part, "the browser has exited"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)
            text = {}
        self.settle()

    def settle(self) -> None:
        """Wait until the page is drawn and the images in view are loaded."""
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 100))))"
        )

    def emulate(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the colour scheme and the size of the window; a window narrower than 600 pixels is a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def problems(self) -> list[Any]:
        """Return exceptions, dialogs, log messages, and requests for anything but files so far."""
        self.settle()
        bad = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Log.entryAdded")
        found: list[Any] = [event for event in self.events if event.get("method") in bad]
        for event in self.events:
            url = event.get("params", {}).get("request", {}).get("url", "file:")
            if not url.startswith(("file:", "data:")):
                found.append(url)
        return found

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._commands.close()
        self._results.close()
        self._profile.cleanup()
