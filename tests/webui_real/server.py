"""A WebUI in its own process: started, asked over HTTP, stopped. Standard library, numpy and Pillow only."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
FLAGS = (
    "--skip-prepare-environment",
    "--skip-torch-cuda-test",
    "--skip-version-check",
    "--skip-python-version-check",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--no-half",
    "--use-cpu",
    "all",
    "--precision",
    "full",
    "--api",
    "--server-name",
    "127.0.0.1",
)
STARTED = "Startup time:"
START_SECONDS = 120
ANSWER_SECONDS = 120
REQUEST = {"steps": 2, "seed": 1, "width": 64, "height": 64, "sampler_name": "Euler a", "cfg_scale": 7}


class AnswerError(Exception):
    """The WebUI answered with a status that is no success."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:2000]}")
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a generation gave.

    Attributes:
        pictures: Each (height, width, 3), uint8.
        info: The answer's ``info``, parsed.
    """

    pictures: list[np.ndarray]
    info: dict[str, Any]

    @property
    def picture(self) -> np.ndarray:
        """The first one."""
        return self.pictures[0]

    @property
    def infotext(self) -> str:
        """What is written into the first picture's file."""
        return self.info["infotexts"][0]

    @property
    def parameters(self) -> str:
        """The infotext's last line, which holds no prompt."""
        return self.infotext.rsplit("\n", 1)[-1]

    @property
    def told(self) -> str:
        """Everything the answer says beside the prompts and what is written into the picture."""
        hidden = {"prompt", "all_prompts", "negative_prompt", "all_negative_prompts", "infotexts"}
        return json.dumps({name: value for name, value in self.info.items() if name not in hidden})


@dataclass
class WebUI:
    """A WebUI's process, from `start` to `stop`.

    Attributes:
        root: The WebUI's folder.
        python: Its interpreter.
        data: Its data folder.
        flags: Start options besides `FLAGS`.
        port: On which it answers.
        login: ``user:password`` that requests carry.
    """

    root: Path
    python: str
    data: Path
    flags: tuple[str, ...] = ()
    port: int = 0
    login: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.data / f"webui-{self.port}.log"

    def console(self) -> str:
        """All that it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def link_extension(self, repository: Path = REPOSITORY) -> None:
        """Make this repository an extension of the data folder."""
        place = self.data / "extensions" / "prefuse"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(repository, target_is_directory=True)

    def start(self) -> float:
        """Start, wait until a model is loaded; seconds that took."""
        self.port = _free_port()
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [self.python, "launch.py", "--data-dir", str(self.data), "--port", str(self.port), *FLAGS]
        begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - the tester's own WebUI
                [*command, *self.flags],
                cwd=self.root,
                env=os.environ | quiet | threads | {"PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait()
        return time.monotonic() - begun

    def wait(self, starts: int = 1) -> None:
        """Until it has started so many times in all and has a model.

        A request before its API is there would make it end: its server takes no middleware after the first one.
        """
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"the WebUI ended while it started:\n{self.console()[-4000:]}")
            if self.console().count(STARTED) >= starts and self._has_model():
                return
            time.sleep(0.2)
        raise RuntimeError(f"the WebUI did not answer within {START_SECONDS} s:\n{self.console()[-4000:]}")

    def _has_model(self) -> bool:
        try:
            return bool(self.get("/sdapi/v1/options")["sd_model_checkpoint"])
        except (AnswerError, OSError, KeyError):
            return False

    def stop(self) -> None:
        """End the process and those it started."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far (Linux)."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        return self._ask(path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """JSON of a POST of JSON."""
        return self._ask(path, json.dumps({} if body is None else body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "application/json"}
        )
        if self.login:
            request.add_header("Authorization", f"Basic {base64.b64encode(self.login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310 - as above
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise AnswerError(error.code, error.read().decode(errors="replace")) from error

    def draw(self, prompt: str, *, path: str = "/sdapi/v1/txt2img", **changes: Any) -> Answer:
        """Generate; `changes` go into the request."""
        answer = self.post(path, {**REQUEST, "prompt": prompt, **changes})
        return Answer([picture_of(text) for text in answer["images"]], json.loads(answer["info"]))

    def redraw(self, prompt: str, first: np.ndarray, **changes: Any) -> Answer:
        """img2img from a picture.

        The WebUI draws the picture's latent from a distribution, with the random numbers that the last request left:
        the same request comes first, so that they are always the same.
        """
        self.draw(prompt, steps=1)
        changes = {"denoising_strength": 0.9, **changes}
        return self.draw(prompt, path="/sdapi/v1/img2img", init_images=[text_of(first)], **changes)

    def options(self, **values: Any) -> None:
        """Change settings, as "Apply settings" does."""
        self.post("/sdapi/v1/options", values)

    @contextmanager
    def with_options(self, **values: Any) -> Iterator[None]:
        """Settings for a while."""
        now = self.get("/sdapi/v1/options")
        self.options(**values)
        try:
            yield
        finally:
            self.options(**{name: now[name] for name in values})

    def reload_page(self) -> None:
        """What the settings' button "Reload UI" does; waits until it answers again."""
        config = self.get("/config")
        button = next(part["id"] for part in config["components"] if part["props"].get("value") == "Reload UI")
        number = next(i for i, call in enumerate(config["dependencies"]) if button in call["targets"])
        starts = self.console().count(STARTED)
        self.post("/run/predict", {"fn_index": number, "data": [], "session_hash": "reload"})
        self.wait(starts + 1)


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Between two pictures, in units of 1/255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def picture_of(text: str) -> np.ndarray:
    """A PNG in base64 as (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def text_of(picture: np.ndarray) -> str:
    """A picture as PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
