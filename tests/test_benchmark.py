"""The speed benchmark: its figures on small volumes, its table and its plot; no test asks how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from med3d_nets import InputError
from tools import benchmark, benchmark_growth, benchmark_report, transfer_report


@pytest.mark.slow
def test_chain(tmp_path: Path) -> None:
    result = benchmark.chain("96,80,64", str(tmp_path / "chain.json"), repeats=1, to=str(tmp_path / "speed.csv"))
    assert json.loads((tmp_path / "chain.json").read_text()) == result
    assert all(result[key] > 0 for key in ("ratio", "memory_ratio", "after_network_ratio"))
    assert result["dice_float32"] > 0.99
    assert result["dice_float32_of_float32"] > 0.9999
    lines = benchmark_report.table(str(tmp_path / "speed.csv")).splitlines()
    assert lines[0].startswith("| 96 x 80 x 64 | read | resample | network | after | write | whole |")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "MONAI's usual chain",
        "this project",
        "this project, float32",
    ]
    assert lines[2].split("|")[8].strip() == "1.0x"


def test_network(tmp_path: Path) -> None:
    result = benchmark.network(10, (16, 64, 64), str(tmp_path / "network.json"), repeats=1)
    assert json.loads((tmp_path / "network.json").read_text()) == result
    assert result["ratio"] > 0
    assert result["dice_float32_of_float32"] > 0.999


@pytest.mark.slow
def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = benchmark_growth.growth(edges=(32, 40), classes=(2, 5), depths=(10,))
    assert [(row["axis"], row["voxels"], row["classes"], row["depth"]) for row in rows] == [
        ("voxels", 32**3, 3, 10),
        ("voxels", 40**3, 3, 10),
        ("classes", 215**3, 2, 10),
        ("classes", 215**3, 5, 10),
        ("depth", 215**3, 3, 10),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(benchmark_growth, "growth", lambda: rows)
    benchmark.growth(str(tmp_path / "growth.csv"))
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_dice() -> None:
    one, other = np.array([0, 1, 1, 2]), np.array([0, 1, 0, 2])
    assert benchmark._mean_dice(one, other, range(1, 4)) == pytest.approx((2 / 3 + 1) / 2)


def test_bad_input(tmp_path: Path) -> None:
    for shape in ("96,96", (8, 96, 96)):
        with pytest.raises(InputError, match="three edges of at least 16 voxels"):
            benchmark.network(10, shape)
    with pytest.raises(InputError, match="no results yet"):
        benchmark_report.table(str(tmp_path / "none.csv"))


def test_tables_of_the_docs_are_those_of_the_results() -> None:
    for name in ("README.md", "docs/speed.md"):
        assert benchmark_report.table() in (benchmark_report.ROOT / name).read_text()
    assert transfer_report.table() in (benchmark_report.ROOT / "docs" / "co-training.md").read_text()
    assert transfer_report.summary() in (benchmark_report.ROOT / "README.md").read_text()
