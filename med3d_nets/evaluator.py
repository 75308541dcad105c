"""MONAI's SupervisedEvaluator over many cases, of which a bad one does not stop the others.

An ignite engine ends at the first exception. Here every case is a run of its own, and what failed is told at
the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ignite.engine.events import EventEnum
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch.utils.data import Dataset

from med3d_nets.errors import InputError
from med3d_nets.processes import StopRequest, parts, rank
from med3d_nets.stages import Stages

_logger = logging.getLogger(__name__)


class CaseEvents(EventEnum):
    """Events of CaseEvaluator beside ignite's.

    ``CASES_STARTED`` is fired once before the first case, ``CASE_FAILED`` after a case ended in an exception,
    ``ALL_CASES_DONE`` once after the last case.
    """

    CASES_STARTED = "cases_started"
    CASE_FAILED = "case_failed"
    ALL_CASES_DONE = "all_cases_done"


class CaseEvaluator(SupervisedEvaluator):
    """Evaluate the cases of a dataset one by one; failed ones are reported at the end and the others finish.

    The dataset is that of ``val_data_loader``, a MONAI Dataset whose items have ``case``, a unique name; the
    loader's other settings do not matter. To share cases among processes, give each a part of the list; they meet
    after the last one, and the first reports for all.

    ``state.cases`` are the items, ``state.item`` is the current one, ``state.case`` its name and ``state.started`` the
    time when it began (``time.perf_counter``); ``state.failed`` maps failed cases to reasons. Handlers of
    ``CASES_STARTED`` put into ``state.skipped`` the names of cases that are not to be run. A handler of
    ``ITERATION_COMPLETED`` may put a function without arguments into ``state.write``, which is called when all handlers
    are done with the case; with ``prefetch`` in a thread, while the next case is computed. What it raises is the
    failure of its case.

    ignite's own events and metrics start anew with every case; handlers that go over all cases collect in
    ``ITERATION_COMPLETED`` and finish in ``CaseEvents.ALL_CASES_DONE``.

    On SIGTERM the case in hand is finished, and the program ends.

    Args:
        prefetch: read the next case while one is computed, and write the one before.
        kwargs: those of SupervisedEvaluator, except ``event_names``.
    """

    # ignite's resumable runs do not start again after an exception
    interrupt_resume_enabled = False

    def __init__(self, prefetch: bool = False, **kwargs: Any) -> None:
        super().__init__(event_names=[CaseEvents], **kwargs)
        self.prefetch = prefetch
        self.state.cases, self.state.failed, self.state.skipped = [], {}, set()
        self.state.case, self.state.item, self.state.started, self.state.write = "", {}, 0.0, None
        # the engine's own words on each of the runs, for which this class reports
        self.logger.setLevel(logging.CRITICAL)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Run all cases.

        Args:
            global_epoch: as for SupervisedEvaluator.

        Raises:
            InputError: cases failed; the message gives the reason for each. Of several processes, the first raises it
                for the cases of all.
            SystemExit: the process was asked to stop, or another one has ended.
        """
        dataset: Any = self.data_loader.dataset  # type: ignore[union-attr]
        self.state.cases = list(dataset.data)
        self.state.failed, self.state.skipped = {}, set()
        self.fire_event(CaseEvents.CASES_STARTED)
        names = [str(item["case"]) for item in self.state.cases]
        todo = [index for index, name in enumerate(names) if name not in self.state.skipped]
        if len(todo) < len(names):
            print(f"{len(names) - len(todo)} of {len(names)} cases are finished already: skipped", flush=True)
        self._run_cases(dataset, {index: names[index] for index in todo}, global_epoch)
        self.state.failed = {name: self.state.failed[name] for name in names if name in self.state.failed}
        self.fire_event(CaseEvents.ALL_CASES_DONE)
        print(f"{len(todo) - len(self.state.failed)} of {len(todo)} cases done", flush=True)
        everyone = parts((len(names), self.state.failed))
        failed = {name: reason for _, part in everyone for name, reason in part.items()}
        if failed and rank() == 0:
            raise InputError(_summary(failed, sum(count for count, _ in everyone)))

    def _run_cases(self, dataset: Any, names: dict[int, str], global_epoch: int) -> None:
        """Run the cases of a dataset whose indices and names are given."""
        overlap = self.prefetch and len(names) > 1
        stages = Stages(dataset.__getitem__, list(names), lambda i, e: self._fail(names[i], e), overlap)
        with StopRequest() as stop, stages:
            for number, (index, name) in enumerate(names.items(), start=1):
                if stop.asked:
                    break
                print(f"[{number}/{len(names)}] {name}", flush=True)
                self.state.case, self.state.item = name, self.state.cases[index]
                self.state.started, self.state.write = time.perf_counter(), None
                try:
                    self._run_one(stages.take, global_epoch)
                except Exception as error:
                    self._fail(name, error)
                    continue
                write, self.state.write = self.state.write, None
                if write:
                    stages.put(index, write)
        if stop.asked:
            raise SystemExit(
                f"Asked to stop (SIGTERM): the case in hand, {self.state.case or 'none'}, is finished. Start the same "
                "command again to go on; where skip_finished is on, finished cases are not run again."
            )

    def _run_one(self, load: Callable[[], Any], global_epoch: int) -> None:
        self.state.batch = self.state.output = None  # free the last case before the next is loaded
        self.state.epoch_length = 1
        whole, self.data_loader = self.data_loader, DataLoader(_One(load), batch_size=1)
        try:
            super().run(global_epoch)
        finally:
            self.data_loader = whole

    def _fail(self, name: str, error: Exception) -> None:
        """Note a failed case, which need not be the current one, and tell the handlers."""
        current, self.state.case = self.state.case, name
        self.state.failed[name] = _reason(error, name)
        self.fire_event(CaseEvents.CASE_FAILED)
        self.state.case = current


class _One(Dataset):
    """A dataset of one item, loaded when it is asked for and not kept."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.load()


def _reason(error: Exception, name: str) -> str:
    """The message of the InputError that MONAI's transforms wrapped, or type and message of another error."""
    cause: BaseException = error
    while not isinstance(cause, InputError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return str(cause)
    _logger.error("%s failed unexpectedly", name, exc_info=error)
    return f"{type(cause).__name__}: {cause}"


def _summary(failed: dict[str, str], count: int) -> str:
    if count == 1:
        return next(iter(failed.values()))
    listing = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
    return f"{len(failed)} of {count} cases failed:\n{listing}"
