"""The contact sheet of small pictures, and the slice of a volume that it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from med3d_nets.contact_sheet import axial_tile, write_contact_sheet
from med3d_nets.errors import InputError


def test_tiles_stand_row_by_row(tmp_path: Path) -> None:
    """A white, a black and a red picture, two in a row."""
    tiles = [(np.ones((8, 8)), "white\np $0.9$"), (np.zeros((8, 8)), "a name that is far too long for one tile")]
    red = np.zeros((4, 4, 3))
    red[..., 0] = 1
    write_contact_sheet(tmp_path / "made" / "sheet.png", [*tiles, (red, "red")], columns=2)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["sheet.png"]
    sheet = imread(tmp_path / "made" / "sheet.png")[..., :3]
    height, width = sheet.shape[:2]
    row, low, left, right = height // 4, 3 * height // 4 - 10, width // 4, 3 * width // 4
    np.testing.assert_allclose(sheet[row, left], [1, 1, 1], atol=0.02)
    np.testing.assert_allclose(sheet[row, right], [0, 0, 0], atol=0.02)
    np.testing.assert_allclose(sheet[low, left], [1, 0, 0], atol=0.02)
    assert sheet[low, right].max() < 0.2  # the background
    small = imread(_one(tmp_path, tiles[:1]))
    assert small.shape[1] < width


def _one(folder: Path, tiles: list) -> Path:
    write_contact_sheet(folder / "one.png", tiles, window=None)
    return folder / "one.png"


def test_no_tile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sheet.png: no picture for the contact sheet"):
        write_contact_sheet(tmp_path / "sheet.png", [])


def test_axial_tile_is_radiological_with_square_pixels() -> None:
    """The patient's left, the far end of axis 0 in RAS reversed, is on the right; anterior is at the top."""
    volume = np.zeros((6, 4, 3))
    volume[0, -1, 1] = 1  # left, anterior
    tile = axial_tile(volume, (1.0, 1.0, 5.0))
    assert tile.shape == (4, 6) and tile[0, -1] == 1 and tile.sum() == 1
    assert axial_tile(volume, (1.0, 1.0, 5.0), 0).sum() == 0
    wide = axial_tile(volume, (2.0, 1.0, 5.0))
    assert wide.shape == (4, 12) and wide[0, -1] == 1
