"""The targets of the transfer benchmark: which patients are trained on, validated and scored, and by which bundle.

Held-out patients are those of the manifest and validation patients are fixed; a fraction and a seed draw from the
rest, patient by patient.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from med3d_nets.class_scores import resampled
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.manifest import Domain
from med3d_nets.tables import read_rows
from tools.bundle_run import ROOT, run_bundle

SEGMENTATION = ROOT / "bundles" / "med3d_multidomain_segmentation_resnet10"
CLASSIFICATION = ROOT / "bundles" / "med3d_feature_extraction_resnet10"
MALIGNANCY, NODULES = "malignancy", "nodule_ct"
SCORES = ("dice", "surface_dice")  # of evaluate.json's; a Hausdorff distance of poor masks takes minutes a case
CHECKPOINTS = 10  # epochs between them; short trainings would spend much of their time on more


@dataclass(frozen=True)
class Budget:
    """What every training of the benchmark may cost.

    Attributes:
        epochs: with a validation after each.
        batches: of an epoch.
        batch_size: cases of a batch.
        norm_batches: batches over which batch norms are estimated before each validation.
        val_fraction: share of the patients that are not held out, for validation, where the manifest names none.
    """

    epochs: int = 20
    batches: int = 25
    batch_size: int = 4
    norm_batches: int = 10
    val_fraction: float = 0.1

    def __str__(self) -> str:
        """All of it; ``norm_batches`` and ``val_fraction`` where they are not the usual ones."""
        rest = {name: getattr(self, name) for name in ("norm_batches", "val_fraction")}
        other = [f", {name} {value:g}" for name, value in rest.items() if value != getattr(Budget, name)]
        return f"{self.epochs} epochs of {self.batches} batches of {self.batch_size}{''.join(other)}"


@dataclass(frozen=True)
class Outcome:
    """Result of one training, on patients that are held out.

    Attributes:
        train_cases: cases trained on.
        metric: ``dice`` (mean over classes and cases, native space) or ``auc``.
        score: its value.
        low: lower end of its 95 % bootstrap interval, over patients.
        high: upper end.
        surface_dice: at 1 mm; empty for a classification.
        epochs_to_95: first epoch whose validation score is 95 % of the training's best.
    """

    train_cases: int
    metric: str
    score: float
    low: float
    high: float
    surface_dice: float | str
    epochs_to_95: int


class Task(ABC):
    """One target.

    Args:
        domain: its domain in the manifest, which its encoders must not have seen.
        out: folder of the runs.
        budget: of every run.
    """

    bundle: Path
    curve: str  # name of the validation score in TensorBoard
    new_layer_factor: int  # learning rate of new layers over that of a pretrained encoder

    def __init__(self, domain: Domain, out: Path, budget: Budget) -> None:
        self.domain = domain.name
        self.source = domain
        self.out = out
        self.runs = out / "runs" / re.sub(r"\W+", "_", str(budget))
        self.budget = budget
        held_out = sorted({case["patient"] for case in domain.held_out_cases()})
        if not held_out:
            raise InputError(f"{domain.name}: the manifest holds no patient out, so nothing unseen can be scored.")
        pool = sorted({case["patient"] for case in domain.training_cases()})
        count = max(1, round(budget.val_fraction * len(pool)))
        self.test, self.val = held_out, sorted(domain.val_patients or random.Random(0).sample(pool, count))
        self.pool = [patient for patient in pool if patient not in self.val]
        if not self.pool:
            raise InputError(f"{domain.name}: one patient besides those held out cannot be trained on and validated.")

    def chosen(self, fraction: float, seed: int) -> list[str]:
        """Patients to train on: a share of those that are neither held out nor for validation, at least one."""
        order = random.Random(seed).sample(self.pool, len(self.pool))
        return sorted(order[: max(1, round(fraction * len(order)))])

    def train(self, name: str, encoder: str, frozen: int, fraction: float, seed: int, rate: float) -> float:
        """Train, or take what is finished, and return the best validation score."""
        folder = self.runs / name
        if not (folder / "checkpoints" / f"checkpoint_epoch={self.budget.epochs}.pt").is_file():
            resume = any((folder / "checkpoints").glob("checkpoint_epoch=*.pt"))
            folder.mkdir(parents=True, exist_ok=True)
            common = {
                "seed": seed,
                "max_epochs": self.budget.epochs,
                "val_interval": 1,
                "batch_size": self.budget.batch_size,
                "norm_batches": self.budget.norm_batches,
                "checkpoint_interval": min(CHECKPOINTS, self.budget.epochs),
                "backbone_weights": encoder,
                "frozen_stages": frozen,
                "learning_rate": rate,
                "new_layer_lr_factor": self.new_layer_factor if encoder else 1,
                "num_workers": 1,
                "resume": str(resume).lower(),
            }
            run_bundle(self.bundle, "train", folder, {**common, **self._options(folder, self.chosen(fraction, seed))})
        return max(self._scores(folder))

    def train_and_score(self, name: str, encoder: str, frozen: int, fraction: float, seed: int, rate: float) -> Outcome:
        """Train and score the best network on the patients held out."""
        best = self.train(name, encoder, frozen, fraction, seed, rate)
        folder = self.runs / name
        reached = next(i for i, score in enumerate(self._scores(folder), start=1) if score >= 0.95 * best)
        patients = set(self.chosen(fraction, seed))
        cases = sum(case["patient"] in patients for case in self.source.cases)
        return Outcome(cases, *self._evaluate(folder), epochs_to_95=reached)

    def tidy(self, name: str) -> None:
        """Delete the checkpoints of a training whose result is on record: 170 MB each."""
        shutil.rmtree(self.runs / name / "checkpoints", ignore_errors=True)

    def _scores(self, folder: Path) -> list[float]:
        """Validation score of each epoch; of a resumed run the last record of an epoch counts."""
        events = EventAccumulator(str(folder))
        events.Reload()
        return [value for _, value in sorted({one.step: one.value for one in events.Scalars(self.curve)}.items())]

    @abstractmethod
    def _options(self, folder: Path, patients: Sequence[str]) -> dict[str, Any]:
        """Keys of ``train.json`` that are the task's own; writes what they name into the run's folder."""

    @abstractmethod
    def _evaluate(self, folder: Path) -> tuple[str, float, float, float, float | str]:
        """Name, value and interval of the score, and surface Dice."""


class Segmentation(Task):
    """A domain as a segmentation task of its own."""

    bundle, curve, new_layer_factor = SEGMENTATION, "val_mean_dice", 3

    def _options(self, folder: Path, patients: Sequence[str]) -> dict[str, Any]:
        unused = [patient for patient in self.pool if patient not in patients]
        source = self.source
        entry = {
            "name": source.name,
            "path": str(source.folder.resolve()),
            "classes": {name: list(values) for name, values in source.classes.items()},
            "background": list(source.background),
            "ignore": list(source.ignore),
            "hold_out": [*self.test, *unused],
            "val_patients": self.val,
            "patient_pattern": source.patient_pattern,
            "same_patient": source.same_patient,
            "allow_empty": source.allow_empty,
        }
        _write(folder / "manifest.json", json.dumps({"domains": [entry]}, indent=1))
        return {
            "dataset_dir": source.folder.parent,
            "manifest": folder / "manifest.json",
            "fingerprint_dir": self.out / "fingerprints",
            "batches_per_epoch": self.budget.batches,
            "freeze_norm_after": 1,  # batches of two make poor statistics; see docs/co-training.md
        }

    def _evaluate(self, folder: Path) -> tuple[str, float, float, float, float | str]:
        test = folder / "test.json"
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["domains"][0]["hold_out"] = self.test
        _write(test, json.dumps(manifest))
        options = {"dataset_dir": self.source.folder.parent, "manifest": test, "domain": self.domain}
        options |= {"weights": folder / "model.pt", "handlers#0#metrics": list(SCORES)}
        run_bundle(self.bundle, "evaluate", folder / "scores", options)
        report = json.loads((folder / "scores" / "scores.json").read_text())
        cases: dict[str, Any] = report["cases"]
        found = {name: [one["dice"] for one in classes.values()] for name, classes in cases.items()}
        found = {name: [value for value in values if value is not None] for name, values in found.items()}
        scored = [name for name, values in found.items() if values]  # what is neither labelled nor found has no Dice
        dice = np.array([np.mean(found[name]) for name in scored])
        patients = {case["case"]: case["patient"] for case in self.source.cases}
        surface = [one["surface_dice"]["mean"] for one in report["summary"].values()]
        draws = [dice[drawn].mean() for drawn in resampled([patients[name] for name in scored], 1000)]
        low, high = np.percentile(draws, [2.5, 97.5])
        return "dice", float(dice.mean()), float(low), float(high), float(np.mean(surface))


class Malignancy(Task):
    """Benign or malign nodules, by the file's own diagnosis (``Diagnosis`` of metadata.csv)."""

    bundle, curve, new_layer_factor = CLASSIFICATION, "val_auc", 10

    def _options(self, folder: Path, patients: Sequence[str]) -> dict[str, Any]:
        rows = [["case", "label", "patient", "split"]]
        diagnoses = self._diagnoses()
        for case in self.source.cases:
            patient = case["patient"]
            sections = ((patients, "training"), (self.val, "validation"), (self.test, "test"))
            split = next((name for own, name in sections if patient in own), "none")
            rows.append([case["case"], diagnoses[case["case"]], patient, split])
        _write(folder / "labels.csv", "".join(",".join(row) + "\n" for row in rows))
        return {
            "dataset_dir": self.source.folder / "imagesTr",
            "labels": folder / "labels.csv",
            "spacing": [1, 1, 1],
            "input_size": [40, 40, 24],  # the median crop has 31 x 31 x 9 mm
            "samples_per_epoch": self.budget.batches * self.budget.batch_size,
            "freeze_backbone": "false",
        }

    def chosen(self, fraction: float, seed: int) -> list[str]:
        """As for all tasks, with a patient of each class where the share has none."""
        patients = super().chosen(fraction, seed)
        diagnoses = self._diagnoses()
        by_patient: dict[str, set[str]] = {}
        for case in self.source.cases:
            by_patient.setdefault(case["patient"], set()).add(diagnoses[case["case"]])
        for label in sorted(set(diagnoses.values())):
            if not any(label in by_patient[patient] for patient in patients):
                patients.append(next(patient for patient in self.pool if label in by_patient[patient]))
        return sorted(patients)

    def _evaluate(self, folder: Path) -> tuple[str, float, float, float, float | str]:
        options = {"dataset_dir": self.source.folder / "imagesTr", "labels": folder / "labels.csv"}
        run_bundle(self.bundle, "evaluate", folder / "scores", {**options, "weights": folder / "model.pt"})
        auc = json.loads((folder / "scores" / "scores.json").read_text())["summary"]["auc"]
        return "auc", auc["value"], *auc["ci95"], ""

    def _diagnoses(self) -> dict[str, str]:
        rows = read_rows(self.source.folder / "metadata.csv", ("patient_id", "nodule_id", "Diagnosis"))
        return {f"{row['patient_id']}_R_{row['nodule_id']}": row["Diagnosis"] for row in rows}


def task_of(target: str, domains: Sequence[Domain], out: Path, budget: Budget) -> Task:
    """Make the task of a target.

    Args:
        target: name of a domain, or ``malignancy``.
        domains: those of the manifests.
        out: folder of the runs.
        budget: of every run.

    Raises:
        InputError: no such target, two domains of its name, or no patients that it needs.
    """
    name = NODULES if target == MALIGNANCY else target
    found = [domain for domain in domains if domain.name == name]
    if not found:
        names = ", ".join([MALIGNANCY, *(domain.name for domain in domains)])
        raise InputError(f"target {target!r}: in no manifest. Targets: {names}.")
    if len(found) > 1:
        raise InputError(f"target {target!r}: both manifests have a domain of this name. Rename one of them.")
    return (Malignancy if target == MALIGNANCY else Segmentation)(found[0], out, budget)


def _write(path: Path, text: str) -> None:
    with replacing(path) as hidden:
        hidden.write_text(text, encoding="utf-8")
