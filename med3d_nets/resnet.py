"""The Med3D encoder: a dilated 3D ResNet, tensor for tensor that of the MedicalNet release.

Chen, Ma, Zheng, arXiv 1904.00625, section 3.2: a 3D ResNet whose layer3 and layer4 keep stride 8 and dilate their
3³ convolutions by 2 and 4 instead. State-dict keys are MedicalNet's without the leading ``module.``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from med3d_nets.registry import DEPTHS, OUTPUT_STRIDES, SHORTCUT_TYPES

# output stride: (strides, dilations) of layer1 to layer4. The weights are the same for all of them.
_GEOMETRY: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 1)),
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
}


class Med3DResNet(nn.Module):
    """3D ResNet encoder of Med3D that returns its five feature maps.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        shortcut_type: ``"A"`` (subsample and zero-pad channels, no parameters) or ``"B"`` (1³ convolution and
            norm); None takes the type of the released weights of that depth.
        in_channels: channels of the input, 1 in all released weights.
        output_stride: stride of layer4. 8 is the published network (layer3 and layer4 dilated by 2 and 4);
            16 and 32 replace dilation by stride for feature pyramids and detection. All share the same weights.

    Raises:
        ValueError: depth, shortcut_type, in_channels or output_stride is not one of the above.

    Example:
        >>> stem, layer1, layer2, layer3, layer4 = Med3DResNet(10)(torch.zeros(1, 1, 32, 32, 32))
        >>> layer4.shape
        torch.Size([1, 512, 4, 4, 4])
    """

    def __init__(
        self, depth: int, shortcut_type: str | None = None, in_channels: int = 1, output_stride: int = 8
    ) -> None:
        super().__init__()
        _check_arguments(depth, shortcut_type, in_channels, output_stride)
        record = DEPTHS[depth]
        self.depth = depth
        self.shortcut_type = shortcut_type or record.shortcut
        self.in_channels = in_channels
        self.output_stride = output_stride
        self.feature_channels = record.feature_channels
        strides, dilations = _GEOMETRY[output_stride]
        self.feature_strides = (2, 4, 8, 8 * strides[2], 8 * strides[2] * strides[3])

        self.conv1 = nn.Conv3d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        block = _Bottleneck if record.block == "bottleneck" else _BasicBlock
        layers = []
        in_width = 64
        for width, blocks, stride, dilation in zip((64, 128, 256, 512), record.layers, strides, dilations, strict=True):
            layers.append(_make_layer(block, in_width, width, blocks, stride, dilation, self.shortcut_type))
            in_width = width * record.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self._init_weights()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Compute the feature maps.

        Args:
            x: image, (B, in_channels, X, Y, Z).

        Returns:
            Five maps, after the stem (stride 2, before max-pooling), layer1 (4), layer2 (8), layer3 and layer4
            (8 each at output stride 8); a map of stride s has ceil(X / s) voxels along X, likewise Y and Z.
        """
        stem = self.relu(self.bn1(self.conv1(x)))
        layer1 = self.layer1(self.maxpool(stem))
        layer2 = self.layer2(layer1)
        layer3 = self.layer3(layer2)
        layer4 = self.layer4(layer3)
        return [stem, layer1, layer2, layer3, layer4]

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")


def stages(backbone: Med3DResNet) -> list[list[nn.Module]]:
    """List the modules of the five stages: stem, layer1, layer2, layer3, layer4."""
    return [[backbone.conv1, backbone.bn1], [backbone.layer1], [backbone.layer2], [backbone.layer3], [backbone.layer4]]


def freeze_stages(backbone: Med3DResNet, count: int) -> None:
    """Take the first stages out of training: no gradient, and batch norms that keep their running statistics.

    The latter lasts until ``train()`` is called; a network that freezes calls this there again.

    Args:
        backbone: the encoder.
        count: number of stages, 0 (none) to 5 (all).

    Raises:
        ValueError: count is not 0 to 5.
    """
    if not 0 <= count <= 5:
        raise ValueError(f"frozen_stages={count}: allowed are 0 to 5 (stem, layer1, layer2, layer3, layer4).")
    frozen = [backbone] if count == 5 else [module for stage in stages(backbone)[:count] for module in stage]
    for module in frozen:
        module.requires_grad_(False)
        module.eval()


class ShortcutA(nn.Module):
    """Shortcut without parameters: subsample by the stride, append zero channels (He 2015, option A).

    Unlike the original and MONAI, which cut it with ``.data``, the gradient flows through it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, X, Y, Z) to (B, out_channels, ceil(X / stride), …)."""
        x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.extra_channels))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv3(in_channels, width, stride, dilation)
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = _conv3(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, width * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm3d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def _conv3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv3d:
    return nn.Conv3d(
        in_channels, out_channels, kernel_size=3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


def _make_layer(
    block: type[_BasicBlock] | type[_Bottleneck],
    in_channels: int,
    width: int,
    blocks: int,
    stride: int,
    dilation: int,
    shortcut_type: str,
) -> nn.Sequential:
    out_channels = width * block.expansion
    downsample: nn.Module | None = None
    if stride != 1 or in_channels != out_channels:
        if shortcut_type == "A":
            downsample = ShortcutA(in_channels, out_channels, stride)
        else:
            conv = nn.Conv3d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm3d(out_channels))
    first = block(in_channels, width, stride, dilation, downsample)
    rest = [block(out_channels, width, 1, dilation, None) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _check_arguments(depth: int, shortcut_type: str | None, in_channels: int, output_stride: int) -> None:
    def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: allowed are {', '.join(repr(a) for a in allowed)}.")

    one_of("depth", depth, list(DEPTHS))
    one_of("shortcut_type", shortcut_type, [None, *SHORTCUT_TYPES])
    one_of("output_stride", output_stride, OUTPUT_STRIDES)
    if in_channels < 1:
        raise ValueError(f"in_channels={in_channels}: at least 1 is needed.")
