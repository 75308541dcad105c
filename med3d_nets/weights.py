"""Strict loading of weights: every key is accounted for, a partial match is an error.

MedicalNet's own loader keeps the keys that happen to match and says nothing, also when that is none of them; here the
depth and the shortcut type are read off the tensors and compared with the network before anything is copied.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from med3d_nets.errors import InputError
from med3d_nets.registry import DEPTHS
from med3d_nets.resnet import Med3DResNet

_Net = TypeVar("_Net", bound=nn.Module)


def load_backbone(backbone: Med3DResNet, path: str | Path) -> Med3DResNet:
    """Load encoder weights, for example a released ``resnet_10_23dataset.pth``, into a backbone.

    Args:
        backbone: the encoder to fill.
        path: checkpoint of the release's form, ``{"state_dict": {"module.conv1.weight": …}}``, a bare state dict of
            an encoder, or one of a network whose encoder is called ``backbone``. Any float type.

    Returns:
        The same backbone.

    Raises:
        InputError: the file is absent or no checkpoint, or its depth, shortcut type, keys, shapes or
            kinds of number differ, or it holds NaN or infinity.
    """
    state = read_state_dict(path)
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    found = detect_architecture(state)
    wanted = (backbone.depth, backbone.shortcut_type)
    if found is not None and found != wanted:
        raise InputError(
            f"{path}: these are weights of a ResNet-{found[0]} with shortcut {found[1]}, the network is a "
            f"ResNet-{wanted[0]} with shortcut {wanted[1]}. Pass the weights of that depth, or build the other network."
        )
    return _load_exactly(backbone, state, path)


def load_network(network: _Net, path: str | Path) -> _Net:
    """Load the weights of a whole network, for example a bundle's ``models/model.pt``.

    Args:
        network: the network to fill.
        path: a bare state dict (or ``{"state_dict": …}``) with exactly the network's keys. Any float type.

    Returns:
        The same network.

    Raises:
        InputError: the file is absent or no checkpoint, or its depth, shortcut type, keys, shapes or
            kinds of number differ, or it holds NaN or infinity.
    """
    state = read_state_dict(path)
    backbone = getattr(network, "backbone", None)
    if isinstance(backbone, Med3DResNet):
        found = detect_architecture({k.removeprefix("backbone."): v for k, v in state.items()})
        if found is not None and found != (backbone.depth, backbone.shortcut_type):
            raise InputError(
                f"{path}: these are weights of a ResNet-{found[0]} with shortcut {found[1]}, the bundle's network is a "
                f"ResNet-{backbone.depth} with shortcut {backbone.shortcut_type}. Use the weights of this bundle."
            )
    return _load_exactly(network, state, path)


def initialise(network: _Net, backbone_weights: str = "", initial_weights: str = "") -> _Net:
    """Give a network its starting point for training.

    Args:
        network: a SegmentationNet or any network with a ``backbone``.
        backbone_weights: encoder weights for ``load_backbone``; empty: none.
        initial_weights: weights of the whole network for ``load_network``; empty: none.

    Returns:
        The same network; with both empty, as it was built.

    Raises:
        InputError: both are given, or the weights do not fit.
    """
    if backbone_weights and initial_weights:
        raise InputError("Both backbone_weights and initial_weights are given; give one of them.")
    if backbone_weights:
        load_backbone(network.backbone, backbone_weights)  # type: ignore[arg-type]
    if initial_weights:
        load_network(network, initial_weights)
    return network


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
            f"{path}: {_listed('there twice, with and without module.', twice)}. Save the state dict of one network."
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


def _load_exactly(module: _Net, state: dict[str, torch.Tensor], path: str | Path) -> _Net:
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        raise InputError(
            f"{path}: the weights do not fit the network: {_listed('missing', missing)}; "
            f"{_listed('unexpected', unexpected)}; {_listed('of another shape', shapes)}. Nothing was loaded."
        )
    kinds = [key for key in own if state[key].is_floating_point() != own[key].is_floating_point()]
    broken = [key for key in own if state[key].is_floating_point() and not state[key].isfinite().all()]
    if kinds or broken:
        raise InputError(
            f"{path}: {_listed('of another kind of number', kinds)}; {_listed('with NaN or infinity', broken)}. "
            "Nothing was loaded; take the weights of a training that did not diverge."
        )
    module.load_state_dict(state)
    return module


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def _listed(what: str, keys: list[str]) -> str:
    more = ", …" if len(keys) > 3 else ""
    return f"{len(keys)} {what}" + (f" ({', '.join(keys[:3])}{more})" if keys else "")
