"""TensorRT for the encoder of a network, by MONAI's ``trt_compile``; what ``configs/inference_trt.json`` uses."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from monai.networks import trt_compile
from torch import nn

from med3d_nets.errors import InputError

_PACKAGES = ("tensorrt", "polygraphy", "onnx")


def with_tensorrt(network: nn.Module, weights: str | Path, args: Mapping[str, Any]) -> nn.Module:
    """Run a network's encoder by TensorRT. MONAI would go on without it where it is missing; this stops.

    The engine is built at the first pass, which takes minutes, and kept as ``WEIGHTS.backbone.plan``; it is built anew
    when the weights are newer.

    Args:
        network: with ``.backbone``, its weights loaded, on an NVIDIA GPU; changed in place.
        weights: file of its weights, in a folder that can be written.
        args: those of ``monai.networks.trt_compiler.TrtCompiler``.

    Returns:
        The network.

    Raises:
        InputError: there is no NVIDIA GPU, or a package is missing.
    """
    missing = _missing()
    if missing:
        raise InputError(
            f"inference_trt.json: TensorRT cannot run here. Missing: {', '.join(missing)}. "
            "Install what is missing, or run without this overlay."
        )
    return trt_compile(network, str(weights), args=dict(args), submodule="backbone")


def _missing() -> list[str]:
    missing = [] if torch.cuda.is_available() else ["an NVIDIA GPU that PyTorch sees"]
    return missing + [f"the package {name}" for name in _PACKAGES if find_spec(name) is None]
