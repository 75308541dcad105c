"""Scores of one region against its reference: overlap, volume and distances of surfaces.

Distances and overlap are MONAI's; a surface is the voxels at the border of a region. ``voe`` to ``rmsd_mm`` are those
of the LiTS challenge (Bilic 2023, Medical Image Analysis 84).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import nibabel as nib
import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from monai.metrics.utils import get_edge_surface_distance
from monai.transforms import generate_spatial_bounding_box

from med3d_nets.errors import InputError

Scores = dict[str, float]


@dataclass(frozen=True)
class Regions:
    """A predicted region and its reference, both with voxels, in their common box and one voxel around it.

    Args:
        pred: bool, shape (1, 1, X, Y, Z).
        label: likewise.
        spacing: mm.
        tolerance_mm: of the surface Dice.
    """

    pred: torch.Tensor
    label: torch.Tensor
    spacing: Sequence[float]
    tolerance_mm: float

    @cached_property
    def distances(self) -> torch.Tensor:
        """From each surface voxel of both regions to the other's surface, mm."""
        found = get_edge_surface_distance(self.pred[0, 0], self.label[0, 0], spacing=self.spacing, symmetric=True)[1]
        return torch.cat([one.double() for one in found])


@dataclass(frozen=True)
class Metric:
    """A score.

    Args:
        of: computes it for two regions with voxels.
        missed: its value where only one of the regions has voxels; None: the diagonal of the volume in mm, for a
            distance that would be infinite.
        worst: of several values, which is the worst.
    """

    of: Callable[[Regions], float]
    missed: float | None
    worst: Callable[[Iterable[float]], float] = max


def _largest(values: Iterable[float]) -> float:
    return max(values, key=abs)


def _volume_difference(regions: Regions) -> float:
    true = int(regions.label.sum())
    return (int(regions.pred.sum()) - true) / true


def _surface_dice(regions: Regions) -> float:
    tolerance, spacing = [regions.tolerance_mm], list(regions.spacing)
    return float(compute_surface_dice(regions.pred, regions.label, tolerance, include_background=True, spacing=spacing))


def _hausdorff95(regions: Regions) -> float:
    spacing = list(regions.spacing)
    return float(
        compute_hausdorff_distance(regions.pred, regions.label, include_background=True, percentile=95, spacing=spacing)
    )


METRICS = {
    "dice": Metric(lambda r: float(compute_dice(r.pred, r.label, include_background=True)), 0.0, min),
    "surface_dice": Metric(_surface_dice, 0.0, min),
    "hd95_mm": Metric(_hausdorff95, None),
    "voe": Metric(lambda r: 1 - float(compute_iou(r.pred, r.label, include_background=True)), 1.0),
    "rvd": Metric(_volume_difference, -1.0, _largest),
    "assd_mm": Metric(lambda r: float(r.distances.mean()), None),
    "mssd_mm": Metric(lambda r: float(r.distances.max()), None),
    "rmsd_mm": Metric(lambda r: float(r.distances.square().mean().sqrt()), None),
}
"""``dice`` and ``surface_dice`` (0 to 1), 95 % Hausdorff distance, volume overlap error (1 - Jaccard index), relative
volume difference (of the reference's, signed), and mean, maximum and root mean square of the symmetric surface
distance."""

USUAL = ("dice", "surface_dice", "hd95_mm")


def score(
    pred: torch.Tensor,
    label: torch.Tensor,
    affine: np.ndarray,
    tolerance_mm: float = 2.0,
    metrics: Sequence[str] = USUAL,
) -> Scores:
    """Score one class of one case.

    A class that is in neither has undefined (NaN) scores. One that is in only one of them has the worst overlap, and
    its distances, which would be infinite, count as the diagonal of the volume, so that means stay finite. The
    relative volume difference to no volume is undefined.

    Args:
        pred: predicted region, bool, shape (X, Y, Z).
        label: reference region, bool, same shape.
        affine: from voxel index to mm, 4 × 4; distances use the lengths of its columns, without shear.
        tolerance_mm: distance up to which a border voxel is right for the surface Dice.
        metrics: names of ``METRICS``.

    Returns:
        The metrics, ``predicted_ml``, ``true_ml``, ``predicted_voxels`` and ``true_voxels``.

    Raises:
        InputError: an unknown metric.
    """
    check(metrics)
    spacing = nib.affines.voxel_sizes(affine)
    voxel_ml = float(abs(np.linalg.det(affine[:3, :3]))) / 1000
    predicted, true = int(pred.sum()), int(label.sum())
    sizes = {"predicted_ml": predicted * voxel_ml, "true_ml": true * voxel_ml}
    sizes |= {"predicted_voxels": predicted, "true_voxels": true}
    if not predicted and not true:
        return {**dict.fromkeys(metrics, math.nan), **sizes}
    if not predicted or not true:
        diagonal = float(np.linalg.norm(np.array(pred.shape) * spacing))
        missed = {name: diagonal if METRICS[name].missed is None else METRICS[name].missed for name in metrics}
        if "rvd" in missed and not true:
            missed["rvd"] = math.nan
        return {**missed, **sizes}  # type: ignore[dict-item]
    start, end = generate_spatial_bounding_box((pred | label)[None], margin=1, allow_smaller=True)
    box = (None, None, *(slice(low, high) for low, high in zip(start, end, strict=True)))
    regions = Regions(pred[box], label[box], spacing.tolist(), tolerance_mm)  # surfaces of all would take gigabytes
    return {**{name: METRICS[name].of(regions) for name in metrics}, **sizes}


def check(metrics: Sequence[str]) -> None:
    """Raise an InputError for metrics that do not exist."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise InputError(f"metrics={list(metrics)}: allowed are {', '.join(METRICS)}.")


def global_dice(scores: Iterable[Scores]) -> float:
    """Dice of all cases' voxels together; NaN where no case has the class.

    Args:
        scores: of one class, with ``dice``.
    """
    common = total = 0.0
    for one in scores:
        voxels = one["predicted_voxels"] + one["true_voxels"]
        total += voxels
        common += one["dice"] * voxels if voxels else 0.0
    return common / total if total else math.nan
