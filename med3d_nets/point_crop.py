"""A cube around a point of a scan, or around the middle of a crop, at one voxel size."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample
from numpy.typing import NDArray

from med3d_nets.errors import InputError
from med3d_nets.inputs import LoadVolumed
from med3d_nets.preparation import check_spacing

_logger = logging.getLogger(__name__)


class LoadScand(MapTransform):
    """LoadVolumed that keeps the last scan, because the points of one scan follow each other.

    What follows in the pipeline must not write into the volume; ``CropAtPointd`` does not.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self._load = LoadVolumed("image")
        self._last: tuple[str, Any] = ("", None)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load each key's path.

        Raises:
            InputError: see LoadVolumed.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            path = str(d[key])
            if self._last[0] != path:
                self._last = ("", None)  # frees the one before while the next is read
                self._last = (path, self._load({"image": path})["image"])
            d[key] = self._last[1]
        return d


class CropAtPointd(MapTransform):
    """Cut a cube around a point and resample it (trilinear), axes to the patient's right, front and head (RAS).

    What lies outside the scan gets the value ``outside``: the crops of LIDC end where the nodule ends, and beyond it is
    lung more often than anything else.

    Args:
        keys: the scan, a MetaTensor (1, X, Y, Z) with its affine in RAS mm.
        spacing: voxel size in mm.
        size: voxels of the cube along the three axes.
        outside: intensity outside the scan, in the scan's unit (HU).
        air: warn where the median within 5 mm of the point is below this, for outside the body it is; None: never.

    An item may have ``point`` (mm, RAS), without which the middle of the scan is taken, and ``where``, what to call
    the point in messages. It gets ``warning``, text.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float],
        size: Sequence[int],
        outside: float = -850.0,
        air: float | None = -960.0,
    ) -> None:
        super().__init__(keys)
        self.spacing = check_spacing(spacing)
        self.size = [int(n) for n in size]
        if len(self.size) != 3 or min(self.size) < 1:
            raise InputError(f"size={size!r}: needed are three numbers of voxels, for example [40, 40, 32].")
        self.outside = float(outside)
        self.air = air
        self._resample = SpatialResample(mode="bilinear", padding_mode="zeros")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop each key's scan.

        Raises:
            InputError: the point is outside the scan.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            scan = d[key]
            affine = np.asarray(scan.affine, dtype=np.float64)
            where = str(d.get("where", scan.meta.get("filename_or_obj", "")))
            point = d.get("point")
            voxel = (np.array(scan.shape[1:]) - 1) / 2 if point is None else _voxel_of(point, affine)
            self._check_inside(where, point, voxel, scan, affine)
            d["warning"] = self._warning(where, scan, voxel, affine)
            centre = affine[:3, :3] @ voxel + affine[:3, 3]
            d[key] = self._cut(scan, centre, affine)
        return d

    def _cut(self, scan: MetaTensor, centre: NDArray[np.float64], affine: NDArray[np.float64]) -> MetaTensor:
        """The cube; of a whole scan only the part around it is resampled."""
        target = np.diag([*self.spacing, 1.0])
        target[:3, 3] = centre - (np.array(self.size) - 1) / 2 * self.spacing
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.size], indexing="ij"), axis=-1).reshape(-1, 3)
        inverse = np.linalg.inv(affine) @ target
        voxels = corners @ inverse[:3, :3].T + inverse[:3, 3]
        low = np.clip(np.floor(voxels.min(axis=0)).astype(int) - 1, 0, None)
        high = np.minimum(np.ceil(voxels.max(axis=0)).astype(int) + 2, scan.shape[1:])
        x, y, z = map(slice, low.tolist(), high.tolist())
        part = torch.as_tensor(scan.as_tensor())[:, x, y, z] - self.outside
        moved = affine.copy()
        moved[:3, 3] = affine[:3, :3] @ low + affine[:3, 3]
        cube = self._resample(
            MetaTensor(part, affine=torch.as_tensor(moved), meta={**scan.meta}),
            dst_affine=torch.as_tensor(target),
            spatial_size=self.size,
        )
        return MetaTensor(torch.as_tensor(cube) + self.outside, affine=torch.as_tensor(target), meta={**scan.meta})

    def _check_inside(
        self, where: str, point: Any, voxel: NDArray[np.float64], scan: MetaTensor, affine: NDArray[np.float64]
    ) -> None:
        size = np.array(scan.shape[1:])
        if point is None or _inside(voxel, size):
            return
        x, y, z = point
        turned = _inside(_voxel_of((-x, -y, z), affine), size)
        corners = np.array([affine[:3, :3] @ corner + affine[:3, 3] for corner in ((0, 0, 0), size - 1)])
        spans = ", ".join(
            f"{name} {low:.0f} to {high:.0f}"
            for name, low, high in zip("xyz", corners.min(axis=0), corners.max(axis=0), strict=True)
        )
        hint = " With the other of LPS and RAS it is inside: give that as space." if turned else ""
        raise InputError(
            f"{where}: the point ({x:.1f}, {y:.1f}, {z:.1f}) mm (RAS) is outside {scan.meta.get('filename_or_obj')}, "
            f"which has {spans} mm.{hint or ' Check the row and its scan.'}"
        )

    def _warning(self, where: str, scan: MetaTensor, voxel: NDArray[np.float64], affine: NDArray[np.float64]) -> str:
        """Text where there is only air around the point."""
        if self.air is None:
            return ""
        reach = np.ceil(5.0 / np.linalg.norm(affine[:3, :3], axis=0)).astype(int)
        low = np.maximum(np.round(voxel).astype(int) - reach, 0)
        x, y, z = map(slice, low.tolist(), (np.round(voxel).astype(int) + reach + 1).tolist())
        middle = float(torch.as_tensor(scan.as_tensor())[0, x, y, z].median())
        if middle >= self.air:
            return ""
        text = f"only air around the point (median {middle:.0f} HU within 5 mm): is it inside the body?"
        _logger.warning("%s: %s", where, text)
        return text


def _voxel_of(point: Sequence[float], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    return (np.linalg.inv(affine) @ np.array([*point, 1.0]))[:3]


def _inside(voxel: NDArray[np.float64], size: NDArray[np.int64]) -> bool:
    return bool((voxel > -0.5).all() and (voxel < size - 0.5).all())
