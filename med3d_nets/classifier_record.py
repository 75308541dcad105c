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
_KEYS = ("classes", "spacing", "input_size")


class ClassifierRecord:
    """Training handler that writes ``classifier.json`` when the training starts.

    Args:
        folder: folder of the training's ``model.pt``.
        classes: names of the classes by index.
        spacing: voxel size in mm that the volumes are resampled to.
        input_size: voxels that the network is given at most.
        more: whatever else is to be told of the training.
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
            before = read_record(self.path.with_name("model.pt"))["classes"]
            if before != self.record["classes"]:
                raise InputError(
                    f"{self.path}: the training has the classes {', '.join(before)}, the labels now "
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
    record = {**read_record(weights), **more}
    with replacing(path) as hidden:
        hidden.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")


def read_record(weights: str | Path) -> dict[str, Any]:
    """Read the ``classifier.json`` beside a classifier's weights.

    Args:
        weights: its ``model.pt`` or ``model_last.pt``.

    Returns:
        ``classes`` (names by index), ``spacing``, ``input_size``, and what else the training told.

    Raises:
        InputError: there is no record, or it is none.
    """
    path = Path(weights).expanduser().with_name(NAME)
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
    return record
