"""Checkpoints on disk: read safely, named, and told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from med3d_nets.errors import InputError
from med3d_nets.registry import DEPTHS


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint safely (``weights_only=True``) and strip its wrapping.

    Args:
        path: file written by ``torch.save``.

    Returns:
        The state dict, with ``state_dict`` unwrapped and a leading ``module.`` removed from its keys.

    Raises:
        InputError: the file is absent, unreadable, holds something else than tensors by name, or a name twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such weights file. A bundle without trained weights must be trained first; backbone "
            "weights are listed in its large_files.yml (python -m monai.bundle download_large_files)."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every kind of damage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InputError(
            f"{path}: not a checkpoint that can be read ({reason}). The file is truncated, damaged or holds more than "
            "tensors (it must load with weights_only=True). Download or copy it again."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(_is_named_tensor(*item) for item in state.items()):
        raise InputError(f"{path}: a state dict (tensors by name) is needed, found {type(content).__name__}.")
    stripped = {key.removeprefix("module."): value for key, value in state.items()}
    if len(stripped) < len(state):
        twice = [key for key in stripped if key in state and f"module.{key}" in state]
        raise InputError(
            f"{path}: {listed('there twice, with and without module.', twice)}. Save the state dict of one network."
        )
    return stripped


def detect_architecture(state: dict[str, torch.Tensor]) -> tuple[int, str] | None:
    """Read depth and shortcut type off an encoder's state dict.

    Args:
        state: tensors by name, ``layer1.0.conv1.weight`` and so on.

    Returns:
        Depth and ``"A"`` or ``"B"``, or None when the blocks are those of no known depth.
    """
    blocks = [len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    block = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    shortcut = "B" if "layer2.0.downsample.0.weight" in state else "A"
    for record in DEPTHS.values():
        if record.block == block and list(record.layers) == blocks:
            return record.depth, shortcut
    return None


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def listed(what: str, keys: list[str]) -> str:
    """Count and first names of some keys, for a message."""
    more = ", …" if len(keys) > 3 else ""
    return f"{len(keys)} {what}" + (f" ({', '.join(keys[:3])}{more})" if keys else "")


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)
