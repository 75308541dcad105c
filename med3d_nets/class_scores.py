"""Scores of a classifier: probabilities per case, accuracy, AUC, sensitivity and calibration with intervals."""

from __future__ import annotations

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
from med3d_nets.label_sets import joined
from med3d_nets.processes import gather, rank
from med3d_nets.tables import csv_text
from med3d_nets.weights import file_sha256

Measure = Callable[[NDArray[np.float64], NDArray[np.int64]], float]


class ClassScores:
    """Handler of CaseEvaluator that writes ``predictions.csv`` and ``scores.json`` after the last case.

    It expects in the engine's output, after postprocessing, ``pred``: probabilities, (num_classes,), and ``label``: the
    true class (of several labels one number per class, 1 where the case has it), or None for cases without label, of
    which there is a table of predictions alone. Items of the dataset
    may have ``patient``. Files of an earlier run that are not written anew get the suffix ``.old``. Of several
    processes, the first writes the cases of all.

    Args:
        output_dir: folder for the files.
        classes: names of the classes by index.
        weights: file of the network's weights, whose hash goes into the JSON.
        bootstrap_samples: number of resamples for the intervals.
        multi_label: a case may have several classes, each with a probability of its own.
    """

    def __init__(
        self,
        output_dir: str | Path,
        classes: Sequence[str],
        weights: str | Path,
        bootstrap_samples: int = 1000,
        multi_label: bool = False,
    ) -> None:
        self.output_dir = Path(output_dir).expanduser()
        self.classes = list(classes)
        self.weights = weights
        self.bootstrap_samples = bootstrap_samples
        self.multi_label = multi_label
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
            "truth": None if label is None else _truth(label, self.multi_label),
        }

    def _finish(self, engine: Engine) -> None:
        """Gather the cases of all processes and write them."""
        cases, failed = gather(self._cases), gather(engine.state.failed)  # type: ignore[attr-defined]
        self._cases = {}
        labelled = bool(cases) and all(one["truth"] is not None for one in cases.values())
        measure = summarise_labels if self.multi_label else summarise
        summary = measure(list(cases.values()), self.classes, self.bootstrap_samples) if labelled else {}
        told = [name for name, score in summary.items() if isinstance(score, dict) and "ci95" in score]
        engine.state.metrics.update({name: summary[name]["value"] for name in told})
        if rank() != 0:
            return
        report = {
            "summary": summary,
            "classes": self.classes,
            "multi_label": self.multi_label,
            "weights_sha256": file_sha256(self.weights),
            "cases": len(cases),
            "failed": failed,
        }
        self._write("predictions.csv", _csv(cases, self.classes, labelled, self.multi_label) if cases else None)
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
    resamples = resampled([one["patient"] for one in cases], samples)

    def told(measure: Measure) -> dict[str, Any]:
        return with_interval(measure, probabilities, truth, resamples)

    present = [index for index in range(len(classes)) if index in truth]
    predicted = probabilities.argmax(axis=1)
    of_two = {"sensitivity_at_90_specificity": told(sensitivity_at)} if len(classes) == 2 else {}
    return {
        "accuracy": told(accuracy),
        "auc": told(lambda p, t: mean_auc(p, t, present)),
        **of_two,
        "calibration_error": told(calibration_error),
        "auc_per_class": {classes[index]: _or_none(mean_auc(probabilities, truth, [index])) for index in present},
        "confusion": {
            classes[true]: {name: int(((truth == true) & (predicted == i)).sum()) for i, name in enumerate(classes)}
            for true in present
        },
        "patients": len({one["patient"] for one in cases}),
        "bootstrap_samples": samples,
    }


def summarise_labels(cases: Sequence[dict[str, Any]], classes: Sequence[str], samples: int = 1000) -> dict[str, Any]:
    """Scores of several labels: of each class by itself, with and without it, and their means, with 95 % intervals.

    Args:
        cases: ``patient``, ``probabilities`` (num_classes,), ``truth`` (num_classes,), 0 or 1.
        classes: names of the classes.
        samples: see ``summarise``.

    Returns:
        ``auc`` (mean over classes; null where a class has no AUC), ``accuracy`` (share of all the cases' classes that
        are right at 0.5), ``exact`` (share of cases with all classes right), each ``value`` and ``ci95``;
        ``per_class``: of each class ``cases`` that have it and what ``summarise`` gives of two classes, without it and
        with it, the latter's AUC, sensitivity at 90 % specificity, calibration error and so on; ``patients``,
        ``bootstrap_samples``.
    """
    probabilities = np.array([one["probabilities"] for one in cases], dtype=np.float64)
    truth = np.array([one["truth"] for one in cases], dtype=np.int64)
    resamples = resampled([one["patient"] for one in cases], samples)
    measures: dict[str, Measure] = {
        "auc": lambda p, t: float(np.mean([mean_auc(p[:, [i]], 1 - t[:, i], [0]) for i in range(len(classes))])),
        "accuracy": lambda p, t: float(((p >= 0.5) == t).mean()),
        "exact": lambda p, t: float(((p >= 0.5) == t).all(axis=1).mean()),
    }
    per_class = {}
    for index, name in enumerate(classes):
        p = [1 - probabilities[:, index], probabilities[:, index]]
        own = [
            {"patient": one["patient"], "probabilities": both, "truth": is_it}
            for one, both, is_it in zip(cases, np.stack(p, axis=1), truth[:, index], strict=True)
        ]
        scores = summarise(own, [f"not {name}", name], samples)
        kept = ("auc", "accuracy", "sensitivity_at_90_specificity", "calibration_error", "confusion")
        per_class[name] = {"cases": int(truth[:, index].sum()), **{key: scores[key] for key in kept}}
    return {
        **{name: with_interval(measure, probabilities, truth, resamples) for name, measure in measures.items()},
        "per_class": per_class,
        "patients": len({one["patient"] for one in cases}),
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


def prediction(probabilities: Sequence[float], classes: Sequence[str], multi_label: bool = False) -> str:
    """The most probable class; of several labels all that are at least as probable as not, as a cell of a table."""
    if multi_label:
        return joined([name for name, p in zip(classes, probabilities, strict=True) if p >= 0.5])
    return classes[int(np.argmax(probabilities))]


def _truth(label: Any, multi_label: bool) -> Any:
    return [int(value) for value in label] if multi_label else int(label)


def resampled(patients: Sequence[Any], samples: int) -> list[NDArray[np.int64]]:
    """Draw patients with replacement, whose cases are drawn together.

    Args:
        patients: of each case.
        samples: number of draws.

    Returns:
        Indices of the cases of each draw.
    """
    names = np.array(patients)
    groups = [np.flatnonzero(names == patient) for patient in dict.fromkeys(names.tolist())]
    generator = np.random.default_rng(0)
    return [
        np.concatenate([groups[index] for index in generator.integers(len(groups), size=len(groups))])
        for _ in range(samples)
    ]


def with_interval(
    measure: Measure,
    probabilities: NDArray[np.float64],
    truth: NDArray[np.int64],
    resamples: Sequence[NDArray[np.int64]],
) -> dict[str, Any]:
    """A measure of all cases, and its 95 % interval over resamples of them.

    Args:
        measure: of probabilities and truth; NaN where it is undefined, which is left out of the interval.
        probabilities: or other scores, (n, …).
        truth: (n, …).
        resamples: of ``resampled``.

    Returns:
        ``value`` and ``ci95``, each None where undefined.
    """
    values = np.array([measure(probabilities[chosen], truth[chosen]) for chosen in resamples])
    values = values[np.isfinite(values)]
    interval = [float(value) for value in np.percentile(values, [2.5, 97.5])] if len(values) else None
    return {"value": _or_none(measure(probabilities, truth)), "ci95": interval}


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


def _csv(cases: dict[str, dict[str, Any]], classes: Sequence[str], labelled: bool, multi_label: bool) -> str:
    rows = []
    for case, one in cases.items():
        found = prediction(one["probabilities"], classes, multi_label)
        truth = [_true_name(one["truth"], classes, multi_label)] if labelled else []
        rows.append([case, *(f"{value:.6f}" for value in one["probabilities"]), found, *truth])
    return csv_text(["case", *(f"p_{name}" for name in classes), "prediction", *(["truth"] if labelled else [])], rows)


def _true_name(truth: Any, classes: Sequence[str], multi_label: bool) -> str:
    return prediction(truth, classes, True) if multi_label else classes[truth]


def _line(score: dict[str, Any]) -> str:
    if score["value"] is None:
        return "undefined"
    interval = f" (95 % interval {score['ci95'][0]:.3f} to {score['ci95'][1]:.3f})" if score["ci95"] else ""
    return f"{score['value']:.3f}{interval}"
