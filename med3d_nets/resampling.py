"""A scan onto the network's grid: right, anterior, superior, at a voxel size of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Spacing

from med3d_nets.grids import map_between, onto_grid
from med3d_nets.preparation import check_spacing


class ResampleRASd(MapTransform):
    """MONAI's ``Orientationd("RAS")`` and ``Spacingd(mode="bilinear")`` in one step, with their grid and values.

    What goes back to the scan is ``NativeLabelsd``; ``Invertd`` has no trace of this transform.

    Args:
        keys: images, MetaTensors (1, X, Y, Z), float32.
        spacing: voxel size in mm along right-left, anterior-posterior and superior-inferior.

    Raises:
        InputError: the spacing is not three positive numbers.
    """

    def __init__(self, keys: KeysCollection, spacing: Sequence[float], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orientation = Orientation("RAS", labels=None, lazy=True)
        self.spacing = Spacing(check_spacing(spacing), lazy=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the images resampled."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            planned: Any = self.spacing(self.orientation(image))
            affine, shape = planned.peek_pending_affine(), planned.peek_pending_shape()
            matrix = map_between(np.asarray(image.affine), np.asarray(affine), shape)
            values = onto_grid(image.as_tensor(), matrix, shape)
            meta = {name: value for name, value in image.meta.items() if name != "affine"}
            d[key] = MetaTensor(values, affine=affine, meta=meta)
        return d
