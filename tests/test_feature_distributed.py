"""The feature-extraction bundle's training and evaluation in two processes, on CPU (gloo) where there is no GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.feature_runs import BUNDLE, SMALL, read_table, run, write_dataset, write_encoder
from tests.small_training import scalars
from tests.torchrun import torchrun as run_processes

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def torchrun(folder: Path, name: str, **options: Any) -> str:
    """Run a config and its multi_gpu overlay in two processes; return what they print."""
    done = run_processes(folder, BUNDLE, [name, f"multi_gpu_{name}"], **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_training_and_evaluation(folder: Path) -> None:
    data, encoder, out = write_dataset(folder / "data"), write_encoder(folder / "mine.pth"), folder / "out"
    paths = {"dataset_dir": str(data), "output_dir": str(out), "backbone_weights": str(encoder)}
    torchrun(folder, "train", **SMALL, **paths, freeze_backbone=False)
    assert (out / "classifier.json").is_file() and max(scalars(out, "val_auc").values()) <= 1
    checkpoint = torch.load(out / "checkpoints" / "checkpoint_epoch=2.pt", weights_only=True)
    assert checkpoint["trainer"] == {"epoch": 2, "iteration": 2}  # 3 of 6 cases each, in one batch
    assert len(checkpoint["random_state"]["processes"]) == 2
    options = {"dataset_dir": str(data), "weights": str(out / "model_last.pt")}
    torchrun(folder, "evaluate", **options, output_dir=str(folder / "two"))
    run("evaluate", **options, output_dir=str(folder / "one"))
    one, two = (read_table(folder / name / "predictions.csv") for name in ("one", "two"))
    assert list(one) == list(two) and len(one) == 8
    for case, row in one.items():
        assert float(row["p_rough"]) == pytest.approx(float(two[case]["p_rough"]), abs=1e-3)


def test_embeddings_of_both_processes_are_in_one_table(folder: Path) -> None:
    data, out = write_dataset(folder / "data", count=2), folder / "out"
    where = {"dataset_dir": str(data), "weights": str(write_encoder(folder / "mine.pth")), "spacing": [2.0, 2.0, 2.0]}
    torchrun(folder, "inference", **where, output_dir=str(out))
    run("inference", **where, output_dir=str(folder / "one"))
    one, two = (read_table(path / "embeddings.csv") for path in (folder / "one", out))
    assert list(one) == list(two) == ["rough0", "rough1", "smooth0", "smooth1"]
    for case, row in one.items():
        assert [float(row[f"e{i}"]) for i in range(5)] == pytest.approx([float(two[case][f"e{i}"]) for i in range(5)])
    assert json.loads((out / "run.json").read_text())["cases"] == list(one)
