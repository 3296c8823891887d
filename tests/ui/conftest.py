"""The page in a real browser, or a clear word that there is none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import MISSING, Browser, find_browser
from tests.ui.driver import PageDriver
from tests.ui.serving import PageServer, fill_loras

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
BROWSER_FIXTURES = {"browser", "page"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_browser() is not None:
        return
    for item in items:
        if HERE in item.path.parents and BROWSER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if any(MISSING in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(MISSING, yellow=True)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """The page on the demo model; each of pytest's workers has one."""
    server = PageServer(tmp_path_factory.mktemp("serve"))
    fill_loras(server.loras)
    server.start()
    yield server
    server.end()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_browser()
    assert executable
    browser = Browser(executable, tmp_path_factory.mktemp("browser"), 1280, 1000)
    yield browser
    browser.close()


@pytest.fixture
def page(server: PageServer, browser: Browser) -> Iterator[PageDriver]:
    """The page, opened anew; at the end none of our scripts has thrown."""
    page = PageDriver(browser, server.address).open()
    yield page
    assert not [error for error in browser.errors if "prefuse" in error]
