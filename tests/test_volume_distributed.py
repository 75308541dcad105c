"""The volume-classification bundle in two processes, on CPU (gloo) where there is no GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.feature_runs import read_table
from tests.torchrun import torchrun
from tests.volume_runs import BUNDLE, SMALL, infer, run, write_blobs

pytestmark = pytest.mark.slow


def processes(folder: Path, name: str, **options: Any) -> None:
    """Run a config and its multi_gpu overlay in two processes."""
    done = torchrun(folder, BUNDLE, [name, f"multi_gpu_{name}"], **options)
    assert done.returncode == 0, done.stdout


def test_training_evaluation_and_inference(tmp_path: Path) -> None:
    """Of several labels; what two processes predict is what one does."""
    data, out = write_blobs(tmp_path / "data", 16, several=True), tmp_path / "run"
    options = {"multi_label": True, "val_fraction": 0.25, "norm_batches": 2, "seed": 1}
    processes(tmp_path, "train", **{**SMALL, **options}, dataset_dir=str(data), output_dir=str(out))
    checkpoint = torch.load(out / "checkpoints" / "checkpoint_epoch=2.pt", weights_only=True)
    assert len(checkpoint["random_state"]["processes"]) == 2
    where = {"dataset_dir": str(data), "weights": str(out / "model_last.pt")}
    processes(tmp_path, "evaluate", **where, output_dir=str(tmp_path / "two"))
    run("evaluate", **where, output_dir=str(tmp_path / "one"))
    processes(tmp_path, "inference", **where, output_dir=str(tmp_path / "out"), heatmap=True)
    infer(data, tmp_path / "alone", out / "model_last.pt")
    tables = [read_table(tmp_path / name / "predictions.csv") for name in ("one", "two", "out", "alone")]
    assert len(tables[0]) == 16 and all(set(table) == set(tables[0]) for table in tables)
    assert list(tables[2]) == list(tables[3])
    for case, row in tables[0].items():
        for table in tables[1:]:
            assert float(table[case]["p_left"]) == pytest.approx(float(row["p_left"]), abs=1e-3)
    assert (tmp_path / "out" / "predictions.png").is_file()
    assert len(list((tmp_path / "out").glob("*_heatmap.nii.gz"))) == 16
    shutil.rmtree(out)
