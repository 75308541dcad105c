"""From logits on the network's grid to labels on the scan's own, in one step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from med3d_nets.grids import map_between, slabs


class NativeLabelsd(MapTransform):
    """Replace logits on the network's grid by labels on the grid of the image as it was read.

    The same labels as MONAI's ``Invertd`` (linear) and ``AsDiscreted(argmax=True)`` up to ties, without logits of the
    scan's full size in between: each slab is interpolated, compared and forgotten. Beyond the network's grid its
    outermost logits go on. With ``softmax`` the labels are those of the chain that begins with
    ``Activationsd(softmax=True)``, where probabilities are interpolated: borders lie elsewhere between two voxels.

    Args:
        keys: logits, (C, X, Y, Z), floating point, on the grid of ``orig_keys``.
        orig_keys: image that the network saw, a MetaTensor (1, X, Y, Z) whose ``meta`` has ``original_affine`` and
            ``spatial_shape`` of the image as read.
        probabilities: also keep the softmax of the interpolated logits on the native grid, float16, (C, X', Y', Z'),
            under the key with ``_probabilities``.
        softmax: interpolate probabilities instead of logits.

    Raises:
        ValueError: logits and image are not on one grid.
    """

    def __init__(
        self,
        keys: KeysCollection,
        orig_keys: str = "image",
        probabilities: bool = False,
        softmax: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orig_keys = orig_keys
        self.probabilities = probabilities
        self.softmax = softmax

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with labels, uint8 (int16 from 257 classes), (1, X', Y', Z'), MetaTensors."""
        d = dict(data)
        image = d[self.orig_keys]
        affine = np.asarray(image.meta["original_affine"], dtype=np.float64)
        shape = [int(n) for n in image.meta["spatial_shape"]]
        matrix = map_between(np.asarray(image.affine, dtype=np.float64), affine, shape)
        meta = {name: image.meta[name] for name in ("filename_or_obj", "original_affine", "spatial_shape", "space")}
        for key in self.key_iterator(d):
            logits = torch.as_tensor(d[key])
            if logits.shape[1:] != image.shape[1:]:
                raise ValueError(f"{key} has {tuple(logits.shape[1:])} voxels, its image {tuple(image.shape[1:])}")
            out = torch.zeros((1, *shape), dtype=torch.uint8 if len(logits) <= 256 else torch.int16)
            soft = torch.empty((len(logits), *shape), dtype=torch.float16) if self.probabilities else None
            source = logits.float().softmax(dim=0) if self.softmax else logits.float()
            for where, values in slabs(source, matrix, shape):
                out[where] = largest_channel(values, out.dtype)[None].cpu()
                if soft is not None:
                    soft[where] = (values if self.softmax else values.softmax(dim=0)).half().cpu()
            d[key] = MetaTensor(out, affine=torch.as_tensor(affine), meta=dict(meta))
            if soft is not None:
                d[f"{key}_probabilities"] = MetaTensor(soft, affine=torch.as_tensor(affine), meta=dict(meta))
        return d


def largest_channel(values: torch.Tensor, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Index of the largest channel, the first of equal ones; ``argmax`` over the first axis of many is far slower.

    Args:
        values: (C, …).
        dtype: of the result.

    Returns:
        Indices, (…).
    """
    best = values[0].clone()
    index = torch.zeros(best.shape, dtype=dtype, device=best.device)
    for channel in range(1, len(values)):
        # the channel is above all before it; masked_fill_ is many times slower
        torch.maximum(index, (values[channel] > best).to(dtype).mul_(channel), out=index)
        torch.maximum(best, values[channel], out=best)
    return index
