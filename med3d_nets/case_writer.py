"""What all writers of results share: how a run begins, what a result was made from, files that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import torch
from ignite.engine import Engine, Events
from isal import igzip

import med3d_nets
from med3d_nets.archive import is_finished, origin_of, read_report
from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import remove_partial, replacing, set_aside
from med3d_nets.processes import rank
from med3d_nets.weights import file_sha256

COMPRESSION = 2  # of ISA-L, 0 to 3

Contents = Mapping[str, "nib.Nifti1Image | bytes"]


class CaseWriter(ABC):
    """Handler of CaseEvaluator that writes files per case, and at the end tables of all cases.

    No file is ever half written. When a run starts, tables of an earlier one get the suffix ``.old``; so do the files
    of a case that fails: results of an earlier run must not look like those of the failed one.

    A subclass gives the call, which sets ``engine.state.write``, and the methods below that raise or say so.

    Args:
        output_dir: folder for the files, made when the first case starts.
        weights: file of the network's weights, whose hash goes into the reports.
        made_by: what else shapes a result, for the reports: the bundle, the settings.
        tables: names of the files of all cases.
        skip_finished: leave a case out whose files are all there and were made from the same image by the same weights
            and settings.
    """

    def __init__(
        self,
        output_dir: str | Path,
        weights: str | Path,
        made_by: Mapping[str, Any],
        tables: Iterable[str],
        skip_finished: bool = False,
    ) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.weights = weights
        self.made_by = dict(made_by)
        self.tables = list(tables)
        self.skip_finished = skip_finished
        self._sha256 = ""
        self._origin: dict[str, Any] = {}  # of the current case

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(CaseEvents.CASES_STARTED, self._start)
        engine.add_event_handler(Events.STARTED, self._note_origin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.CASE_FAILED, self._set_aside)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

    @abstractmethod
    def __call__(self, engine: Engine) -> None:
        """Have the files of the current case written."""

    @abstractmethod
    def _finish(self, engine: Engine) -> None:
        """Write the tables of all cases of all processes."""

    @abstractmethod
    def _files_of(self, case: str) -> list[Path]:
        """Files that a case may have, its report first."""

    def _start(self, engine: Engine) -> None:
        state: Any = engine.state
        begin(self.output_dir, self.tables)
        if self.skip_finished:
            state.skipped |= {one["case"] for one in state.cases if self._is_finished(one)}
        cases = [one["case"] for one in state.cases if one["case"] not in state.skipped]
        remove_partial(self.output_dir, {path.name for case in cases for path in self._files_of(case)})

    def _is_finished(self, case: Mapping[str, Any]) -> bool:
        return is_finished(self._report_of(case["case"]), self._origin_of(case["image"]), self.output_dir)

    def _report_of(self, case: str) -> dict[str, Any] | None:
        return read_report(self._files_of(case)[0])

    def _note_origin(self, engine: Engine) -> None:
        """The image as it is when the case begins: if it changes later, its result is not taken for finished."""
        self._origin = self._origin_of(engine.state.item["image"])  # type: ignore[attr-defined]

    def _origin_of(self, image: str) -> dict[str, Any]:
        self._sha256 = self._sha256 or file_sha256(self.weights)
        return origin_of(image, {**self.made_by, "weights_sha256": self._sha256})

    def _set_aside(self, engine: Engine) -> None:
        for path in self._files_of(engine.state.case):  # type: ignore[attr-defined]
            set_aside(path)

    def _write_files(self, case: str, report: Mapping[str, Any], contents: Contents) -> None:
        """All files of a case, or none if one cannot be written; files that an earlier run had beside them go aside.

        The report names the others with their sizes in bytes. They are put in place backwards, the first one last: a
        mask with report and picture beside it is known for no input.

        Args:
            case: its name.
            report: for JSON.
            contents: by the file's name; a NIfTI image is compressed.
        """
        own, sizes = self._files_of(case), {}
        with contextlib.ExitStack() as files:
            for name, content in contents.items():
                hidden = files.enter_context(replacing(self.output_dir / name))
                if isinstance(content, bytes):
                    hidden.write_bytes(content)
                else:
                    with igzip.open(hidden, "wb", compresslevel=COMPRESSION) as stream:
                        content.to_stream(stream)
                sizes[name] = hidden.stat().st_size
            hidden = files.enter_context(replacing(own[0]))
            hidden.write_bytes(f"{json.dumps({**report, 'files': sizes}, indent=2)}\n".encode())
            for path in own[1:]:
                if path.name not in contents:
                    set_aside(path)


def begin(output_dir: Path, tables: Iterable[str]) -> None:
    """Make the folder of a run; the first process sets the tables of an earlier one aside.

    Args:
        output_dir: the folder.
        tables: names of the files of all cases.

    Raises:
        InputError: nothing can be written there.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in tables if rank() == 0 else ():
            set_aside(output_dir / name)
    except OSError as error:
        raise InputError(
            f"{output_dir}: nothing can be written to this output_dir ({error.strerror}). "
            "Give a folder that can be written."
        ) from error


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "med3d_nets": med3d_nets.__version__,
        "monai": monai.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
