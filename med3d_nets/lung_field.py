"""Where lungs are in a CT, roughly and without a network: the part of a scan in which nodules are looked for.

Gas inside the body that is no bowel gas, its gaps of up to ``CLOSE_MM`` closed (vessels, nodules, masses at the wall)
and grown by ``GROW_MM``. It is generous on purpose; for a mask of the lungs use the lung bundle.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

GAS_HU = -400.0
PURE_AIR_HU = -945.0  # the median of lungs is above, of the air around a body and in bowel below
EDGE_MM = 4.0  # of the voxels that this looks at
LEAST_ML = 15.0
CLOSE_MM, GROW_MM = 16.0, 4.0


class CropLungsd(MapTransform):
    """Crop a CT to its lungs, with a margin, and add where they are.

    Args:
        keys: the image in HU, a MetaTensor (1, X, Y, Z).
        field_key: where the field goes, uint8, (1, X, Y, Z) of the cropped image: 1 where nodules are looked for.
        margin_mm: what is kept around the field. Where no lung is found, the image stays whole and the field is 0.
    """

    def __init__(
        self,
        keys: KeysCollection,
        field_key: str = "field",
        margin_mm: float = 10.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.field_key = field_key
        self.margin_mm = margin_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the image cropped, its affine moved along, and the field."""
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            spacing = nib.affines.voxel_sizes(np.asarray(image.affine))
            field = lung_field(image[0].as_tensor(), spacing.tolist())
            place = self._box(field, spacing)
            affine = np.asarray(image.affine, dtype=np.float64).copy()
            affine[:3, 3] = nib.affines.apply_affine(affine, [part.start for part in place])
            meta = {name: value for name, value in image.meta.items() if name != "affine"}
            x, y, z = place
            values = image.as_tensor()[:, x, y, z].clone()
            d[key] = MetaTensor(values, affine=torch.as_tensor(affine), meta=meta)
            d[self.field_key] = torch.from_numpy(field[x, y, z].copy())[None]
        return d

    def _box(self, field: NDArray[np.uint8], spacing: NDArray[np.float64]) -> tuple[slice, ...]:
        found = ndimage.find_objects(field)
        if not found:
            return tuple(slice(0, n) for n in field.shape)
        margins = [round(self.margin_mm / step) for step in spacing]
        return tuple(
            slice(max(0, part.start - margin), min(n, part.stop + margin))
            for part, margin, n in zip(found[0], margins, field.shape, strict=True)
        )


def lung_field(hu: torch.Tensor, spacing: list[float]) -> NDArray[np.uint8]:
    """Find the lungs.

    Args:
        hu: HU, (X, Y, Z), axes towards right, front and head or any other way along the body's axes, the third from
            feet to head.
        spacing: mm.

    Returns:
        uint8 of the same shape: 1 in and around lungs, all 0 where there are none.
    """
    factor = [max(1, round(EDGE_MM / step)) for step in spacing]
    small = F.avg_pool3d(hu.float()[None, None], factor, ceil_mode=True)[0, 0].numpy()
    step = [f * s for f, s in zip(factor, spacing, strict=True)]
    lungs = _lung_pieces(small, step)
    if not lungs.any():
        return np.zeros(tuple(hu.shape), np.uint8)
    reach = round(CLOSE_MM / min(step)) + 1
    inner = slice(reach, -reach)
    away = ndimage.distance_transform_edt(~np.pad(lungs, reach), sampling=step) > CLOSE_MM
    closed = ndimage.distance_transform_edt(~away, sampling=step)[inner, inner, inner] > CLOSE_MM - GROW_MM
    for axis, f in enumerate(factor):
        closed = np.repeat(closed, f, axis=axis).take(range(hu.shape[axis]), axis)
    return closed.astype(np.uint8)


def _lung_pieces(hu: NDArray[np.float32], step: list[float]) -> NDArray[np.bool_]:
    """Pieces of gas that are neither around the body, nor padding, nor pure air, nor small."""
    pieces, count = ndimage.label(hu < GAS_HU)
    if not count:
        return np.zeros(hu.shape, bool)
    index = np.arange(1, count + 1)
    medians = ndimage.median(hu, pieces, index)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:] * np.prod(step) / 1000
    return np.isin(pieces, index[(medians > PURE_AIR_HU) & (sizes >= LEAST_ML)])
