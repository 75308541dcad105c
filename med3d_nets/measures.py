"""Volumes of a mask's labels, and what should make its user careful."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

_SIDES = {"L": "left", "R": "right", "P": "posterior", "A": "anterior", "I": "inferior", "S": "superior"}

_OPPOSITE = dict(zip("LRPAIS", "RLAPSI", strict=True))

Profiles = list[NDArray[np.int64]]


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
