"""The page in its own process: started on folders of its own, asked where it is, stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lib_lora.core.files import read_lora_file
from lib_lora.core.saving import save_tensors
from lib_lora.hosts.standalone.demo import LORA_DIR

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
END_SECONDS = 10
_ADDRESS = re.compile(r"Prefuse is at (http://\S+)")


class PageServer:
    """``serve`` on `folder`, from `start` to `stop`.

    Attributes:
        loras: The LoRA folder.
        models: The model folder.
        outputs: The picture folder.
        address: Of the page.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.loras, self.models, self.outputs = (folder / name for name in ("loras", "models", "outputs"))
        for made in (self.loras, self.models, self.outputs):
            made.mkdir(parents=True, exist_ok=True)
        self.address = ""
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, wait until it says where it is."""
        self._log.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "lib_lora", *self._arguments()],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self._folder / "cache")},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_SECONDS
        while not (found := _ADDRESS.search(self.console())):
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the page did not start:\n{self.console()}")
            time.sleep(0.1)
        self.address = found[1]

    def console(self) -> str:
        """All that it printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def end(self, by: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit status and seconds after a signal; it is killed if that takes too long."""
        if self._process is None:
            return 0, 0.0
        begun = time.monotonic()
        self._process.send_signal(by)
        try:
            status = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._process = None
        return status, time.monotonic() - begun

    @property
    def _log(self) -> Path:
        return self._folder / "console.log"

    def _arguments(self) -> list[str]:
        folders = {"--lora-dir": self.loras, "--model-dir": self.models, "--out-dir": self.outputs}
        named = [word for name, folder in folders.items() for word in (name, str(folder))]
        return ["serve", "--port", "0", "--language", "en", *named, *self._options]


def fill_loras(folder: Path) -> None:
    """The demo's LoRAs, one with spaces and an alias, one that is cut short."""
    for file in LORA_DIR.glob("*.safetensors"):
        shutil.copyfile(file, folder / file.name)
    tensors = read_lora_file(folder / "stripes.safetensors").tensors
    save_tensors(folder / "soft lines (v2).safetensors", tensors, {"ss_output_name": "softly"})
    (folder / "cut short.safetensors").write_bytes((folder / "stripes.safetensors").read_bytes()[:3000])
