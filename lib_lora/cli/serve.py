"""``serve``: the page, in a browser of this computer."""

from __future__ import annotations

import locale
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lib_lora.errors import JobError

if TYPE_CHECKING:
    import argparse

ADDRESS = "127.0.0.1"
PORT = 7870
INDEX = "loras.sqlite"
"""What is known of LoRA files, so that a restart reads none again."""
END_SECONDS = 2.0
"""For what runs to remove its temporary files; those of what does not end in time are removed by a later start."""
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "MPLBACKEND": "Agg"}


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    add("--model", default="demo", help="demo, a diffusers folder, or a .safetensors or .ckpt file (default: demo)")
    add("--lora-dir", type=Path, action="append", help="folder of LoRA files; may be repeated (default: loras)")
    add("--model-dir", type=Path, default=Path("models"), help="folder of models to choose from (default: models)")
    add("--out-dir", type=Path, default=Path("outputs"), help="where pictures go (default: outputs)")
    add("--port", type=int, default=PORT, help=f"default: {PORT}; 0 for any that is free")
    add("--address", default=ADDRESS, help=f"to listen at (default: {ADDRESS}, which only this computer reaches)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    add("--mode", choices=("prefuse", "hook"), default="prefuse", help="into the weights, or beside them")
    add("--compile", choices=("off", "inductor", "tensorrt"), default="off", help="in the background; eager till then")
    add("--language", help="en or zh (default: as this computer speaks)")


def run(arguments: argparse.Namespace, _: list[str]) -> None:
    """Show the page in a browser of this computer."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from lib_lora.ui.page import build, open_page
    except ImportError as error:
        raise JobError(f"the page needs gradio ({error}); install it with: pip install gradio") from error
    from lib_lora.hosts.standalone.cache import cache_file
    from lib_lora.hosts.standalone.host import StandaloneHost
    from lib_lora.ui.jobs import Jobs

    named = {name: getattr(arguments, name) for name in ("device", "dtype", "mode")}
    named |= {"index": cache_file(INDEX), "compiler": arguments.compile}
    loras = arguments.lora_dir or ()
    host = StandaloneHost(arguments.model, loras, arguments.model_dir, arguments.out_dir, **named)
    jobs = Jobs()
    blocks = build(host, arguments.language or locale.getlocale()[0] or "", jobs)
    try:
        address = open_page(blocks, host, arguments.address, arguments.port)
    except (OSError, OverflowError) as error:
        where = f"{arguments.address}, port {arguments.port}"
        raise JobError(f"the page can not be served at {where}: {error}; choose another --port") from error
    print(f"Prefuse is at {address} (Ctrl+C ends it)", flush=True)
    _wait_for_the_end()
    jobs.close(END_SECONDS)


def _wait_for_the_end() -> None:
    """Until Ctrl+C or a request to end; a second Ctrl+C does not wait for anything."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1):  # in slices: Windows notices Ctrl+C between them alone
        pass
    signal.signal(signal.SIGINT, signal.SIG_DFL)
