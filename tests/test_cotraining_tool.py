"""The comparison of a shared encoder with one for each domain, on small domains."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from med3d_nets import InputError
from tests.small_domains import SMALL, write_manifest
from tools import cotraining


@pytest.mark.slow
def test_train_score_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(tmp_path)
    budget = ("batch_size", "patch_size", "val_window", "norm_batches", "num_workers", "min_val_patients")
    monkeypatch.setattr(cotraining, "SETTINGS", {key: SMALL[key] for key in budget})
    where: dict[str, Any] = {"data": str(tmp_path), "manifest": str(tmp_path / "manifest.json")}
    for _ in range(2):
        cotraining.train(out=str(tmp_path / "runs"), epochs=2, batches=4, **where)
    told = capsys.readouterr().out
    assert told.count("begins") == 2 and told.count("done") == 2  # balls hold nobody out, so no network alone
    cotraining.score(out=str(tmp_path / "runs"), to=str(tmp_path / "a.csv"), **where)
    with open(tmp_path / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["class"]) for row in rows] == [
        ("joint", "near"),
        ("joint", "far"),
        ("alone_boxes", "near"),
        ("alone_boxes", "far"),
    ]
    assert all(0 <= float(row["dice"]) <= 1 and row["cases"] == "1" for row in rows)
    assert rows[0]["batches"] == "8" and 2 <= int(rows[2]["batches"]) < 8
    lines = cotraining.table(str(tmp_path / "a.csv")).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| boxes | 1 | ")


def test_an_unfinished_run_is_not_scored(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    with pytest.raises(InputError, match=r"joint/model_last\.pt: no such weights\. Finish the training first"):
        cotraining.score(str(tmp_path), str(tmp_path / "runs"), str(tmp_path / "manifest.json"))


def test_a_failed_training_names_its_log(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    label = tmp_path / "balls" / "labelsTr" / "case0.nii.gz"
    label.write_bytes(label.read_bytes()[:100])
    with pytest.raises(
        InputError, match=r"the train run failed[\s\S]*joint\.log:[\s\S]*case0\.nii\.gz: cannot be read"
    ):
        cotraining.train(str(tmp_path), str(tmp_path / "runs"), str(tmp_path / "manifest.json"))
    assert "case0.nii.gz: cannot be read" in (tmp_path / "runs" / "joint.log").read_text()


def test_the_table_of_the_docs_is_that_of_the_results() -> None:
    assert cotraining.table() in (cotraining.ROOT / "docs" / "co-training.md").read_text()
