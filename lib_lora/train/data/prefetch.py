"""Making things ahead in threads, so that who needs them does not wait."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from concurrent.futures import Future

Given = TypeVar("Given")
Made = TypeVar("Made")


def prefetched(make: Callable[[Given], Made], given: Iterable[Given], workers: int) -> Generator[Made]:
    """``map(make, given)``, in order, with up to two things a thread made ahead.

    Args:
        make: Called in threads; what it raises is raised where its result would have come.
        given: Its arguments; may be endless.
        workers: Threads; 0 to make each thing when it is asked for.
    """
    if not workers:
        yield from map(make, given)
        return
    pool = ThreadPoolExecutor(workers, "prefuse-data")
    try:
        rest = iter(given)
        ahead: deque[Future[Made]] = deque(pool.submit(make, one) for one in itertools.islice(rest, 2 * workers))
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(make, one) for one in itertools.islice(rest, 1))
            yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
