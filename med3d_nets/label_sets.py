"""Labels of which a volume may have several, or none: ``effusion|nodule``, ``none``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3d_nets.errors import InputError

SEPARATOR, NONE = "|", "none"


def members(cell: str) -> list[str]:
    """The classes that a cell names: ``effusion|nodule`` has two, ``none`` has none."""
    return [] if cell == NONE else [name.strip() for name in cell.split(SEPARATOR)]


def joined(names: Sequence[str]) -> str:
    """The cell that names the classes."""
    return SEPARATOR.join(names) or NONE


def indicator(where: str, cell: str, classes: Sequence[str]) -> NDArray[np.float32]:
    """Read a cell as one number per class, 1 where the volume has it, else 0.

    Args:
        where: of the cell, for an error.
        cell: names of classes parted by ``|``, or ``none``.
        classes: the classes in order.

    Returns:
        (number of classes,).

    Raises:
        InputError: a class is unknown or comes twice.
    """
    names = members(cell)
    for name in names:
        if name not in classes:
            raise InputError(
                f"{where}: unknown label '{name}'. The classes: {', '.join(classes)}; several are parted by "
                f"'{SEPARATOR}', and '{NONE}' is none of them."
            )
    if len(set(names)) < len(names):
        raise InputError(f"{where}: the label '{cell}' names a class twice. Name each once.")
    return np.array([name in names for name in classes], dtype=np.float32)


def classes_of(case: Mapping[str, Any]) -> dict[int, str]:
    """Index and name of each class of a case: one, or of several labels those that it has.

    Args:
        case: of ``read_labels``: ``label`` (an index, or one number per class) and ``class`` (a name, or a cell).
    """
    if has_several(case):
        return dict(zip(np.flatnonzero(case["label"]).tolist(), members(case["class"]), strict=True))
    return {case["label"]: case["class"]}


def has_several(case: Mapping[str, Any]) -> bool:
    """Whether a case of ``read_labels`` was read with ``multi_label``."""
    return isinstance(case["label"], np.ndarray)


def check_classes(classes: Collection[str]) -> None:
    """Refuse names that a cell of several labels cannot hold.

    Raises:
        InputError: a name is empty, holds the separator, or is the word for no class.
    """
    bad = [name for name in classes if not name or SEPARATOR in name or name == NONE]
    if bad:
        raise InputError(
            f"The class '{bad[0]}' cannot be one of several labels: names must not be empty, '{NONE}', or hold "
            f"'{SEPARATOR}'. Rename it, or remove a '{SEPARATOR}' that parts nothing."
        )
