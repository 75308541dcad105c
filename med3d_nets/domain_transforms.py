"""Transforms of the co-training: label values to class indices, each domain's spacing, patches.

An item knows what its domain needs (``with_settings``), so that one chain serves all domains.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandAffine, Randomizable, Spacing
from monai.transforms.utils import generate_label_classes_crop_centers
from torch.nn import functional as F

from med3d_nets.multidomain import UNKNOWN
from med3d_nets.transforms import check_label


class ClassIndexd(MapTransform):
    """Turn the label values of a domain's files into class indices, uint8.

    The item's ``values`` are those of class 1, 2, …, its ``background`` those that are 0 like 0 itself, its ``ignore``
    those that become ``UNKNOWN``.

    Args:
        keys: the label, a MetaTensor (1, X, Y, Z).
        image_key: the image that it must share its grid with.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Map each key.

        Raises:
            InputError: another grid than the image's, or a value of which it is not told what it is.
        """
        d = dict(data)
        known = [value for values in (*d["values"], d["background"], d["ignore"]) for value in values]
        for key in self.key_iterator(d):
            label = d[key]
            check_label(label, d[self.image_key], {0, *known})
            index = np.zeros(label.shape, dtype=np.uint8)
            for number, values in enumerate(d["values"], start=1):
                index[np.isin(label.numpy(), values)] = number
            index[np.isin(label.numpy(), d["ignore"])] = UNKNOWN
            d[key] = MetaTensor(torch.from_numpy(index), meta=label.meta)
        return d


class LeaveOutUnknownd(MapTransform):
    """Make voxels whose label is ``UNKNOWN`` background in prediction and label, so that they count in no score.

    Args:
        keys: prediction and label, label maps of one grid.
        label_key: the label.
    """

    def __init__(self, keys: KeysCollection, label_key: str = "label", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Clear each key."""
        d = dict(data)
        known = torch.as_tensor(d[self.label_key]) != UNKNOWN
        for key in self.key_iterator(d):
            d[key] = d[key] * known.to(d[key].device)
        return d


class DomainSpacingd(MapTransform):
    """Resample to the working spacing of the item's domain, its ``spacing``.

    That is in mm along right-left, anterior-posterior and inferior-superior, so it comes after Orientationd.

    Args:
        keys: image and label, MetaTensors (1, X, Y, Z) in RAS.
        label_keys: those of ``keys`` that are labels; they are taken over from the nearest voxel.
    """

    def __init__(
        self, keys: KeysCollection, label_keys: Sequence[str] = ("label",), allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_keys = set(label_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample each key."""
        d = dict(data)
        to_spacing = Spacing(pixdim=[float(v) for v in d["spacing"]])
        for key in self.key_iterator(d):
            is_label = key in self.label_keys
            moved = to_spacing(d[key], mode="nearest" if is_label else "bilinear")
            d[key] = moved.to(torch.uint8) if is_label else moved
        return d


class RandPatchd(Randomizable, MapTransform):
    """Cut a patch of the item's ``patch_size``, centred on a voxel of a class drawn at random, turned and scaled.

    Every class that the case has, background included, is equally likely (project choice). Beyond the volume the
    image is 0, the mean after z-scoring, and the label ``UNKNOWN``.

    Args:
        keys: image and label, (1, X, Y, Z).
        label_keys: those of ``keys`` that are labels.
        indices_key: flat indices of each class's voxels, as ClassesToIndicesd gives them.
        prob: probability of turning and scaling.
        rotate: largest angle about each axis in radians.
        scale: largest relative change of size.
        margin: the region that is turned, over the patch.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: Sequence[str] = ("label",),
        indices_key: str = "label_cls_indices",
        prob: float = 0.5,
        rotate: float = 0.2,
        scale: float = 0.15,
        margin: float = 1.3,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.label_keys = set(label_keys)
        self.indices_key = indices_key
        self.affine = RandAffine(prob=prob, rotate_range=[rotate] * 3, scale_range=[scale] * 3)
        self.margin = margin
        self._centre: list[int] = [0, 0, 0]

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandPatchd:
        """Seed this transform and the turning in it."""
        super().set_random_state(seed, state)
        self.affine.set_random_state(state=self.R)
        return self

    def randomize(self, data: Mapping[Hashable, Any]) -> None:
        """Draw centre, angles and scales."""
        size = data[self.keys[0]].shape[1:]
        [centre] = generate_label_classes_crop_centers(
            (1, 1, 1), 1, size, data[self.indices_key], rand_state=self.R, warn=False
        )
        patch = data["patch_size"]
        # a patch that fits lies within the volume, a volume that fits lies within the patch
        self._centre = [
            int(np.clip(c, p // 2, n - p + p // 2)) if n >= p else n // 2
            for c, p, n in zip(centre, patch, size, strict=True)
        ]
        self.affine.randomize()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut each key at the same place."""
        d = dict(data)
        self.randomize(d)
        patch = tuple(d["patch_size"])
        wide = [p + 2 * math.ceil((self.margin - 1) * p / 2) for p in patch]
        for key in self.key_iterator(d):
            is_label = key in self.label_keys
            region = _region(torch.as_tensor(d[key]), self._centre, wide, UNKNOWN if is_label else 0).float()
            region = UNKNOWN - region if is_label else region  # turning fills with 0, which then is UNKNOWN
            mode = "nearest" if is_label else "bilinear"
            region = torch.as_tensor(self.affine(region, patch, mode, "zeros", randomize=False))
            d[key] = (UNKNOWN - region).to(torch.uint8) if is_label else region
        return d


def _region(volume: torch.Tensor, centre: Sequence[int], size: Sequence[int], fill: int) -> torch.Tensor:
    """The box of a size around a voxel, ``fill`` beyond the volume; (1, *size)."""
    starts = [c - n // 2 for c, n in zip(centre, size, strict=True)]
    ends = [start + n for start, n in zip(starts, size, strict=True)]
    inside = tuple(slice(max(0, start), max(0, end)) for start, end in zip(starts, ends, strict=True))
    beyond = [(max(0, -start), max(0, end - n)) for start, end, n in zip(starts, ends, volume.shape[1:], strict=True)]
    pad = [amount for axis in reversed(beyond) for amount in axis]
    return F.pad(volume[:, inside[0], inside[1], inside[2]], pad, value=fill)
