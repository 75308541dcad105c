"""What a user gets of a classification: a report and pictures per case, and a table and a contact sheet of all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine
from matplotlib.image import imread, imsave
from monai.data import MetaTensor
from numpy.typing import NDArray

from med3d_nets.archive import FAILED, status
from med3d_nets.case_writer import CaseWriter, versions
from med3d_nets.class_scores import prediction
from med3d_nets.classification import ClassificationNet
from med3d_nets.contact_sheet import axial_tile, write_contact_sheet
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.heatmap import HeatMapper, heat_picture, on_image, on_own_grid
from med3d_nets.processes import gather_rows, rank
from med3d_nets.results import nifti
from med3d_nets.tables import csv_text

TABLE, SHEET = "predictions.csv", "predictions.png"
REPORT, TILE, MAP, PICTURE = "_class.json", "_class.png", "_heatmap.nii.gz", "_heatmap.png"


class PredictionWriter(CaseWriter):
    """Handler of CaseEvaluator that writes what a classifier says of each case, and at the end a table and a picture.

    Per case ``{case}_class.json`` (probability of each class, prediction, what it was made from) and
    ``{case}_class.png``, an axial slice; with heat maps also ``{case}_heatmap.nii.gz``, the evidence for a class on
    the scan's own grid, and ``{case}_heatmap.png``. After the last case ``predictions.csv``, a row for each, and
    ``predictions.png``, a contact sheet. Of several processes the first writes those for the cases of all.

    It expects in the engine's output, after postprocessing, ``pred``: probabilities, (num_classes,), and ``image``: the
    network's input, a MetaTensor in RAS padded at its ends, and in the batch ``size``, its voxels without padding.

    Args:
        output_dir: see CaseWriter.
        classes: names of the classes by index.
        weights: see CaseWriter.
        record: what else the reports tell and shapes a result: the bundle, the spacing and so on.
        network: the ClassificationNet with its own weights, for heat maps; None: no heat maps.
        heatmap_class: the class of the heat maps by name; empty: the most probable of each case.
        multi_label: a case may have several classes.
        sheet_cases: most cases on the contact sheet, the first ones; 0: no sheet.
        skip_finished: see CaseWriter.

    Raises:
        InputError: ``heatmap_class`` is none of the classes.
    """

    def __init__(
        self,
        output_dir: str | Path,
        classes: Sequence[str],
        weights: str | Path,
        record: Mapping[str, Any],
        network: ClassificationNet | None = None,
        heatmap_class: str = "",
        multi_label: bool = False,
        sheet_cases: int = 60,
        skip_finished: bool = False,
    ) -> None:
        self.classes = list(classes)
        self.heatmap_class = str(heatmap_class)
        if self.heatmap_class and self.heatmap_class not in self.classes:
            raise InputError(
                f"heatmap_class='{heatmap_class}': the classes are {', '.join(self.classes)}; empty takes the most "
                "probable one."
            )
        self.mapper = None if network is None else HeatMapper(network)
        heat = {"heatmap": self.mapper is not None, "heatmap_class": self.heatmap_class}
        made_by = {**record, "classes": self.classes, "multi_label": multi_label, **heat}
        super().__init__(output_dir, weights, made_by, [TABLE, SHEET], skip_finished)
        self.multi_label = multi_label
        self.sheet_cases = int(sheet_cases)

    def __call__(self, engine: Engine) -> None:
        """Have the files of the current case written."""
        state: Any = engine.state
        output = state.output[0]
        probabilities = [float(value) for value in output["pred"]]
        if not np.isfinite(probabilities).all():
            raise InputError(
                f"{state.case}: the probabilities are not finite. Take weights of a training that did not diverge."
            )
        image = output["image"].cpu()
        size = [int(n) for n in torch.as_tensor(state.batch[0]["size"])]
        heat, index = None, int(np.argmax(probabilities))
        if self.mapper is not None:
            index = self.classes.index(self.heatmap_class) if self.heatmap_class else index
            heat = self.mapper(image, index, size)
        state.write = partial(self._write_case, state.case, probabilities, image, size, heat, index, self._origin)

    def _write_case(
        self,
        case: str,
        probabilities: Sequence[float],
        image: MetaTensor,
        size: Sequence[int],
        heat: MetaTensor | None,
        index: int,
        origin: Mapping[str, Any],
    ) -> None:
        by_name = dict(zip(self.classes, probabilities, strict=True))
        report: dict[str, Any] = {
            "case": case,
            **origin,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "probabilities": by_name,
            "prediction": prediction(probabilities, self.classes, self.multi_label),
        }
        voxels = image[0, : size[0], : size[1], : size[2]].numpy()
        spacing = nib.affines.voxel_sizes(np.asarray(image.affine)).tolist()
        contents: dict[str, nib.Nifti1Image | bytes] = {}
        seen = None
        if heat is not None:
            seen, name = on_image(heat, image, size), self.classes[index]
            report["heatmap_of"] = name
            notes = [] if seen.any() else [f"no evidence for {name} anywhere"]
            title = f"{case}: evidence for {name} (p {probabilities[index]:.2f})"
            affine = np.asarray(image.meta["original_affine"], dtype=np.float64)
            contents[MAP] = nifti(on_own_grid(heat, image, size), affine)
            contents[PICTURE] = heat_picture(voxels, seen, spacing, title, notes)
        contents[TILE] = _tile(voxels, seen, spacing)
        named = {self._path(case, ending).name: content for ending, content in contents.items()}
        self._write_files(case, {**report, "versions": versions()}, named)
        told = ", ".join(f"{name} {p:.3f}" for name, p in by_name.items())
        print(f"  {case}: {report['prediction']} ({told})", flush=True)

    def _finish(self, engine: Engine) -> None:
        state: Any = engine.state
        mine = []
        for one in state.cases:
            case, what = one["case"], status(one["case"], state.failed, state.skipped)
            report = None if what == FAILED else self._report_of(case)
            mine.append((case, what, state.failed.get(case, ""), report))
        rows = gather_rows(mine)
        if rank() != 0 or not rows:
            return
        with replacing(self.output_dir / TABLE) as hidden:
            hidden.write_text(_table(rows, self.classes), encoding="utf-8")
        print(f"{len(rows)} cases -> {self.output_dir / TABLE}", flush=True)
        done = [(case, report) for case, _, _, report in rows if report is not None][: self.sheet_cases]
        if done:
            tiles = [(imread(self._path(case, TILE))[..., :3], f"{case}\n{_words(report)}") for case, report in done]
            write_contact_sheet(self.output_dir / SHEET, tiles)

    def _files_of(self, case: str) -> list[Path]:
        return [self._path(case, ending) for ending in (REPORT, TILE, MAP, PICTURE)]

    def _path(self, case: str, ending: str) -> Path:
        return self.output_dir / f"{case}{ending}"


def _words(report: Mapping[str, Any]) -> str:
    """Prediction and its probability; of several labels or none, that of the most probable class."""
    probabilities = report["probabilities"]
    name = report["prediction"]
    return f"{name} {probabilities[name] if name in probabilities else max(probabilities.values()):.2f}"


def _tile(voxels: NDArray[np.floating], heat: NDArray[np.floating] | None, spacing: Sequence[float]) -> bytes:
    """The middle axial slice, or that of a heat map's peak with the map in colour over it, as PNG."""
    hot = heat is not None and heat.any()
    index = int(np.unravel_index(heat.argmax(), heat.shape)[2]) if heat is not None and hot else None
    plane = axial_tile(voxels, spacing, index)
    low, high = np.percentile(voxels, [1, 99])
    grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, axis=-1)
    if heat is not None and hot:
        over = axial_tile(heat, spacing, index).clip(0, 1)
        alpha = 0.6 * over[..., None]
        grey = (1 - alpha) * grey + alpha * matplotlib.colormaps["inferno"](over)[..., :3]
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(grey), format="png")
    return buffer.getvalue()


def _table(rows: Sequence[tuple[str, str, str, Mapping[str, Any] | None]], classes: Sequence[str]) -> str:
    lines = []
    for case, what, reason, report in rows:
        if report is None:
            lines.append([case, *[""] * len(classes), "", what, reason])
        else:
            values = [f"{report['probabilities'][name]:.6f}" for name in classes]
            lines.append([case, *values, report["prediction"], what, reason])
    return csv_text(["case", *(f"p_{name}" for name in classes), "prediction", "status", "reason"], lines)
