"""Scores of a segmentation against its reference on the input's own grid, per case and class.

Dice, surface Dice (arXiv 2111.05408) and 95 % Hausdorff distance are MONAI's; a surface is the voxels at the
border of a region.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.transforms import generate_spatial_bounding_box

from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing, set_aside
from med3d_nets.processes import gather, rank

Scores = dict[str, float]

# of several cases, which is the worst
_WORST: dict[str, Callable[..., str]] = {"dice": min, "surface_dice": min, "hd95_mm": max}
_COLUMNS = (*_WORST, "predicted_ml", "true_ml")


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
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Mapping[str, str],
        tolerance_mm: float | Mapping[str, float] = 2.0,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.labels = {int(value): name for value, name in labels.items()}
        by_name = dict(tolerance_mm) if isinstance(tolerance_mm, Mapping) else {}
        if by_name and set(by_name) != set(self.labels.values()):
            raise InputError(f"tolerance_mm names {sorted(by_name)}; needed are {sorted(self.labels.values())}.")
        self.tolerance_mm = by_name or {name: float(tolerance_mm) for name in self.labels.values()}  # type: ignore[arg-type]
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
            )
            for value, name in self.labels.items()
        }

    def _finish(self, engine: Engine) -> None:
        """Gather the cases of all processes and write them."""
        cases, failed = gather(self._cases), gather(engine.state.failed)  # type: ignore[attr-defined]
        self._cases = {}
        summary = {name: _summarise(name, cases) for name in self.labels.values()}
        means = [one["dice"]["mean"] for one in summary.values() if one["dice"]["mean"] is not None]
        engine.state.metrics["mean_dice"] = statistics.fmean(means) if means else math.nan
        if rank() != 0:
            return
        report = {"summary": summary, "tolerance_mm": self.tolerance_mm, "cases": cases, "failed": failed}
        self._write("scores.csv", _csv(cases) if cases else None)
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


def score(pred: torch.Tensor, label: torch.Tensor, affine: np.ndarray, tolerance_mm: float) -> Scores:
    """Score one class of one case.

    A class that is in neither has undefined (NaN) scores. One that is in only one of them has Dice and
    surface Dice 0, and its Hausdorff distance, which would be infinite, counts as the diagonal of the volume,
    so that means stay finite.

    Args:
        pred: predicted region, bool, shape (X, Y, Z).
        label: reference region, bool, same shape.
        affine: from voxel index to mm, 4 × 4; distances use the lengths of its columns, without shear.
        tolerance_mm: distance up to which a border voxel is right for the surface Dice.

    Returns:
        ``dice`` and ``surface_dice`` (0 to 1), ``hd95_mm``, ``predicted_ml``, ``true_ml``.
    """
    spacing = nib.affines.voxel_sizes(affine)
    voxel_ml = float(abs(np.linalg.det(affine[:3, :3]))) / 1000
    volumes = {"predicted_ml": int(pred.sum()) * voxel_ml, "true_ml": int(label.sum()) * voxel_ml}
    if not pred.any() and not label.any():
        return {"dice": math.nan, "surface_dice": math.nan, "hd95_mm": math.nan, **volumes}
    if not pred.any() or not label.any():
        diagonal = float(np.linalg.norm(np.array(pred.shape) * spacing))
        return {"dice": 0.0, "surface_dice": 0.0, "hd95_mm": diagonal, **volumes}
    start, end = generate_spatial_bounding_box((pred | label)[None], margin=1, allow_smaller=True)
    box = (None, None, *(slice(low, high) for low, high in zip(start, end, strict=True)))
    one, two = pred[box], label[box]  # surfaces of the whole volume would take gigabytes
    surface_dice = compute_surface_dice(one, two, [tolerance_mm], include_background=True, spacing=spacing.tolist())
    hd95 = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=spacing.tolist())
    return {
        "dice": float(compute_dice(one, two, include_background=True)),
        "surface_dice": float(surface_dice),
        "hd95_mm": float(hd95),
        **volumes,
    }


def _summarise(name: str, cases: Mapping[str, Mapping[str, Scores]]) -> dict[str, dict[str, Any]]:
    """Mean, median and worst of each score of a class, over the cases where it is defined."""
    summary = {}
    for metric, worst_of in _WORST.items():
        values = {case: one[name][metric] for case, one in cases.items() if not math.isnan(one[name][metric])}
        worst = worst_of(values, key=values.__getitem__) if values else None
        summary[metric] = {
            "mean": statistics.fmean(values.values()) if values else None,
            "median": statistics.median(values.values()) if values else None,
            "worst": values[worst] if worst else None,
            "worst_case": worst,
            "cases": len(values),
        }
    return summary


def _csv(cases: Mapping[str, Mapping[str, Scores]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "class", *_COLUMNS])
    for case, classes in cases.items():
        for name, one in classes.items():
            writer.writerow([case, name, *("" if math.isnan(one[c]) else f"{one[c]:.5g}" for c in _COLUMNS)])
    return text.getvalue()


def _with_null(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _line(metric: str, values: Mapping[str, Any]) -> str:
    if values["mean"] is None:
        return f"{metric} undefined"
    return f"{metric} {values['mean']:.4g} (worst {values['worst']:.4g}, {values['worst_case']})"
