"""Probabilities of nodules as a table, and a contact sheet of what the network was shown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from med3d_nets.case_writer import begin, versions
from med3d_nets.classifier_ensemble import weights_files
from med3d_nets.contact_sheet import axial_tile, write_contact_sheet
from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing
from med3d_nets.processes import gather, rank
from med3d_nets.tables import csv_text
from med3d_nets.weights import file_sha256

FILES = ("predictions.csv", "contact_sheet.png", "run.json")


class NoduleTable:
    """Handler of CaseEvaluator that writes ``predictions.csv``, ``contact_sheet.png`` and ``run.json`` at the end.

    A row has the case, of points also the series and the position (mm, in the space of the table of points), the
    probability of each target, and a warning. The sheet shows the axial slice through the middle of each cube that
    the network saw, the patient's right on the left. Files of an earlier run get the suffix ``.old`` when the run
    starts. Of several processes, the first writes the cases of all.

    It expects in the engine's output ``pred``, probabilities (targets,), and ``image``, the cube (1, X, Y, Z).

    Args:
        output_dir: folder for the files.
        targets: names of the targets by index.
        weights: file of the network's weights, or several.
        record: what else ``run.json`` tells.
        space: of the positions, ``LPS`` or ``RAS``.
        window: intensities of the cube that are black and white on the sheet.
    """

    def __init__(
        self,
        output_dir: str | Path,
        targets: Sequence[str],
        weights: str | Path | Sequence[str | Path],
        record: Mapping[str, Any],
        space: str = "LPS",
        window: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.targets = list(targets)
        self.weights = weights_files(weights)
        self.record = dict(record)
        self.sign = -1.0 if space == "LPS" else 1.0
        self.window = list(window)
        self._cases: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(CaseEvents.CASES_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Keep the current case.

        Raises:
            InputError: the probabilities are not finite.
        """
        state: Any = engine.state
        output, item = state.output[0], state.item
        probabilities = [float(value) for value in output["pred"]]
        if not np.isfinite(probabilities).all():
            raise InputError(
                f"{state.case}: the probabilities are not finite. Take weights of a training that did not diverge."
            )
        cube = np.asarray(output["image"][0].float().cpu())
        self._cases[state.case] = {
            "series": item.get("series", ""),
            "point": item.get("point"),
            "probabilities": probabilities,
            "warning": str(state.batch[0].get("warning", "")),
            "slice": axial_tile(cube, [1.0, 1.0, 1.0]).astype(np.float16),  # cubes have one voxel size
        }

    def _start(self, engine: Engine) -> None:
        self._cases = {}
        begin(self.output_dir, FILES)

    def _finish(self, engine: Engine) -> None:
        """Gather the cases of all processes and write them."""
        cases, failed = gather(self._cases), gather(engine.state.failed)  # type: ignore[attr-defined]
        if rank() != 0:
            return
        report = {
            **self.record,
            "targets": self.targets,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "weights": [{"file": str(path), "sha256": file_sha256(path)} for path in self.weights],
            "cases": list(cases),
            "failed": failed,
            "versions": versions(),
        }
        if cases:
            with replacing(self.output_dir / "predictions.csv") as hidden:
                hidden.write_text(self._csv(cases), encoding="utf-8")
            tiles = [(one["slice"].astype(np.float32), self._caption(name, one)) for name, one in cases.items()]
            columns = max(6, math.ceil(math.sqrt(len(tiles))))
            write_contact_sheet(self.output_dir / "contact_sheet.png", tiles, columns, window=self.window)
            print(f"{len(cases)} nodules -> {self.output_dir / 'predictions.csv'}", flush=True)
        with replacing(self.output_dir / "run.json") as hidden:
            hidden.write_text(f"{json.dumps(report, indent=2)}\n", encoding="utf-8")

    def _caption(self, name: str, case: Mapping[str, Any]) -> str:
        values = [f"{target} {p:.2f}" for target, p in zip(self.targets, case["probabilities"], strict=True)]
        return "\n".join([name, *values])

    def _csv(self, cases: Mapping[str, Mapping[str, Any]]) -> str:
        points = any(case["point"] is not None for case in cases.values())
        place = ["seriesuid", "coordX", "coordY", "coordZ"] if points else []
        rows = []
        for name, case in cases.items():
            row: list[Any] = [name]
            if points:
                x, y, z = case["point"]
                row += [case["series"], *(f"{value:.3f}" for value in (self.sign * x, self.sign * y, z))]
            rows.append([*row, *(f"{value:.6f}" for value in case["probabilities"]), case["warning"]])
        return csv_text(["case", *place, *(f"p_{target}" for target in self.targets), "warning"], rows)
