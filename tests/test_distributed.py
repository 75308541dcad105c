"""Training and evaluation in two processes, started as a user does, on CPU (gloo) where there is no GPU."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from med3d_nets.segmentation import SegmentationNet
from tests.small_training import BUNDLE, SPACING, run_config, small, write_dataset
from tests.torchrun import torchrun as run_processes


def torchrun(folder: Path, configs: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run configs of the bundle in two processes."""
    return run_processes(folder, BUNDLE, configs, **options)


def train(folder: Path, data: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Train; afterwards each process writes the weights that it ended with."""
    rank_weights = "$torch.save(@network.module.state_dict(), @output_dir + f'/rank{dist.get_rank()}.pt')"
    settings = small(
        dataset_dir=str(data),
        output_dir=str(folder / "out"),
        val_patients=["chest0", "chest1", "chest2"],
        run=["$@train#trainer.run()", rank_weights],
    )
    return torchrun(folder, ["train", "multi_gpu_train"], **{**settings, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), count=5)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Output of two epochs; three cases for validation, so that one process has more of them than the other."""
    root = tmp_path_factory.mktemp("trained")
    done = train(root, data)
    assert done.returncode == 0, done.stdout
    (root / "out" / "log").write_text(done.stdout)
    yield root / "out"
    shutil.rmtree(root)


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_training_writes_once(trained: Path) -> None:
    names = sorted(p.name for p in trained.rglob("*") if p.is_file() and not p.name.startswith("rank"))
    events = [name for name in names if name.startswith("events.out.tfevents")]
    assert [name for name in names if name not in events] == [
        "checkpoint_epoch=1.pt",
        "checkpoint_epoch=2.pt",
        "log",
        "model.pt",
        "model_last.pt",
    ]
    assert len({name.split(".")[-2] for name in events}) == 1, events  # of one process, its id
    assert (trained / "log").read_text().count("Epoch[2] Metrics -- val_mean_dice") == 1
    SegmentationNet(10, 3, "fpn").load_state_dict(read(trained / "model_last.pt"))


def test_both_processes_end_with_equal_weights(trained: Path) -> None:
    first, second = read(trained / "rank0.pt"), read(trained / "rank1.pt")
    parameters = dict(SegmentationNet(10, 3, "fpn").named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in parameters)
    assert all(torch.equal(first[name], value) for name, value in read(trained / "model_last.pt").items())


def test_samples_are_shared_out(trained: Path) -> None:
    """4 samples an epoch in batches of 2: one step each, not two; and each process draws its own."""
    checkpoint = read(trained / "checkpoints" / "checkpoint_epoch=2.pt")
    assert checkpoint["trainer"] == {"epoch": 2, "iteration": 2}
    one, other = (process["torch"] for process in checkpoint["random_state"]["processes"])
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_two_nodes(data: Path, tmp_path: Path) -> None:
    """Two torchruns that meet at an address, two processes each, as on two machines that share a disk."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={meeting}", "--rdzv_id=1", "--local_addr=127.0.0.1"]
    options = {"nodes": nodes, "output_dir": str(tmp_path / "out"), "batch_size": 1}
    with ThreadPoolExecutor(2) as both:
        runs = [both.submit(train, tmp_path / name, data, **options) for name in ("first", "second")]
    assert [run.result().returncode for run in runs] == [0, 0], [run.result().stdout for run in runs]
    validated = [run.result().stdout.count("Epoch[2] Metrics -- val_mean_dice") for run in runs]
    assert sorted(validated) == [0, 1]
    last = read(tmp_path / "out" / "model_last.pt")
    for rank in range(4):
        ended = read(tmp_path / "out" / f"rank{rank}.pt")
        assert all(torch.equal(ended[name], value) for name, value in last.items())
    assert len(read(tmp_path / "out" / "checkpoints" / "checkpoint_epoch=2.pt")["random_state"]["processes"]) == 4


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    shutil.copy(trained / "checkpoints" / "checkpoint_epoch=1.pt", tmp_path / "out" / "checkpoints")
    done = train(tmp_path, data, resume=True)
    assert done.returncode == 0, done.stdout
    again, before = (read(out / "checkpoints" / "checkpoint_epoch=2.pt") for out in (tmp_path / "out", trained))
    assert again["best_model"] == before["best_model"] and again["trainer"] == before["trainer"]
    assert all(torch.equal(again["network"][name], value) for name, value in before["network"].items())
    for one, other in zip(again["random_state"]["processes"], before["random_state"]["processes"], strict=True):
        assert torch.equal(one["torch"], other["torch"])
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_one_case_for_validation_and_a_frozen_pretrained_backbone(data: Path, trained: Path, tmp_path: Path) -> None:
    start = trained / "model_last.pt"
    options = {"backbone_weights": str(start), "freeze_backbone": True, "max_epochs": 1}
    done = train(tmp_path, data, val_patients=["chest0"], **options)
    assert done.returncode == 0, done.stdout
    before, after = read(start), read(tmp_path / "out" / "model_last.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.classify.weight" in changed and not any(name.startswith("backbone.") for name in changed)
    optimizer = read(tmp_path / "out" / "checkpoints" / "checkpoint_epoch=1.pt")["optimizer"]
    assert [group["initial_lr"] for group in optimizer["param_groups"]] == pytest.approx([1e-3, 1e-5])
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_no_case_for_validation(data: Path, tmp_path: Path) -> None:
    done = train(tmp_path, data, val_patients=[], val_fraction=0, max_epochs=1)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out" / "model_last.pt").exists() and not (tmp_path / "out" / "model.pt").exists()
    shutil.rmtree(tmp_path)


def test_one_process_goes_on_from_two(trained: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "out")
    run_config("train", **small(dataset_dir=str(data), output_dir=str(tmp_path / "out"), resume=True, max_epochs=3))
    checkpoint = read(tmp_path / "out" / "checkpoints" / "checkpoint_epoch=3.pt")
    assert checkpoint["trainer"] == {"epoch": 3, "iteration": 6}  # two steps an epoch now
    assert len(checkpoint["random_state"]["processes"]) == 1
    shutil.rmtree(tmp_path)


def test_evaluation_shares_the_cases_out(trained: Path, tmp_path: Path) -> None:
    """Four cases, the second bad: the others have the scores of a single process, in one file."""
    data = write_dataset(tmp_path / "data", count=4)
    (data / "labels" / "chest1.nii.gz").write_bytes(b"no volume")
    options = evaluation(data, trained)
    two = torchrun(tmp_path, ["evaluate", "multi_gpu_evaluate"], output_dir=str(tmp_path / "two"), **options)
    assert two.returncode != 0, two.stdout
    assert "Error: 1 of 4 cases failed" in two.stdout and "chest1.nii.gz" in two.stdout
    with pytest.raises(Exception, match="Failed to evaluate"):
        run_config("evaluate", output_dir=str(tmp_path / "one"), **options)
    assert (tmp_path / "two" / "scores.csv").read_text() == (tmp_path / "one" / "scores.csv").read_text()
    scores = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert list(scores["cases"]) == ["chest0", "chest2", "chest3"] and list(scores["failed"]) == ["chest1"]
    assert scores == json.loads((tmp_path / "one" / "scores.json").read_text())


@pytest.mark.slow
def test_evaluation_of_fewer_cases_than_processes(trained: Path, tmp_path: Path) -> None:
    options = evaluation(write_dataset(tmp_path / "data", count=1), trained)
    done = torchrun(tmp_path, ["evaluate", "multi_gpu_evaluate"], output_dir=str(tmp_path / "out"), **options)
    assert done.returncode == 0, done.stdout
    assert list(json.loads((tmp_path / "out" / "scores.json").read_text())["cases"]) == ["chest0"]


def evaluation(data: Path, trained: Path) -> dict[str, Any]:
    """Settings of evaluate.json."""
    return {
        "bundle_root": str(BUNDLE),
        "device": "cpu",
        "dataset_dir": str(data),
        "section": "training",
        "spacing": [SPACING] * 3,
        "weights": str(trained / "model_last.pt"),
    }
