"""Linear probing and fine-tuning by the bundle's own configs, and the evaluation of what they give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from med3d_nets import ClassificationNet, InputError, read_record
from tests.feature_runs import CLASSES, SMALL, read_table, run, train, write_dataset, write_encoder, write_labels
from tests.small_training import assert_same, losses, refusal, scalars

ROOT = Path(__file__).parents[1]


@dataclass
class Probe:
    """A finished linear probing."""

    data: Path
    encoder: Path
    out: Path


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A temporary folder that is emptied at once: checkpoints have 60 to 170 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    """Five epochs on two classes that differ in texture."""
    root = tmp_path_factory.mktemp("probe")
    made = Probe(write_dataset(root / "data", 5), write_encoder(root / "mine.pth"), root / "out")
    train(made.data, made.out, made.encoder, max_epochs=5, checkpoint_interval=5)
    yield made
    shutil.rmtree(root)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def encoder_of(path: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("module."): v for k, v in read(path)["state_dict"].items()}


def changed(before: dict[str, torch.Tensor], network: dict[str, torch.Tensor]) -> set[str]:
    """Tensors of the encoder that are no longer bit for bit what they were."""
    return {key for key, value in before.items() if not torch.equal(network[f"backbone.{key}"], value)}


def test_probing_tells_the_classes_apart_and_leaves_the_encoder_as_it_is(probe: Probe) -> None:
    assert max(scalars(probe.out, "val_accuracy").values()) == max(scalars(probe.out, "val_auc").values()) == 1
    score = scalars(probe.out, "val_score")
    assert score[5] == pytest.approx((2 + scalars(probe.out, "val_probability")[5]) / 3)
    assert score[5] > score[1]
    loss = losses(probe.out)
    assert len(loss) == 10 and loss[10] < 0.5 * loss[1]
    for name in ("model.pt", "model_last.pt"):
        network = read(probe.out / name)
        assert not changed(encoder_of(probe.encoder), network)
        ClassificationNet(10, 2).load_state_dict(network)


def test_what_is_written(probe: Probe) -> None:
    names = {p.name for p in probe.out.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert names == {"model.pt", "model_last.pt", "classifier.json", "checkpoint_epoch=5.pt"}
    record = read_record(probe.out / "model.pt")
    assert record["classes"] == ["rough", "smooth"] and record["spacing"] == SMALL["spacing"]
    assert record["cases"]["validation"] == ["smooth0", "rough0"] and len(record["cases"]["training"]) == 8
    assert record["freeze_backbone"] is True and record["backbone_weights"] == str(probe.encoder)


def test_features_are_standardised_over_the_training_volumes(probe: Probe) -> None:
    head = {k: v for k, v in read(probe.out / "model_last.pt").items() if k.startswith("head.0.")}
    assert head["head.0.mean"].abs().max() > 0.1
    assert (head["head.0.std"] > 0).all() and (head["head.0.std"] != 1).any()


def test_evaluation_equals_a_computation_by_hand(probe: Probe, folder: Path) -> None:
    """Of the training cases too; the volumes are larger than input_size, so the centre is cropped."""
    weights = probe.out / "model_last.pt"
    run("evaluate", dataset_dir=str(probe.data), weights=str(weights), output_dir=str(folder))
    assert {path.name for path in folder.iterdir()} == {"predictions.csv", "scores.json"}
    rows = read_table(folder / "predictions.csv")
    assert list(rows) == sorted(f"{kind}{index}" for kind in CLASSES for index in range(5))
    network = ClassificationNet(10, 2).eval()
    network.load_state_dict(read(weights))
    right = 0
    for case, row in rows.items():
        probabilities = network(prepared(probe.data / f"{case}.nii.gz")).softmax(1)[0]
        assert [float(row["p_rough"]), float(row["p_smooth"])] == pytest.approx(probabilities.tolist(), abs=1e-4)
        assert row["prediction"] == ("rough", "smooth")[int(probabilities.argmax())] and row["truth"] == case[:-1]
        right += row["prediction"] == row["truth"]
    summary = json.loads((folder / "scores.json").read_text())["summary"]
    assert summary["accuracy"]["value"] == right / 10 >= 0.9
    assert sum(sum(row.values()) for row in summary["confusion"].values()) == 10
    truth = np.array([row["truth"] == "smooth" for row in rows.values()])
    p = np.array([float(row["p_smooth"]) for row in rows.values()])
    assert summary["auc"]["value"] == pytest.approx((p[truth][:, None] > p[~truth]).mean())


def prepared(path: Path) -> torch.Tensor:
    """The network's input by numpy; the volumes are at the working spacing, in RAS."""
    voxels = np.asarray(nib.load(path).dataobj, dtype=np.float64)
    voxels = np.clip(voxels, *np.percentile(voxels, [0.5, 99.5]))
    voxels = (voxels - voxels.mean()) / voxels.std()
    starts = [max(n - 16, 0) // 2 for n in voxels.shape]
    voxels = voxels[tuple(slice(start, start + 16) for start in starts)]
    return torch.from_numpy(np.pad(voxels, [(0, 16 - n) for n in voxels.shape])).float()[None, None]


def test_prediction_without_labels_by_the_best_model(probe: Probe, folder: Path) -> None:
    options = {"dataset_dir": str(probe.data), "weights": str(probe.out / "model.pt"), "output_dir": str(folder)}
    run("evaluate", **options)
    (folder / "predictions.csv").unlink()
    run("evaluate", **options, labels="")
    rows = read_table(folder / "predictions.csv")
    assert list(next(iter(rows.values()))) == ["case", "p_rough", "p_smooth", "prediction"] and len(rows) == 10
    assert {path.name for path in folder.iterdir()} == {"predictions.csv", "scores.json.old"}


def test_evaluation_needs_the_record_and_the_classes(probe: Probe, folder: Path) -> None:
    options = {"dataset_dir": str(probe.data), "output_dir": str(folder / "out")}
    shutil.copy(probe.out / "model.pt", folder)
    message = refusal(lambda: run("evaluate", **options, weights=str(folder / "model.pt")))
    assert "classifier.json: no record of a trained classifier" in message
    labels = write_labels(folder / "labels.csv", [(f"{kind}{i}", "other") for kind in CLASSES for i in range(5)])
    weights = str(probe.out / "model.pt")
    message = refusal(lambda: run("evaluate", **options, weights=weights, labels=str(labels)))
    assert "unknown label 'other'. The classes: rough, smooth" in message


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not JSON"), ("[]", "no classes"), ('{"classes": ["a"]}', "no spa")]
)
def test_a_damaged_record(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "classifier.json").write_text(content)
    with pytest.raises(InputError, match=words):
        read_record(tmp_path / "model.pt")


@pytest.mark.parametrize("freeze_norm", [True, False])
def test_fine_tuning_changes_the_encoder(freeze_norm: bool, probe: Probe, folder: Path) -> None:
    """Its norm statistics only where they are not frozen, and every weight otherwise."""
    options = {"freeze_backbone": "false", "freeze_norm": freeze_norm, "norm_batches": 1, "max_epochs": 1}
    train(probe.data, folder, probe.encoder, **options, samples_per_epoch=16, val_fraction=0, val_patients=[])
    before = encoder_of(probe.encoder)
    statistics = {key for key in before if "running" in key or "num_batches" in key}
    expected = set(before) - statistics if freeze_norm else set(before)
    assert changed(before, read(folder / "model_last.pt")) == expected


def test_resumed_equals_uninterrupted(probe: Probe, folder: Path) -> None:
    """Fine-tuning that goes on from the checkpoint of its first epoch is the same to the last bit."""
    options = {"freeze_backbone": False, "samples_per_epoch": 4}
    train(probe.data, folder / "whole", probe.encoder, **options)
    (folder / "parts" / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "whole" / "classifier.json", folder / "parts")
    shutil.copy(folder / "whole" / "checkpoints" / "checkpoint_epoch=1.pt", folder / "parts" / "checkpoints")
    torch.manual_seed(987)
    train(probe.data, folder / "parts", probe.encoder, **options, resume="true")
    assert_same(*(read(folder / name / "checkpoints" / "checkpoint_epoch=2.pt") for name in ("parts", "whole")))
    assert losses(folder / "parts") == {2: losses(folder / "whole")[2]}
    labels = write_labels(folder / "l.csv", [(f"{kind}{i}", f"my {kind}") for kind in CLASSES for i in range(5)])
    again = {**options, "resume": True, "max_epochs": 3, "labels": str(labels)}
    message = refusal(lambda: train(probe.data, folder / "parts", probe.encoder, **again))
    assert "the training has the classes rough, smooth, the labels now my rough, my smooth" in message


def test_going_on_from_a_trained_classifier(probe: Probe, folder: Path) -> None:
    """Its scales stay, and another starting point beside it is refused."""
    start = str(probe.out / "model_last.pt")
    more = {"initial_weights": start, "max_epochs": 1, "samples_per_epoch": 4}
    message = refusal(lambda: train(probe.data, folder, probe.encoder, **more))
    assert "Both backbone_weights and initial_weights are given" in message
    options = {key: value for key, value in SMALL.items()} | more
    run("train", dataset_dir=str(probe.data), output_dir=str(folder), **options)
    before, after = read(Path(start)), read(folder / "model_last.pt")
    assert_same(before["head.0.std"], after["head.0.std"])
    assert not torch.equal(before["head.2.weight"], after["head.2.weight"])


def test_refused_before_anything_is_written(probe: Probe, folder: Path) -> None:
    labels = write_labels(folder / "one.csv", [(f"{kind}{i}", "same") for kind in CLASSES for i in range(5)])
    message = refusal(lambda: train(probe.data, folder / "out", probe.encoder, labels=str(labels)))
    assert "The labels have 1 class" in message
    message = refusal(lambda: train(probe.data, folder / "out", probe.encoder, balance="yes"))
    assert "balance='yes': allowed are" in message
    assert not list(folder.rglob("*.pt"))


@pytest.mark.real_data
@pytest.mark.slow
def test_real_ct_and_mri(real_data: Path, folder: Path) -> None:
    """Nodule crops of CT from hippocampus MRI, 24 each, by the lung bundle's encoder."""
    rows = []
    for task, label in (("nodule_ct", "CT"), ("hippocampus_mr", "MRI")):
        for path in sorted((real_data / task / "imagesTr").glob("*.nii.gz"))[:192:8]:
            rows.append((path.relative_to(real_data).as_posix(), label))
    labels = write_labels(folder / "labels.csv", rows)
    encoder = ROOT / "bundles" / "lung_ct_segmentation_resnet10" / "models" / "model.pt"
    options = {"spacing": [1.0, 1.0, 1.0], "input_size": [48, 48, 48], "max_epochs": 20, "val_patients": []}
    train(real_data, folder / "out", encoder, labels=str(labels), val_fraction=0.25, **options)
    run(
        "evaluate",
        dataset_dir=str(real_data),
        labels=str(labels),
        weights=str(folder / "out" / "model_last.pt"),
        output_dir=str(folder / "scores"),
    )
    assert json.loads((folder / "scores" / "scores.json").read_text())["summary"]["accuracy"]["value"] >= 0.9
