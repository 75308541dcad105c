"""The comparison of two classifiers on the same nodules."""

from __future__ import annotations

from pathlib import Path

import pytest

from med3d_nets.errors import InputError
from med3d_nets.tables import csv_text
from tools.nodules import compare

COLUMNS = ["case", "patient", "p_malign", "p_rating_4_5", "true_malign", "true_rating_4_5"]


def write(path: Path, right: bool, count: int = 20) -> str:
    """Malignant is every second nodule by one rule, every fourth by the other; the first may be told wrong."""
    rows = []
    for number in range(count):
        malign, rated = number % 2, int(number % 4 == 0)
        rows.append([f"n{number:02d}", f"p{number // 2}", malign if right else 1 - malign, rated, malign, rated])
    path.write_text(csv_text(COLUMNS, rows))
    return str(path)


def test_compare(tmp_path: Path) -> None:
    right, wrong = write(tmp_path / "a.csv", True), write(tmp_path / "b.csv", False)
    assert compare(right, wrong).splitlines() == [
        "malign: AUC +1.000 (+1.000 to +1.000)",
        "rating_4_5: AUC +0.000 (+0.000 to +0.000)",
    ]


def test_other_nodules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"other nodules \(20 and 18\)"):
        compare(write(tmp_path / "a.csv", True), write(tmp_path / "b.csv", True, 18))
