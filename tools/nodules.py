"""Nodule classification over patient-level folds: is it better than from scratch, and than the diameter alone?

    python -m tools.nodules folds --data NODULES --out RUNS [--arms scratch,ENCODER] [--max_epochs N …]
    python -m tools.nodules table
    python -m tools.nodules compare A/predictions.csv B/predictions.csv     of two runs of evaluate.json

Every fold is predicted by the network of the last epoch of a training that saw none of its patients, so that no epoch
was chosen by them; the patients held out from all folds stay unseen. What is finished is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import numpy as np

from med3d_nets.class_scores import resampled, with_interval
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.nodule_labels import TARGETS, read_nodules, split_nodules
from med3d_nets.nodule_scores import auc, auc_difference, markdown, summarise_nodules
from med3d_nets.tables import read_rows
from tools.bundle_run import ROOT, commit, run_bundle

BUNDLE = ROOT / "bundles" / "lung_nodule_ct_classification_resnet10"
JSON = ROOT / "docs" / "results" / "nodule_folds.json"
Cases = dict[str, dict[str, Any]]


def folds(
    data: str, out: str, arms: str | Sequence[str] = ("med3d_real8_resnet10", "scratch"), folds: int = 5, **keys: Any
) -> None:
    """Train and predict every fold from every start, and write the scores.

    Args:
        data: folder of the crops with their ``metadata.csv``.
        out: folder of the runs.
        arms: ``scratch``, names of the registry or paths of encoders.
        folds: number of folds.
        keys: keys of ``train.json`` for all trainings, for example ``max_epochs``.

    Raises:
        InputError: a training or a prediction failed.
    """
    arms = arms.split(",") if isinstance(arms, str) else list(arms)
    cases = read_nodules(data)
    predicted: dict[str, Cases] = {arm: {} for arm in arms}
    for fold in range(folds):
        for arm in arms:
            options = {"dataset_dir": data, "fold": fold, "folds": folds, **keys}
            options["backbone_weights"] = "" if arm == "scratch" else arm
            folder = Path(out) / f"{Path(arm).stem}_{fold}"
            table = _predictions(folder, options)
            val = split_nodules(cases, fold, folds)[1]
            predicted[arm].update(_joined(val, table, fold))
    report = {"budget": {**keys, "folds": folds}, "commit": commit(), **_scores(predicted)}
    with replacing(JSON) as hidden:
        hidden.write_text(f"{json.dumps(report, indent=1)}\n", encoding="utf-8")
    print(table_of(report))


def table(path: str = str(JSON)) -> str:
    """Make Markdown tables of the scores of ``folds``.

    Args:
        path: its JSON.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file. Run python -m tools.nodules folds first.")
    return table_of(json.loads(Path(path).read_text(encoding="utf-8")))


def compare(a: str, b: str) -> str:
    """Tell how much better one classifier is than another on the same nodules.

    Args:
        a: ``predictions.csv`` of ``evaluate.json``.
        b: that of the other one.

    Returns:
        A line per target: difference of the AUCs, A over B, with its 95 % interval by bootstrap over patients.

    Raises:
        InputError: a file is no such table, or they are of other nodules.
    """
    one, other = _evaluated(a), _evaluated(b)
    if one.keys() != other.keys():
        raise InputError(f"{a} and {b} are of other nodules ({len(one)} and {len(other)}). Evaluate both on the same.")
    lines = []
    for index, target in enumerate(TARGETS):
        value = _difference(_columns(one, index), _columns(other, index))
        lines.append(f"{target}: AUC {value['value']:+.3f} ({value['ci95'][0]:+.3f} to {value['ci95'][1]:+.3f})")
    return "\n".join(lines)


def table_of(report: Mapping[str, Any]) -> str:
    """Markdown of all folds together, of each fold, and of each arm against scratch."""
    lines = []
    for arm, summary in report["all"].items():
        lines += [f"From {arm}, all folds together:", "", markdown(summary), ""]
    lines += ["| AUC by fold | " + " | ".join(str(n) for n in range(report["budget"]["folds"])) + " |"]
    lines += ["|" + "---|" * (report["budget"]["folds"] + 1)]
    for name, values in report["folds"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    for name, one in report["against_scratch"].items():
        lines += ["", f"{name}: AUC {one['value']:+.3f} ({one['ci95'][0]:+.3f} to {one['ci95'][1]:+.3f}) over scratch"]
    return "\n".join(lines)


def _predictions(folder: Path, options: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Train, or go on, or take what is there; then predict all crops with the last epoch's network."""
    table = folder / "predictions" / "predictions.csv"
    if not table.is_file():
        if not (folder / "trained").is_file():
            resume = any((folder / "checkpoints").glob("checkpoint_epoch=*.pt"))
            run_bundle(BUNDLE, "train", folder, {**options, "resume": str(resume).lower(), "num_workers": 0})
            (folder / "trained").touch()
        own = {"dataset_dir": options["dataset_dir"], "weights": folder / "model_last.pt", "flips": "false"}
        run_bundle(BUNDLE, "inference", folder / "predictions", own)
    return {row["case"]: row for row in read_rows(table, ("case", *(f"p_{target}" for target in TARGETS)))}


def _joined(cases: Sequence[Mapping[str, Any]], table: Mapping[str, Mapping[str, str]], fold: int) -> Cases:
    return {
        case["case"]: {
            "fold": fold,
            "patient": case["patient"],
            "diameter": case["diameter"],
            "truth": [int(value) for value in case["label"]],
            "probabilities": [float(table[case["case"]][f"p_{target}"]) for target in TARGETS],
        }
        for case in cases
    }


def _evaluated(path: str) -> Cases:
    values = [f"{kind}_{target}" for kind in ("p", "true") for target in TARGETS]
    return {
        row["case"]: {
            "fold": 0,
            "patient": row["patient"],
            "truth": [int(row[name]) for name in values[len(TARGETS) :]],
            "probabilities": [float(row[name]) for name in values[: len(TARGETS)]],
        }
        for row in read_rows(Path(path), ("case", "patient", *values))
    }


def _scores(predicted: Mapping[str, Cases]) -> dict[str, Any]:
    """Scores of all folds together with intervals, AUC by fold, and differences to scratch over the same resamples."""
    targets = list(TARGETS)
    by_fold: dict[str, list[float]] = {}
    against: dict[str, Any] = {}
    for index, target in enumerate(targets):
        for arm, cases in predicted.items():
            columns = _columns(cases, index)
            by_fold[f"{target}, {arm}"] = [
                auc(columns["score"][columns["fold"] == fold], columns["truth"][columns["fold"] == fold])
                for fold in np.unique(columns["fold"])
            ]
            if arm != "scratch" and "scratch" in predicted:
                against[f"{target}, {arm}"] = _difference(columns, _columns(predicted["scratch"], index))
    everything = {arm: summarise_nodules(cases, targets) for arm, cases in predicted.items()}
    return {"all": everything, "folds": by_fold, "against_scratch": against}


def _columns(cases: Cases, index: int) -> dict[str, Any]:
    ordered = [cases[name] for name in sorted(cases)]
    return {
        "fold": np.array([case["fold"] for case in ordered]),
        "patient": [case["patient"] for case in ordered],
        "score": np.array([case["probabilities"][index] for case in ordered]),
        "truth": np.array([case["truth"][index] for case in ordered]),
    }


def _difference(own: Mapping[str, Any], scratch: Mapping[str, Any]) -> dict[str, Any]:
    scores = np.stack([own["score"], scratch["score"]], axis=1)
    return with_interval(auc_difference, scores, own["truth"], resampled(own["patient"], 1000))


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"folds": folds, "table": table, "compare": compare})
