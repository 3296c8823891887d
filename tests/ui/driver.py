"""The page as its user sees it: controls by the keys of their words, in the DOM of both gradios."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from tests.browser import Browser

TABS = (
    '#prefuse-tabs [role="tablist"] button, #prefuse-tabs .overflow-dropdown button, #prefuse-tabs > .tab-nav > button'
)
"""Gradio 6 has a tablist, with a menu of those that have no room; gradio 3 a bar."""
OPTIONS = '[role="option"], ul.options > li'
JOB = ".prefuse-job"
OPENINGS = 5
"""How often a list is opened until it is filled."""


class PageDriver:
    """One page in one browser.

    Attributes:
        browser: Where it is shown.
        address: Of the page.
    """

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        self.address = address

    def open(self, theme: str = "light", width: int = 1280, height: int = 1000) -> PageDriver:
        """Load the page anew, until its script works."""
        self.browser.resize(width, height)
        self.browser.open(f"{self.address}?__theme={theme}")
        self.wait("window.prefuseTab && !!document.getElementById('prefuse-tabs')?.offsetParent")
        return self

    def sub_tab(self, title: str) -> None:
        """Open a sub-tab by its words."""
        found = _by_text(TABS, title, "!one.closest('[aria-hidden=true]')")
        self.wait(f"!!{found}")
        self.run(f"{found}.click()")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.browser.run(script)

    def wait(self, script: str, seconds: float = 30) -> Any:
        """Until an expression is true or an element; its value."""
        return self.browser.wait(f"((one) => one instanceof Node || one)({script})", seconds)

    def text(self, selector: str) -> str:
        """Visible text of an element; ``""`` if there is none."""
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def texts(self, selector: str) -> list[str]:
        """Text of each element."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.textContent.trim())")

    def count(self, selector: str) -> int:
        """How many elements there are."""
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def click(self, key: str) -> None:
        """A button."""
        self.browser.click(f"{place(key)}")

    def type(self, key: str, text: str) -> None:
        """Replace what stands in a text box or number box."""
        self.browser.type(f"{place(key)} textarea, {place(key)} input", text)

    def value(self, key: str) -> str:
        """What stands in a text box, number box or list."""
        return self.run(f"document.querySelector('{place(key)} textarea, {place(key)} input')?.value ?? ''")

    def slide(self, key: str, number: float) -> None:
        """Drag a slider's knob to a number."""
        self.wait(f"!!document.querySelector('{place(key)} input[type=range]')")
        self.run(
            f"""(() => {{
                const knob = document.querySelector("{place(key)} input[type=range]");
                Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(knob, "{number}");
                for (const kind of ["input", "change", "pointerup"])
                    knob.dispatchEvent(new Event(kind, {{bubbles: true}}));
            }})()"""
        )

    def choose(self, key: str, text: str) -> None:
        """Choose from a list: open it, and press the mouse on an option as soon as that is there."""
        down = "new MouseEvent('mousedown', {bubbles: true, cancelable: true})"
        is_chosen = f"document.querySelector('{place(key)} input').value === {json.dumps(text)}"
        for _ in range(OPENINGS):  # a list that is open is not filled anew, and one that is filled anew closes
            self.browser.click(f"{place(key)} input")
            with suppress(TimeoutError):
                self.wait(f"((one) => one && (one.dispatchEvent({down}), one))({_by_text(OPTIONS, text)})", 3)
                self.wait(is_chosen, 3)
                break
            self.run("document.activeElement.blur()")
        self.wait(is_chosen, 1)

    def upload(self, key: str, path: Path) -> None:
        """Drop a file."""
        self.wait(f"!!document.querySelector('{place(key)} input[type=file]')")
        self.browser.upload(f"{place(key)} input[type=file]", path)

    def job(self, key: str, form: str, seconds: float = 120) -> str:
        """What is said at the end of the job that a button begins; `form` is the selector of where it is said."""
        state = f"document.querySelector('{form} {JOB}')"
        self.run(f"window.said = {state}, 0")
        self.click(key)
        self.wait(f"{state} && {state} !== window.said")
        return self.job_end(form, seconds)

    def job_end(self, form: str, seconds: float = 120) -> str:
        """What is said at the end of the job that is said to run inside `form`, a selector."""
        state = f"document.querySelector('{form} {JOB}')"
        self.wait(f"{state} && !{state}.querySelector('progress') && !/Waiting/.test({state}.textContent)", seconds)
        return self.text(f"{form} {JOB}")

    def screenshot(self, path: Path) -> None:
        """The window as a PNG file."""
        time.sleep(0.3)
        path.write_bytes(self.browser.picture())


def place(key: str) -> str:
    """Selector of the control with the words of `key`."""
    return f"#prefuse-{key.replace('.', '-').replace('_', '-')}"


def _by_text(selector: str, text: str, which: str = "one.offsetParent") -> str:
    """The visible element with just that text; gradio puts a tick before what is chosen."""
    return (
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        f".find((one) => {which} && one.textContent.replace('✓', '').trim() === {json.dumps(text)})"
    )
