"""DenseASPP in 3D: densely connected dilated convolutions on layer4, the head of Med3D's liver segmentation.

Yang, Yu, Zhang, Li, Yang, CVPR 2018 (DenseASPP for Semantic Segmentation in Street Scenes), section 3;
Med3D (arXiv 1904.00625), in its experiment on LiTS, puts it behind the encoder, with rates that it does not tell.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

RATES = (3, 6, 12, 18, 24)
"""The published rates, for maps of 64 x 64 (crops of 512 x 512 at stride 8)."""
_PUBLISHED_EDGE = 64


def scaled_rates(size: Sequence[int], rates: Sequence[int] = RATES, edge: int = _PUBLISHED_EDGE) -> list[list[int]]:
    """Scale rates to maps of another size, so that each reaches as far across the map as it does in the paper.

    A convolution whose rate is the map's size or more sees nothing but padding beside its centre: with the published
    rates that are two of five on the 16³ map of a crop of 128³. Each axis has its own rates.

    Args:
        size: voxels of the map along X, Y, Z.
        rates: those to scale.
        edge: voxels of the map that they were chosen for.

    Returns:
        For each rate one of at least 1 along X, Y and Z.

    Example:
        >>> scaled_rates((16, 16, 8))
        [[1, 1, 1], [2, 2, 1], [3, 3, 2], [4, 4, 2], [6, 6, 3]]
    """
    return [[max(1, round(rate * n / edge)) for n in size] for rate in rates]


class DenseASPPHead(nn.Module):
    """Dilated 3³ convolutions, each of all that was computed before it, then one 1³ convolution, at layer4's scale.

    Args:
        channels: channels of the five feature maps.
        strides: strides of the five feature maps.
        out_channels: number of classes.
        dropout: probability with which a channel is dropped before the last convolution.
        rates: dilation of each convolution, along all axes or along X, Y, Z; see ``scaled_rates``. Where one is not
            smaller than the map, the convolution is a 1³ one there, which a warning says.
        growth: channels that each convolution adds.
        bottleneck: channels to which its input is reduced.
        layer_dropout: probability with which a channel of what it adds is dropped.

    Raises:
        ValueError: no rate, or one that is not a whole number of at least 1 or three of them.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int,
        dropout: float = 0.1,
        rates: Sequence[int | Sequence[int]] = RATES,
        growth: int = 64,
        bottleneck: int = 128,
        layer_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.stride = strides[-1]
        self.rates = [_along_axes(rate) for rate in rates]
        if not self.rates:
            raise ValueError("rates: at least one is needed.")
        width = channels[-1]
        layers = []
        for index, rate in enumerate(self.rates):
            layers.append(_layer(width, bottleneck, growth, rate, layer_dropout, norm=index > 0))
            width += growth
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout3d(dropout)
        self.classify = nn.Conv3d(width, out_channels, kernel_size=1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Map layer4, (B, C, x, y, z), to logits, (B, out_channels, x, y, z)."""
        x = features[-1]
        if not torch.jit.is_scripting():
            self._check_size(x)
        for layer in self.layers:
            x = torch.cat((layer(x), x), dim=1)
        return self.classify(self.dropout(x))

    @torch.jit.unused
    def _check_size(self, x: torch.Tensor) -> None:
        if torch.compiler.is_compiling():  # torch.export would tie the sizes to the comparison
            return
        size = tuple(x.shape[2:])
        beyond = [rate for rate in self.rates if any(one >= n for one, n in zip(rate, size, strict=True))]
        if beyond:
            message = f"DenseASPP: on maps of {size} the rates {beyond} see padding alone; scaled_rates fits them."
            warnings.warn(message, stacklevel=2)


def _layer(channels: int, bottleneck: int, growth: int, rate: list[int], dropout: float, norm: bool) -> nn.Sequential:
    """BN (not in the first layer), ReLU, 1³ convolution, BN, ReLU, dilated 3³ convolution, dropout."""
    start: list[nn.Module] = [nn.BatchNorm3d(channels)] if norm else []
    return nn.Sequential(
        *start,
        nn.ReLU(),  # not in place: its input is kept
        nn.Conv3d(channels, bottleneck, kernel_size=1, bias=False),
        nn.BatchNorm3d(bottleneck),
        nn.ReLU(inplace=True),
        nn.Conv3d(bottleneck, growth, kernel_size=3, padding=tuple(rate), dilation=tuple(rate)),  # type: ignore[arg-type]
        nn.Dropout3d(dropout),
    )


def _along_axes(rate: int | Sequence[int]) -> list[int]:
    rates = list(rate) if isinstance(rate, Sequence) else [rate] * 3
    if len(rates) != 3 or any(not isinstance(one, int) or one < 1 for one in rates):
        raise ValueError(f"rate {rate!r}: a whole number of at least 1 is needed, or three of them for X, Y and Z.")
    return rates
