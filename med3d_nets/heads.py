"""Segmentation heads: five feature maps in, logits at the head's own scale, ``head.stride``, out.

``medicalnet`` is the head of the released fine-tuning code, ``linear`` the branch of the co-training (paper,
section 3.2: 1³ convolution, then up-sampling), ``fpn`` a light feature pyramid (Lin 2017; Kirillov 2019, Panoptic
Feature Pyramid Networks, figure 3) for targets whose border matters, ``denseaspp`` that of Med3D's liver segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from med3d_nets.denseaspp import DenseASPPHead


def upsample(x: torch.Tensor, factor: int, like: torch.Tensor) -> torch.Tensor:
    """Up-sample a map by the ratio of two strides and cut off what lies beyond the finer map.

    A map of stride s has ceil(X / s) voxels, so its last voxel may reach past the image. Stretching it to the finer
    map's size instead would move whatever it shows, by up to s - 1 voxels.

    Args:
        x: coarse map, (B, C, x, y, z).
        factor: its stride divided by that of ``like``.
        like: map or image whose spatial size the result has, at most ``factor`` times that of ``x``.

    Returns:
        Trilinear interpolation of ``x``, (B, C, …) of the spatial size of ``like``.
    """
    if factor > 1:
        x = F.interpolate(x, scale_factor=float(factor), mode="trilinear", align_corners=False)
    # By negative padding, because torch.export ties a slice to the sizes of its example.
    beyond = [like.shape[axis] - x.shape[axis] for axis in (4, 3, 2)]
    return F.pad(x, [0, beyond[0], 0, beyond[1], 0, beyond[2]])


class MedicalNetHead(nn.Module):
    """``conv_seg`` of MedicalNet on layer4: twice its scale, that is 1/4 of the input's at output stride 8.

    Args:
        channels: channels of the five feature maps.
        strides: strides of the five feature maps.
        out_channels: number of classes.
        dropout: probability with which a channel is dropped before the last convolution.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], out_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stride = strides[-1] // 2
        # Indices as in the original, so that its fine-tuned checkpoints (conv_seg.0.weight, …) fit.
        self.conv_seg = nn.Sequential(
            nn.ConvTranspose3d(channels[-1], 32, kernel_size=2, stride=2),
            nn.BatchNorm3d(32),
            nn.ReLU(inplace=True),
            nn.Conv3d(32, 32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm3d(32),
            nn.ReLU(inplace=True),
            nn.Conv3d(32, out_channels, kernel_size=1, bias=False),
        )
        self.dropout = nn.Dropout3d(dropout)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map layer4, (B, C, x, y, z), to logits, (B, out_channels, 2x, 2y, 2z)."""
        x = features[-1]
        for index, layer in enumerate(self.conv_seg):
            if index == 6:
                x = self.dropout(x)
            x = layer(x)
        return x


class LinearHead(nn.Module):
    """Branch of the co-training: one 1³ convolution on layer4, at layer4's scale.

    Args:
        channels: channels of the five feature maps.
        strides: strides of the five feature maps.
        out_channels: number of classes.
        dropout: probability with which a channel is dropped before the convolution.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], out_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stride = strides[-1]
        self.dropout = nn.Dropout3d(dropout)
        self.conv = nn.Conv3d(channels[-1], out_channels, kernel_size=1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map layer4, (B, C, x, y, z), to logits, (B, out_channels, x, y, z)."""
        return self.conv(self.dropout(features[-1]))


class FPNHead(nn.Module):
    """Light feature pyramid over layer4, layer2, layer1 and the stem: logits at the input's scale.

    The last layer is a sub-pixel convolution (Shi 2016, CVPR, as a transposed convolution whose kernel is its
    stride): the stem's features at stride 2 know where in their 2³ voxels a border runs.

    Args:
        channels: channels of the five feature maps.
        strides: strides of the five feature maps.
        out_channels: number of classes.
        dropout: probability with which a channel is dropped before the last convolution.
        width: channels of the pyramid at strides 8 and 4; half of it at stride 2.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int,
        dropout: float = 0.0,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.stride = strides[0] // 2
        self.factors = (strides[4] // strides[2], strides[2] // strides[1], strides[1] // strides[0])
        stem, layer1, layer2, _, layer4 = channels
        self.top = nn.Conv3d(layer4, width, kernel_size=1)
        self.lateral2 = nn.Conv3d(layer2, width, kernel_size=1)
        self.lateral1 = nn.Conv3d(layer1, width, kernel_size=1)
        self.smooth1 = _conv_norm_relu(width, width // 2)
        self.lateral0 = nn.Conv3d(stem, width // 2, kernel_size=1)
        self.smooth0 = _conv_norm_relu(width // 2, width // 2)
        self.dropout = nn.Dropout3d(dropout)
        self.classify = nn.ConvTranspose3d(width // 2, out_channels, kernel_size=2, stride=2)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map five maps to logits, (B, out_channels, …) of twice the stem's spatial size."""
        top, middle, bottom = self.factors
        x = upsample(self.top(features[4]), top, features[2]) + self.lateral2(features[2])
        x = self.smooth1(upsample(x, middle, features[1]) + self.lateral1(features[1]))
        x = self.smooth0(upsample(x, bottom, features[0]) + self.lateral0(features[0]))
        return self.classify(self.dropout(x))


HEADS: dict[str, type[MedicalNetHead | LinearHead | FPNHead | DenseASPPHead]] = {
    "medicalnet": MedicalNetHead,
    "linear": LinearHead,
    "fpn": FPNHead,
    "denseaspp": DenseASPPHead,
}


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True))
