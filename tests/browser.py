"""Headless Chromium: opens a page, clicks, types and looks, through the DevTools protocol over a pair of pipes."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
# Chromium reads commands from descriptor 3 and writes answers to 4.
_START = """
import os, sys
ends = [os.dup(int(end)) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
    os.set_inheritable(place, True)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab. Errors of the scripts of a page fail the test at the next call."""

    def __init__(self, profile: Path):
        """Start the browser; ``profile`` is a new folder."""
        commands, answers = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", *_QUIET]
        ends = (commands[0], answers[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, ends), CHROMIUM, *options, f"--user-data-dir={profile}"],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands[0])
        os.close(answers[1])
        self._commands, self._answers = os.fdopen(commands[1], "wb", 0), os.fdopen(answers[0], "rb")
        self._numbers, self._session, self._events, self._unread = itertools.count(1), None, [], b""
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Call a method of the DevTools protocol."""
        message = {"id": next(self._numbers), "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != message["id"]:
            self._events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._unread:
            chunk = self._answers.read1(1 << 16)
            assert chunk, "Chromium has ended"
            self._unread += chunk
        text, _, self._unread = self._unread.partition(b"\0")
        return json.loads(text)

    def open(self, page: Path | str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a file or an address in a window of this size, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        while "Page.loadEventFired" not in [event.get("method") for event in self._events]:
            self._events.append(self._read())
        self.look("0")

    def look(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        errors = [answer["exceptionDetails"]] if "exceptionDetails" in answer else []
        errors += [e["params"]["exceptionDetails"] for e in self._events if e["method"] == "Runtime.exceptionThrown"]
        assert not errors, errors
        return answer["result"].get("value")

    def click(self, selector: str, number: int = 0) -> None:
        """Click with the mouse into the middle of the number-th element that the selector finds."""
        node = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.look(f"{node}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.look(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({node}.getBoundingClientRect())")
        hit = self.look(f"(n => n === {node} || {node}.contains(n))(document.elementFromPoint({x}, {y}))")
        assert hit, f"something lies over {selector}"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self._settle()

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self._settle()

    def type(self, text: str) -> None:
        """Type into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key such as ArrowRight or Escape."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Enter": 13, " ": 32}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select element, or a place of a slider."""
        self.look(
            f"(n => {{ n.value = {json.dumps(value)}; n.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        self._settle()

    def _settle(self) -> None:
        """Wait until what an event has caused is drawn."""
        self.look("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def text(self, selector: str) -> str:
        """Return the text of an element as it is shown."""
        return self.look(f"document.querySelector({json.dumps(selector)}).innerText")

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.call("Browser.close")
        self._commands.close()
        self._answers.close()
        self._process.wait()
