"""What a trained classifier needs beside its weights: ``classifier.json`` in the folder of its ``model.pt``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite import distributed as idist
from ignite.engine import Engine, Events

from med3d_nets.errors import InputError
from med3d_nets.files import replacing

NAME = "classifier.json"
UNTRAINED: dict[str, Any] = {"classes": ["0", "1"], "spacing": [1.5] * 3, "input_size": [96] * 3}

_KEYS = ("classes", "spacing", "input_size")
_DEFAULTS: dict[str, Any] = {  # of what a record without these keys was trained with
    "modality": "mr",
    "hu_window": [-1000.0, 1000.0],
    "clip_percentiles": [0.5, 99.5],
    "multi_label": False,
}


class ClassifierRecord:
    """Training handler that writes ``classifier.json`` when the training starts.

    Args:
        folder: folder of the training's ``model.pt``.
        classes: names of the classes by index.
        spacing: voxel size in mm that the volumes are resampled to.
        input_size: voxels that the network is given at most.
        more: whatever else is to be told of the training, for example ``modality`` and ``multi_label``.
        resume: the training goes on, so that the classes must be those of the record that is there.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        spacing: Sequence[float],
        input_size: Sequence[int],
        more: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        self.path = Path(folder) / NAME
        own = {"classes": list(classes), "spacing": list(spacing), "input_size": list(input_size)}
        self.record = {**more, **own}
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write, in the first process.

        Raises:
            InputError: the training that goes on has other classes.
        """
        if self.resume:
            before = read_record(self.path.with_name("model.pt"))
            several = bool(self.record.get("multi_label", False))
            if before["multi_label"] != several:
                raise InputError(
                    f"{self.path}: the training has multi_label {before['multi_label']}, now it is {several}. "
                    "Resume with the same, or give another output_dir."
                )
            if before["classes"] != self.record["classes"]:
                raise InputError(
                    f"{self.path}: the training has the classes {', '.join(before['classes'])}, the labels now "
                    f"{', '.join(self.record['classes'])}. Resume with the same labels, or give another output_dir."
                )
        if idist.get_rank() == 0:
            with replacing(self.path) as hidden:
                hidden.write_text(f"{json.dumps(self.record, indent=2)}\n", encoding="utf-8")


def note(weights: str | Path, more: Mapping[str, Any]) -> None:
    """Add keys to the ``classifier.json`` beside a classifier's weights.

    Raises:
        InputError: there is no record, or it is none.
    """
    path = Path(weights).expanduser().with_name(NAME)
    read_record(weights)
    record = {**json.loads(path.read_text(encoding="utf-8")), **more}
    with replacing(path) as hidden:
        hidden.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")


def settings_of(weights: str | Path, bundle_root: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a classifier: those of the record beside its weights, else for a bundle's own weights the bundle's.

    A network can so be made without any weights, for its export or its checks.

    Args:
        weights: its ``model.pt``.
        bundle_root: the bundle.
        settings: those of ``train.json``; what a record lacks is taken from them too.

    Raises:
        InputError: weights from elsewhere have no record.
    """
    path = Path(weights).expanduser()
    own = path.resolve() == (Path(bundle_root) / "models" / "model.pt").resolve()
    if own and not path.with_name(NAME).is_file():
        return dict(settings)
    return {**settings, **read_record(weights)}


def read_record(weights: str | Path, untrained: bool = False) -> dict[str, Any]:
    """Read the ``classifier.json`` beside a classifier's weights.

    Args:
        weights: its ``model.pt`` or ``model_last.pt``.
        untrained: where there are no such weights either, give the record of a network of two classes, so that a config
            can build one that is described, checked or given weights later.

    Returns:
        ``classes`` (names by index), ``spacing``, ``input_size``, ``modality``, ``hu_window``, ``clip_percentiles``,
        ``multi_label`` (where a record has none, those of MRI and one label), and what else the training told.

    Raises:
        InputError: there is no record, or it is none.
    """
    file = Path(weights).expanduser()
    path = file.with_name(NAME) if file.name else Path(NAME)
    if untrained and not file.is_file():
        return {**_DEFAULTS, **UNTRAINED}
    if not path.is_file():
        raise InputError(
            f"{path}: no record of a trained classifier. Train one with configs/train.json, give its model.pt as "
            f"weights, and keep {NAME} beside it."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}). Copy it again from the training's folder.") from error
    missing = [key for key in _KEYS if not isinstance(record, dict) or not record.get(key)]
    if missing:
        raise InputError(f"{path}: has no {', '.join(missing)}. Copy it again from the training's folder.")
    return {**_DEFAULTS, **record}
