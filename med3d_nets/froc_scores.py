"""Scores of a detector: the FROC curve as CSV, JSON and picture, and all findings as LUNA16 takes them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing, set_aside
from med3d_nets.findings import row, table
from med3d_nets.froc import RATES, Froc, ScanHits, froc, intervals, match
from med3d_nets.processes import gather, rank
from med3d_nets.tables import csv_text
from med3d_nets.weights import file_sha256

FILES = ("froc.csv", "froc.json", "froc.png", "detections.csv", "nodules.csv")


class FrocScores:
    """Handler of CaseEvaluator that writes ``froc.csv``, ``froc.json``, ``froc.png`` and the tables behind them.

    It expects in the engine's output, after postprocessing, ``pred``: findings of WorldBoxesd, (n, 7), and in the batch
    ``points`` and ``excluded``, (m, 4): x, y, z, diameter in RAS mm. ``detections.csv`` has all findings in LUNA16's
    columns (LPS), ``nodules.csv`` each nodule with the probability of its best finding, empty where it was missed. If
    no nodule could be scored, nothing is written and files of an earlier run get the suffix ``.old``. Of several
    processes, the first writes the scans of all.

    Args:
        output_dir: folder for the files.
        weights: file of the network's weights, whose hash goes into the JSON.
        bootstrap_samples: number of resamples of scans for the intervals.
    """

    def __init__(self, output_dir: str | Path, weights: str | Path, bootstrap_samples: int = 1000) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.weights = weights
        self.bootstrap_samples = int(bootstrap_samples)
        self._cases: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Keep the current scan."""
        state: Any = engine.state
        pred, batch = state.output[0]["pred"], state.batch[0]
        self._cases[state.case] = {
            "findings": np.asarray(pred.cpu(), dtype=np.float64).tolist(),
            "points": batch["points"].tolist(),
            "excluded": batch["excluded"].tolist(),
        }

    def _finish(self, engine: Engine) -> None:
        """Gather the scans of all processes and write them."""
        state: Any = engine.state
        cases, failed = gather(self._cases), gather(state.failed)
        self._cases = {}
        scans = {name: _matched(one) for name, one in cases.items()}
        curve = froc(list(scans.values()))
        state.metrics["cpm"] = curve.cpm
        if rank() != 0:
            return
        if not curve.nodules:
            for name in FILES:
                set_aside(self.output_dir / name)
            if failed:  # the evaluator tells of these
                return
            raise InputError(
                f"None of the {curve.scans} scans has a nodule in the annotations, so there is no sensitivity. "
                "Evaluate scans with nodules."
            )
        ends = intervals(list(scans.values()), self.bootstrap_samples)
        report = {**summary(curve, ends), "weights_sha256": file_sha256(self.weights), "failed": failed}
        found = [row(name, np.array(one)) for name, case in cases.items() for one in case["findings"]]
        contents = (curve_csv(curve), json.dumps(report, indent=2) + "\n", None, table(found), _nodules(cases, scans))
        for name, content in zip(FILES, contents, strict=True):
            with replacing(self.output_dir / name) as hidden:
                hidden.write_bytes(picture(curve, ends) if content is None else content.encode())
        low, high = ends[:, -1]
        interval = f"95 % interval {low:.3f} to {high:.3f}"
        print(f"CPM {curve.cpm:.3f} ({interval}), {curve.nodules} nodules in {curve.scans} scans", flush=True)


def summary(curve: Froc, ends: np.ndarray) -> dict[str, Any]:
    """The scores with their intervals, for JSON.

    Args:
        curve: the curve.
        ends: of ``intervals``, (2, 8).
    """
    rates = {
        f"{rate:g}": {"sensitivity": _or_none(value), "ci95": [_or_none(low), _or_none(high)]}
        for rate, value, low, high in zip(RATES, curve.at_rates, *ends[:, :-1], strict=True)
    }
    return {
        "cpm": _or_none(curve.cpm),
        "cpm_ci95": [_or_none(end) for end in ends[:, -1]],
        "sensitivity_at_false_positives_per_scan": rates,
        "largest_sensitivity": _or_none(curve.sensitivity[-1]) if len(curve.sensitivity) else 0.0,
        "scans": curve.scans,
        "nodules": curve.nodules,
        "definition": "LUNA16: a hit is nearer to the nodule's middle than its radius; intervals by resampling scans",
    }


def curve_csv(curve: Froc) -> str:
    """The curve as a table: threshold, false positives per scan, sensitivity."""
    points = zip(curve.thresholds, curve.rates, curve.sensitivity, strict=True)
    rows = [[f"{value:.6g}" for value in values] for values in points]
    return csv_text(["threshold", "false_positives_per_scan", "sensitivity"], rows)


def picture(curve: Froc, ends: np.ndarray) -> bytes:
    """The curve over false positives per scan, logarithmic, with the intervals at LUNA16's rates."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.step(np.maximum(curve.rates, 1e-3), curve.sensitivity, where="post", color="#1f6fb2")
    axes.plot(RATES, curve.at_rates, "o", color="#1f6fb2")
    axes.vlines(RATES, *ends[:, :-1], color="#1f6fb2", alpha=0.4)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.1, 10)
    axes.set_xticks(RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("false positives per scan")
    axes.set_ylabel("sensitivity")
    axes.grid(alpha=0.3)
    axes.set_title(f"CPM {curve.cpm:.3f}; {curve.nodules} nodules in {curve.scans} scans", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _matched(case: dict[str, Any]) -> ScanHits:
    findings = np.array(case["findings"], dtype=np.float64).reshape(-1, 7)
    return match(findings[:, :3], findings[:, 6], case["points"], case["excluded"])


def _nodules(cases: dict[str, dict[str, Any]], scans: dict[str, ScanHits]) -> str:
    rows = []
    for name, case in cases.items():
        for (x, y, z, diameter), score in zip(case["points"], scans[name].true.tolist(), strict=True):
            told = f"{score:.6f}" if np.isfinite(score) else ""
            rows.append([name, *(f"{n:.3f}" for n in (-x, -y, z, diameter)), told])
    return csv_text(["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "probability"], rows)


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
