"""Other forms of 3D convolutions: the same sums from ordinary operations, for CPUs whose own 3D kernel is slow.

In bfloat16 on a CPU with AMX the plain dilated convolution runs at a tenth of the speed of a 2D one or of a matrix
product, and the stem, with its one input channel, at a quarter. In float32, and on other CPUs, nothing is gained
(docs/speed.md). ``rewrite`` puts a ``TunedConv`` in place of every convolution that has other forms.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Form = Callable[[torch.Tensor, nn.Conv3d], torch.Tensor]

_logger = logging.getLogger(__name__)
_LITTLE = 5e7  # multiplications: a convolution of a few milliseconds, of which no form is worth a timing
_SLAB = 2e9  # multiplications of the part of a volume that is timed
_FEW = 64  # output channels of the plain form that is timed
_BLOCK = 32 * 2**20  # bytes of a matrix of columns
_CHOICES: dict[tuple[object, ...], Form] = {}


class TunedConv(nn.Module):
    """A convolution that takes the fastest of its forms, timed at the first use of a shape and remembered.

    All convolutions of a process share what is remembered.

    Args:
        conv: the convolution; kept as ``.conv``.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, X, Y, Z) as the convolution does."""
        if x.device.type != "cpu":
            return plain(x, self.conv)
        conv = self.conv
        key = (tuple(x.shape), x.dtype, tuple(conv.weight.shape), conv.stride, conv.dilation, torch.get_num_threads())
        if key not in _CHOICES:
            _CHOICES[key] = _fastest(x, conv)
        return _CHOICES[key](x, conv)


def rewrite(module: nn.Module) -> None:
    """Put a TunedConv in place of every convolution inside a module that has other forms.

    Args:
        module: a network for inference; changed in place.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv3d) and other_forms(child):
            setattr(module, name, TunedConv(child))
        else:
            rewrite(child)


def other_forms(conv: nn.Conv3d) -> list[Form]:
    """The forms that may be faster than the plain one: none for most convolutions.

    Args:
        conv: any convolution.
    """
    cubic = all(len(set(sizes)) == 1 for sizes in (conv.kernel_size, conv.stride, conv.padding, conv.dilation))
    if not cubic or conv.groups != 1 or conv.padding_mode != "zeros":
        return []
    kernel, stride, padding, dilation = conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.dilation[0]
    if conv.in_channels == 1 and kernel > 3 and dilation == 1:
        return [unfolded]
    if kernel == 3 and stride == 1 and padding == dilation > 1:
        return [planes, columns]
    return []


def plain(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """The convolution as it is."""
    result: torch.Tensor = conv(x)
    return result


def planes(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A 3³ convolution at stride 1 as three 2D convolutions, the planes along X being their batch.

    The outer two are shifted by the dilation and added.

    Args:
        x: (B, in_channels, X, Y, Z), best channels last: then no plane is copied.
        conv: of kernel 3, stride 1, and a padding that is its dilation.
    """
    shift = conv.dilation[0]

    def plane(part: torch.Tensor, tap: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        batch, channels, count, *size = part.shape
        flat = part.transpose(1, 2).reshape(batch * count, channels, *size)
        flat = F.conv2d(flat, conv.weight[:, :, tap], bias, padding=shift, dilation=shift)
        return flat.reshape(batch, count, conv.out_channels, *size).transpose(1, 2)

    out = plane(x, 1, conv.bias)
    if x.shape[2] > shift:
        out[:, :, shift:] += plane(x[:, :, :-shift], 0)
        out[:, :, :-shift] += plane(x[:, :, shift:], 2)
    return out


def columns(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A 3³ convolution at stride 1 as a matrix product: what a voxel's kernel sees is one row, a few rows at a time.

    Args:
        x: (B, in_channels, X, Y, Z).
        conv: of kernel 3, stride 1, and a padding that is its dilation.
    """
    batch, channels, *size = x.shape
    shift = conv.dilation[0]
    weight = conv.weight.permute(0, 2, 3, 4, 1).reshape(conv.out_channels, -1)
    padded = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *[shift] * 6)).contiguous()
    to_image, to_x, to_y, to_z, _ = padded.stride()
    strides = (to_y, to_z, shift * to_x, shift * to_y, shift * to_z, 1)
    step = max(1, _BLOCK // (size[2] * weight.shape[1] * x.element_size()))
    out = x.new_empty((batch, *size, conv.out_channels))
    for image in range(batch):
        for plane in range(size[0]):
            for row in range(0, size[1], step):
                count = min(step, size[1] - row)
                start = padded.storage_offset() + image * to_image + plane * to_x + row * to_y
                seen = padded.as_strided((count, size[2], 3, 3, 3, channels), strides, start)
                rows = F.linear(seen.reshape(count * size[2], -1), weight, conv.bias)
                out[image, plane, row : row + count] = rows.reshape(count, size[2], -1)
    return out.permute(0, 4, 1, 2, 3)


def unfolded(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """A convolution of one input channel as one whose channels are the kernel's reach along Z.

    The channels, at least as many as the kernel is long, are a multiple of eight; weights beyond the kernel are zero.

    Args:
        x: (B, 1, X, Y, Z).
        conv: of one input channel, no dilation, and the same stride and padding along all axes.
    """
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    beyond = -kernel % 8
    count = (x.shape[4] + 2 * padding - kernel) // stride + 1
    padded = F.pad(x[:, 0], (padding, padding + beyond, padding, padding, padding, padding))
    reach = padded.unfold(3, kernel + beyond, stride)[:, :, :, :count]
    reach = reach.permute(0, 4, 1, 2, 3).contiguous(memory_format=torch.channels_last_3d)
    weight = F.pad(conv.weight, (0, beyond)).permute(0, 4, 2, 3, 1)
    return F.conv3d(reach, weight, conv.bias, (stride, stride, 1))


@torch.inference_mode()
def _fastest(x: torch.Tensor, conv: nn.Conv3d) -> Form:
    """Time the forms on a part of the volume."""
    if x[:, 0].numel() * conv.weight.numel() / conv.stride[0] ** 3 < _LITTLE:
        return plain
    slab = _slab(x, conv)
    seconds = {form: _seconds(form, slab, conv) for form in (plain, *other_forms(conv))}
    best = min(seconds, key=lambda form: seconds[form])
    _logger.info("Convolution %s of %s: %s", tuple(conv.weight.shape), tuple(x.shape), best.__name__)
    return best


def _slab(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """The first image, cut along X and then Y; what is left holds the whole reach of the kernel along X."""
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
    voxels = _SLAB * conv.stride[0] ** 3 / conv.weight.numel()
    count = min(x.shape[2], max(reach, int(voxels / (x.shape[3] * x.shape[4]))))
    rows = min(x.shape[3], max(reach // 2 + 1, int(voxels / (count * x.shape[4]))))
    return x[:1, :, :count, :rows].contiguous(memory_format=torch.channels_last_3d)


def _seconds(form: Form, x: torch.Tensor, conv: nn.Conv3d) -> float:
    """Time of the second run: in the first a kernel is made.

    The plain form may be forty times slower than the others, so it computes few of its output channels, and the time is
    multiplied: its work is proportional to them.
    """
    few = min(_FEW, conv.out_channels) if form is plain else conv.out_channels
    weight, bias = conv.weight[:few], None if conv.bias is None else conv.bias[:few]
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        if form is plain:
            F.conv3d(x, weight, bias, conv.stride, conv.padding, conv.dilation)
        else:
            form(x, conv)
    return (time.perf_counter() - start) * conv.out_channels / few
