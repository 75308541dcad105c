"""The few transforms that the bundles need and MONAI lacks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from med3d_nets.errors import InputError


class RandMirrord(RandomizableTransform, MapTransform):
    """Mirror left and right, and swap the labels of paired organs, so that left stays the patient's left.

    Args:
        keys: image and label, channel first, (1, X, Y, Z) with X along left-right.
        label_keys: those of ``keys`` that hold labels.
        pairs: label values to swap, for example ``[(1, 2)]`` for left and right lung.
        prob: probability of mirroring.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.label_keys = set(label_keys)
        self.pairs = [(int(a), int(b)) for a, b in pairs]

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Mirror all keys together or none."""
        out = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return out
        for key in self.key_iterator(out):
            flipped = torch.flip(out[key], dims=(1,))
            if key in self.label_keys:
                original = flipped.clone()
                for a, b in self.pairs:
                    flipped[original == a] = b
                    flipped[original == b] = a
            out[key] = flipped
        return out


class CheckLabeld(MapTransform):
    """Refuse label volumes that do not belong to their image or hold unknown values.

    Args:
        keys: the label.
        image_key: the image that it must share its grid with.
        num_classes: labels 0 to num_classes - 1 are allowed.
    """

    def __init__(
        self, keys: KeysCollection, image_key: str, num_classes: int, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Return the data unchanged, or raise InputError."""
        for key in self.key_iterator(dict(data)):
            check_label(data[key], data[self.image_key], set(range(self.num_classes)))
        return dict(data)


def check_label(label: torch.Tensor, image: torch.Tensor, allowed: set[int]) -> None:
    """Refuse a label volume that does not belong to its image or holds other values than the allowed ones.

    Args:
        label: label values, a MetaTensor (1, X, Y, Z).
        image: its image, a MetaTensor of the same grid.
        allowed: label values.

    Raises:
        InputError: the grids differ, or there are other values.
    """
    name = label.meta.get("filename_or_obj", "label")  # type: ignore[attr-defined]
    same = np.allclose(label.affine, image.affine, atol=1e-2)  # type: ignore[attr-defined]
    if label.shape[1:] != image.shape[1:] or not same:
        raise InputError(
            f"{name}: the label's grid differs from its image's: shape {tuple(label.shape[1:])} and "
            f"{tuple(image.shape[1:])}, affines {'equal' if same else 'different'}. Resample it to the image."
        )
    values = torch.unique(label).tolist()
    if not allowed.issuperset(values):
        ordered = sorted(allowed)
        run = ordered == list(range(len(ordered)))
        words = f"0 to {ordered[-1]}" if run else ", ".join(map(str, ordered))
        raise InputError(f"{name}: label values {values[:10]}; allowed are {words}. Merge or renumber them.")
