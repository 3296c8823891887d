"""A page in a headless Chromium, driven with the mouse and the keyboard. Standard library only.

Chromium's DevTools protocol is spoken over two pipes (``--remote-debugging-pipe``): JSON messages that end with a NUL.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = (
    "a test of a page did not run: no browser; set PREFUSE_CHROMIUM to the executable of a Chromium, "
    f"or have one of {', '.join(NAMES)} on PATH"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--remote-debugging-pipe",
)
LAUNCH = """\
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Makes two descriptors the ones that the browser takes for the protocol's pipes."""
SECONDS = 30
STILL_MS = 50
"""For so long an element has to be at its place before it is clicked."""
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
"""Key → its number for a browser."""


def find_browser() -> str | None:
    """The executable of a Chromium."""
    given = os.environ.get("PREFUSE_CHROMIUM")
    return next(filter(None, map(shutil.which, [given] if given else NAMES)), None)


class Browser:
    """A Chromium with one page, until `close`.

    Attributes:
        errors: What the page's scripts threw.
        requests: Addresses that the page asked for since `open`.
    """

    def __init__(self, executable: str, profile: Path, width: int = 1280, height: int = 1400) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._session = ""
        self._number = 0
        self._rest = b""
        theirs, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [executable, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(  # noqa: S603 - the tester's own browser
            [sys.executable, "-c", LAUNCH, str(theirs), str(theirs_out), *command],
            pass_fds=(theirs, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs)
        os.close(theirs_out)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._ask("Page.enable")
        self._ask("Runtime.enable")
        self._ask("Network.enable")

    def close(self) -> None:
        """End the browser and what it started."""
        with suppress(OSError, RuntimeError):
            self._ask("Browser.close")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        os.close(self._in)
        os.close(self._out)

    def open(self, address: str) -> None:
        """Go there; what the page still does is not waited for."""
        self.errors.clear()
        self.requests.clear()
        self._ask("Page.navigate", url=address)

    def resize(self, width: int, height: int) -> None:
        """Give the page another window."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {_said(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = SECONDS) -> Any:
        """Until an expression is true; its value."""
        end = time.monotonic() + seconds
        value: Any = None
        while time.monotonic() < end:
            try:
                if value := self.run(script):
                    return value
            except RuntimeError as error:  # the page is being made
                value = error
            time.sleep(0.1)
        raise TimeoutError(f"not within {seconds} s, last {value!r}: {script}")

    def box(self, selector: str) -> dict[str, float]:
        """Where the first visible element of a selector is, when it stands still: x, y, width, height; scrolled to."""
        return self.wait(
            f"""(async () => {{
                const seen = [...document.querySelectorAll({json.dumps(selector)})].find((one) => one.offsetParent);
                if (!seen) return null;
                const inside = (box) => box.top >= 0 && box.bottom <= innerHeight;
                if (!inside(seen.getBoundingClientRect())) seen.scrollIntoView({{block: "center"}});
                const before = seen.getBoundingClientRect();
                await new Promise((done) => setTimeout(done, {STILL_MS}));
                const box = seen.getBoundingClientRect();
                const stands = seen.isConnected && box.x === before.x && box.y === before.y;
                return stands && {{x: box.x, y: box.y, width: box.width, height: box.height}};
            }})()""",
            10,
        )

    def click(self, selector: str, *, hover: str = "") -> None:
        """A click of the left button on the middle of an element, perhaps after the mouse was over another one."""
        if hover:
            self._mouse("mouseMoved", self.box(hover))
        box = self.box(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._mouse(kind, box)

    def _mouse(self, kind: str, box: dict[str, float], *, held: bool = False) -> None:
        button = {"buttons": int(held)} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        button |= {"button": "left"} if held else {}
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def type(self, selector: str, text: str) -> None:
        """Replace a text field's content, as a keyboard does."""
        self.click(selector)
        self.run("document.activeElement.select()")
        if text:
            self._ask("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                self._ask("Input.dispatchKeyEvent", type=kind, key="Delete", windowsVirtualKeyCode=46)

    def write(self, text: str) -> None:
        """Type where the cursor is."""
        self._ask("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key that writes nothing, such as ``ArrowDown``; `modifiers` 2 is Ctrl."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, **named)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float], moves: int = 4) -> None:
        """Press the left button on an element, move and release it; places are fractions of its width and height."""
        box = self.box(selector)

        def at(part: float) -> dict[str, float]:
            across, down = (one + part * (other - one) for one, other in zip(start, end, strict=True))
            return {
                "x": box["x"] + across * box["width"],
                "y": box["y"] + down * box["height"],
                "width": 0,
                "height": 0,
            }

        self._mouse("mouseMoved", at(0))
        self._mouse("mousePressed", at(0))
        for move in range(1, moves + 1):
            self._mouse("mouseMoved", at(move / moves), held=True)
        self._mouse("mouseReleased", at(1))

    def upload(self, selector: str, path: Path) -> None:
        """Give a file to an input of files, as its dialog does."""
        root = self._ask("DOM.getDocument")["root"]["nodeId"]
        node = self._ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._ask("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def picture(self, box: dict[str, float] | None = None) -> bytes:
        """The window, or a part of it, as PNG."""
        clip = {"clip": {**box, "scale": 1}} if box else {}
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png", **clip)["data"])

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._message(end)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(_said(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _message(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not self._selector.select(end - time.monotonic()):
                raise TimeoutError(f"the browser did not answer within {SECONDS} s")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise RuntimeError("the browser ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def _said(details: dict[str, Any]) -> str:
    return details.get("exception", {}).get("description") or details["text"]
