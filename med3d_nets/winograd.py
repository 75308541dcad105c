"""3³ convolutions with a third of the multiplications, for inference in float32 on a CPU.

Winograd's F(2, 3) along each axis: 2³ outputs take 4³ multiplications for each pair of channels in place of 2³ * 3³
(Lavin and Gray, arXiv 1509.09308, section 4.1, in three dimensions). The rest are sums, and the multiplications are
matrix products. A dilated convolution is a plain one on each of the d³ grids of every d-th voxel. The sums run in
another order, so outputs differ from those of the convolution by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

# With fewer channels or voxels, the sums and the transform of the weights take what the multiplications save.
_LEAST_CHANNELS = 256
_LEAST_VOXELS = 4096
_LEAST_SAVING = 2.0
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
    """Whether a volume is large, and pairs of voxels on each of the d³ grids fill it well enough.

    Args:
        x: (B, in_channels, X, Y, Z).
        conv: one that ``has_form`` accepts.
    """
    size, shift = x.shape[2:], conv.dilation[0]
    axis = _loop_axis(size, shift)
    pairs = [_pairs(edge, shift) if i == axis else shift * _blocks(edge, shift) for i, edge in enumerate(size)]
    return x[:, 0].numel() >= _LEAST_VOXELS and 27 * prod(size) >= _LEAST_SAVING * 64 * prod(pairs)


def winograd(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """Compute a convolution by Winograd's F(2, 3) along each axis, two planes at a time.

    Args:
        x: (B, in_channels, X, Y, Z), float32, best channels last.
        conv: one that ``has_form`` accepts.

    Returns:
        (B, out_channels, X, Y, Z), channels last.
    """
    shift, axis = conv.dilation[0], _loop_axis(x.shape[2:], conv.dilation[0])
    out = x.new_empty((len(x), *x.shape[2:], conv.out_channels))
    images, results = x.permute(0, 2, 3, 4, 1).movedim(1 + axis, 1), out.movedim(1 + axis, 1)
    planes = _Planes(images.shape[2:4], conv, axis)
    count = images.shape[1]
    for image, result in zip(images, results, strict=True):
        for first in range(count):
            if first // shift % 2 == 0:
                seen = [image[i] if 0 <= i < count else None for i in range(first - shift, first + 3 * shift, shift)]
                planes.compute(seen, result[first : first + shift + 1 : shift])
    return out.permute(0, 4, 1, 2, 3)


class _Planes:
    """Two planes of outputs from the four of inputs that they see; memory is used again for the next two.

    Voxel d * (2 * block + side) + phase of an axis is at (block, side, phase) here.

    Args:
        size: voxels of a plane.
        conv: the convolution.
        axis: that the planes lie across, 0 to 2.
    """

    def __init__(self, size: Sequence[int], conv: nn.Conv3d, axis: int) -> None:
        shift, channels, out_channels = conv.dilation[0], conv.in_channels, conv.out_channels
        ny, nz = (_blocks(edge, shift) for edge in size)
        self.weight, self.bias = _weight(conv, axis), 0.0 if conv.bias is None else conv.bias
        self.inside = slice(shift, shift + size[0]), slice(shift, shift + size[1])
        self.size = tuple(size)
        new = self.weight.new_empty
        self.seen = self.weight.new_zeros((4, 2 * shift * (ny + 1), 2 * shift * (nz + 1), channels))
        self.x = new((4, ny + 1, 2, shift, nz + 1, 2, shift, channels))
        self.xy = new((4, 4, ny, shift, nz + 1, 2, shift, channels))
        self.xyz = new((4, 4, 4, ny, shift, nz, shift, channels))
        self.products = new((4, 4, 4, ny, shift, nz, shift, out_channels))
        self.out_xy = new((4, 4, ny, shift, nz, 2, shift, out_channels))
        self.out_x = new((4, ny, 2, shift, nz, 2, shift, out_channels))
        self.out = new((2, 2 * shift * ny, 2 * shift * nz, out_channels))

    def compute(self, planes: Sequence[torch.Tensor | None], out: torch.Tensor) -> None:
        """Compute one or two planes.

        Args:
            planes: four of (Y, Z, in_channels), the dilation apart; None beyond the volume.
            out: (1 or 2, Y, Z, out_channels), for the outputs at the second of the planes and the third.
        """
        for seen, plane in zip(self.seen, planes, strict=True):
            seen[self.inside] = 0.0 if plane is None else plane
        voxels = self.seen.view(2, 2, *self.x.shape[1:])
        _combine(voxels[0], voxels[1], 0, self.x)
        _combine(self.x[:, :-1], self.x[:, 1:], 2, self.xy.transpose(0, 1))
        _combine(self.xy[:, :, :, :, :-1], self.xy[:, :, :, :, 1:], 5, self.xyz.permute(2, 0, 1, 3, 4, 5, 6, 7))
        channels, out_channels = self.weight.shape[1:]
        torch.bmm(self.xyz.view(64, -1, channels), self.weight, out=self.products.view(64, -1, out_channels))
        _sum(self.products.unbind(2), self.out_xy.unbind(5))
        _sum(self.out_xy.unbind(1), self.out_x.unbind(2))
        _sum(self.out_x.unbind(0), self.out.view(2, *self.out_x.shape[1:]).unbind(0))
        torch.add(self.out[: len(out), : self.size[0], : self.size[1]], self.bias, out=out)


def _blocks(edge: int, dilation: int) -> int:
    """Blocks of two voxels of each grid that cover an axis."""
    return -(-edge // (2 * dilation))


def _pairs(edge: int, dilation: int) -> int:
    """Pairs of voxels, the dilation apart, that cover an axis; some have one voxel beyond it, none has both."""
    whole, rest = divmod(edge, 2 * dilation)
    return whole * dilation + min(rest, dilation)


def _loop_axis(size: Sequence[int], dilation: int) -> int:
    """The axis whose last block is emptiest: where pairs beyond the volume are left out."""
    return max(range(3), key=lambda axis: dilation * _blocks(size[axis], dilation) / _pairs(size[axis], dilation))


def _weight(conv: nn.Conv3d, axis: int) -> torch.Tensor:
    """The matrices of the 64 products, (64, in_channels, out_channels): computed anew each time, to save memory.

    Args:
        conv: the convolution.
        axis: that comes first.
    """
    transform = torch.kron(torch.kron(_TRANSFORM, _TRANSFORM), _TRANSFORM)
    taps = conv.weight.movedim(2 + axis, 2).permute(2, 3, 4, 1, 0).reshape(27, -1)
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
