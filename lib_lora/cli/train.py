"""``train``: from a folder of pictures to a LoRA file, or to a tuned model."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lora.cli.output import bar, tell
from lib_lora.errors import JobError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Sequence

    from lib_lora.core.saving import Progress
    from lib_lora.train.control import Wish, Wishes
    from lib_lora.train.options import TrainOptions
    from lib_lora.train.progress import Listener, TrainProgress

RANK = "LOCAL_RANK"
"""Number of a process among several, as Accelerate's launcher sets it."""


def options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add = parser.add_argument
    parser.usage = "python -m lib_lora train [CONFIG.toml] [--key value …]"
    parser.epilog = "Every option of a configuration may also be given as --key value, which counts more."
    add("--options", action="store_true", help="list all options and end")
    add("--json", action="store_true")
    # Keys are those of the training's options, which are not looked up before this command runs.
    add("given", nargs="...", metavar="CONFIG.toml", help="options as key = value; then --key value …")


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Train a LoRA, or the whole UNet, on a folder of pictures."""
    from lib_lora.train.options import TrainOptions

    given = [*rest, *arguments.given]
    own = {name: getattr(arguments, name) or f"--{name}" in given for name in ("options", "json")}
    given = [word for word in given if word not in ("--options", "--json")]
    if own["options"]:
        tell({key: [default, text] for key, default, text in TrainOptions.table()}, _table(), as_json=own["json"])
        return
    options = _read(given)
    with asked(options) as wishes, _shown() as (bars, progress):
        outcome = _train(options, wishes, progress, bars)
    if _is_first():
        tell(outcome.to_dict(), str(outcome), as_json=own["json"])


def _read(given: Sequence[str]) -> TrainOptions:
    """Those of the file that is named first, if one is, and those behind it."""
    from lib_lora.train.option_values import read_arguments, read_toml
    from lib_lora.train.options import TrainOptions

    if not given:
        raise JobError("nothing says what to train; give a CONFIG.toml, or --train_data_dir FOLDER; see --options")
    from_file, words = ([], given) if given[0].startswith("--") else ([given[0]], given[1:])
    values = read_arguments(words)
    from_file += [values.pop("config_file")] if "config_file" in values else []  # kohya's way to name it
    return TrainOptions.of({key: value for file in from_file for key, value in read_toml(Path(file)).items()} | values)


def _train(options: TrainOptions, wishes: Wishes, progress: Listener, bars: Callable[[str], Progress]) -> Any:
    from lib_lora.hosts.standalone.training import load_model, model_to_train, picture_drawer
    from lib_lora.train.trainer import train

    loaded = load_model(options.model)
    model = model_to_train(loaded, options.model)
    draw = picture_drawer(loaded, [Path("loras"), options.output.output_dir])
    return train(model, options, wishes=wishes, progress=progress, draw_picture=draw, bars=bars)


@contextmanager
def asked(options: TrainOptions) -> Generator[Wishes]:
    """What files and Ctrl+C say: the first one ends the training and saves, the second ends it at once."""
    from lib_lora.train.control import SignalFiles, Wish

    files = SignalFiles(options.output.output_dir, options.output.output_name)
    files.forget_stop()
    interrupted: list[int] = []

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, before)

    def wish() -> Wish:
        return Wish.STOP if interrupted else files.wish()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, before)
        files.forget_stop()


@contextmanager
def _shown() -> Generator[tuple[Callable[[str], Progress], Listener]]:
    """One bar at a time on stderr, where that is a terminal: what is done before the first step, then the steps."""
    from lib_lora.core.saving import no_progress

    with ExitStack() as stack:

        def begin(title: str) -> Progress:
            stack.close()
            return stack.enter_context(bar(title)) if _is_first() else no_progress

        def progress(now: TrainProgress) -> None:
            if not steps:
                stack.close()
                steps.append(stack.enter_context(_bar_of_steps(now)))
            rates = "/".join(f"{rate:.1e}" for rate in dict.fromkeys(now.rates.values()))
            memory = now.memory_bytes / 2**30
            steps[0].set_postfix_str(f"loss {now.mean_loss:.4f}, lr {rates}, {memory:.1f} GiB", refresh=False)
            steps[0].update(now.step - steps[0].n)

        steps: list[Any] = []
        yield begin, progress


def _bar_of_steps(now: TrainProgress) -> Any:
    from tqdm import tqdm

    return tqdm(desc="training", unit="step", initial=now.step - 1, total=now.steps, disable=None, leave=False)


def _is_first() -> bool:
    return os.environ.get(RANK, "0") == "0"


def _table() -> str:
    """One line for each option, by group: name, default, what it is."""
    from lib_lora.train.option_values import described
    from lib_lora.train.options import TrainOptions

    lines: list[str] = []
    for kind in TrainOptions.kinds().values():
        rows = [(key, "" if default is None else _toml(default), text) for key, default, text in described([kind])]
        key_width, default_width = (max(len(row[index]) for row in rows) for index in (0, 1))
        lines += ["", (kind.__doc__ or "").partition(".")[0].upper()]
        lines += [f"  {key:{key_width}}  {default:{default_width}}  {_plain(text)}" for key, default, text in rows]
    return "\n".join(lines[1:])


def _plain(text: str) -> str:
    return text.replace("``", "").replace("`", "")


def _toml(value: Any) -> str:
    """A default, as it would stand in a configuration."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value}" if isinstance(value, (int, float)) else f'"{value}"'
