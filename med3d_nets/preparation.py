"""What feature extraction and classification do to a volume beside MONAI's own transforms."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch.nn import functional as F

from med3d_nets.errors import InputError
from med3d_nets.inputs import load_volume


class CheckVolumed(MapTransform):
    """Refuse a volume without contrast, or one that is too large at the working spacing; pass others on unchanged.

    Args:
        keys: the image, a MetaTensor (1, X, Y, Z).
        spacing: voxel size in mm to which it will be resampled, along right-left, anterior-posterior and
            superior-inferior.
        max_voxels: most voxels after that; the memory of a pass grows with them.

    Raises:
        InputError: the spacing is not three positive numbers.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: Sequence[float],
        max_voxels: float = 50e6,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spacing = check_spacing(spacing)
        self.max_voxels = float(max_voxels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check each key's image.

        Raises:
            InputError: all voxels are equal, or there would be more than ``max_voxels``.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            name = image.meta.get("filename_or_obj", f"image '{key}'")
            if float(image.min()) == float(image.max()):
                raise InputError(f"{name}: every voxel is {float(image.min()):g}, so there is nothing to see in it.")
            affine = np.asarray(image.affine)
            order = np.argsort(nib.io_orientation(affine)[:, 0])
            extent = (nib.affines.voxel_sizes(affine) * image.shape[1:])[order]
            shape = [round(length / size) or 1 for length, size in zip(extent, self.spacing, strict=True)]
            if np.prod(shape, dtype=float) > self.max_voxels:
                raise InputError(
                    f"{name}: would have {' x '.join(map(str, shape))} voxels of "
                    f"{' x '.join(f'{s:g}' for s in self.spacing)} mm, allowed are {self.max_voxels:g} in all. "
                    "Give a larger spacing, crop the volume, or raise max_voxels if the memory suffices."
                )
        return d


class PadAtEndd(MapTransform):
    """Pad volumes at their ends with zeros to one size, so that they form a batch, and note their own size.

    Zero is the mean of a volume after z-scoring, and what the convolutions see beyond a border anyway.

    Args:
        keys: the image, (1, X, Y, Z), nowhere larger than ``spatial_size``.
        spatial_size: voxels along X, Y and Z.
        size_key: where the size without padding goes, int64, (3,); ClassificationNet leaves the rest out.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        size_key: str = "size",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_size = [int(n) for n in spatial_size]
        self.size_key = size_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pad each key's image.

        Raises:
            ValueError: an image is larger than ``spatial_size``; crop it first.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key])
            missing = [want - have for want, have in zip(self.spatial_size, image.shape[1:], strict=True)]
            if min(missing) < 0:
                raise ValueError(f"image of {tuple(image.shape[1:])} voxels: larger than {tuple(self.spatial_size)}")
            d[self.size_key] = torch.tensor(image.shape[1:])
            d[key] = F.pad(image, [pad for n in reversed(missing) for pad in (0, n)])
        return d


def median_spacing(cases: Iterable[Mapping[str, Any]]) -> list[float]:
    """Per-axis median voxel size of volumes, the paper's working spacing of a domain (arXiv 1904.00625, section 3).

    Every volume is read, which takes a while.

    Args:
        cases: as ``find_cases`` or ``read_labels`` give them.

    Returns:
        Millimetres along right-left, anterior-posterior and superior-inferior, to 1/1000 mm.

    Example:
        >>> median_spacing(find_cases("scans"))  # doctest: +SKIP
        [0.703, 0.703, 1.25]
    """
    spacings = []
    for case in cases:
        affine = np.asarray(load_volume(case["image"]).affine)
        order = np.argsort(nib.io_orientation(affine)[:, 0])
        spacings.append(nib.affines.voxel_sizes(affine)[order])
    if not spacings:
        raise InputError("No case, so no median spacing.")
    return [round(float(value), 3) for value in np.median(spacings, axis=0)]


def check_spacing(spacing: Sequence[float]) -> list[float]:
    """Three voxel sizes in mm as numbers.

    Raises:
        InputError: they are not three positive, finite numbers.
    """
    try:
        sizes = [float(size) for size in spacing]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) != 3 or not all(0 < size < float("inf") for size in sizes):
        raise InputError(f"spacing={spacing!r}: needed are three voxel sizes in mm, for example [1.5, 1.5, 1.5].")
    return sizes
