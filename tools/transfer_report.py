"""Table and figures of the transfer benchmark, from its CSV."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.tables import Row, read_rows
from tools.bundle_run import ROOT

CSV = ROOT / "docs" / "results" / "transfer.csv"
OWN = "med3d_real8"  # the arm whose encoder this project trains, without the target's domain
_NEEDED = ("target", "arm", "mode", "fraction", "seed", "metric", "score", "epochs_to_95")


def table(path: str = str(CSV)) -> str:
    """Make a Markdown table: each arm and mode against scratch on the same patients and seeds.

    Args:
        path: CSV of ``transfer run``.

    Returns:
        Mean score over the seeds, its difference to scratch with the 95 % interval of the paired t distribution over
        the seeds that both have, the same for the surface Dice at 1 mm of a segmentation, and the epochs to 95 % of the
        training's best validation score.

    Raises:
        InputError: there is no such file.
    """
    rows = _rows(path)
    lines = [
        "| target | data | arm | seeds | score | against scratch (95 % interval) | surface Dice | against scratch | "
        "epochs to 95 % |",
        "|" + "---|" * 9,
    ]
    for target, fraction in sorted({(row["target"], float(row["fraction"])) for row in rows}):
        here = [row for row in rows if row["target"] == target and float(row["fraction"]) == fraction]
        scratch = [row for row in here if row["arm"] == "scratch"]
        for arm, mode in sorted(
            {(row["arm"], row["mode"]) for row in here}, key=lambda key: (key[0] != "scratch", key)
        ):
            own = [row for row in here if (row["arm"], row["mode"]) == (arm, mode)]
            name = _name(arm, mode)
            cells = [target, f"{fraction:.0%}", name, str(len(own)), f"{own[0]['metric']} {_mean(own, 'score'):.3f}"]
            cells += [_gain(own, scratch) if arm != "scratch" else "", *_surface(own, scratch)]
            lines.append(_line([*cells, f"{_mean(own, 'epochs_to_95'):.1f}"]))
    return "\n".join(lines)


def summary(path: str = str(CSV), arm: str = OWN, at: float = 0.1) -> str:
    """Make the README's table: scores by share of the training patients, from scratch and from the project's encoder.

    Args:
        path: CSV of ``transfer run``.
        arm: the encoder, all of which was trained.
        at: share for which difference and epochs are shown.

    Returns:
        Two rows for each target and measure (a segmentation also has the surface Dice): means, with the number of seeds
        where it is below three, and the columns of ``table`` for one share.

    Raises:
        InputError: there is no such file.
    """
    rows = [row for row in _rows(path) if row["mode"] == "full" and row["arm"] in ("scratch", arm)]
    shares = sorted({float(row["fraction"]) for row in rows})
    gain_column = f"gain at {at:.0%} (95 % interval)"
    head = ["target", "from", *(f"{share:.0%}" for share in shares), gain_column, "epochs to 95 %"]
    lines = [_line(head), "|" + "---|" * len(head)]

    def runs(target: str, start: str, share: float) -> list[Row]:
        return [row for row in rows if (row["target"], row["arm"], float(row["fraction"])) == (target, start, share)]

    measures = {(row["target"], row["metric"], "score") for row in rows}
    measures |= {(row["target"], "surface dice", "surface_dice") for row in rows if row["surface_dice"]}
    for (target, metric, column), start in itertools.product(sorted(measures), ("scratch", arm)):
        own, scratch = runs(target, start, at), runs(target, "scratch", at)
        cells = [_score(runs(target, start, share), column) for share in shares]
        gain = _gain(own, scratch, column) if own and start != "scratch" else ""
        epochs = f"{_mean(own, 'epochs_to_95'):.1f}" if own else "–"
        lines.append(_line([f"{target} ({metric})", start, *cells, gain, epochs]))
    return "\n".join(lines)


def plot(path: str = str(CSV), folder: str = str(CSV.parent)) -> None:
    """Draw ``transfer_TARGET.png``: scores and epochs to 95 % against the share of the data, mean and seeds.

    Args:
        path: CSV of ``transfer run``.
        folder: where the figures go.

    Raises:
        InputError: there is no such file.
    """
    rows = _rows(path)
    for target in sorted({row["target"] for row in rows}):
        here = [row for row in rows if row["target"] == target]
        titles = {"score": f"{target}: {here[0]['metric']}, held-out patients", "epochs_to_95": "epochs to 95 %"}
        if here[0]["surface_dice"]:
            titles = {"score": titles["score"], "surface_dice": "surface dice at 1 mm", **titles}
        figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
        panels = dict(zip(titles, figure.subplots(1, len(titles)), strict=True))
        for arm, mode in sorted({(row["arm"], row["mode"]) for row in here}):
            own = [row for row in here if (row["arm"], row["mode"]) == (arm, mode)]
            for column, axes in panels.items():
                _curve(axes, own, column, _name(arm, mode))
        for column, axes in panels.items():
            axes.set(xscale="log", xlabel="training patients, %", title=titles[column])
            axes.grid(alpha=0.3)
        panels["score"].legend()
        with replacing(Path(folder) / f"transfer_{target}.png") as hidden:
            figure.savefig(hidden, dpi=110, format="png")


def _curve(axes: Axes, rows: Sequence[Row], column: str, name: str) -> None:
    shares = sorted({float(row["fraction"]) for row in rows})
    means = [_mean([row for row in rows if float(row["fraction"]) == share], column) for share in shares]
    [line] = axes.plot(np.array(shares) * 100, means, marker="o", label=name)
    points = [(float(row["fraction"]) * 100, float(row[column])) for row in rows]
    axes.plot(*zip(*points, strict=True), ".", color=line.get_color(), alpha=0.4)


def _rows(path: str) -> list[Row]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no results yet. Run python -m tools.transfer run.")
    return read_rows(Path(path), _NEEDED)


def _name(arm: str, mode: str) -> str:
    return arm if arm == "scratch" else f"{arm}, {mode}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(rows: Sequence[Row], column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows)


def _score(rows: Sequence[Row], column: str) -> str:
    if not rows:
        return "–"
    few = {1: " (1 seed)", 2: " (2 seeds)"}.get(len(rows), "")
    return f"{_mean(rows, column):.3f}{few}"


def _surface(rows: Sequence[Row], scratch: Sequence[Row]) -> tuple[str, str]:
    """Mean surface Dice and its gain; a classification has none."""
    if not rows[0]["surface_dice"]:
        return "", ""
    gain = "" if rows[0]["arm"] == "scratch" else _gain(rows, scratch, "surface_dice")
    return f"{_mean(rows, 'surface_dice'):.3f}", gain


def _gain(rows: Sequence[Row], scratch: Sequence[Row], column: str = "score") -> str:
    """Mean difference, seed by seed, and its interval."""
    others = {row["seed"]: float(row[column]) for row in scratch}
    gains = [float(row[column]) - others[row["seed"]] for row in rows if row["seed"] in others]
    if not gains:
        return "no scratch run"
    mean = statistics.fmean(gains)
    if len(gains) < 2:
        return f"{mean:+.3f} (one seed)"
    half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
