"""Where a nodule may lie: inside a lung, off the mediastinum, apart from others, in tissue that holds air."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tools.lung_labels import LEFT, RIGHT

OFF_MEDIASTINUM_MM = 12.0
APART_MM = 12.0
AT_PLEURA = 0.3  # share of nodules that may touch the pleura, as LIDC's do
AIRY_HU = -600.0
Spacing = tuple[float, float, float]


class Places:
    """Places of one scan.

    Args:
        hu: HU, (X, Y, Z), axes to the right, front and head.
        lungs: 1 left lung, 2 right lung, same shape.
        spacing: mm.
    """

    def __init__(self, hu: NDArray[np.float32], lungs: NDArray[np.uint8], spacing: Spacing) -> None:
        self.step = np.array(spacing)
        self.lungs = lungs > 0
        self.depth = ndimage.distance_transform_edt(self.lungs, sampling=spacing)
        inner = mediastinum(lungs)
        self.off = ndimage.distance_transform_edt(~inner, sampling=spacing) if inner.any() else None
        self.air = ndimage.gaussian_filter(hu, [2.0 / s for s in spacing]) < AIRY_HU

    def draw(
        self, radius: float, taken: Sequence[tuple[NDArray[np.float64], float]], rng: np.random.Generator
    ) -> NDArray[np.int64] | None:
        """Draw a place for a nodule.

        Args:
            radius: mm.
            taken: middles (voxels) and radii (mm) of what is there already.
            rng: of the place.

        Returns:
            Voxel of its middle, None where the lungs have no room.
        """
        deepest = radius + 1.0 if rng.random() >= AT_PLEURA else max(2.0, 0.6 * radius)
        free = (self.depth >= deepest) & self.air
        if self.off is not None:
            free &= self.off >= radius + OFF_MEDIASTINUM_MM
        return self._draw(free, radius, taken, rng)

    def draw_mass(
        self, radius: float, taken: Sequence[tuple[NDArray[np.float64], float]], rng: np.random.Generator
    ) -> NDArray[np.int64] | None:
        """Draw a place for a mass: with a broad base on the lung's border, its middle inside; see ``draw``."""
        free = (self.depth >= 0.2 * radius) & (self.depth <= 0.8 * radius) & self.air
        return self._draw(free, radius, taken, rng)

    def _draw(
        self,
        free: NDArray[np.bool_],
        radius: float,
        taken: Sequence[tuple[NDArray[np.float64], float]],
        rng: np.random.Generator,
    ) -> NDArray[np.int64] | None:
        found = np.flatnonzero(free)
        for _ in range(200 if len(found) else 0):
            voxel = np.array(np.unravel_index(rng.choice(found), free.shape))
            near = (np.linalg.norm((voxel - m) * self.step) < radius + r + APART_MM for m, r in taken)
            to_border = np.minimum(voxel, np.array(free.shape) - 1 - voxel) * self.step
            if to_border.min() >= radius and not any(near):
                return voxel
        return None


def mediastinum(lungs: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """What lies between the lungs: on a line from right to left behind one of them and before the other."""
    along = []
    for side in (LEFT, RIGHT):
        own = lungs == side
        towards = np.maximum.accumulate(own, axis=0), np.maximum.accumulate(own[::-1], axis=0)[::-1]
        along.append(towards)
    (left_from_low, left_from_high), (right_from_low, right_from_high) = along
    between = (left_from_low & right_from_high) | (right_from_low & left_from_high)
    return between & (lungs == 0)
