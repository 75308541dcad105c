"""From a training run's weights to the file that a bundle ships."""

from __future__ import annotations

from pathlib import Path

import torch

from med3d_nets import classifier_record
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.weights import load_network, read_state_dict
from tools.bundle_folder import Bundle

MAX_MB = 30.0


def ship(checkpoint: Path, folder: Path, max_mb: float = MAX_MB) -> Path:
    """Write a trained network's weights in half precision as the bundle's ``models/model.pt``.

    Weights of convolutions and linear layers (more than one dimension) become float16; biases, norm parameters, running
    statistics and integers stay as they are, since they are few and lose more. Loading turns float16 back into float32.
    The record beside a classifier's weights goes with them.

    Args:
        checkpoint: state dict of the bundle's ``network_def``, for example a run's ``model.pt``.
        folder: the bundle.
        max_mb: largest file, in 10⁶ bytes, that the repository should carry.

    Returns:
        Path of the written file.

    Raises:
        InputError: the bundle has no network, the weights do not fit it exactly, are not finite, or are too large.
    """
    bundle = Bundle(folder)
    if "network_def" not in bundle.configs.get("inference", {}):
        raise InputError(f"{folder}: no bundle with configs/inference.json and a network_def; make it first.")
    load_network(bundle.network, checkpoint)
    state = {key: _small(value) for key, value in read_state_dict(checkpoint).items()}
    wrong = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise InputError(
            f"{checkpoint}: {len(wrong)} tensors are not finite in half precision ({', '.join(wrong[:3])}); "
            "look at the training's loss and ship an earlier checkpoint."
        )
    target = folder / "models" / "model.pt"
    with replacing(target) as hidden:
        torch.save(state, hidden)
        size = hidden.stat().st_size / 1e6
        if size > max_mb:
            raise InputError(
                f"{checkpoint}: {size:.1f} MB in half precision, at most {max_mb:g} MB belong in the repository. "
                "Publish the file elsewhere and list it in large_files.yml."
            )
    record = checkpoint.with_name(classifier_record.NAME)
    if record.is_file():
        with replacing(target.with_name(record.name)) as hidden:
            hidden.write_bytes(record.read_bytes())
    return target


def _small(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor.clone()
