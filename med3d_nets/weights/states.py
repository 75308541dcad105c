"""Checkpoints on disk: read and written safely, named, and told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch

from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.registry import DEPTHS

SAFETENSORS = ".safetensors"
SUFFIXES = (".pt", ".pth", SAFETENSORS)

State = dict[str, torch.Tensor]

_ENCODER_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# A key that only one foreign layout has: what that layout is.
_FOREIGN = {
    "stem.0.weight": "torchvision's video ResNet, whose stem is 3x7x7 and whose blocks have other names",
    "down_tr64.ops.0.conv1.weight": "Models Genesis, a U-Net",
    "fc.weight": "a ResNet with a classifier (MONAI's or Hara's), which `python -m med3d_nets.weights convert` takes",
    "layer1.0.downsample.0.bias": "MONAI's ResNet, which `python -m med3d_nets.weights convert` takes",
    "layer2.0.downsample.0.bias": "MONAI's ResNet, which `python -m med3d_nets.weights convert` takes",
}


def read_state_dict(path: str | Path) -> State:
    """Read a checkpoint safely (``weights_only=True``, or safetensors) and strip its wrapping.

    Args:
        path: file written by ``torch.save``, or with the suffix ``.safetensors``.

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
    content = _content(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(_is_named_tensor(*item) for item in state.items()):
        keys = f" with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) and content else ""
        raise InputError(
            f"{path}: a state dict (tensors by name) is needed, found {type(content).__name__}{keys}. "
            'Save the network\'s state_dict(), bare or as {"state_dict": …}.'
        )
    stripped = {key.removeprefix("module."): value for key, value in state.items()}
    if len(stripped) < len(state):
        twice = [key for key in stripped if key in state and f"module.{key}" in state]
        raise InputError(
            f"{path}: {listed('there twice, with and without module.', twice)}. Save the state dict of one network."
        )
    return stripped


def write_state_dict(state: State, path: str | Path, wrapped: bool = False) -> None:
    """Write tensors by name as a file that ``read_state_dict`` reads.

    Args:
        state: tensors by name.
        path: file to write; the suffix decides the format: ``.pt`` and ``.pth`` torch's, or ``.safetensors``.
        wrapped: write the form of the MedicalNet release, ``{"state_dict": {"module.…": …}}``.

    Raises:
        InputError: another suffix, a wrapped safetensors file, or the file cannot be written.
    """
    path = Path(path)
    allowed = (".pt", ".pth") if wrapped else SUFFIXES
    if path.suffix not in allowed:
        raise InputError(f"{path}: the suffix of weights to write may be {', '.join(allowed)}; name the file so.")
    own = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    with replacing(path) as hidden:
        if path.suffix == SAFETENSORS:
            hidden.write_bytes(safetensors.torch.save(own, {"format": "pt"}))
        else:
            torch.save({"state_dict": {f"module.{k}": v for k, v in own.items()}} if wrapped else own, hidden)


def detect_architecture(state: State) -> tuple[int, str] | None:
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


def split_head(state: State) -> tuple[State, State]:
    """Part a state dict into encoder and rest.

    Args:
        state: of a network whose encoder is called ``backbone``, of the original MedicalNet network (the encoder
            beside ``conv_seg``), or of an encoder alone.

    Returns:
        The encoder's tensors by the encoder's names. The rest by the names of a ``SegmentationNet``
        (``head.conv_seg.0.weight``); what belongs to no known network keeps its name.
    """
    if any(key.startswith("backbone.") for key in state):
        encoder = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
        return encoder, {key: value for key, value in state.items() if not key.startswith("backbone.")}
    encoder = {key: value for key, value in state.items() if key.split(".")[0] in _ENCODER_PARTS}
    rest = {key: value for key, value in state.items() if key not in encoder}
    return encoder, {f"head.{key}" if key.startswith("conv_seg.") else key: value for key, value in rest.items()}


def foreign_layout(state: State) -> str:
    """A sentence on whose weights these seem to be, empty when no other known layout is recognised."""
    for key, layout in _FOREIGN.items():
        if key in state:
            return f"These look like weights of {layout}: docs/weights.md says what loads."
    return ""


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


def _content(path: Path) -> object:
    try:
        if path.suffix == SAFETENSORS:
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every kind of damage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise InputError(
            f"{path}: not a checkpoint that can be read ({reason}). The file is truncated, damaged or holds more than "
            "tensors (it must load with weights_only=True). Download or copy it again."
        ) from error


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)
