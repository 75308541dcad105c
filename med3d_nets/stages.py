"""Reading, computing and writing of cases at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

Job = Callable[[], Any]


class Stages:
    """While the caller computes a case, a thread reads the next one and another writes the last one.

    There are never more than two cases on the way in and one on the way out. Without overlap, the same calls do their
    work at once.

    Args:
        read: reads the case of an index.
        indices: of the cases in their order.
        on_error: called with index and error of a case that could not be written.
        overlap: whether to use threads.

    Example:
        >>> with Stages(str, [7, 8], print) as stages:
        ...     for index in [7, 8]:
        ...         text = stages.take()
        ...         stages.put(index, lambda: None)
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        indices: Sequence[int],
        on_error: Callable[[int, Exception], None],
        overlap: bool = True,
    ) -> None:
        self._read = read
        self._indices = iter(indices)
        self._on_error = on_error
        self._overlap = overlap
        self._threads = ExitStack()
        self._ahead: Future[Any] | None = None
        self._writing: tuple[int, Future[Any]] | None = None

    def __enter__(self) -> Stages:
        if self._overlap:
            self._reader = self._threads.enter_context(ThreadPoolExecutor(1, "read"))
            self._writer = self._threads.enter_context(ThreadPoolExecutor(1, "write"))
            self._ahead = self._read_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ahead is not None:
            self._ahead.cancel()
        self._await_writing()
        self._threads.close()

    def take(self) -> Any:
        """Return the next case as read, and begin with the one after it.

        Raises:
            Exception: what reading it raised.
        """
        if not self._overlap:
            return self._read(next(self._indices))
        current, self._ahead = self._ahead, self._read_next()
        assert current is not None, "there are no more cases"
        return current.result()

    def put(self, index: int, write: Job) -> None:
        """Begin to write a case when the one before is written; errors go to ``on_error``.

        Args:
            index: of the case.
            write: does it.
        """
        self._await_writing()
        if self._overlap:
            self._writing = index, self._writer.submit(write)
            return
        try:
            write()
        except Exception as error:
            self._on_error(index, error)

    def _read_next(self) -> Future[Any] | None:
        index = next(self._indices, None)
        return None if index is None else self._reader.submit(self._read, index)

    def _await_writing(self) -> None:
        if self._writing is None:
            return
        (index, future), self._writing = self._writing, None
        try:
            future.result()
        except Exception as error:
            self._on_error(index, error)
