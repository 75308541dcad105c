"""What a user gets of a case: the mask on the input's own grid, its measures as JSON, and a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from nibabel.processing import resample_from_to
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from med3d_nets.archive import summary_row, write_summary
from med3d_nets.case_writer import CaseWriter, versions
from med3d_nets.measures import measure
from med3d_nets.preview import WINDOW_HU, render_preview
from med3d_nets.processes import gather_rows, rank

SUMMARY = "summary.csv"
_USED = ("image", "pred", "pred_probabilities")  # of the engine's output
_ENDINGS = (".json", ".nii.gz", ".png", "_prob.nii.gz")


class SegmentationWriter(CaseWriter):
    """Handler of CaseEvaluator that writes ``{case}_seg.nii.gz``, ``{case}_seg.json`` and ``{case}_seg.png``.

    It expects in the engine's output, after postprocessing, ``pred``: the label map on the input's own grid,
    shape (1, X, Y, Z), and ``image``: the network's input, RAS, shape (1, X', Y', Z'), both MetaTensors. With
    ``pred_probabilities``, (C, X, Y, Z), there is also ``{case}_seg_prob.nii.gz``: the classes along the fourth axis,
    in 256 steps. After several cases there is ``summary.csv`` with a row for each, of several processes for all.

    Args:
        output_dir: see CaseWriter.
        labels: name of each label value, for example ``{"1": "left lung", "2": "right lung"}``.
        hu_window: HU that are 0 and 1 in ``image``, for the picture; None where it is not scaled HU.
        weights: see CaseWriter.
        bundle: name and version of the bundle, for the JSON.
        volume_range_ml: plausible volume of all labels together in mL; outside there is a warning. None: any is.
        max_spacing_mm: largest voxel size without a warning.
        mean_hu: tell the mean HU of each label, too: at the network's spacing and clipped to ``hu_window``.
        picture_hu: HU that are black and white in the picture, where ``hu_window`` is given.
        suffix: of the files' names.
        extra: what else the JSON tells.
        settings: what else shapes a result, for the JSON.
        skip_finished: see CaseWriter.
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Mapping[str, str],
        hu_window: Sequence[float] | None,
        weights: str | Path,
        bundle: Mapping[str, str],
        volume_range_ml: Sequence[float] | None = (500.0, 10_000.0),
        max_spacing_mm: float = 5.0,
        mean_hu: bool = False,
        picture_hu: Sequence[float] = WINDOW_HU,
        suffix: str = "seg",
        extra: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        skip_finished: bool = False,
    ) -> None:
        self.labels = {int(value): name for value, name in labels.items()}
        self.hu_window = hu_window
        self.volume_range_ml = volume_range_ml
        self.max_spacing_mm = max_spacing_mm
        self.mean_hu = mean_hu
        self.picture_hu = None if hu_window is None else picture_hu
        self.suffix = suffix
        self.extra = dict(extra or {})
        shaping = {"labels": {name: value for value, name in self.labels.items()}, **(settings or {})}
        made_by = {"bundle": dict(bundle), "settings": shaping}
        super().__init__(output_dir, weights, made_by, [SUMMARY], skip_finished)

    def __call__(self, engine: Engine) -> None:
        """Have the files of the current case written."""
        state: Any = engine.state
        output = {key: state.output[0][key].cpu() for key in _USED if key in state.output[0]}
        seconds = round(time.perf_counter() - state.started, 3)
        state.write = partial(self._write_case, state.case, output, self._origin, seconds)

    def _write_case(self, case: str, output: Mapping[str, Any], origin: Mapping[str, Any], seconds: float) -> None:
        image, pred = output["image"], output["pred"]
        mask = pred[0].numpy().astype(np.uint8)
        affine = _own_affine(image, pred)
        measures = measure(mask, affine, self.labels, self.volume_range_ml, self.max_spacing_mm)
        written = nifti(mask, affine)
        values, seen = self._seen(image, written)
        if self.mean_hu:
            for one in measures["labels"].values():
                inside = values[seen == one["value"]]
                one["mean_hu"] = round(float(inside.mean()), 1) if inside.size else None
        report = {
            "case": case,
            **origin,
            "mask": self._path(case, ".nii.gz").name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": seconds,
            **self.extra,
            **measures,
        }
        contents: dict[str, nib.Nifti1Image | bytes] = {
            ".nii.gz": written,
            ".png": self._picture(values, seen, nib.affines.voxel_sizes(image.affine.numpy()).tolist(), measures, case),
        }
        if "pred_probabilities" in output:
            contents["_prob.nii.gz"] = _probabilities(output["pred_probabilities"], affine)
        named = {self._path(case, ending).name: content for ending, content in contents.items()}
        self._write_files(case, {**report, "versions": versions()}, named)
        volumes = ", ".join(f"{name} {one['volume_ml']:,.0f} mL" for name, one in measures["labels"].items())
        lines = [f"{volumes} -> {self._path(case, '.nii.gz')}", *(f"warning: {one}" for one in measures["warnings"])]
        print("\n".join(f"  {case}: {line}" for line in lines), flush=True)

    def _finish(self, engine: Engine) -> None:
        state: Any = engine.state
        mine = [summary_row(one, state, self._report_of(one["case"])) for one in state.cases]
        rows = gather_rows(mine)
        if rank() == 0 and len(rows) > 1:
            write_summary(self.output_dir / SUMMARY, rows, list(self.labels.values()))

    def _files_of(self, case: str) -> list[Path]:
        return [self._path(case, ending) for ending in _ENDINGS]

    def _path(self, case: str, ending: str) -> Path:
        return self.output_dir / f"{case}_{self.suffix}{ending}"

    def _seen(self, image: MetaTensor, written: nib.Nifti1Image) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The network's input in HU, without its padding, and the mask as written, brought there by the affines."""
        low, high = self.hu_window or (0.0, 1.0)
        ahead = nib.Nifti1Image(np.asarray(written.dataobj) + np.uint8(1), written.affine)  # 0 is beyond the input
        moved = resample_from_to(ahead, (image.shape[1:], image.affine.numpy()), order=0, mode="grid-constant")
        found = np.asarray(moved.dataobj)
        box = find_objects(np.minimum(found, 1))[0]
        return image[0].numpy()[box] * (high - low) + low, np.maximum(found[box], 1) - np.uint8(1)

    def _picture(
        self,
        values: NDArray[np.float32],
        seen: NDArray[np.uint8],
        spacing: Sequence[float],
        measures: dict[str, Any],
        case: str,
    ) -> bytes:
        """Image and mask on the network's grid: a wrong place would show."""
        volumes = [f"{name}  {one['volume_ml']:,.0f} mL" for name, one in measures["labels"].items()]
        return render_preview(
            values,
            seen,
            spacing,
            dict(zip(self.labels, volumes, strict=True)),
            f"{case}: {measures['total_volume_ml']:,.0f} mL",
            measures["warnings"],
            self.picture_hu,
        )


def _own_affine(image: MetaTensor, pred: MetaTensor) -> NDArray[np.float64]:
    """The input's affine as read, without the rounding on the way to the network's grid and back."""
    affine = np.asarray(image.meta["original_affine"], dtype=np.float64)
    if not np.allclose(pred.affine, affine, atol=1e-3):
        raise ValueError("pred is not on the input's grid; postprocessing must bring it there (NativeLabelsd)")
    return affine


def _probabilities(values: torch.Tensor, affine: NDArray[np.float64]) -> nib.Nifti1Image:
    """Probabilities, (C, X, Y, Z), as NIfTI of (X, Y, Z, C); nibabel scales them to 256 steps."""
    return nifti(values.cpu().permute(1, 2, 3, 0).numpy(), affine)


def nifti(values: NDArray[Any], affine: NDArray[np.float64]) -> nib.Nifti1Image:
    """Make a NIfTI image of unsigned bytes in scanner space.

    Args:
        values: (X, Y, Z) or (X, Y, Z, C); other numbers than bytes are scaled to 256 steps when it is written.
        affine: voxel index to mm in RAS, 4 × 4; its shear stays in the sform.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    image = nib.Nifti1Image(values, affine, header)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None, code="unknown")  # a quaternion cannot hold the shear of a tilted gantry
    image.header.set_xyzt_units("mm")
    return image
