"""3³ convolutions with a third of the multiplications, for inference in float32 on a CPU.

Winograd's F(2, 3) along each axis: 2³ outputs take 4³ multiplications for each pair of channels in place of 2³ * 3³
(Lavin and Gray, arXiv 1509.09308, section 4.1, in three dimensions). The rest are sums, and the multiplications are
matrix products. A dilated convolution is a plain one on each of the d³ grids of every d-th voxel. The sums run in another
order, so outputs differ from those of the convolution by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn
from torch.nn import functional as F

# With fewer channels or voxels, the sums and the transform of the weights take what the multiplications save.
_LEAST_CHANNELS = 256
_LEAST_VOXELS = 4096
_LEAST_SAVING = 2.0
_ROWS = 256  # of a matrix product: few for the cache, enough that the weights are not most of what is read
_TRANSFORM = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # of weights: G in the paper


class WinogradConv(nn.Module):
    """A convolution that computes large volumes as Winograd's products and small ones as it is.

    The volume's shape decides, not a timing, so that a scan has the same labels in every run.

    Args:
        conv: one that ``has_form`` accepts; kept as ``.conv``.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, X, Y, Z) as the convolution does."""
        plain = x.device.type != "cpu" or x.dtype != torch.float32
        plain = plain or x.requires_grad or torch.is_autocast_enabled("cpu") or not pays(x, self.conv)
        result: torch.Tensor = self.conv(x) if plain else winograd(x, self.conv)
        return result


def use_winograd(module: nn.Module) -> None:
    """Put a WinogradConv in place of every convolution inside a module that has the form and enough channels.

    Args:
        module: a network for inference; changed in place.
    """
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.Conv3d):
            use_winograd(child)
        elif has_form(child) and min(child.in_channels, child.out_channels) >= _LEAST_CHANNELS:
            setattr(module, name, WinogradConv(child))


def has_form(conv: nn.Conv3d) -> bool:
    """Whether a convolution has kernel 3, stride 1, one group, and zero padding as wide as its one dilation.

    Args:
        conv: any convolution.
    """
    shift = conv.dilation[0]
    return (
        conv.kernel_size == (3, 3, 3)
        and conv.stride == (1, 1, 1)
        and conv.dilation == conv.padding == (shift, shift, shift)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def pays(x: torch.Tensor, conv: nn.Conv3d) -> bool:
    """Whether a volume is large, and blocks of two voxels on each of the d³ grids fill it well enough.

    Args:
        x: (B, in_channels, X, Y, Z).
        conv: one that ``has_form`` accepts.
    """
    size, shift = x.shape[2:], conv.dilation[0]
    products = 64 * prod(shift * _blocks(edge, shift) for edge in size)
    return x[:, 0].numel() >= _LEAST_VOXELS and 27 * prod(size) >= _LEAST_SAVING * products


def winograd(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """Compute a convolution by Winograd's F(2, 3) along each axis, two planes of each grid at a time.

    Args:
        x: (B, in_channels, X, Y, Z), float32, best channels last.
        conv: one that ``has_form`` accepts.

    Returns:
        (B, out_channels, X, Y, Z), channels last.
    """
    size, shift = x.shape[2:], conv.dilation[0]
    blocks = [_blocks(edge, shift) for edge in size]
    padded = _padded(x, blocks, shift)
    out = x.new_empty((len(x), *[n for count in blocks for n in (count, 2, shift)], conv.out_channels))
    planes = _Planes(x, blocks, conv)
    for image, result in zip(padded, out, strict=True):
        for block in range(blocks[0]):
            for phase in range(shift):
                planes.compute(image[block : block + 2, :, phase], result[block, :, phase])
    out = out.view(len(x), *[2 * shift * count for count in blocks], -1)[:, : size[0], : size[1], : size[2]]
    if conv.bias is not None:
        out += conv.bias
    return out.permute(0, 4, 1, 2, 3)


class _Planes:
    """Two planes of outputs from the four of inputs that they see; memory is used again for the next two.

    Args:
        x: the volume.
        blocks: along its axes.
        conv: the convolution.
    """

    def __init__(self, x: torch.Tensor, blocks: list[int], conv: nn.Conv3d) -> None:
        _, ny, nz = blocks
        shift, channels, out_channels = conv.dilation[0], conv.in_channels, conv.out_channels
        self.weight = _weight(conv)
        self.x = x.new_empty((4, ny + 1, 2, shift, nz + 1, 2, shift, channels))
        self.xy = x.new_empty((4, 4, ny, shift, nz + 1, 2, shift, channels))
        self.xyz = x.new_empty((4, 4, 4, ny, shift, nz, shift, channels))
        self.products = x.new_empty((4, 4, 4, ny, shift, nz, shift, out_channels))
        self.out_xy = x.new_empty((4, 4, ny, shift, nz, 2, shift, out_channels))
        self.out_x = x.new_empty((4, ny, 2, shift, nz, 2, shift, out_channels))

    def compute(self, planes: torch.Tensor, out: torch.Tensor) -> None:
        """Write outputs.

        Args:
            planes: (2, 2, blocks + 1, 2, d, blocks + 1, 2, d, in_channels), block and side along X first.
            out: (2, blocks, 2, d, blocks, 2, d, out_channels), side along X first.
        """
        _combine(planes[0], planes[1], 0, self.x)
        _combine(self.x[:, :-1], self.x[:, 1:], 2, self.xy.transpose(0, 1))
        _combine(self.xy[:, :, :, :, :-1], self.xy[:, :, :, :, 1:], 5, self.xyz.permute(2, 0, 1, 3, 4, 5, 6, 7))
        channels, out_channels = self.weight.shape[1:]
        torch.bmm(self.xyz.view(64, -1, channels), self.weight, out=self.products.view(64, -1, out_channels))
        _sum(self.products.unbind(2), self.out_xy.unbind(5))
        _sum(self.out_xy.unbind(1), self.out_x.unbind(2))
        _sum(self.out_x.unbind(0), out.unbind(0))


def _blocks(edge: int, dilation: int) -> int:
    """Blocks of two voxels of each grid that cover an axis."""
    return -(-edge // (2 * dilation))


def _padded(x: torch.Tensor, blocks: list[int], dilation: int) -> torch.Tensor:
    """Map (B, C, X, Y, Z) to (B, blocks + 1, 2, d, blocks + 1, 2, d, blocks + 1, 2, d, C) with zeros around it.

    Voxel d * (2 * block + side) + phase is at (block, side, phase) of an axis; a block also sees the next one.
    """
    padding = [0, 0]  # of channels; last axis first
    for edge, count in zip(reversed(x.shape[2:]), reversed(blocks), strict=True):
        padding += [dilation, dilation * (2 * count + 1) - edge]
    padded = F.pad(x.permute(0, 2, 3, 4, 1), padding)
    return padded.view(len(x), *[n for count in blocks for n in (count + 1, 2, dilation)], -1)


def _weight(conv: nn.Conv3d) -> torch.Tensor:
    """The matrices of the 64 products, (64, in_channels, out_channels): computed anew each time, to save memory."""
    transform = torch.kron(torch.kron(_TRANSFORM, _TRANSFORM), _TRANSFORM)
    taps = conv.weight.permute(2, 3, 4, 1, 0).reshape(27, -1)
    return (transform @ taps).view(64, conv.in_channels, conv.out_channels)


def _combine(here: torch.Tensor, after: torch.Tensor, axis: int, out: torch.Tensor) -> None:
    """Combine the four voxels that a block sees along an axis (B transposed, in the paper).

    Args:
        here: blocks.
        after: for each the next one.
        axis: that of the two sides in both.
        out: (4, …), for the combinations.
    """
    (a, b), (c, d) = here.unbind(axis), after.unbind(axis)
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def _sum(products: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Sum four products to the two outputs of a block along an axis (A transposed, in the paper)."""
    a, b, c, d = products
    part = b + c
    torch.add(a, part, out=out[0])
    torch.sub(b, c, out=part)
    torch.sub(part, d, out=out[1])
