"""What a user gets of a case: the mask on the input's own grid, its measures as JSON, and a picture."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from isal import igzip
from monai.data import MetaTensor
from nibabel.processing import resample_from_to
from numpy.typing import NDArray
from scipy.ndimage import find_objects

import med3d_nets
from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing
from med3d_nets.preview import WINDOW_HU, render_preview
from med3d_nets.weights import file_sha256

COMPRESSION = 2  # of ISA-L, 0 to 3
_SIDES = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "I": "inferior", "S": "superior"}

_OPPOSITE = dict(zip("LRPAIS", "RLAPSI", strict=True))


class SegmentationWriter:
    """Handler of CaseEvaluator that writes ``{case}_seg.nii.gz``, ``{case}_seg.json`` and ``{case}_seg.png``.

    It expects in the engine's output, after postprocessing, ``pred``: the label map on the input's own grid,
    shape (1, X, Y, Z), and ``image``: the network's input, RAS, shape (1, X', Y', Z'), both MetaTensors. With
    ``pred_probabilities``, (C, X, Y, Z), there is also ``{case}_seg_prob.nii.gz``: the classes along the fourth axis,
    in 256 steps.
    No file is ever half written. If a case fails, files of an earlier run under its name get the suffix
    ``.old``.

    Args:
        output_dir: folder for the files, made when the first case starts.
        labels: name of each label value, for example ``{"1": "left lung", "2": "right lung"}``.
        hu_window: HU that are 0 and 1 in ``image``, for the picture; None where it is not scaled HU.
        weights: file of the network's weights, whose hash goes into the JSON.
        bundle: name and version of the bundle, for the JSON.
        volume_range_ml: plausible volume of all labels together in mL; outside there is a warning. None: any is.
        max_spacing_mm: largest voxel size without a warning.
        suffix: of the files' names.
        extra: what else the JSON tells.
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
        suffix: str = "seg",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.labels = {int(value): name for value, name in labels.items()}
        self.hu_window = hu_window
        self.weights = weights
        self.bundle = dict(bundle)
        self.volume_range_ml = volume_range_ml
        self.max_spacing_mm = max_spacing_mm
        self.suffix = suffix
        self.extra = dict(extra or {})
        self._sha256 = ""

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(Events.STARTED, self._make_folder)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.CASE_FAILED, self._set_aside)

    def __call__(self, engine: Engine) -> None:
        """Write the three files of the current case."""
        case, output = engine.state.case, engine.state.output[0]  # type: ignore[attr-defined,index]
        image, pred = output["image"].cpu(), output["pred"].cpu()
        mask = pred[0].numpy().astype(np.uint8)
        affine = _own_affine(image, pred)
        measures = measure(mask, affine, self.labels, self.volume_range_ml, self.max_spacing_mm)
        report = {
            "case": case,
            "image": str(image.meta.get("filename_or_obj", "")),
            "mask": self._path(case, ".nii.gz").name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.extra,
            **measures,
            **self._origin(),
        }
        written = nifti(mask, affine)
        contents: dict[str, nib.Nifti1Image | bytes] = {
            ".nii.gz": written,
            ".json": f"{json.dumps(report, indent=2)}\n".encode(),
            ".png": self._picture(image, written, measures, case),
        }
        if "pred_probabilities" in output:
            contents["_prob.nii.gz"] = _probabilities(output["pred_probabilities"], affine)
        self._write(case, contents)
        volumes = ", ".join(f"{name} {one['volume_ml']:,.0f} mL" for name, one in measures["labels"].items())
        print(f"  {volumes} -> {self._path(case, '.nii.gz')}")
        for warning in measures["warnings"]:
            print(f"  warning: {warning}")

    def _make_folder(self, engine: Engine) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: this output_dir cannot be made ({error.strerror}). "
                "Give a folder that can be written."
            ) from error

    def _set_aside(self, engine: Engine) -> None:
        """Results of an earlier run must not look like those of the failed one."""
        for ending in (".nii.gz", ".json", ".png", "_prob.nii.gz"):
            _set_aside(self._path(engine.state.case, ending))  # type: ignore[attr-defined]

    def _path(self, case: str, ending: str) -> Path:
        return self.output_dir / f"{case}_{self.suffix}{ending}"

    def _origin(self) -> dict[str, Any]:
        self._sha256 = self._sha256 or file_sha256(self.weights)
        return {
            "bundle": self.bundle,
            "weights_sha256": self._sha256,
            "versions": versions(),
        }

    def _picture(self, image: MetaTensor, written: nib.Nifti1Image, measures: dict[str, Any], case: str) -> bytes:
        """The mask as written, brought onto the image's grid by the affines: a wrong place would show."""
        low, high = self.hu_window or (0.0, 1.0)
        affine = image.affine.numpy()
        ahead = nib.Nifti1Image(np.asarray(written.dataobj) + np.uint8(1), written.affine)  # 0 is beyond the input
        moved = resample_from_to(ahead, (image.shape[1:], affine), order=0, mode="grid-constant")
        found = np.asarray(moved.dataobj)
        box = find_objects(np.minimum(found, 1))[0]  # without the network's padding
        volumes = [f"{name}  {one['volume_ml']:,.0f} mL" for name, one in measures["labels"].items()]
        return render_preview(
            image[0].numpy()[box] * (high - low) + low,
            np.maximum(found[box], 1) - np.uint8(1),
            nib.affines.voxel_sizes(affine),
            dict(zip(self.labels, volumes, strict=True)),
            f"{case}: {measures['total_volume_ml']:,.0f} mL",
            measures["warnings"],
            None if self.hu_window is None else WINDOW_HU,
        )

    def _write(self, case: str, contents: Mapping[str, nib.Nifti1Image | bytes]) -> None:
        """All files, or none if one cannot be written."""
        with contextlib.ExitStack() as files:
            for ending, content in contents.items():
                hidden = files.enter_context(replacing(self._path(case, ending)))
                if isinstance(content, bytes):
                    hidden.write_bytes(content)
                else:
                    with igzip.open(hidden, "wb", compresslevel=COMPRESSION) as stream:
                        content.to_stream(stream)
            if "_prob.nii.gz" not in contents:
                _set_aside(self._path(case, "_prob.nii.gz"))


def _set_aside(path: Path) -> None:
    if path.exists():
        os.replace(path, f"{path}.old")


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "med3d_nets": med3d_nets.__version__,
        "monai": monai.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure(
    mask: NDArray[np.uint8],
    affine: NDArray[np.float64],
    labels: Mapping[int, str],
    volume_range_ml: Sequence[float] | None = (500.0, 10_000.0),
    max_spacing_mm: float = 5.0,
) -> dict[str, Any]:
    """Measure a mask, and tell what should make its user careful.

    Args:
        mask: label values, shape (X, Y, Z).
        affine: from voxel index to mm in RAS, 4 × 4.
        labels: name of each label value; "left …" and "right …" are taken for a pair.
        volume_range_ml: plausible volume of all labels together; None: any is.
        max_spacing_mm: largest voxel size without a warning.

    Returns:
        ``shape``, ``spacing_mm``, ``orientation`` (nibabel's axis codes), ``labels`` (by name: value, voxels,
        volume_ml), ``total_volume_ml``, ``warnings``.
    """
    voxel_ml = float(abs(np.linalg.det(affine[:3, :3]))) / 1000
    spacing = nib.affines.voxel_sizes(affine)
    # voxels of each label in every slice along the three axes: size, place and borders follow from these
    profiles = {name: _profiles(mask == value) for value, name in labels.items()}
    voxels = {name: int(along[0].sum()) for name, along in profiles.items()}
    total = sum(voxels.values()) * voxel_ml
    warnings = [f"no voxel of {name} found" for name, count in voxels.items() if not count]
    warnings += _border_warnings(profiles, affine)
    warnings += _side_warnings(profiles, affine)
    low, high = volume_range_ml or (0.0, math.inf)
    if not low <= total <= high:
        warnings.append(f"the total volume of {total:,.0f} mL is implausible (usual are {low:,.0f} to {high:,.0f} mL)")
    if spacing.max() > max_spacing_mm + 1e-3:
        warnings.append(f"slices {spacing.max():.1f} mm apart: borders are uncertain above {max_spacing_mm:g} mm")
    return {
        "shape": list(mask.shape),
        "spacing_mm": [round(float(s), 5) for s in spacing],
        "orientation": "".join(nib.aff2axcodes(affine)),
        "labels": {
            name: {"value": value, "voxels": voxels[name], "volume_ml": round(voxels[name] * voxel_ml, 2)}
            for value, name in labels.items()
        },
        "total_volume_ml": round(total, 2),
        "warnings": warnings,
    }


Profiles = list[NDArray[np.int64]]


def _profiles(region: NDArray[np.bool_]) -> Profiles:
    return [region.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]


def _border_warnings(profiles: Mapping[str, Profiles], affine: NDArray[np.float64]) -> list[str]:
    found = []
    ends = nib.aff2axcodes(affine)
    starts = [_OPPOSITE[end] for end in ends]
    for name, along in profiles.items():
        sides = [_SIDES[starts[axis]] for axis in range(3) if along[axis][0]]
        sides += [_SIDES[ends[axis]] for axis in range(3) if along[axis][-1]]
        if sides:
            words = ", ".join(sorted(sides))
            found.append(f"{name} touches the border of the image ({words}): its volume may be incomplete")
    return found


def _side_warnings(profiles: Mapping[str, Profiles], affine: NDArray[np.float64]) -> list[str]:
    """Left and right organs whose centres of mass, along the patient's right, are in the wrong order."""
    found = []
    for name in profiles:
        other = name.replace("left ", "right ", 1)
        if other == name or other not in profiles or not profiles[name][0].any() or not profiles[other][0].any():
            continue
        if _centre(profiles[name], affine)[0] >= _centre(profiles[other], affine)[0]:
            found.append(f"{name} is not on the left of {other}: check the orientation of the image")
    return found


def _centre(along: Profiles, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centre of mass in mm, RAS."""
    index = [np.average(np.arange(len(counts)), weights=counts) for counts in along]
    return affine[:3, :3] @ index + affine[:3, 3]


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
