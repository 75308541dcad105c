"""A Med3D encoder with a segmentation head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from med3d_nets.heads import HEADS, upsample
from med3d_nets.resnet import Med3DResNet


class SegmentationNet(nn.Module):
    """Segmentation network: ``.backbone`` (Med3DResNet) and ``.head``.

    ``net(x)`` gives logits at the input's spatial size; ``net.head(net.backbone(x))`` gives them at the head's own
    scale (``medicalnet`` 1/4, ``linear`` and ``denseaspp`` 1/8, ``fpn`` 1, at output stride 8).

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        out_channels: number of classes, background included.
        head: ``"medicalnet"``, ``"linear"``, ``"fpn"`` or ``"denseaspp"``.
        dropout: probability of channel dropout before the head's last convolution.
        shortcut_type: see Med3DResNet.
        in_channels: channels of the input.
        output_stride: see Med3DResNet.
        freeze_backbone: train the head alone. The backbone gets no gradient and its batch norms keep their running
            statistics (the authors' advice for small data), whatever ``train()`` is called with.
        head_options: further arguments of the head, such as ``{"rates": [2, 4, 6]}`` of ``denseaspp``.

    Raises:
        ValueError: an argument is not one of the above.

    Example:
        >>> SegmentationNet(10, out_channels=3)(torch.zeros(1, 1, 33, 40, 17)).shape
        torch.Size([1, 3, 33, 40, 17])
    """

    def __init__(
        self,
        depth: int,
        out_channels: int,
        head: str = "medicalnet",
        dropout: float = 0.0,
        shortcut_type: str | None = None,
        in_channels: int = 1,
        output_stride: int = 8,
        freeze_backbone: bool = False,
        head_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head={head!r}: allowed are {', '.join(map(repr, HEADS))}.")
        if out_channels < 1:
            raise ValueError(f"out_channels={out_channels}: at least 1 is needed.")
        self.backbone = Med3DResNet(depth, shortcut_type, in_channels, output_stride)
        channels, strides = self.backbone.feature_channels, self.backbone.feature_strides
        self.head = HEADS[head](channels, strides, out_channels, dropout, **(head_options or {}))
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, X, Y, Z), at least 16 voxels per axis, to logits, (B, out_channels, X, Y, Z)."""
        return upsample(self.head(self.backbone(x)), self.head.stride, x)

    def train(self, mode: bool = True) -> SegmentationNet:
        """Set training mode; a frozen backbone stays in evaluation mode, norm statistics included."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self
