"""Scores of a classifier: probabilities per case, accuracy, AUC, sensitivity and calibration with intervals."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_roc_auc
from numpy.typing import NDArray

from med3d_nets.evaluator import CaseEvents
from med3d_nets.files import replacing, set_aside
from med3d_nets.processes import gather, rank
from med3d_nets.weights import file_sha256

Measure = Callable[[NDArray[np.float64], NDArray[np.int64]], float]


class ClassScores:
    """Handler of CaseEvaluator that writes ``predictions.csv`` and ``scores.json`` after the last case.

    It expects in the engine's output, after postprocessing, ``pred``: probabilities, (num_classes,), and ``label``: the
    true class, or None for cases without label, of which there is a table of predictions alone. Items of the dataset
    may have ``patient``. Files of an earlier run that are not written anew get the suffix ``.old``. Of several
    processes, the first writes the cases of all.

    Args:
        output_dir: folder for the files.
        classes: names of the classes by index.
        weights: file of the network's weights, whose hash goes into the JSON.
        bootstrap_samples: number of resamples for the intervals.
    """

    def __init__(
        self, output_dir: str | Path, classes: Sequence[str], weights: str | Path, bootstrap_samples: int = 1000
    ) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.classes = list(classes)
        self.weights = weights
        self.bootstrap_samples = bootstrap_samples
        self._cases: dict[str, dict[str, Any]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(CaseEvents.ALL_CASES_DONE, self._finish)

    def __call__(self, engine: Engine) -> None:
        """Keep the current case."""
        case, output = engine.state.case, engine.state.output[0]  # type: ignore[attr-defined,index]
        label = output.get("label")
        self._cases[case] = {
            "patient": str(engine.state.batch[0].get("patient", case)),  # type: ignore[index]
            "probabilities": [float(value) for value in output["pred"]],
            "truth": None if label is None else int(label),
        }

    def _finish(self, engine: Engine) -> None:
        """Gather the cases of all processes and write them."""
        cases, failed = gather(self._cases), gather(engine.state.failed)  # type: ignore[attr-defined]
        self._cases = {}
        labelled = bool(cases) and all(one["truth"] is not None for one in cases.values())
        summary = summarise(list(cases.values()), self.classes, self.bootstrap_samples) if labelled else {}
        told = [name for name, score in summary.items() if isinstance(score, dict) and "ci95" in score]
        engine.state.metrics.update({name: summary[name]["value"] for name in told})
        if rank() != 0:
            return
        report = {
            "summary": summary,
            "classes": self.classes,
            "weights_sha256": file_sha256(self.weights),
            "cases": len(cases),
            "failed": failed,
        }
        self._write("predictions.csv", _csv(cases, self.classes, labelled) if cases else None)
        self._write("scores.json", f"{json.dumps(report, indent=2)}\n" if labelled else None)
        for name in told:
            print(f"{name}: {_line(summary[name])}")

    def _write(self, name: str, content: str | None) -> None:
        path = self.output_dir / name
        if content is not None:
            with replacing(path) as hidden:
                hidden.write_text(content, encoding="utf-8")
        else:
            set_aside(path)


def summarise(cases: Sequence[dict[str, Any]], classes: Sequence[str], samples: int = 1000) -> dict[str, Any]:
    """Accuracy and AUC with 95 % intervals.

    The intervals are percentiles of a bootstrap over patients, whose cases are drawn together: several volumes of one
    patient are no independent cases.

    Args:
        cases: ``patient``, ``probabilities`` (num_classes,), ``truth`` (index of the class).
        classes: names of the classes.
        samples: number of resamples; those that lack a class of the cases have no AUC and are left out of its interval.

    Returns:
        ``accuracy``, ``auc``, ``calibration_error`` and, of two classes, ``sensitivity_at_90_specificity`` for the
        second (``value``, ``ci95``; null where undefined: AUC needs two classes among the cases; of several it is the
        mean over classes against the rest), ``auc_per_class``, ``confusion`` (true class by predicted class),
        ``patients``, ``bootstrap_samples``.
    """
    probabilities = np.array([one["probabilities"] for one in cases], dtype=np.float64)
    truth = np.array([one["truth"] for one in cases], dtype=np.int64)
    patients = np.array([one["patient"] for one in cases])
    groups = [np.flatnonzero(patients == patient) for patient in dict.fromkeys(patients.tolist())]
    generator = np.random.default_rng(0)
    resamples = [
        np.concatenate([groups[index] for index in generator.integers(len(groups), size=len(groups))])
        for _ in range(samples)
    ]

    def with_interval(measure: Measure) -> dict[str, Any]:
        values = np.array([measure(probabilities[chosen], truth[chosen]) for chosen in resamples])
        values = values[np.isfinite(values)]
        interval = [float(value) for value in np.percentile(values, [2.5, 97.5])] if len(values) else None
        return {"value": _or_none(measure(probabilities, truth)), "ci95": interval}

    present = [index for index in range(len(classes)) if index in truth]
    predicted = probabilities.argmax(axis=1)
    of_two = {"sensitivity_at_90_specificity": with_interval(sensitivity_at)} if len(classes) == 2 else {}
    return {
        "accuracy": with_interval(accuracy),
        "auc": with_interval(lambda p, t: mean_auc(p, t, present)),
        **of_two,
        "calibration_error": with_interval(calibration_error),
        "auc_per_class": {classes[index]: _or_none(mean_auc(probabilities, truth, [index])) for index in present},
        "confusion": {
            classes[true]: {name: int(((truth == true) & (predicted == i)).sum()) for i, name in enumerate(classes)}
            for true in present
        },
        "patients": len(groups),
        "bootstrap_samples": samples,
    }


def accuracy(probabilities: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Share of cases whose most probable class is the true one."""
    return float((probabilities.argmax(axis=1) == truth).mean())


def sensitivity_at(probabilities: NDArray[np.float64], truth: NDArray[np.int64], specificity: float = 0.9) -> float:
    """Highest sensitivity for the second of two classes at which the specificity is at least as asked; NaN without it.

    Args:
        probabilities: (n, 2).
        truth: 0 or 1, (n,).
        specificity: share of the first class that must be recognised.
    """
    negative, positive = (np.sort(probabilities[truth == index, 1]) for index in (0, 1))
    if not len(negative) or not len(positive):
        return float("nan")
    allowed = int((1 - specificity) * len(negative) + 1e-9)  # false alarms
    threshold = negative[len(negative) - 1 - allowed]  # what is above it is called the second class
    return float((positive > threshold).mean())


def calibration_error(probabilities: NDArray[np.float64], truth: NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error: mean distance between a prediction's probability and how often it is right.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.

    Args:
        probabilities: (n, num_classes).
        truth: (n,).
        bins: of equal width, over the probability of the most probable class.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((right[place == one] - confidence[place == one]).sum()) for one in np.unique(place)]
    return float(sum(gaps) / len(truth))


def mean_auc(probabilities: NDArray[np.float64], truth: NDArray[np.int64], classes: Sequence[int]) -> float:
    """Area under the ROC curve of classes against the rest, averaged; NaN where a class or its rest is absent.

    Args:
        probabilities: (n, num_classes).
        truth: index of the true class, (n,).
        classes: indices of the classes to average over.
    """
    values = []
    for index in classes:
        is_class = truth == index
        if is_class.all() or not is_class.any():
            return float("nan")
        auc: Any = compute_roc_auc(torch.from_numpy(probabilities[:, index]), torch.from_numpy(is_class).long())
        values.append(float(auc))
    return float(np.mean(values)) if values else float("nan")


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


def _csv(cases: dict[str, dict[str, Any]], classes: Sequence[str], labelled: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *(f"p_{name}" for name in classes), "prediction", *(["truth"] if labelled else [])])
    for case, one in cases.items():
        prediction = classes[int(np.argmax(one["probabilities"]))]
        truth = [classes[one["truth"]]] if labelled else []
        writer.writerow([case, *(f"{value:.6f}" for value in one["probabilities"]), prediction, *truth])
    return text.getvalue()


def _line(score: dict[str, Any]) -> str:
    if score["value"] is None:
        return "undefined"
    interval = f" (95 % interval {score['ci95'][0]:.3f} to {score['ci95'][1]:.3f})" if score["ci95"] else ""
    return f"{score['value']:.3f}{interval}"
