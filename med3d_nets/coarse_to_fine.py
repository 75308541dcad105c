"""Segmentation in two stages: find the organ in the whole volume at low resolution, segment it inside its box.

Chen, Ma, Zheng, arXiv 1904.00625, experiment on LiTS: coarse localisation of the whole volume at low
resolution, then segmentation of the enlarged region. That both stages share one encoder is a project choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cc3d
import torch
from monai.inferers import Inferer
from torch import nn
from torch.nn import functional as F

from med3d_nets.errors import InputError
from med3d_nets.heads import HEADS, upsample
from med3d_nets.inferer import WholeVolumeInferer
from med3d_nets.segmentation import SegmentationNet

Box = tuple[slice, slice, slice, slice, slice]

_SURE = 20.0  # logits of what lies outside the box: background, with a probability that no float32 tells from 1


class CoarseToFineNet(SegmentationNet):
    """A SegmentationNet with a second, light head that localises: ``.backbone``, ``.coarse`` and ``.head``.

    ``net(x)`` are the logits of the fine stage, ``net(x, coarse=True)`` those of the coarse one (background and
    organ), both at the input's size; which resolution each sees is up to the caller.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        out_channels: number of classes of the fine stage, background included.
        head: of the fine stage; see SegmentationNet.
        coarse_head: of the coarse stage, likewise.
        dropout: probability of channel dropout before the last convolution of both.
        head_options: further arguments of the fine stage's head.
        options: further arguments of SegmentationNet.

    Raises:
        ValueError: an argument is not one of the above.
    """

    def __init__(
        self,
        depth: int,
        out_channels: int,
        head: str = "denseaspp",
        coarse_head: str = "linear",
        dropout: float = 0.0,
        head_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(depth, out_channels, head, dropout, head_options=head_options, **options)
        if coarse_head not in HEADS:
            raise ValueError(f"coarse_head={coarse_head!r}: allowed are {', '.join(map(repr, HEADS))}.")
        channels, strides = self.backbone.feature_channels, self.backbone.feature_strides
        self.coarse = HEADS[coarse_head](channels, strides, 2, dropout)

    def forward(self, x: torch.Tensor, coarse: bool = False) -> torch.Tensor:
        """Map (B, in_channels, X, Y, Z), at least 16 voxels per axis, to logits, (B, out_channels or 2, X, Y, Z)."""
        features = self.backbone(x)
        if coarse:
            return upsample(self.coarse(features), self.coarse.stride, x)
        return upsample(self.head(features), self.head.stride, x)


class CoarseToFineInferer(Inferer):
    """Find the largest structure at low resolution, then compute logits inside its enlarged box.

    Where nothing is found, or outside the box, the logits are those of certain background.

    Args:
        out_channels: number of classes of the fine stage, background included.
        factor: edge of the coarse stage's voxels over that of the volume's, one number or one for each axis.
        margin: voxels of the volume by which the box is enlarged at each side, one number or one for each axis.
        least_voxels: of the coarse stage; smaller structures are not an organ.
        window: see WholeVolumeInferer, of the fine stage; the coarse one sees the volume whole if memory allows.
        overlap: of windows.
        progress: show a bar of the fine stage.

    Raises:
        InputError: a factor below 1, a negative margin, or a wrong window.
    """

    def __init__(
        self,
        out_channels: int,
        factor: float | Sequence[float] = 2.0,
        margin: int | Sequence[int] = 16,
        least_voxels: int = 1,
        window: str | Sequence[int] = "auto",
        overlap: float = 0.25,
        progress: bool = False,
    ) -> None:
        self.out_channels = out_channels
        self.factor = _three("factor", factor, least=1.0)
        self.margin = _three("margin", margin, least=0.0)
        self.least_voxels = least_voxels
        self.coarse = WholeVolumeInferer(overlap=overlap)
        self.fine = WholeVolumeInferer(window, overlap, progress=progress)

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the logits of one volume.

        Args:
            inputs: the volume, (1, C, X, Y, Z).
            network: a CoarseToFineNet, also an accelerated one.
            args: not used.
            kwargs: what else the network takes.

        Returns:
            Logits, (1, classes, X, Y, Z).

        Raises:
            InputError: more than one volume.
        """
        inputs = torch.as_tensor(inputs).as_subclass(torch.Tensor)
        if len(inputs) != 1:
            raise InputError(f"{len(inputs)} volumes at once: the boxes differ, so give them one at a time.")
        logits = inputs.new_full((1, self.out_channels, *inputs.shape[2:]), -_SURE, dtype=torch.float32)
        logits[:, 0] = _SURE
        box = self.locate(inputs, network, **kwargs)
        if box:
            logits[box] = self.fine(inputs[box], network, **kwargs).to(logits.dtype)
        return logits

    def locate(self, inputs: torch.Tensor, network: nn.Module, **kwargs: Any) -> Box | None:
        """Find the enlarged box of the largest structure.

        Args:
            inputs: the volume, (1, C, X, Y, Z).
            network: a CoarseToFineNet.
            kwargs: what else it takes.

        Returns:
            An index of (1, C, X, Y, Z) for its voxels; None if the coarse stage finds nothing.
        """
        size = inputs.shape[2:]
        small = [max(1, round(n / factor)) for n, factor in zip(size, self.factor, strict=True)]
        coarse = self.coarse(F.interpolate(inputs, small, mode="area"), network, coarse=True, **kwargs)
        inside = (coarse[0, 1] > coarse[0, 0]).cpu().numpy()
        pieces, count = cc3d.connected_components(inside, connectivity=26, return_N=True)
        found = cc3d.statistics(pieces)
        volumes = found["voxel_counts"][1:]
        if not count or volumes.max() < self.least_voxels:
            return None
        box = found["bounding_boxes"][1 + int(volumes.argmax())]
        first, second, third = (self._enlarged(box[i], size[i] / small[i], i, size[i]) for i in range(3))
        return slice(None), slice(None), first, second, third

    def _enlarged(self, side: slice, scale: float, axis: int, edge: int) -> slice:
        """A side of the box in voxels of the volume, with its margin."""
        margin = self.margin[axis]
        return slice(max(0, math.floor(side.start * scale - margin)), min(edge, math.ceil(side.stop * scale + margin)))


def _three(name: str, value: float | Sequence[float], least: float) -> list[float]:
    values = [float(one) for one in value] if isinstance(value, Sequence) else [float(value)] * 3
    if len(values) != 3 or min(values) < least:
        raise InputError(f"{name}={value!r}: a number of at least {least:g} is needed, or three for X, Y and Z.")
    return values
