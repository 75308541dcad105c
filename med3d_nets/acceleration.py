"""A network made ready for inference: norms folded into convolutions, channels last, bfloat16 where that pays.

Float32 stays float32: outputs differ by rounding alone. bfloat16 is used on CPUs that multiply it natively (AMX, or
AVX-512 BF16), and there only if a short timing says that it is faster.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from med3d_nets.errors import InputError

PRECISIONS = ("auto", "float32", "bfloat16")

_logger = logging.getLogger(__name__)
_EDGE = 64  # voxels of the volume that is timed
_Convolution = (nn.Conv3d, nn.ConvTranspose3d)


class InferenceNet(nn.Module):
    """A network for inference, as ``accelerate`` makes it.

    Args:
        network: folded, in its precision and on its device.
        dtype: of its weights.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype=dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.dtype = dtype
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image, (B, C, X, Y, Z), to the network's output in float32."""
        x = torch.as_tensor(x).as_subclass(torch.Tensor)
        x = x.to(dtype=self.dtype).contiguous(memory_format=torch.channels_last_3d)
        logits: torch.Tensor = self.network(x)
        return logits.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def accelerate(network: nn.Module, precision: str = "auto") -> nn.Module:
    """Make a copy of a network that computes the same, faster. It cannot be trained.

    Args:
        network: with its weights loaded, on the device where it will run; not changed.
        precision: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on a CPU that multiplies it natively and where it
            is faster. On CUDA ``auto`` is float32, for mixed precision is the evaluator's ``amp``.

    Returns:
        The network for inference, in evaluation mode.

    Raises:
        InputError: precision is none of these.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r}: allowed are {', '.join(PRECISIONS)}.")
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    fold_norms(folded)
    if precision == "bfloat16":
        return InferenceNet(folded, torch.bfloat16)
    plain = InferenceNet(folded, torch.float32)
    first = next(folded.parameters(), None)
    if precision == "float32" or first is None or first.device.type != "cpu" or not multiplies_bfloat16():
        return plain
    short = InferenceNet(copy.deepcopy(folded), torch.bfloat16)
    slow, fast = _seconds(plain), _seconds(short)
    _logger.info("A pass takes %.0f ms in float32 and %.0f ms in bfloat16.", 1000 * slow, 1000 * fast)
    return short if fast < slow else plain


def fold_norms(module: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in place.

    The two are neighbours among the children of a module, in the order in which they run: so they are in all networks
    of this package.

    Args:
        module: a network in evaluation mode.
    """
    children = list(module.named_children())
    for (name, conv), (norm_name, norm) in pairwise(children):
        if isinstance(conv, _Convolution) and isinstance(norm, nn.BatchNorm3d):
            transposed = isinstance(conv, nn.ConvTranspose3d)
            setattr(module, name, fuse_conv_bn_eval(conv, norm, transpose=transposed))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_norms(child)


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; elsewhere it is emulated, far slower than float32."""
    checks: tuple[Callable[[], Any] | None, ...] = tuple(
        getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    return any(bool(check()) for check in checks if check)


@torch.inference_mode()
def _seconds(network: InferenceNet) -> float:
    """Time of a pass over a small volume, the better of two after one that warms up."""
    channels = next(conv for conv in network.modules() if isinstance(conv, nn.Conv3d)).in_channels
    x = torch.zeros(1, channels, _EDGE, _EDGE, _EDGE)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        network(x)
        times.append(time.perf_counter() - start)
    return min(times[1:])
