"""From one form of weights to another: the original MedicalNet's, MONAI's ResNet, a bundle's, a bare encoder.

All of them name the encoder's tensors alike. They differ in wrapping, in the head, and in the bias that MONAI's
shortcut convolution has by default, which moves exactly into the norm that follows: the norm subtracts its running
mean, so ``mean - bias`` without the bias is the same function, in training too, where the batch's mean takes the bias
out again.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from med3d_nets.errors import InputError
from med3d_nets.heads import MedicalNetHead
from med3d_nets.resnet import Med3DResNet
from med3d_nets.weights.loading import located
from med3d_nets.weights.states import (
    State,
    detect_architecture,
    foreign_layout,
    listed,
    read_state_dict,
    split_head,
    write_state_dict,
)

FORMS = {
    "bundle": "a bundle's models/model.pt: SegmentationNet, bare",
    "encoder": "an encoder alone, bare, for load_backbone",
    "medicalnet": 'the original code\'s, {"state_dict": {"module.…": …}}',
    "monai": "monai.networks.nets.resnet*, bare",
}
_MONAI_NOTE = (
    "the tensors are the same, the function is not: MONAI's ResNet has strides 2 and no dilation in layer3 and layer4. "
    "With conv1_t_stride=2 (its default is 1) it computes what Med3DResNet(output_stride=32) does; the released "
    "weights were trained at output stride 8 (docs/weights.md has numbers)"
)
_BIAS = re.compile(r"(layer\d\.0\.downsample)\.0\.bias")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """What was converted; ``str()`` of it is for people.

    Attributes:
        source: file read.
        target: file written.
        found: form of the source, a key of ``FORMS``.
        to: form of the target, a key of ``FORMS``.
        depth: depth of the encoder.
        shortcut: shortcut type of the encoder.
        in_channels: input channels of the stem.
        tensors: number of tensors written.
        notes: what was changed or left out, and where the function differs.
    """

    source: Path
    target: Path
    found: str
    to: str
    depth: int
    shortcut: str
    in_channels: int
    tensors: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        line = (
            f"{self.target}: {self.tensors} tensors of a ResNet-{self.depth} with shortcut {self.shortcut} and "
            f"{self.in_channels} input channel(s), from {self.source} ({self.found} to {self.to})"
        )
        return "\n".join([line, *(f"  note: {note}" for note in self.notes)])


def convert(source: str | Path, target: str | Path, to: str = "", bias_downsample: bool = False) -> Conversion:
    """Convert a weights file.

    Args:
        source: file to read (``.pt``, ``.pth``, ``.safetensors``, or the original's ``.pth.tar``), or a registry name.
        target: file to write; its suffix decides the format.
        to: ``"bundle"``, ``"encoder"``, ``"medicalnet"`` or ``"monai"``; empty: ``"bundle"`` if the source has a
            segmentation head, else ``"encoder"``.
        bias_downsample: for ``"monai"``: give the shortcut convolutions the (zero) bias that MONAI's networks have
            unless they are built with ``bias_downsample=False``.

    Returns:
        The account of it; its notes are also logged as warnings.

    Raises:
        InputError: the source is no complete encoder of a known depth, has no head where one is needed, or the form
            or suffix is unknown.

    Example:
        >>> convert("finetuned.pth.tar", "models/model.pt")  # doctest: +SKIP
    """
    if to not in ("", *FORMS):
        raise InputError(f"to={to!r}: allowed are {', '.join(f'{form} ({what})' for form, what in FORMS.items())}.")
    path = located(source)
    found, encoder, head, notes = _read(path)
    depth, shortcut, channels = _check_encoder(encoder, path)
    to = to or ("bundle" if head else "encoder")
    if "monai" in (found, to):
        notes.append(_MONAI_NOTE)
    state = _assemble(encoder, head, to, path, notes)
    if to == "monai" and bias_downsample:
        state.update(_zero_biases(state))
    write_state_dict(state, target, wrapped=to == "medicalnet")
    done = Conversion(path, Path(target), found, to, depth, shortcut, channels, len(state), tuple(notes))
    for note in notes:
        _log.warning("%s: %s.", target, note)
    return done


def _read(path: Path) -> tuple[str, State, State, list[str]]:
    """Form, encoder, head by SegmentationNet's names, and notes on what was changed."""
    content = read_state_dict(path)
    encoder, rest = split_head(content)
    head = {key: value for key, value in rest.items() if key.startswith("head.")}
    classifier = [key for key in rest if key.startswith("fc.")]
    others = [key for key in rest if key not in head and key not in classifier]
    if not encoder or others:
        raise InputError(
            f"{path}: no encoder of this family with a known head: {listed('tensors of the encoder', list(encoder))}, "
            f"{listed('of no known part', others)}. {foreign_layout(content)}".rstrip()
        )
    notes = []
    if classifier:
        notes.append(f"left out, a classifier has no place here: {', '.join(classifier)}")
    named = any(key.startswith("backbone.") for key in content)
    found = "bundle" if named else "medicalnet" if head else "encoder"
    biases = [key for key in encoder if _BIAS.fullmatch(key)]
    if classifier or biases:
        found = "monai"
    if biases:
        encoder = _fold_biases(encoder)
        notes.append(f"{len(biases)} biases of shortcut convolutions moved into the running means, which is exact")
    counters = [f"{key.removesuffix('running_mean')}num_batches_tracked" for key in encoder if "running_mean" in key]
    absent = [key for key in counters if key not in encoder]
    if absent:  # written before torch 0.4.1
        encoder.update({key: torch.tensor(0) for key in absent})
        notes.append(f"{len(absent)} num_batches_tracked set to 0, which no result depends on")
    return found, encoder, head, notes


def _fold_biases(encoder: State) -> State:
    folded = {key: value for key, value in encoder.items() if not _BIAS.fullmatch(key)}
    for key, bias in encoder.items():
        match = _BIAS.fullmatch(key)
        mean = f"{match[1]}.1.running_mean" if match else ""
        if mean in folded:
            folded[mean] = (folded[mean].double() - bias.double()).to(folded[mean].dtype)
    return folded


def _zero_biases(state: State) -> State:
    convolutions = {key: value for key, value in state.items() if key.endswith("downsample.0.weight")}
    return {key.replace("0.weight", "0.bias"): value.new_zeros(len(value)) for key, value in convolutions.items()}


def _check_encoder(encoder: State, path: Path) -> tuple[int, str, int]:
    """Depth, shortcut and input channels of an encoder that is complete to the last tensor."""
    found = detect_architecture(encoder)
    stem = encoder.get("conv1.weight")
    if found is None or stem is None or stem.ndim != 5:
        raise InputError(
            f"{path}: its blocks are those of no 3D ResNet of depth 10, 18, 34, 50, 101, 152 or 200. "
            f"{foreign_layout(encoder)}".rstrip()
        )
    with torch.device("meta"):
        network = Med3DResNet(found[0], found[1], in_channels=stem.shape[1])
    _check_shapes(encoder, network.state_dict(), f"a ResNet-{found[0]} with shortcut {found[1]}", path)
    return (*found, stem.shape[1])


def _check_shapes(state: State, own: State, what: str, path: Path) -> None:
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        raise InputError(
            f"{path}: is not {what}: {listed('missing', missing)}; {listed('unexpected', unexpected)}; "
            f"{listed('of another shape', shapes)}. Nothing was written. {foreign_layout(state)}".rstrip()
        )


def _assemble(encoder: State, head: State, to: str, path: Path, notes: list[str]) -> State:
    """The target's tensors by its names."""
    conv_seg = {key.removeprefix("head."): value for key, value in head.items() if key.startswith("head.conv_seg.")}
    if conv_seg:
        _check_conv_seg(conv_seg, encoder, path)
    if to == "bundle":
        if not head:
            raise InputError(
                f"{path}: is an encoder without a head, a bundle's model needs both. Use to='encoder', or train from "
                "it with --backbone_weights."
            )
        return {**{f"backbone.{key}": value for key, value in encoder.items()}, **head}
    if to == "medicalnet" and conv_seg:
        return {**encoder, **conv_seg}
    if head:
        notes.append(f"the head is left out ({listed('tensors', list(head))})")
    return dict(encoder)


def _check_conv_seg(conv_seg: State, encoder: State, path: Path) -> None:
    last = conv_seg.get("conv_seg.6.weight")
    channels = encoder["layer4.0.bn3.bias" if "layer4.0.bn3.bias" in encoder else "layer4.0.bn2.bias"].shape[0]
    with torch.device("meta"):
        head = MedicalNetHead([channels] * 5, [8] * 5, 1 if last is None else last.shape[0])
    _check_shapes(conv_seg, head.state_dict(), "MedicalNet's conv_seg", path)
