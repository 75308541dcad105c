"""Scores of a nodule classifier by each rule, beside what the nodule's diameter alone tells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from numpy.typing import NDArray

from med3d_nets.class_scores import mean_auc, resampled, summarise, with_interval
from med3d_nets.classifier_ensemble import weights_files
from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing, set_aside
from med3d_nets.processes import gather, rank
from med3d_nets.tables import csv_text
from med3d_nets.weights import file_sha256

CLASSES = ("benign", "malignant")


class NoduleScores:
    """Handler of CaseEvaluator that writes ``predictions.csv``, ``scores.json`` and ``calibration.png`` at the end.

    It expects in the engine's output ``pred``, probabilities (targets,), and of the dataset's items ``label`` (0.0 or
    1.0 per target), ``patient`` and ``diameter`` (mm or None). Files of an earlier run get the suffix ``.old`` when
    the run starts. Of several processes, the first writes the cases of all.

    Args:
        output_dir: folder for the files.
        targets: names of the questions by index, see ``read_nodules``.
        weights: file of the network's weights, or several.
        bootstrap_samples: number of resamples of patients for the intervals.
    """

    def __init__(
        self,
        output_dir: str | Path,
        targets: Sequence[str],
        weights: str | Path | Sequence[str | Path],
        bootstrap_samples: int = 1000,
    ) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.targets = list(targets)
        self.weights = weights_files(weights)
        self.samples = bootstrap_samples
        self._cases: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(CaseEvents.CASES_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Keep the current case."""
        state: Any = engine.state
        self._cases[state.case] = {
            "patient": state.item["patient"],
            "diameter": state.item["diameter"],
            "probabilities": [float(value) for value in state.output[0]["pred"]],
            "truth": [int(value) for value in state.item["label"]],
        }

    def _start(self, engine: Engine) -> None:
        self._cases = {}
        for name in ("predictions.csv", "scores.json", "calibration.png") if rank() == 0 else ():
            set_aside(self.output_dir / name)

    def _finish(self, engine: Engine) -> None:
        """Gather the cases of all processes and write them."""
        state: Any = engine.state
        cases, failed = gather(self._cases), gather(state.failed)
        summary = summarise_nodules(cases, self.targets, self.samples) if cases else {}
        state.metrics.update({f"{name}_auc": one["auc"]["value"] for name, one in summary.items()})
        if rank() != 0 or not cases:
            return
        report = {
            "summary": summary,
            "cases": len(cases),
            "failed": failed,
            "weights_sha256": [file_sha256(path) for path in self.weights],
        }
        with replacing(self.output_dir / "predictions.csv") as hidden:
            hidden.write_text(_csv(cases, self.targets), encoding="utf-8")
        with replacing(self.output_dir / "calibration.png") as hidden:
            calibration_plot(cases, self.targets).savefig(hidden, dpi=110)
        with replacing(self.output_dir / "scores.json") as hidden:
            hidden.write_text(f"{json.dumps(report, indent=2)}\n", encoding="utf-8")
        print(markdown(summary))


def summarise_nodules(
    cases: Mapping[str, Mapping[str, Any]], targets: Sequence[str], samples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Scores of each target; see ``class_scores.summarise``, whose intervals are a bootstrap over patients.

    Args:
        cases: by name ``patient``, ``diameter`` (mm or None), ``probabilities`` and ``truth`` (targets,).
        targets: names of the targets.
        samples: number of resamples.

    Returns:
        By target what ``summarise`` gives, and where each nodule has a diameter ``diameter_auc``, that of the diameter
        alone, and ``auc_over_diameter``, the difference, each with its interval over the same resamples.
    """
    patients = [case["patient"] for case in cases.values()]
    resamples = resampled(patients, samples)
    summary = {}
    for index, target in enumerate(targets):
        probability = np.array([case["probabilities"][index] for case in cases.values()], dtype=np.float64)
        truth = np.array([case["truth"][index] for case in cases.values()], dtype=np.int64)
        rows = [
            {"patient": patient, "probabilities": [1 - p, p], "truth": int(t)}
            for patient, p, t in zip(patients, probability, truth, strict=True)
        ]
        summary[target] = summarise(rows, CLASSES, samples)
        diameters = [case["diameter"] for case in cases.values()]
        if None not in diameters:
            both = np.stack([probability, np.array(diameters, dtype=np.float64)], axis=1)
            summary[target]["diameter_auc"] = with_interval(auc, both[:, 1], truth, resamples)
            summary[target]["auc_over_diameter"] = with_interval(auc_difference, both, truth, resamples)
    return summary


def auc(score: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Area under the ROC curve of a score, (n,), for truth 1 against 0; NaN where one is absent."""
    return mean_auc(np.stack([-score, score], axis=1), truth, [1])


def auc_difference(scores: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """How much larger the area is for the first of two scores, (n, 2), than for the second."""
    return auc(scores[:, 0], truth) - auc(scores[:, 1], truth)


def markdown(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of ``summarise_nodules``: each target, and the diameter alone below it."""
    lines = [
        "| rule | score by | AUC | accuracy | sensitivity at 90 % specificity | calibration error |",
        "|" + "---|" * 6,
    ]
    for target, one in summary.items():
        keys = ("auc", "accuracy", "sensitivity_at_90_specificity", "calibration_error")
        lines.append(f"| {target} | network | " + " | ".join(_cell(one[key]) for key in keys) + " |")
        if "diameter_auc" in one:
            lines.append(f"| {target} | diameter alone | {_cell(one['diameter_auc'])} | | | |")
            lines.append(f"| {target} | network over diameter | {_cell(one['auc_over_diameter'])} | | | |")
    return "\n".join(lines)


def calibration_plot(cases: Mapping[str, Mapping[str, Any]], targets: Sequence[str], bins: int = 10) -> Figure:
    """Share of malignant nodules over the mean probability that they were given, in bins of equal width."""
    figure = Figure(figsize=(4.2 * len(targets), 4.2), layout="constrained")
    for axes, (index, target) in zip(
        figure.subplots(1, len(targets), squeeze=False)[0], enumerate(targets), strict=True
    ):
        probability = np.array([case["probabilities"][index] for case in cases.values()])
        truth = np.array([case["truth"][index] for case in cases.values()])
        place = np.minimum((probability * bins).astype(int), bins - 1)
        used = np.unique(place)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axes.plot([probability[place == b].mean() for b in used], [truth[place == b].mean() for b in used], "o-")
        for b in used:
            axes.annotate(str((place == b).sum()), (probability[place == b].mean(), truth[place == b].mean()))
        axes.set(xlabel="probability", ylabel="share malignant", title=f"{target}, {len(cases)} nodules")
        axes.set(xlim=(0, 1), ylim=(0, 1.05))
    return figure


def _cell(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "undefined"
    interval = f" ({score['ci95'][0]:.3f} to {score['ci95'][1]:.3f})" if score["ci95"] else ""
    return f"{score['value']:.3f}{interval}"


def _csv(cases: Mapping[str, Mapping[str, Any]], targets: Sequence[str]) -> str:
    columns = ["case", "patient", "diameter_mm", *(f"p_{t}" for t in targets), *(f"true_{t}" for t in targets)]
    rows = []
    for name, case in cases.items():
        probabilities = [f"{value:.6f}" for value in case["probabilities"]]
        rows.append([name, case["patient"], case["diameter"] or "", *probabilities, *case["truth"]])
    return csv_text(columns, rows)
