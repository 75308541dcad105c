"""Strict loading of weights: every key is accounted for, a partial match is an error.

MedicalNet's own loader keeps the keys that happen to match and says nothing, also when that is none of them; here the
depth and the shortcut type are read off the tensors and compared with the network before anything is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from med3d_nets.errors import InputError
from med3d_nets.resnet import Med3DResNet
from med3d_nets.weights.states import detect_architecture, listed, read_state_dict

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
            f"{path}: the weights do not fit the network: {listed('missing', missing)}; "
            f"{listed('unexpected', unexpected)}; {listed('of another shape', shapes)}. Nothing was loaded."
        )
    kinds = [key for key in own if state[key].is_floating_point() != own[key].is_floating_point()]
    broken = [key for key in own if state[key].is_floating_point() and not state[key].isfinite().all()]
    if kinds or broken:
        raise InputError(
            f"{path}: {listed('of another kind of number', kinds)}; {listed('with NaN or infinity', broken)}. "
            "Nothing was loaded; take the weights of a training that did not diverge."
        )
    module.load_state_dict(state)
    return module
