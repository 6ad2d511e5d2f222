"""A real headless Chromium for tests, spoken to by the DevTools protocol over two pipes: no driver, no package.

https://chromedevtools.github.io/devtools-protocol/ : JSON messages, each closed by a zero byte, on descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-extensions", "--disable-dev-shm-usage", "--disable-breakpad", "--mute-audio", "--hide-scrollbars",
    "--disable-features=Translate,OptimizationHints,MediaRouter,DialMediaRouteProvider",
)  # fmt: skip
MISSING = "chromium is missing; apt-get install chromium"


def chromium() -> str | None:
    """Where the browser is, None where there is none."""
    return next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


class PageError(AssertionError):
    """A script on the page threw, or what was waited for did not come."""


class Browser:
    """One page. `requests` are all addresses it asked for, `complaints` what its console said (errors, CSP)."""

    def __init__(self, width: int = 1440, height: int = 900, *, dark: bool = False) -> None:
        self.requests: deque[str] = deque(maxlen=10_000)
        self.complaints: deque[str] = deque(maxlen=200)
        self._profile = tempfile.TemporaryDirectory(prefix="kizu-chromium-", ignore_cleanup_errors=True)
        self._next = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._buffer = b""
        self._session: str | None = None
        self._process = self._launch(width, height)
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self._call(f"{domain}.enable")
            self.resize(width, height)
            self.theme(dark)
        except BaseException:
            self.close()
            raise

    def _launch(self, width: int, height: int) -> subprocess.Popen[bytes]:
        binary = chromium()
        assert binary is not None, MISSING
        command_out, self._commands = os.pipe()
        self._messages, message_in = os.pipe()
        here = (os.dup(command_out), os.dup(message_in))  # away from 3 and 4, where they have to go
        words = [binary, *FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        # The shell puts the pipes where the browser looks for them; Popen has no way to say that.
        shell = f'exec "$@" 3<&{here[0]} 4>&{here[1]} {here[0]}<&- {here[1]}>&-'
        process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *words, "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=here,
            start_new_session=True,
        )
        for descriptor in (command_out, message_in, *here):
            os.close(descriptor)
        return process

    @property
    def pid(self) -> int:
        """The browser's first process; its children do the work."""
        return self._process.pid

    def open(self, url: str, timeout_s: float = 30.0) -> None:
        """Go there; returns when the page is loaded."""
        self._call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'", timeout_s)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        found = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise PageError(f"{script}: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 20.0) -> Any:
        """Until the expression is truthy; its value.

        Raises:
            PageError: not within `timeout_s`; with what the page says instead.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(PageError):
                if value := self.run(condition):
                    return value
            if time.monotonic() > deadline:
                body = self.run("document.body ? document.body.innerText.slice(0, 1500) : ''")
                raise PageError(f"not within {timeout_s} s: {condition}\n{body}\n{list(self.complaints)[-5:]}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What a reader sees of the first match."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """With a real pointer, in the middle of the first match."""
        x, y = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: "
            "'nearest'}); const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / "
            "2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def point(self, x: float, y: float) -> None:
        """Move the pointer there."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str, *, shift: bool = False) -> None:
        """One key: Tab, Enter, Escape, ArrowLeft ..."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36,
                 "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip
        text = {"Enter": "\r", " ": " "}.get(key)
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """The window's size in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def theme(self, dark: bool) -> None:
        """What the machine prefers."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> Path:
        """PNG of the window."""
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))
        return path

    def accessible(self) -> list[dict[str, Any]]:
        """The accessibility tree, flat: what a screen reader is given."""
        return list(self._call("Accessibility.getFullAXTree")["nodes"])

    def freeze(self) -> None:
        """The page's scripts run no more; its socket is read no more once its buffers are full."""
        self._call("Emulation.setScriptExecutionDisabled", value=True)

    def close(self) -> None:
        """End the browser and everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        for descriptor in (self._commands, self._messages):
            os.close(descriptor)
        self._profile.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- protocol -----------------------------------------------------------------------------------------------------

    def _call(self, method: str, timeout_s: float = 60.0, **parameters: Any) -> dict[str, Any]:
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout_s
        while self._next not in self._answers:
            self._read(deadline, method)
        answer = self._answers.pop(self._next)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _read(self, deadline: float, what: str) -> None:
        ready, _, _ = select.select([self._messages], [], [], max(0.0, deadline - time.monotonic()))
        data = os.read(self._messages, 1 << 20) if ready else b""
        if not data:
            raise PageError(f"the browser does not answer {what}; it ended with {self._process.poll()}")
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in messages:
            self._note(json.loads(message))

    def _note(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(str(details.get("exception", {}).get("description") or details.get("text")))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
