"""The Med3D encoder as a feature extractor: averages of its five maps in one vector.

The average of the last map is the usual input of a classifier (He 2015, "Deep Residual Learning", section 3.3); those
of the earlier stages are a project choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import nn

from med3d_nets.resnet import Med3DResNet

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


class EmbeddingNet(nn.Module):
    """``.backbone`` (Med3DResNet) and the average of each of its five maps over space.

    The image needs no padding: the maps of any size are averaged as they are. The last voxel of a map of stride s may
    reach up to s - 1 voxels past the image, where the convolutions see zeros.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        shortcut_type: see Med3DResNet.
        in_channels: channels of the input.
        output_stride: see Med3DResNet.

    Attributes:
        feature_channels: channels of the five stages, in the order of ``STAGES``.
        slices: where each stage is in the output; ``net(x)[:, net.slices["layer4"]]`` is the embedding proper.

    Raises:
        ValueError: an argument is not one of the above.

    Example:
        >>> EmbeddingNet(10)(torch.zeros(1, 1, 33, 40, 17)).shape
        torch.Size([1, 1024])
    """

    def __init__(
        self, depth: int, shortcut_type: str | None = None, in_channels: int = 1, output_stride: int = 8
    ) -> None:
        super().__init__()
        self.backbone = Med3DResNet(depth, shortcut_type, in_channels, output_stride)
        self.feature_channels = self.backbone.feature_channels
        self.slices = stage_slices(self.feature_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, X, Y, Z) to (B, sum of feature_channels), float32: stem, layer1, … layer4."""
        return torch.cat([feature.float().mean(dim=(2, 3, 4)) for feature in self.backbone(x)], dim=1)


def stage_slices(channels: Sequence[int]) -> dict[str, slice]:
    """Where each stage is in a vector of all stages.

    Args:
        channels: channels of the five stages.
    """
    edges = pairwise(accumulate(channels, initial=0))
    return {stage: slice(start, end) for stage, (start, end) in zip(STAGES, edges, strict=True)}
