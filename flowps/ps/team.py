"""`Team`: a piece of work done in parts by several threads, the caller's own among them.

Parts must not wait for each other: they may run one after the other. Any thread may call any method, several at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Team:
    """`size` threads, the caller's included: a team of one has no thread of its own."""

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size - 1, name) if size > 1 else None

    def run(self, work: Callable[[int], object], parts: int) -> None:
        """Call `work(part)` for 0 … parts - 1; the caller's thread does part 0.

        Returns when all have ended. Raises the error of the first part that failed.
        """
        if self._pool is None:
            for part in range(parts):
                work(part)
            return
        rest: list[Future[object]] = []
        try:
            for part in range(1, parts):
                rest.append(self._pool.submit(work, part))
            if parts:
                work(0)
        finally:
            # Nobody leaves while a part still writes into the caller's arrays.
            errors = [future.exception() for future in rest]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """End the threads. Idempotent; no `run` may come after."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
