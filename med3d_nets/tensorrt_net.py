"""TensorRT for the encoder of a network, by MONAI's ``trt_compile``; what ``configs/inference_trt.json`` uses."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from monai.networks import trt_compile
from torch import nn

from med3d_nets.classifier_ensemble import ClassifierEnsemble, weights_files
from med3d_nets.errors import InputError

_PACKAGES = ("tensorrt", "polygraphy", "onnx")


def with_tensorrt(network: nn.Module, weights: str | Path | Sequence[str | Path], args: Mapping[str, Any]) -> nn.Module:
    """Run a network's encoder by TensorRT. MONAI would go on without it where it is missing; this stops.

    The engine is built at the first pass, which takes minutes, and kept as ``WEIGHTS.DIGEST.backbone.plan``, where
    the digest is that of the encoder's layers and of ``args``; it is built anew when the weights are newer.

    Args:
        network: with ``.backbone``, or a ClassifierEnsemble of such, its weights loaded, on an NVIDIA GPU. It is left
            as it is: Grad-CAM needs gradients, which an engine does not have.
        weights: file of its weights, in a folder that can be written; of an ensemble a file per member.
        args: those of ``monai.networks.trt_compiler.TrtCompiler``.

    Returns:
        A copy of the network.

    Raises:
        InputError: there is no NVIDIA GPU, or a package is missing.
    """
    missing = _missing()
    if missing:
        raise InputError(
            f"inference_trt.json: TensorRT cannot run here. Missing: {', '.join(missing)}. "
            "Install what is missing, or run without this overlay."
        )
    copied = copy.deepcopy(network)
    members = copied.networks if isinstance(copied, ClassifierEnsemble) else [copied]
    for member, file in zip(members, weights_files(weights), strict=True):
        digest = hashlib.sha256(f"{member.backbone} {dict(args)}".encode()).hexdigest()[:8]
        timed = {**args, "timestamp": int(Path(file).stat().st_mtime)}  # MONAI's own would be that of the name below
        trt_compile(member, f"{file}.{digest}", args=timed, submodule="backbone")
    return copied


def _missing() -> list[str]:
    missing = [] if torch.cuda.is_available() else ["an NVIDIA GPU that PyTorch sees"]
    return missing + [f"the package {name}" for name in _PACKAGES if find_spec(name) is None]
