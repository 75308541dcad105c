"""MONAI's SupervisedEvaluator over many cases, of which a bad one does not stop the others.

An ignite engine ends at the first exception. Here every case is a run of its own, and what failed is told at
the end.
"""

from __future__ import annotations

import logging
from typing import Any

from ignite.engine.events import EventEnum
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from torch.utils.data import Subset

from med3d_nets.errors import InputError

_logger = logging.getLogger(__name__)


class CaseEvents(EventEnum):
    """Events of CaseEvaluator beside ignite's.

    ``CASE_FAILED`` is fired after a case ended in an exception, ``ALL_CASES_DONE`` once after the last case.
    """

    CASE_FAILED = "case_failed"
    ALL_CASES_DONE = "all_cases_done"


class CaseEvaluator(SupervisedEvaluator):
    """Evaluate the cases of a dataset one by one; failed ones are reported at the end and the others finish.

    The dataset is that of ``val_data_loader``, a MONAI Dataset whose items have ``case``, a unique name; the
    loader's other settings do not matter. To share cases among processes, give each a part of the list.

    ``state.case`` is the current case, ``state.failed`` maps failed cases to reasons. ignite's own events and
    metrics start anew with every case; handlers that go over all cases collect in ``ITERATION_COMPLETED`` and
    finish in ``CaseEvents.ALL_CASES_DONE``.

    Args:
        kwargs: those of SupervisedEvaluator, except ``event_names``.
    """

    # ignite's resumable runs do not start again after an exception
    interrupt_resume_enabled = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(event_names=[CaseEvents], **kwargs)
        self.state.case = ""
        self.state.failed = {}
        # the engine's own words on each of the runs, for which this class reports
        self.logger.setLevel(logging.CRITICAL)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Run all cases.

        Args:
            global_epoch: as for SupervisedEvaluator.

        Raises:
            InputError: cases failed; the message gives the reason for each.
        """
        dataset: Any = self.data_loader.dataset  # type: ignore[union-attr]
        names = [str(item["case"]) for item in dataset.data]
        self.state.failed = {}
        for index, name in enumerate(names):
            print(f"[{index + 1}/{len(names)}] {name}", flush=True)
            self.state.case = name
            try:
                self._run_one(Subset(dataset, [index]), global_epoch)
            except Exception as error:
                self.state.failed[name] = _reason(error, name)
                self.fire_event(CaseEvents.CASE_FAILED)
        self.fire_event(CaseEvents.ALL_CASES_DONE)
        print(f"{len(names) - len(self.state.failed)} of {len(names)} cases done", flush=True)
        if self.state.failed:
            raise InputError(_summary(self.state.failed, len(names)))

    def _run_one(self, dataset: Subset, global_epoch: int) -> None:
        self.state.batch = self.state.output = None  # free the last case before the next is loaded
        self.state.epoch_length = 1
        whole, self.data_loader = self.data_loader, DataLoader(dataset, batch_size=1)
        try:
            super().run(global_epoch)
        finally:
            self.data_loader = whole


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
