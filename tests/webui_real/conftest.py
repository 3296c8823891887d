"""A real WebUI for the tests of this folder, or a clear word that there is none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import MISSING as NO_BROWSER
from tests.browser import Browser, find_browser
from tests.webui_real.make_controlnet import MISSING as NO_CONTROLNET
from tests.webui_real.server import Answer, WebUI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
MISSING = (
    "tests/webui_real did not run: set WEBUI_ROOT to the folder of a WebUI v1.10.1 "
    "and WEBUI_PYTHON to the interpreter that has its packages"
)
DEFAULTS = {
    "prefuse_enabled": True,
    "prefuse_mode": "auto",
    "prefuse_compat": "exact",
    "prefuse_base_store": "auto",
    "lora_functional": False,
    "lora_in_memory_limit": 0,
    "sd_lora": "None",
    "sd_vae": "Automatic",
    "fp8_storage": "Disable",
    "prefuse_compile": "off",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.webui)
            if "WEBUI_ROOT" not in os.environ:
                item.add_marker(pytest.mark.skip(reason=MISSING))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for reason in (MISSING, NO_BROWSER, NO_CONTROLNET):
        if any(reason in str(report.longrepr) for report in skipped):
            terminalreporter.write_line(reason, yellow=True)


@pytest.fixture(scope="session")
def make_webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., WebUI]]:
    """Starts a WebUI with models of its own; all are stopped at the end."""
    from tests.webui_real.make_models import make_models

    started: list[WebUI] = []

    def make(*flags: str, login: str = "", prepare: Callable[[Path], None] | None = None) -> WebUI:
        data = tmp_path_factory.mktemp("webui")
        make_models(data)
        if prepare is not None:
            prepare(data)
        webui = WebUI(
            Path(os.environ["WEBUI_ROOT"]), os.environ.get("WEBUI_PYTHON", sys.executable), data, flags, login=login
        )
        webui.link_extension()
        started.append(webui)
        webui.start()
        assert "prefuse_enabled" in webui.get("/sdapi/v1/options"), f"the extension did not load:\n{webui.console()}"
        webui.options(samples_save=False, **DEFAULTS)  # also fills the settings, which a fresh installation lacks
        return webui

    yield make
    for webui in started:
        webui.stop()


@pytest.fixture(scope="session")
def one_webui(make_webui: Callable[..., WebUI]) -> WebUI:
    return make_webui()


@pytest.fixture
def webui(one_webui: WebUI) -> Iterator[WebUI]:
    """The WebUI with our extension, settings at their defaults."""
    yield one_webui
    one_webui.options(**DEFAULTS)


@pytest.fixture
def builtin(webui: WebUI) -> Callable[..., Answer]:
    """Generates with the WebUI's own LoRA code, in the same process."""

    def draw(prompt: str, **changes: object) -> Answer:
        with webui.with_options(prefuse_enabled=False):
            return webui.draw(prompt, **changes)

    return draw


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_browser()
    assert executable
    browser = Browser(executable, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
