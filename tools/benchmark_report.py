"""CSV files, table and figure of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.tables import Row, csv_text, read_rows
from tools.bundle_run import ROOT

CHAIN_CSV = ROOT / "docs" / "results" / "speed.csv"
GROWTH_CSV = ROOT / "docs" / "results" / "growth.csv"
PARTS = ("read", "resample", "network", "after", "write", "whole")
NAMES = {
    "stock": "MONAI's usual chain",
    "ours": "this project",
    "ours_float32": "this project, float32",
}


def table(path: str = str(CHAIN_CSV)) -> str:
    """Make the README's table of the CSV that ``benchmark chain`` wrote.

    Args:
        path: the CSV.

    Returns:
        Markdown: seconds of each part, peak memory, and the ratios to the stock chain.

    Raises:
        InputError: there is no such file.
    """
    rows = _rows(path, ("way", "shape", "bytes", "dice_float32", *PARTS))
    stock = next(row for row in rows if row["way"] == "stock")
    lines = [
        f"| {rows[0]['shape'].replace('x', ' x ')} | {' | '.join(PARTS)} | faster | peak memory | Dice with float32 |",
        "|" + "---|" * (len(PARTS) + 4),
    ]
    for row in rows:
        seconds = " | ".join(f"{float(row[part]):.2f} s" for part in PARTS)
        ratio = float(stock["whole"]) / float(row["whole"])
        memory, dice = f"{float(row['bytes']) / 2**30:.2f} GiB", f"{float(row['dice_float32']):.4f}"
        lines.append(f"| {NAMES[row['way']]} | {seconds} | {ratio:.1f}x | {memory} | {dice} |")
    return "\n".join(lines)


def growth_plot(path: str = str(GROWTH_CSV), to: str = str(GROWTH_CSV.with_suffix(".png"))) -> None:
    """Draw time and peak memory against voxels, classes and depth.

    Args:
        path: CSV that ``benchmark growth`` wrote.
        to: the figure, PNG.

    Raises:
        InputError: there is no such file.
    """
    rows = _rows(path, ("axis", "voxels", "classes", "depth", "seconds", "bytes"))
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 3)
    for column, axis in enumerate(("voxels", "classes", "depth")):
        own = [row for row in rows if row["axis"] == axis]
        values = [float(row[axis]) for row in own]
        for line, (key, scale, unit) in enumerate((("seconds", 1.0, "s"), ("bytes", 2.0**30, "GiB"))):
            panel = panels[line][column]
            panel.plot(values, [float(row[key]) / scale for row in own], marker="o")
            panel.set(xlabel=axis, ylabel=unit, ylim=(0, None), xlim=(0, None))
            panel.grid(alpha=0.3)
    with replacing(to) as hidden:
        figure.savefig(hidden, dpi=110, format="png")


def write_rows(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file, numbers with five digits."""
    lines = [[f"{value:.5g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    with replacing(path) as hidden:
        hidden.write_text(csv_text(list(rows[0]), lines), encoding="utf-8")


def _rows(path: str | Path, needed: Sequence[str]) -> list[Row]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no results yet. Run python -m tools.benchmark chain (or growth).")
    return read_rows(Path(path), needed)
