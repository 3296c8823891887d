"""What a GPU does with work that is asked of it, on a CPU: later, on streams, and again from recordings."""

from __future__ import annotations

from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

WRITING = {"aten::_foreach_copy_", "aten::addmm_", "aten::copy_", "aten::mul.out", "aten::cat.out"}


class Kept(TorchDispatchMode):
    """Keeps what writes to memory instead of doing it; views are made as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name not in WRITING and func.name() not in WRITING:
            assert not func._schema.is_mutable, f"{func} is not known to the stand-in"
            return func(*args, **(kwargs or {}))
        self.launches.append((func, args, kwargs or {}))
        return args[0] if func._schema.returns else None

    def do(self, upto: int | None = None) -> None:
        """Do what was kept, again where it was done before."""
        for func, args, kwargs in self.launches[:upto]:
            func(*args, **kwargs)


class Recorder:
    """In the place of CUDA's: addresses and numbers are those of the recording, for good."""

    def __init__(self) -> None:
        self.recordings: list[Kept] = []

    def __call__(self, work):
        kept = Kept()
        with kept:
            work()
        self.recordings.append(kept)
        return kept.do


class Stream:
    """A stream that is never in time: what is asked of it is done when somebody waits for it, and not before.

    Attributes:
        waits: What it waited for, in order.
    """

    def __init__(self) -> None:
        self.kept = Kept()
        self.done = 0
        self.waits: list[object] = []

    def record_event(self):
        return self, len(self.kept.launches)

    def wait_event(self, event) -> None:
        stream, upto = event
        self.waits.append(event)
        stream.finish(upto)

    def wait_stream(self, stream) -> None:
        self.wait_event(stream.record_event())

    def finish(self, upto: int) -> None:
        for func, args, kwargs in self.kept.launches[self.done : upto]:
            func(*args, **kwargs)
        self.done = max(self.done, upto)


@contextmanager
def on_stream(stream):
    """`torch.cuda.stream`."""
    with stream.kept:
        yield
