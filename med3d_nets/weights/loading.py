"""Strict loading of weights: every key is accounted for, a partial match is an error unless it is asked for by name.

MedicalNet's own loader keeps the keys that happen to match and says nothing, also when that is none of them; here the
depth and the shortcut type are read off the tensors and compared with the network before anything is copied.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn

from med3d_nets.errors import InputError
from med3d_nets.resnet import Med3DResNet
from med3d_nets.weights.states import State, detect_architecture, foreign_layout, listed, read_state_dict, split_head

_Net = TypeVar("_Net", bound=nn.Module)
_STEM = "conv1.weight"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Account:
    """What became of each tensor; ``str()`` of it is one line.

    Attributes:
        path: the file.
        loaded: names of the network's tensors that were filled.
        missing: names of the network's tensors that the file does not have.
        unexpected: names of the file's tensors that the network does not have.
        shape_mismatch: names in both, of unequal shape, with the two shapes.
        skipped: names in both, of equal shape, that were left out because ``skip`` names them.
        head: names of the file's tensors that belong to the rest of its network, which a backbone has no place for.
        stem: how the stem was fitted to the network's input channels; empty: as it was.

    What ``missing``, ``unexpected`` and ``shape_mismatch`` hold after loading, ``skip`` named.
    """

    path: Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shape_mismatch: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    stem: str = ""

    def __str__(self) -> str:
        parts = [listed("tensors loaded", list(self.loaded)).split(" (")[0]]
        parts += [listed("missing", list(self.missing)), listed("unexpected", list(self.unexpected))]
        parts += [listed("of another shape", list(self.shape_mismatch))]
        parts += [listed("skipped", list(self.skipped))] if self.skipped else []
        parts += [listed("of a head, not used", list(self.head))] if self.head else []
        parts += [f"stem {self.stem}"] if self.stem else []
        return f"{self.path}: {'; '.join(parts)}."


def load_backbone(net: nn.Module, name_or_path: str | Path, skip: Sequence[str] = ()) -> Account:
    """Load encoder weights, for example ``resnet_10_23dataset``, into a backbone.

    Weights of another number of input channels fit by one rule: one channel becomes C by repeating the stem's weight
    and dividing it by C; C become one by adding them up. Either way an image repeated over the C channels gives the
    activations that it gives as one channel. The account says so.

    Args:
        net: the encoder to fill, or a network that has it as ``backbone`` or ``encoder``.
        name_or_path: name in the registry (looked up in the store, else fetched), or a file: of the release's form,
            ``{"state_dict": {"module.conv1.weight": …}}``, a bare state dict of an encoder, of a network whose
            encoder is called ``backbone``, or of the original MedicalNet network. Any float type; ``.pth``, ``.pt``
            or ``.safetensors``.
        skip: names of tensors or modules of the encoder (``"conv1"``) that are left as they are.

    Returns:
        The account, which is also logged.

    Raises:
        InputError: the file is absent or no checkpoint, or its depth, shortcut type, keys, shapes or
            kinds of number differ, or it holds NaN or infinity, or a name in ``skip`` matches nothing.
    """
    backbone = _backbone_of(net)
    path = located(name_or_path)
    content = read_state_dict(path)
    state, rest = split_head(content)
    # Beside a `backbone.` anything is the rest of its network; beside a bare encoder only MedicalNet's conv_seg is.
    named = any(key.startswith("backbone.") for key in content)
    head = [key for key in rest if named or key.startswith("head.conv_seg.")]
    state.update({key: value for key, value in rest.items() if key not in head})
    _check_architecture(backbone, state, path)
    stem = "" if _is_named(_STEM, skip) else _fit_stem(state, backbone.in_channels)
    return _load(backbone, state, path, skip, tuple(head), stem)


def load_checkpoint(model: nn.Module, path: str | Path, skip: Sequence[str] = ()) -> Account:
    """Load the weights of a whole network, for example a bundle's ``models/model.pt``.

    A checkpoint of the original MedicalNet network (``module.conv1.weight`` … ``module.conv_seg.6.weight``) loads into
    ``SegmentationNet(head="medicalnet")``: its encoder goes to ``backbone``, ``conv_seg`` to ``head.conv_seg``.

    Args:
        model: the network to fill.
        path: a bare state dict (or ``{"state_dict": …}``) with exactly the network's keys, or a registry name. Any
            float type; ``.pth``, ``.pt`` or ``.safetensors``.
        skip: names of tensors or modules (``"head.classify"``) that are left as they are.

    Returns:
        The account, which is also logged.

    Raises:
        InputError: the file is absent or no checkpoint, or its depth, shortcut type, keys, shapes or
            kinds of number differ, or it holds NaN or infinity, or a name in ``skip`` matches nothing.
    """
    path = located(path)
    state = read_state_dict(path)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, Med3DResNet):
        encoder, rest = split_head(state)
        _check_architecture(backbone, encoder, path)
        state = {**{f"backbone.{key}": value for key, value in encoder.items()}, **rest}
    return _load(model, state, path, skip)


def load_network(network: _Net, path: str | Path) -> _Net:
    """``load_checkpoint`` for configs, which need the network back.

    Args:
        network: the network to fill.
        path: see ``load_checkpoint``.

    Returns:
        The same network.

    Raises:
        InputError: see ``load_checkpoint``.
    """
    load_checkpoint(network, path)
    return network


def initialise(network: _Net, backbone_weights: str = "", initial_weights: str = "") -> _Net:
    """Give a network its starting point for training.

    Args:
        network: a SegmentationNet or any network with a ``backbone``.
        backbone_weights: name or path of encoder weights for ``load_backbone``; empty: none.
        initial_weights: weights of the whole network for ``load_checkpoint``; empty: none.

    Returns:
        The same network; with both empty, as it was built.

    Raises:
        InputError: both are given, or the weights do not fit.
    """
    if backbone_weights and initial_weights:
        raise InputError("Both backbone_weights and initial_weights are given; give one of them.")
    if backbone_weights:
        load_backbone(network, backbone_weights)
    if initial_weights:
        load_checkpoint(network, initial_weights)
    return network


def located(name_or_path: str | Path) -> Path:
    """Path of weights: a file is itself, a bare word without suffix is looked up in the store or fetched.

    Raises:
        InputError: the word is no name of the registry, or the file cannot be had.
    """
    path = Path(name_or_path)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    from med3d_nets.weights.store import resolve  # it needs this package's states, so not at the top

    return resolve(str(name_or_path))


def _backbone_of(net: nn.Module) -> Med3DResNet:
    for candidate in (net, getattr(net, "backbone", None), getattr(net, "encoder", None)):
        if isinstance(candidate, Med3DResNet):
            return candidate
    raise TypeError(f"{type(net).__name__}: no Med3DResNet, and none as its backbone or encoder; pass the encoder.")


def _check_architecture(backbone: Med3DResNet, encoder: State, path: Path) -> None:
    found, wanted = detect_architecture(encoder), (backbone.depth, backbone.shortcut_type)
    if found is not None and found != wanted:
        raise InputError(
            f"{path}: these are weights of a ResNet-{found[0]} with shortcut {found[1]}, the network is a "
            f"ResNet-{wanted[0]} with shortcut {wanted[1]}. Pass the weights of that network, or build the other one."
        )


def _fit_stem(state: State, channels: int) -> str:
    """Repeat or add up the stem's input channels in place; the rule is in ``load_backbone``."""
    weight = state.get(_STEM)
    if weight is None or weight.ndim != 5 or weight.shape[1] == channels or 1 not in (weight.shape[1], channels):
        return ""
    if channels == 1:
        state[_STEM] = weight.float().sum(dim=1, keepdim=True)
        return f"summed over {weight.shape[1]} input channels"
    state[_STEM] = weight.float().repeat(1, channels, 1, 1, 1) / channels
    return f"repeated for {channels} input channels and divided by {channels}"


def _load(
    module: nn.Module, state: State, path: Path, skip: Sequence[str], head: tuple[str, ...] = (), stem: str = ""
) -> Account:
    own = module.state_dict()
    names = [*own, *(key for key in state if key not in own)]
    idle = [
        name for name in ([skip] if isinstance(skip, str) else skip) if not any(_is_named(key, [name]) for key in names)
    ]
    if idle:
        raise InputError(f"skip={idle}: matches no tensor of the network or of {path}. Correct the name.")
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = {
        key: f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    }
    wrong = [[key for key in keys if not _is_named(key, skip)] for keys in (missing, unexpected, list(shapes))]
    if any(wrong):
        raise InputError(
            f"{path}: the weights do not fit the network: {listed('missing', wrong[0])}; "
            f"{listed('unexpected', wrong[1])}; {listed('of another shape', [shapes[key] for key in wrong[2]])}. "
            f"Nothing was loaded. {foreign_layout(state)}".rstrip()
        )
    fits = [key for key in own if key in state and key not in shapes]
    skipped = [key for key in fits if _is_named(key, skip)]
    loaded = {key: state[key] for key in fits if key not in skipped}
    _check_values(path, loaded, own)
    module.load_state_dict({**own, **loaded})
    account = Account(
        path, tuple(loaded), tuple(missing), tuple(unexpected), tuple(shapes.values()), tuple(skipped), head, stem
    )
    _log.info("%s", account)
    return account


def _check_values(path: Path, values: State, own: State) -> None:
    kinds = [key for key, value in values.items() if value.is_floating_point() != own[key].is_floating_point()]
    broken = [key for key, value in values.items() if value.is_floating_point() and not value.isfinite().all()]
    if kinds or broken:
        raise InputError(
            f"{path}: {listed('of another kind of number', kinds)}; {listed('with NaN or infinity', broken)}. "
            "Nothing was loaded; take the weights of a training that did not diverge."
        )


def _is_named(key: str, names: Sequence[str]) -> bool:
    """Whether a tensor is one of the named ones or lies in a named module."""
    names = [names] if isinstance(names, str) else names
    return any(key == name or key.startswith(name.removesuffix(".") + ".") for name in names)
