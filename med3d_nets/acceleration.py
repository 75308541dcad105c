"""A network made ready for inference: norms folded into convolutions, channels last, bfloat16 where that pays.

Float32 stays float32: outputs differ by rounding alone, also where wide convolutions are computed with fewer
multiplications (``med3d_nets.winograd``). bfloat16 is used on CPUs that multiply it natively (AMX, or AVX-512 BF16),
and there only if a short timing says that it is faster. With AMX convolutions take the fastest of their forms
(``med3d_nets.kernels``). On request OpenVINO or ``torch.compile`` runs the network.
"""

from __future__ import annotations

import copy
import logging
import time
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from med3d_nets.coarse_to_fine import CoarseToFineNet
from med3d_nets.errors import InputError
from med3d_nets.heads import FPNHead
from med3d_nets.kernels import rewrite
from med3d_nets.multidomain import DomainNet
from med3d_nets.openvino_net import OpenVINONet
from med3d_nets.segmentation import SegmentationNet
from med3d_nets.slab_net import SlabNet
from med3d_nets.winograd import use_winograd

PRECISIONS = ("auto", "float32", "bfloat16")
BACKENDS = ("torch", "openvino")

_logger = logging.getLogger(__name__)
_EDGE = 64  # voxels of the volume that is timed
_COMPILER = ("torch._dynamo", "torch._inductor")  # by name: to import their exceptions takes a second
_Convolution = (nn.Conv3d, nn.ConvTranspose3d)


class InferenceNet(nn.Module):
    """A network for inference, as ``accelerate`` makes it.

    Args:
        network: folded, on its device; changed in place.
        dtype: of its convolutions. What else has weights, a classifier on averages, stays in float32.
        compile: run it by ``torch.compile``, which compiles it anew for every size.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, compile: bool = False) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        for module in network.modules():
            if isinstance(module, _Convolution):
                module.to(dtype)
        if dtype == torch.float32 and not compile:
            use_winograd(network)
        if dtype == torch.bfloat16 and not compile and has_amx():
            rewrite(network)
        self.dtype = dtype
        self.eval()
        # The method, because a compiled module would be a second child with the same weights; anew for every size,
        # because torch 2.13 cannot compile these networks for all at once ("Invalid ranges").
        self._compiled: Any = torch.compile(self._run, dynamic=False) if compile else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map an image, (B, C, X, Y, Z), and what else the network takes, to its output in float32."""
        x = torch.as_tensor(x).as_subclass(torch.Tensor)
        if self._compiled and x.device.type != "meta":  # that of an estimate of memory
            try:
                logits: torch.Tensor = self._compiled(x, *args, **kwargs)
                return logits
            except RuntimeError as error:
                if not type(error).__module__.startswith(_COMPILER):
                    raise
                reason = str(error).partition("\n")[0]
                _logger.warning("The network could not be compiled and runs as it is (%s).", reason)
                self._compiled = None
        return self._run(x, *args, **kwargs)

    def _run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = x.to(dtype=self.dtype).contiguous(memory_format=torch.channels_last_3d)
        logits: torch.Tensor = self.network(x, *args, **kwargs)
        return logits.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def accelerate(
    network: nn.Module, precision: str = "auto", backend: str = "torch", compile: bool = False
) -> InferenceNet | OpenVINONet:
    """Make a copy of a network that computes the same, faster. It cannot be trained.

    Args:
        network: with its weights loaded, on the device where it will run; not changed.
        precision: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on a CPU that multiplies it natively and where it
            is faster. On CUDA ``auto`` is float32, for mixed precision is the evaluator's ``amp``.
        backend: ``torch``, or ``openvino``: by that package, which must be installed, on a CPU and in float32.
        compile: compile the network at the first pass of every size, on either device; that takes longer than a scan.
            Where it cannot be compiled, a warning says so and it runs as it is.

    Returns:
        The network for inference, in evaluation mode.

    Raises:
        InputError: precision or backend is none of these, openvino is missing, or it cannot do what is asked for.
    """
    _check("precision", precision, PRECISIONS)
    _check("backend", backend, BACKENDS)
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    fold_norms(folded)
    first = next(folded.parameters(), None)
    on_cpu = first is not None and first.device.type == "cpu"
    if backend == "openvino":
        if precision == "bfloat16" or compile or not on_cpu:
            raise InputError("backend='openvino' runs on the CPU, in float32 and without compile; leave it at torch.")
        if isinstance(network, CoarseToFineNet):
            raise InputError("backend='openvino' runs networks of one stage; leave it at torch.")
        return OpenVINONet(folded, _channels(folded))
    if not compile:  # which would compile each number of slabs anew
        folded = in_slabs(folded)
    if precision == "bfloat16":
        return InferenceNet(folded, torch.bfloat16, compile)
    if precision == "float32" or not on_cpu or not multiplies_bfloat16():
        return InferenceNet(folded, torch.float32, compile)
    return _faster(folded, compile)


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


def in_slabs(network: nn.Module) -> nn.Module:
    """Let a network with a feature pyramid compute its finest maps slab by slab; others stay as they are.

    Of our own networks alone: a subclass may compute something else.
    """
    if type(network) in (SegmentationNet, DomainNet) and isinstance(network.head, FPNHead):
        return SlabNet(network.backbone, network.head)  # type: ignore[arg-type]
    return network


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; elsewhere it is emulated, far slower than float32."""
    return has_amx() or _has("_is_avx512_bf16_supported")


def has_amx() -> bool:
    """Whether the CPU multiplies tiles."""
    return _has("_is_amx_tile_supported")


def _has(name: str) -> bool:
    """What torch says of the CPU; no in versions that cannot tell."""
    return bool(getattr(torch.cpu, name, bool)())


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r}: allowed are {', '.join(allowed)}.")


def _faster(folded: nn.Module, compile: bool) -> InferenceNet:
    """The network in float32 or in bfloat16, as a timing without compilation says."""
    short = InferenceNet(copy.deepcopy(folded), torch.bfloat16)
    plain = InferenceNet(folded, torch.float32)
    slow, fast = _seconds(plain), _seconds(short)
    _logger.info("A pass takes %.0f ms in float32 and %.0f ms in bfloat16.", 1000 * slow, 1000 * fast)
    best = short if fast < slow else plain
    return InferenceNet(folded, best.dtype, compile) if compile else best


def _channels(network: nn.Module) -> int:
    """Channels of a network's input: those of its first convolution."""
    return next(conv for conv in network.modules() if isinstance(conv, nn.Conv3d)).in_channels


@torch.inference_mode()
def _seconds(network: InferenceNet) -> float:
    """Time of a pass over a small volume, the better of two after one that warms up."""
    x = torch.zeros(1, _channels(network), _EDGE, _EDGE, _EDGE)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        network(x)
        times.append(time.perf_counter() - start)
    return min(times[1:])
