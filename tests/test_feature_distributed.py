"""The feature-extraction bundle's training and evaluation in two processes, on CPU (gloo) where there is no GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.feature_runs import BUNDLE, SMALL, config, read_table, run, write_dataset, write_encoder
from tests.small_training import scalars

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def torchrun(folder: Path, name: str, **options: Any) -> str:
    """Run a config and its multi_gpu overlay in two processes; return what they print."""
    (folder / f"{name}.json").write_text(json.dumps({"bundle_root": str(BUNDLE), **options}))
    files = [config(name), config(f"multi_gpu_{name}"), str(folder / f"{name}.json")]
    meta = str(BUNDLE / "configs" / "metadata.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--config_file", str(files), "--meta_file", meta]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=600)  # seconds; a deadlock would take for ever
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


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
