"""A contact sheet: one small picture per case with a line or two below it, as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.ndimage import zoom

from med3d_nets.errors import InputError
from med3d_nets.files import replacing

_BACKGROUND, _TEXT = "#101418", "#f2f4f6"
_EDGE, _LINE, _GAP = 1.7, 0.17, 0.08  # inches: a tile, a line of its caption, the space between tiles
_DPI = 110
_LETTERS = 26  # of a caption's line: more would run into the next tile


def write_contact_sheet(
    path: str | Path,
    tiles: Sequence[tuple[NDArray[Any], str]],
    columns: int = 6,
    window: Sequence[float] | None = (0.0, 1.0),
) -> None:
    r"""Draw tiles row by row, each fitted into a square, and write them as one PNG, whole or not at all.

    Args:
        path: the PNG.
        tiles: picture and caption of each. A picture is (rows, columns), grey, or (rows, columns, 3), colours from 0
            to 1; row 0 is at the top, pixels are square. Lines of a caption are parted by a line feed, and cut short
            where they are longer than a tile.
        columns: most tiles in a row.
        window: values that are black and white in grey pictures; None takes the 1st and 99th percentile of each.

    Raises:
        InputError: there is no tile, or the file cannot be written.

    Example:
        >>> write_contact_sheet("sheet.png", [(np.eye(8), "one\np 0.93")])  # doctest: +SKIP
    """
    if not tiles:
        raise InputError(f"{path}: no picture for the contact sheet. Give at least one.")
    columns = min(int(columns), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    lines = max(caption.count("\n") + 1 for _, caption in tiles)
    wide, high = _EDGE + _GAP, _EDGE + lines * _LINE + 2 * _GAP
    figure = Figure(figsize=(columns * wide + _GAP, rows * high + _GAP), facecolor=_BACKGROUND)
    width, height = figure.get_size_inches()
    for number, (picture, caption) in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = _GAP + column * wide, height - _GAP - row * high
        axes = figure.add_axes((left / width, (top - _EDGE) / height, _EDGE / width, _EDGE / height))
        axes.set_axis_off()
        low, high_value = _window(picture, window)
        axes.imshow(np.clip(picture, 0, 1) if picture.ndim == 3 else picture, cmap="gray", vmin=low, vmax=high_value)
        text = "\n".join(_short(line) for line in caption.split("\n"))
        place = (left / width, (top - _EDGE - _GAP / 2) / height)
        figure.text(*place, text, color=_TEXT, fontsize=8, va="top", linespacing=1.1, parse_math=False)
    with replacing(path) as hidden, hidden.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=_DPI, facecolor=_BACKGROUND)


def axial_tile(volume: NDArray[Any], spacing: Sequence[float], index: int | None = None) -> NDArray[Any]:
    """Cut an axial slice as radiologists look at it: the patient's right on the left, anterior at the top.

    Args:
        volume: (X, Y, Z), axes to the patient's right, anterior and superior (RAS).
        spacing: voxel size in mm along them; where the first two differ, the slice is made to square pixels.
        index: of the slice; None: the middle one.

    Returns:
        (rows, columns), for ``write_contact_sheet``.
    """
    index = volume.shape[2] // 2 if index is None else index
    plane = np.flip(volume[:, :, index].T)
    factors = [spacing[1] / min(spacing[:2]), spacing[0] / min(spacing[:2])]
    return plane if np.allclose(factors, 1) else zoom(plane, factors, order=1)


def _window(picture: NDArray[Any], window: Sequence[float] | None) -> tuple[float, float]:
    low, high = np.percentile(picture, [1, 99]) if window is None else window
    return float(low), float(max(high, low + 1e-6))


def _short(line: str) -> str:
    return line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…"
