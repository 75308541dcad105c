"""Scores of a segmentation against its reference on the input's own grid, per case and class."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing, set_aside
from med3d_nets.processes import gather, rank
from med3d_nets.region_scores import METRICS, USUAL, Scores, check, global_dice, score
from med3d_nets.tables import csv_text

_VOLUMES = ("predicted_ml", "true_ml")


class CaseScores:
    """Handler of CaseEvaluator that writes ``scores.csv`` and ``scores.json`` after the last case.

    It expects in the engine's output, after postprocessing, ``pred`` and ``label``: label maps on the input's
    own grid, shape (1, X, Y, Z), MetaTensors. Undefined scores (see ``score``) are null in JSON and empty in
    CSV, and left out of the summary. If no case could be scored, nothing is written and files of an earlier
    run get the suffix ``.old``. Of several processes, the first writes the cases of all.

    Args:
        output_dir: folder for the files.
        labels: name of each label value, for example ``{"1": "left lung", "2": "right lung"}``.
        tolerance_mm: of the surface Dice, one for all classes or by name.
        metrics: names of ``region_scores.METRICS``, ``dice`` among them.

    Raises:
        InputError: an unknown metric, or a tolerance that lacks a class.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Mapping[str, str],
        tolerance_mm: float | Mapping[str, float] = 2.0,
        metrics: Sequence[str] = USUAL,
    ) -> None:
        check(metrics)
        self.output_dir = Path(output_dir)
        self.labels = {int(value): name for value, name in labels.items()}
        by_name = dict(tolerance_mm) if isinstance(tolerance_mm, Mapping) else {}
        if by_name and set(by_name) != set(self.labels.values()):
            raise InputError(f"tolerance_mm names {sorted(by_name)}; needed are {sorted(self.labels.values())}.")
        self.tolerance_mm = by_name or {name: float(tolerance_mm) for name in self.labels.values()}  # type: ignore[arg-type]
        self.metrics = tuple(dict.fromkeys(("dice", *metrics)))
        self._cases: dict[str, dict[str, Scores]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Score the current case."""
        case, output = engine.state.case, engine.state.output[0]  # type: ignore[attr-defined,index]
        pred, label = output["pred"].cpu(), output["label"].cpu()
        if pred.shape != label.shape:
            raise InputError(
                f"{case}: the label's shape {tuple(label.shape[1:])} differs from its image's "
                f"{tuple(pred.shape[1:])}. Resample the label to the image."
            )
        affine = pred.affine.numpy()
        self._cases[case] = {
            name: score(
                (pred[0] == value).as_tensor(),
                (label[0] == value).as_tensor(),
                affine,
                self.tolerance_mm[name],
                self.metrics,
            )
            for value, name in self.labels.items()
        }

    def _finish(self, engine: Engine) -> None:
        """Gather the cases of all processes and write them."""
        cases, failed = gather(self._cases), gather(engine.state.failed)  # type: ignore[attr-defined]
        self._cases = {}
        summary = {name: _summarise(name, cases, self.metrics) for name in self.labels.values()}
        overall = {name: global_dice(one[name] for one in cases.values()) for name in self.labels.values()}
        means = [one["dice"]["mean"] for one in summary.values() if one["dice"]["mean"] is not None]
        engine.state.metrics["mean_dice"] = statistics.fmean(means) if means else math.nan
        if rank() != 0:
            return
        report = {"summary": summary, "global_dice": overall, "tolerance_mm": self.tolerance_mm}
        report |= {"cases": cases, "failed": failed}
        self._write("scores.csv", _csv(cases, (*self.metrics, *_VOLUMES)) if cases else None)
        self._write("scores.json", json.dumps(_with_null(report), indent=2) if cases else None)
        for name, one in summary.items():
            print(f"{name}: " + ", ".join(_line(metric, values) for metric, values in one.items()))

    def _write(self, name: str, content: str | None) -> None:
        path = self.output_dir / name
        if content is not None:
            with replacing(path) as hidden:
                hidden.write_text(content)
        else:
            set_aside(path)


def _summarise(
    name: str, cases: Mapping[str, Mapping[str, Scores]], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Mean, median and worst of each score of a class, over the cases where it is defined."""
    summary = {}
    for metric in metrics:
        values = {case: one[name][metric] for case, one in cases.items() if not math.isnan(one[name][metric])}
        worst = METRICS[metric].worst(values.values()) if values else None
        summary[metric] = {
            "mean": statistics.fmean(values.values()) if values else None,
            "median": statistics.median(values.values()) if values else None,
            "worst": worst,
            "worst_case": next((case for case, value in values.items() if value == worst), None),
            "cases": len(values),
        }
    return summary


def _csv(cases: Mapping[str, Mapping[str, Scores]], columns: Sequence[str]) -> str:
    rows = []
    for case, classes in cases.items():
        for name, one in classes.items():
            rows.append([case, name, *("" if math.isnan(one[c]) else f"{one[c]:.5g}" for c in columns)])
    return csv_text(["case", "class", *columns], rows)


def _with_null(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _line(metric: str, values: Mapping[str, Any]) -> str:
    if values["mean"] is None:
        return f"{metric} undefined"
    return f"{metric} {values['mean']:.4g} (worst {values['worst']:.4g}, {values['worst_case']})"
