"""``serve`` as a program: where it is, how it ends, what it says when it can not start."""

from __future__ import annotations

import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from tests.ui.driver import PageDriver
from tests.ui.serving import ROOT, PageServer, fill_loras

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.browser import Browser

QUICK_SECONDS = 8.0
"""Two for jobs to clean up, and what a busy machine adds."""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[PageServer]:
    server = PageServer(tmp_path)
    fill_loras(server.loras)
    server.start()
    yield server
    server.end()


def ends_well(server: PageServer, by: signal.Signals) -> bool:
    status, seconds = server.end(by)
    return status == 0 and seconds < QUICK_SECONDS and "Traceback" not in server.console()


def test_it_ends_quickly_at_ctrl_c(started: PageServer) -> None:
    with urllib.request.urlopen(started.address, timeout=30) as answer:  # noqa: S310 - our own server
        assert answer.status == 200
    assert ends_well(started, signal.SIGINT)


def test_it_ends_quickly_while_a_job_runs_and_a_restart_finds_what_it_knew_of_loras(
    started: PageServer, browser: Browser, tmp_path: Path
) -> None:
    page = PageDriver(browser, started.address).open()
    page.type("generate.prompt", "a red circle <lora:stripes:0.5>")
    page.slide("generate.steps", 150)
    page.click("generate.start")
    page.wait("document.querySelector('#prefuse-generate-status progress')?.value > 0")
    assert ends_well(started, signal.SIGTERM)
    with closing(sqlite3.connect(tmp_path / "cache" / "prefuse" / "loras.sqlite")) as index:
        ((rows,),) = index.execute("SELECT count(*) FROM lora_files_1")
    assert rows == len(list(started.loras.iterdir())) - 1, "the one that is cut short is tried again"


def test_a_port_that_is_taken_is_told_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-m", "lib_lora", "serve", "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert told.returncode != 0
    assert "Traceback" not in told.stderr
    assert f"port {port}" in told.stderr
    assert "choose another --port" in told.stderr
