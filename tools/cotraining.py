"""Is one shared encoder as good as one for each domain? Trains both with the same budget and scores unseen patients.

    python -m tools.cotraining train --data DATA --out RUNS      joint, then each domain alone; goes on where it stopped
    python -m tools.cotraining score --data DATA --out RUNS      held-out cases of all runs -> CSV
    python -m tools.cotraining table                             the CSV as a Markdown table

DATA holds the folders of the manifest (tools/manifests/real8.json by default). A domain alone gets as many batches as
the joint training spends on it, with the same settings and learning-rate schedule.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import fire

from med3d_nets import read_manifest, sampling_weights, split_domains
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.tables import csv_text, read_rows
from tools.bundle_run import ROOT, commit, run_bundle

BUNDLE = ROOT / "bundles" / "med3d_multidomain_segmentation_resnet10"
MANIFEST = ROOT / "tools" / "manifests" / "real8.json"
CSV = ROOT / "docs" / "results" / "cotraining_real8.csv"

EPOCHS, BATCHES, PATCH = 50, 100, 64
WORKERS = max(1, (os.cpu_count() or 1) // 2)  # the samples do not depend on it
SETTINGS = {"flip_prob": 0.5, "num_workers": WORKERS}  # no class of these domains is sided
TEMPERATURE = 3.0  # the default of train.json
COLUMNS = ("run", "domain", "class", "cases", "dice", "dice_worst", "surface_dice", "hd95_mm", "batches", "commit")


def train(data: str, out: str, manifest: str = str(MANIFEST), epochs: int = EPOCHS, batches: int = BATCHES) -> None:
    """Train the joint network and one for each domain that holds patients out.

    Args:
        data: folder where the manifest's paths start.
        out: folder of the runs; finished ones are left alone, begun ones go on.
        manifest: the domains.
        epochs: of every run.
        batches: of a joint epoch.

    Raises:
        InputError: a faulty manifest, or a training that failed.
    """
    domains = read_manifest(manifest, data)
    names = [domain.name for domain in domains]
    shares = sampling_weights(split_domains(domains, 0.1)[0], domains, TEMPERATURE)
    pretrain(data, out, manifest, epochs, batches)
    for domain in domains:
        if domain.held_out_cases():
            others = ",".join(name for name in names if name != domain.name)
            per_epoch = max(1, round(shares[domain.name] * batches))
            _train(
                Path(out) / f"alone_{domain.name}",
                data,
                manifest,
                epochs,
                batches_per_epoch=per_epoch,
                leave_out=others,
            )


def score(data: str, out: str, manifest: str = str(MANIFEST), to: str = str(CSV)) -> None:
    """Score the held-out cases of every domain with its joint and its own network, in native space.

    Args:
        data: folder where the manifest's paths start.
        out: folder of the runs.
        manifest: the domains.
        to: CSV file to write.

    Raises:
        InputError: a run is not finished, or an evaluation failed.
    """
    rows: list[dict[str, Any]] = []
    for domain in read_manifest(manifest, data):
        if domain.held_out_cases():
            for name in ("joint", f"alone_{domain.name}"):
                rows += _score(Path(out) / name, data, manifest, domain.name)
    with replacing(to) as hidden:
        hidden.write_text(csv_text(COLUMNS, rows), encoding="utf-8")
    print(table(to))


def table(path: str = str(CSV)) -> str:
    """Make a Markdown table of a CSV of ``score``.

    Args:
        path: the CSV.

    Returns:
        One row per domain: mean Dice over cases and classes, jointly trained and alone.

    Raises:
        InputError: there is no such file, or it lacks a column.
    """
    rows = read_rows(Path(path), ("run", "domain", "cases", "dice", "surface_dice", "batches"))
    lines = ["| domain | held-out cases | batches | Dice, joint | Dice, alone | surface Dice, joint | alone |"]
    lines.append("|" + "---|" * 7)
    for domain in dict.fromkeys(row["domain"] for row in rows):
        joint, alone = (
            [row for row in rows if row["domain"] == domain and row["run"].startswith(kind)]
            for kind in ("joint", "alone")
        )
        means = [
            f"{statistics.fmean(float(row[column]) for row in kind):.3f}"
            for column in ("dice", "surface_dice")
            for kind in (joint, alone)
        ]
        lines.append(f"| {domain} | {joint[0]['cases']} | {alone[0]['batches']} | {' | '.join(means)} |")
    return "\n".join(lines)


def pretrain(
    data: str,
    out: str,
    manifest: str = str(MANIFEST),
    epochs: int = EPOCHS,
    batches: int = BATCHES,
    leave_out: str = "",
    patch: int = PATCH,
) -> str:
    """Train the joint network, with or without some domains; what is finished is taken, what is begun goes on.

    Args:
        data: folder where the manifest's paths start.
        out: folder of the runs.
        manifest: the domains.
        epochs: of the training.
        batches: of an epoch.
        leave_out: domains that are not trained on, with commas between them.
        patch: edge of a training patch, in voxels.

    Returns:
        Path of its weights, whose encoder other networks can start from; ``made.json`` beside it tells the budget.

    Raises:
        InputError: a faulty manifest, a run that was begun with another budget, or a training that failed.
    """
    folder = Path(out) / run_name(leave_out)
    _train(folder, data, manifest, epochs, batches_per_epoch=batches, leave_out=leave_out, patch_size=[patch] * 3)
    return str(folder / "model_last.pt")


def run_name(leave_out: str = "") -> str:
    """Name of the folder of a joint training without some domains."""
    return f"without_{leave_out.replace(',', '_')}" if leave_out else "joint"


def _train(folder: Path, data: str, manifest: str, epochs: int, **options: Any) -> None:
    made = {"batches": options["batches_per_epoch"] * epochs, "patch_size": options.get("patch_size", [PATCH] * 3)}
    begun = any((folder / "checkpoints").glob("checkpoint_epoch=*.pt"))
    before = json.loads((folder / "made.json").read_text()) if begun else made
    if any(before[key] != value for key, value in made.items()):
        raise InputError(
            f"{folder}: was begun with {before}, now {made} is asked for. Use another folder or delete it."
        )
    if (folder / "checkpoints" / f"checkpoint_epoch={epochs}.pt").is_file():
        print(f"{folder}: done")
        return
    print(f"{folder}: {'goes on' if begun else 'begins'}, log in {folder}.log", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made.json").write_text(json.dumps({**made, "commit": commit()}))
    options = {"max_epochs": epochs, "resume": str(begun).lower(), **SETTINGS, **options}
    run_bundle(BUNDLE, "train", folder, {"dataset_dir": data, "manifest": manifest, **options})


def _score(run: Path, data: str, manifest: str, domain: str) -> list[dict[str, Any]]:
    weights = run / "model_last.pt"
    if not weights.is_file():
        raise InputError(f"{weights}: no such weights. Finish the training first: python -m tools.cotraining train.")
    folder = run / f"scores_{domain}"
    options = {"dataset_dir": data, "manifest": manifest, "domain": domain, "weights": str(weights)}
    run_bundle(BUNDLE, "evaluate", folder, options)
    scores = json.loads((folder / "scores.json").read_text())
    made = json.loads((run / "made.json").read_text())
    return [
        {
            "run": run.name,
            "domain": domain,
            "class": name,
            "cases": len(scores["cases"]),
            "dice": round(one["dice"]["mean"], 4),
            "dice_worst": round(one["dice"]["worst"], 4),
            "surface_dice": round(one["surface_dice"]["mean"], 4),
            "hd95_mm": round(one["hd95_mm"]["mean"], 3),
            "batches": made["batches"],
            "commit": made["commit"],
        }
        for name, one in scores["summary"].items()
    ]


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"train": train, "score": score, "table": table})
