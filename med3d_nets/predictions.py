"""What a user gets of a classification: a report and pictures per case, and a table and a contact sheet of all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from isal import igzip
from matplotlib.image import imread, imsave
from monai.data import MetaTensor
from numpy.typing import NDArray

from med3d_nets.archive import FAILED, is_finished, origin_of, read_report, status
from med3d_nets.class_scores import prediction
from med3d_nets.classification import ClassificationNet
from med3d_nets.contact_sheet import axial_tile, write_contact_sheet
from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import remove_partial, replacing, set_aside
from med3d_nets.heatmap import HeatMapper, heat_picture, on_image, on_own_grid
from med3d_nets.processes import gather_rows, rank
from med3d_nets.results import COMPRESSION, nifti, versions
from med3d_nets.weights import file_sha256

TABLE, SHEET = "predictions.csv", "predictions.png"
REPORT, TILE, MAP, PICTURE = "_class.json", "_class.png", "_heatmap.nii.gz", "_heatmap.png"

Contents = dict[str, "nib.Nifti1Image | bytes"]


class PredictionWriter:
    """Handler of CaseEvaluator that writes what a classifier says of each case, and at the end a table and a picture.

    Per case ``{case}_class.json`` (probability of each class, prediction, what it was made from) and
    ``{case}_class.png``, an axial slice; with heat maps also ``{case}_heatmap.nii.gz``, the evidence for a class on
    the scan's own grid, and ``{case}_heatmap.png``. After the last case ``predictions.csv``, a row for each, and
    ``predictions.png``, a contact sheet. Of several processes the first writes those for the cases of all.

    It expects in the engine's output, after postprocessing, ``pred``: probabilities, (num_classes,), and ``image``: the
    network's input, a MetaTensor in RAS padded at its ends, and in the batch ``size``, its voxels without padding. No
    file is ever half written. When a run starts, table and sheet of an earlier one get the suffix ``.old``; so do the
    files of a case that fails, and heat maps of an earlier run where none are made.

    Args:
        output_dir: folder for the files, made when the first case starts.
        classes: names of the classes by index.
        weights: file of the network's weights, whose hash goes into the reports.
        record: what else the reports tell and shapes a result: the bundle, the spacing and so on.
        network: the ClassificationNet with its own weights, for heat maps; None: no heat maps.
        heatmap_class: the class of the heat maps by name; empty: the most probable of each case.
        multi_label: a case may have several classes.
        sheet_cases: most cases on the contact sheet, the first ones; 0: no sheet.
        skip_finished: leave a case out whose files are all there and were made from the same image by the same weights
            and settings.

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
        self.output_dir = Path(output_dir).expanduser()
        self.classes = list(classes)
        self.heatmap_class = str(heatmap_class)
        if self.heatmap_class and self.heatmap_class not in self.classes:
            raise InputError(
                f"heatmap_class='{heatmap_class}': the classes are {', '.join(self.classes)}; empty takes the most "
                "probable one."
            )
        self.weights = weights
        self.mapper = None if network is None else HeatMapper(network)
        heat = {"heatmap": self.mapper is not None, "heatmap_class": self.heatmap_class}
        self.record = {**record, "classes": self.classes, "multi_label": multi_label, **heat}
        self.multi_label = multi_label
        self.sheet_cases = int(sheet_cases)
        self.skip_finished = skip_finished
        self._sha256 = ""
        self._origin: dict[str, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(CaseEvents.CASES_STARTED, self._start)
        engine.add_event_handler(Events.STARTED, self._note_origin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.CASE_FAILED, self._set_aside)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

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
        contents: Contents = {}
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
        self._write(case, {**report, "versions": versions()}, contents)
        told = ", ".join(f"{name} {p:.3f}" for name, p in by_name.items())
        print(f"  {case}: {report['prediction']} ({told})", flush=True)

    def _write(self, case: str, report: dict[str, Any], contents: Contents) -> None:
        """All files, or none if one cannot be written; the report names the others with their sizes in bytes."""
        sizes = {}
        with contextlib.ExitStack() as files:
            for ending, content in contents.items():
                path = self._path(case, ending)
                hidden = files.enter_context(replacing(path))
                if isinstance(content, bytes):
                    hidden.write_bytes(content)
                else:
                    with igzip.open(hidden, "wb", compresslevel=COMPRESSION) as stream:
                        content.to_stream(stream)
                sizes[path.name] = hidden.stat().st_size
            hidden = files.enter_context(replacing(self._path(case, REPORT)))
            hidden.write_bytes(f"{json.dumps({**report, 'files': sizes}, indent=2)}\n".encode())
        for ending in (MAP, PICTURE):
            if ending not in contents:
                set_aside(self._path(case, ending))

    def _start(self, engine: Engine) -> None:
        """Make the folder, tidy it, and leave finished cases out."""
        state: Any = engine.state
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            for name in (TABLE, SHEET) if rank() == 0 else ():
                set_aside(self.output_dir / name)
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: nothing can be written to this output_dir ({error.strerror}). "
                "Give a folder that can be written."
            ) from error
        if self.skip_finished:
            state.skipped |= {one["case"] for one in state.cases if self._is_finished(one)}
        cases = [one["case"] for one in state.cases if one["case"] not in state.skipped]
        endings = (REPORT, TILE, MAP, PICTURE)
        remove_partial(self.output_dir, {self._path(case, ending).name for case in cases for ending in endings})

    def _is_finished(self, case: Mapping[str, Any]) -> bool:
        report = read_report(self._path(case["case"], REPORT))
        return report is not None and is_finished(report, self._origin_of(case["image"]), self.output_dir)

    def _note_origin(self, engine: Engine) -> None:
        """The image as it is when the case begins: if it changes later, its result is not taken for finished."""
        self._origin = self._origin_of(engine.state.item["image"])  # type: ignore[attr-defined]

    def _origin_of(self, image: str) -> dict[str, Any]:
        self._sha256 = self._sha256 or file_sha256(self.weights)
        return origin_of(image, {**self.record, "weights_sha256": self._sha256})

    def _set_aside(self, engine: Engine) -> None:
        """Results of an earlier run must not look like those of the failed one."""
        for ending in (REPORT, TILE, MAP, PICTURE):
            set_aside(self._path(engine.state.case, ending))  # type: ignore[attr-defined]

    def _finish(self, engine: Engine) -> None:
        """Write table and sheet of all cases of all processes."""
        state: Any = engine.state
        mine = []
        for one in state.cases:
            case, what = one["case"], status(one["case"], state.failed, state.skipped)
            report = None if what == FAILED else read_report(self._path(case, REPORT))
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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *(f"p_{name}" for name in classes), "prediction", "status", "reason"])
    for case, what, reason, report in rows:
        if report is None:
            writer.writerow([case, *[""] * len(classes), "", what, reason])
        else:
            values = [f"{report['probabilities'][name]:.6f}" for name in classes]
            writer.writerow([case, *values, report["prediction"], what, reason])
    return text.getvalue()
