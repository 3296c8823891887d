"""Work that is the same in every switch, as one CUDA graph: its launches are paid once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from lib_lora.core.memory import OUT_OF_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Work = Callable[[], None]

MOST_GRAPHS = 8
"""That are kept; what was not replayed for longest goes."""


class SwitchGraphs:
    """Replays work that is known by everything its launches have fixed: addresses, shapes, numbers.

    Work must give the same result when it is done twice. It is done as it is when it is seen first, recorded when it
    comes again, and replayed from then on. What can not be recorded is done as it is for good.

    Attributes:
        replays: How often a graph did the work.
        problem: Why nothing is recorded any more, a clause; empty while all is well.
    """

    def __init__(self, record: Callable[[Work], Work]) -> None:
        """Without a graph.

        Args:
            record: Makes a replay of some work without doing it.
        """
        self._record = record
        self._replays: OrderedDict[Hashable, Work | None] = OrderedDict()
        self.replays = 0
        self.problem = ""

    def run(self, key: Hashable, work: Work) -> None:
        """Do the work.

        Args:
            key: Equal only where a recording of other work may stand for this.
            work: Launches kernels, reads and writes at fixed places only, and waits for nothing.
        """
        is_known = key in self._replays
        if is_known and self._replays[key] is None and not self.problem:
            self._replays[key] = self._recorded(work)
        replay = self._replays.setdefault(key, None)
        self._replays.move_to_end(key)
        if len(self._replays) > MOST_GRAPHS:
            self._replays.popitem(last=False)
        if replay is None:
            work()
        else:
            replay()
            self.replays += 1

    def _recorded(self, work: Work) -> Work | None:
        try:
            return self._record(work)
        except OUT_OF_MEMORY:
            self.problem = "there was no memory for a graph"
        except RuntimeError as error:  # whatever a driver says
            self.problem = f"no graph could be recorded: {error}"
        return None


class CudaRecorder:
    """Records CUDA graphs of one device that share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def __call__(self, work: Work) -> Work:
        """Record; other threads may use the device meanwhile.

        Raises:
            RuntimeError: CUDA's own.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
