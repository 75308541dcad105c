"""The bundle's training: what it writes, what it starts from, how it goes on, and what it refuses.

All runs are the bundle's own configs, in this process, on chests of a few thousand voxels; one run of forty steps
(``learned``) serves many tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine

from med3d_nets import training
from med3d_nets.errors import InputError
from med3d_nets.resnet import Med3DResNet
from med3d_nets.segmentation import SegmentationNet
from med3d_nets.training import BestModel, OneCycle, latest_checkpoint
from tests.small_training import (
    BUNDLE,
    SHAPE,
    SPACING,
    assert_same,
    config,
    losses,
    parse,
    refusal,
    run_config,
    scalars,
    small,
    train,
    write_dataset,
)

KEYS = ["image", "label"]
MILD = [
    {"_target_": "med3d_nets.RandMirrord", "keys": KEYS, "label_keys": ["label"], "pairs": [[1, 2]]},
    {"_target_": "RandSpatialCropd", "keys": KEYS, "roi_size": [48, 36, 16], "random_size": False},
    {"_target_": "EnsureTyped", "keys": KEYS, "track_meta": False},
]


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Run:
    """A finished training."""

    data: Path
    bundle: Path
    out: Path
    before: dict[Path, bytes]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A temporary folder that is emptied at once: a checkpoint has 170 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), count=4)


@pytest.fixture(scope="module")
def learned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Seven epochs of four steps in a copy of the bundle that has a model; mild augmentation, so that it learns."""
    root = tmp_path_factory.mktemp("learned")
    run = Run(data, root / "bundle", root / "out", {})
    shutil.copytree(BUNDLE, run.bundle, ignore=shutil.ignore_patterns("models"))
    (run.bundle / "models").mkdir()
    (run.bundle / "models" / "model.pt").write_bytes(b"the shipped weights")
    run.before = contents(run.bundle)
    train(
        data,
        run.out,
        bundle_root=str(run.bundle),
        samples_per_epoch=8,
        max_epochs=7,
        val_interval=3,
        checkpoint_interval=3,
        learning_rate=3e-3,
        **{"train#random_transforms": MILD},
    )
    yield run
    shutil.rmtree(root)


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read(path: str | Path) -> Any:
    return torch.load(path, weights_only=True)


# going on


@pytest.mark.parametrize("num_workers", [0, 1])
def test_resumed_equals_uninterrupted(folder: Path, data: Path, num_workers: int) -> None:
    """Killed in the middle of the second of three epochs, all that follows is the same to the last bit."""
    options = {"max_epochs": 3, "num_workers": num_workers}
    train(data, folder / "whole", checkpoint_interval=3, **options)

    def kill(trainer: Engine) -> None:
        if trainer.state.iteration == 3:
            raise Killed

    with pytest.raises(Killed):
        train(data, folder / "parts", on_iteration=kill, **options)
    assert Path(latest_checkpoint(folder / "parts" / "checkpoints")).name == "checkpoint_epoch=1.pt"
    torch.manual_seed(987)
    train(data, folder / "parts", resume="true", **options)

    whole, parts = (read(latest_checkpoint(folder / name / "checkpoints")) for name in ("whole", "parts"))
    assert whole["trainer"] == {"epoch": 3, "iteration": 6}
    assert_same(parts, whole)
    for name in ("model.pt", "model_last.pt"):
        assert_same(read(folder / "parts" / name), read(folder / "whole" / name))
    assert losses(folder / "parts") == losses(folder / "whole")


def test_an_epoch_differs_from_the_next(learned: Run) -> None:
    """Random transforms that start anew with the same seed would be resumable too, but of no use."""
    dataset = parse("train#dataset", dataset_dir=str(learned.data))
    state = training.RandomState(dataset)
    crops = []
    for _ in range(2):
        state(Engine(lambda *_: None))
        crops.append(dataset[0]["image"])
    assert not torch.equal(*crops)


def test_resume_needs_a_checkpoint(folder: Path, data: Path) -> None:
    message = refusal(lambda: train(data, folder / "new", resume=True))
    assert "no checkpoint to resume from" in message and str(folder / "new") in message


def test_resume_of_a_finished_training(learned: Run) -> None:
    message = refusal(lambda: train(learned.data, learned.out, resume=True, max_epochs=7))
    assert "7 epochs are done and max_epochs is 7. Raise it" in message


def test_resume_with_another_network(learned: Run) -> None:
    again = {"resume": True, "max_epochs": 9, "network_def#head": "linear"}
    message = refusal(lambda: train(learned.data, learned.out, **again))
    assert "checkpoint_epoch=7.pt: is not of this network" in message


def test_a_longer_training_goes_on_also_with_mixed_precision(folder: Path, data: Path) -> None:
    """The gradient scaler, which does nothing on CPU, is a part of the checkpoint."""
    options = {"amp": True, "samples_per_epoch": 2}
    train(data, folder, max_epochs=1, **options)
    train(data, folder, max_epochs=2, resume=True, **options)
    states = read(latest_checkpoint(folder / "checkpoints"))
    assert "scaler" in states and states["trainer"] == {"epoch": 2, "iteration": 2}


def test_the_learning_rate_follows_a_raised_max_epochs(learned: Run) -> None:
    scheduler = parse("lr_scheduler", dataset_dir=str(learned.data), max_epochs=40)
    scheduler.load_state_dict(read(latest_checkpoint(learned.out / "checkpoints"))["lr_scheduler"])
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([3e-3 * (32 / 40) ** 0.9] * 2)


def test_a_write_that_is_killed_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.pt"
    training._save({"old": 1}, path)

    def half(content: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(training.torch, "save", half)
    with pytest.raises(Killed):
        training._save({"new": 1}, path)
    monkeypatch.undo()
    assert read(path) == {"old": 1}
    training._save({"new": 2}, path)
    assert read(path) == {"new": 2} and [p.name for p in folder.iterdir()] == ["model.pt"]


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(training.torch, "save", full)
    with pytest.raises(InputError, match=r"model\.pt: cannot be written .*No space left.* another folder"):
        training._save({}, folder / "model.pt")
    assert not list(folder.iterdir())


# what is written


def test_only_output_dir_is_written(learned: Run) -> None:
    assert contents(learned.bundle) == learned.before
    found = sorted(str(p.relative_to(learned.out)) for p in learned.out.rglob("*") if p.is_file())
    rest = [name for name in found if not name.startswith("events.out.tfevents")]
    assert rest == [
        "checkpoints/checkpoint_epoch=6.pt",
        "checkpoints/checkpoint_epoch=7.pt",
        "model.pt",
        "model_last.pt",
    ]


def test_content_of_a_checkpoint(learned: Run) -> None:
    states = read(latest_checkpoint(learned.out / "checkpoints"))
    assert set(states) == {"network", "trainer", "optimizer", "lr_scheduler", "best_model", "random_state"}
    assert states["trainer"] == {"epoch": 7, "iteration": 28}
    assert set(states["random_state"]["processes"][0]) == {"python", "numpy", "torch", "cuda"}
    assert_same(dict(states["network"]), dict(read(learned.out / "model_last.pt")))
    for name in ("model.pt", "model_last.pt"):
        SegmentationNet(10, 3, "fpn").load_state_dict(read(learned.out / name))


def test_it_learns(learned: Run) -> None:
    """From the loss of a guess to far less."""
    loss = losses(learned.out)
    assert sorted(loss) == list(range(1, 29))
    assert np.mean([loss[step] for step in range(25, 29)]) < 0.6 * np.mean([loss[step] for step in range(1, 5)])
    dice = scalars(learned.out, "val_mean_dice")
    assert sorted(dice) == [3, 6]
    assert read(latest_checkpoint(learned.out / "checkpoints"))["best_model"]["best"] == pytest.approx(
        max(dice.values())
    )


def test_best_model_keeps_the_best(folder: Path) -> None:
    network = torch.nn.Linear(1, 1)
    best = BestModel(folder / "model.pt", network)
    engine = Engine(lambda *_: None)
    engine.state.key_metric_name = "dice"
    for value in (0.3, 0.6, 0.5):
        torch.nn.init.constant_(network.weight, value)
        engine.state.metrics = {"dice": value}
        best(engine)
    assert read(folder / "model.pt")["weight"].item() == pytest.approx(0.6)
    assert best.state_dict() == {"best": 0.6}


def test_training_without_validation(folder: Path, data: Path) -> None:
    train(data, folder, val_fraction=0, val_patients=[], max_epochs=1, samples_per_epoch=2)
    assert (folder / "model_last.pt").exists() and not (folder / "model.pt").exists()
    assert sorted(losses(folder)) == [1]


# what it starts from


def released(path: Path, depth: int) -> dict[str, torch.Tensor]:
    """Write encoder weights in the form of the MedicalNet release."""
    state = Med3DResNet(depth).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return dict(state)


def test_backbone_weights(folder: Path, data: Path) -> None:
    state = released(folder / "resnet_10.pth", 10)
    network = parse("network", dataset_dir=str(data), backbone_weights=str(folder / "resnet_10.pth"))
    assert_same(dict(network.backbone.state_dict()), state)


def test_backbone_weights_of_another_depth(folder: Path, data: Path) -> None:
    released(folder / "resnet_18.pth", 18)
    message = refusal(lambda: train(data, folder / "out", backbone_weights=str(folder / "resnet_18.pth")))
    assert "resnet_18.pth: these are weights of a ResNet-18" in message and "the network is a ResNet-10" in message
    assert not list((folder / "out").rglob("*.pt"))


def test_initial_weights(learned: Run) -> None:
    path = learned.out / "model_last.pt"
    network = parse("network", dataset_dir=str(learned.data), initial_weights=str(path))
    assert_same(dict(network.state_dict()), dict(read(path)))


def test_one_starting_point_only(learned: Run) -> None:
    path = str(learned.out / "model_last.pt")
    both = {"initial_weights": path, "backbone_weights": path}
    message = refusal(lambda: parse("network", dataset_dir=str(learned.data), **both))
    assert "Both backbone_weights and initial_weights are given" in message


def test_new_layers_learn_faster_when_the_backbone_is_pretrained(folder: Path, data: Path) -> None:
    released(folder / "resnet_10.pth", 10)
    pretrained = {"dataset_dir": str(data), "backbone_weights": str(folder / "resnet_10.pth")}
    assert rates(parse("optimizer", **pretrained)) == pytest.approx([1e-3, 1e-5])
    assert rates(parse("optimizer", **pretrained, new_layer_lr_factor=10)) == pytest.approx([1e-4, 1e-5])
    assert rates(parse("optimizer", dataset_dir=str(data))) == pytest.approx([1e-3, 1e-3])


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Learning rates of head and backbone, told apart by their numbers of parameters."""
    network = SegmentationNet(10, 3, "fpn")
    sizes = [sum(p.numel() for p in part.parameters()) for part in (network.head, network.backbone)]
    assert [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups] == sizes
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("value", [True, "true"])
def test_a_frozen_backbone_stays_the_same(folder: Path, learned: Run, value: Any) -> None:
    """Weights and norm statistics; the command line passes a string."""
    start = learned.out / "model_last.pt"
    train(learned.data, folder, initial_weights=str(start), freeze_backbone=value, max_epochs=1)
    before, after = read(start), read(folder / "model_last.pt")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    counters = {key for key in before if key.endswith("num_batches_tracked")}
    assert changed - counters == {key for key in before if key.startswith("head.")} - counters
    assert not any(key.startswith("backbone.") for key in changed)


def test_false_on_the_command_line_is_false(data: Path) -> None:
    assert not parse("network_def", dataset_dir=str(data), freeze_backbone="false").freeze_backbone


# what it refuses


def bad_volume(folder: Path, kind: str) -> str:
    """Spoil one file of a dataset; return its name."""
    path = folder / ("images" if kind == "mri" else "labels") / "chest1.nii.gz"
    volume = nib.load(path)
    voxels, affine = np.array(volume.dataobj), volume.affine.copy()
    if kind == "mri":
        voxels = (voxels - voxels.min()).astype(np.int16)
    elif kind == "values":
        voxels[5, 5, 5] = 7
    elif kind == "shape":
        voxels = voxels[:, :, :-1]
    elif kind == "shifted":
        affine[0, 3] += 12
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mri", "is not CT in Hounsfield units"),
        ("values", "label values [0.0, 1.0, 2.0, 7.0]; allowed are 0 to 2"),
        ("shape", "the label's grid differs from its image's: shape (48, 36, 31) and (48, 36, 32)"),
        ("shifted", "affines different"),
    ],
)
def test_bad_volumes(folder: Path, kind: str, words: str) -> None:
    name = bad_volume(write_dataset(folder), kind)
    message = refusal(lambda: parse("train#dataset", dataset_dir=str(folder)))
    assert message.startswith(f"{name}: ") and words in message


def test_the_command_line_shows_the_message_alone(folder: Path) -> None:
    name = bad_volume(write_dataset(folder), "values")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config("train")]
    options = {**small(dataset_dir=str(folder), output_dir=str(folder / "out")), "device": "cpu"}
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 1, done.stderr
    assert f"Error: {name}: label values" in done.stderr and "Traceback" not in done.stderr
    assert not list(folder.rglob("*.pt"))


# measuring the result


def test_evaluation_equals_dice_by_hand(learned: Run, folder: Path) -> None:
    """The scores of evaluate.json are those of the masks that inference.json writes."""
    options = {
        "bundle_root": str(learned.bundle),
        "device": torch.device("cpu"),
        "spacing": [SPACING] * 3,
        "weights": str(learned.out / "model_last.pt"),
    }
    run_config("inference", dataset_dir=str(learned.data / "images"), output_dir=str(folder / "masks"), **options)
    scores = {"dataset_dir": str(learned.data), "section": "training", "output_dir": str(folder / "scores")}
    evaluation = run_config("evaluate", **scores, **options)
    assert sorted(p.name for p in (folder / "scores").iterdir()) == ["scores.csv", "scores.json"]
    rows = np.genfromtxt(folder / "scores" / "scores.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    by_hand = []
    for case in range(4):
        mask = np.asarray(nib.load(folder / "masks" / f"chest{case}_seg.nii.gz").dataobj)
        label = np.asarray(nib.load(learned.data / "labels" / f"chest{case}.nii.gz").dataobj)
        assert mask.shape == label.shape == SHAPE
        by_hand += [2 * ((mask == v) & (label == v)).sum() / ((mask == v).sum() + (label == v).sum()) for v in (1, 2)]
    assert list(rows["case"]) == [f"chest{case}" for case in range(4) for _ in (1, 2)]
    assert rows["dice"] == pytest.approx(by_hand, abs=1e-4)
    assert evaluation.parser.get_parsed_content("evaluator").state.metrics["mean_dice"] == pytest.approx(
        np.mean(by_hand), abs=1e-4
    )
    assert np.mean(by_hand) > 0.5


def test_a_cycle_that_goes_on_for_longer() -> None:
    """Half of it with 10 steps, then up to 20: torch's own ends with an error after 10."""

    def cycle(steps: int) -> OneCycle:
        return OneCycle(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3), 1e-3, total_steps=steps)

    short, long = cycle(10), cycle(20)
    for _ in range(10):
        short.optimizer.step()
        short.step()
    long.load_state_dict(short.state_dict())
    for _ in range(10):
        long.optimizer.step()
        long.step()
    assert long.last_epoch == 20 and long.get_last_lr()[0] < short.get_last_lr()[0] * 1.001
