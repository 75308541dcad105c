"""The volume-classification bundle run as a user does: train, evaluate, infer, export, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from matplotlib.image import imread
from monai.bundle import ckpt_export, onnx_export

from med3d_nets import ClassificationNet, find_cases, read_record
from med3d_nets.weights import file_sha256
from tests.feature_runs import read_table
from tests.small_training import losses, refusal, scalars
from tests.volume_runs import (
    BUNDLE,
    blob_network,
    config,
    infer,
    run,
    run_command,
    save_classifier,
    train,
    write_blobs,
    write_labels,
    write_nifti,
)
from tools import volume_task

HEAT = ("_heatmap.nii.gz", "_heatmap.png")


@dataclass
class Trained:
    """A finished training of two epochs."""

    data: Path
    out: Path

    @property
    def weights(self) -> Path:
        return self.out / "model_last.pt"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Balls at the left, the right, both sides or nowhere, as several labels."""
    root = tmp_path_factory.mktemp("several")
    made = Trained(write_blobs(root / "data", 16, several=True), root / "run")
    train(made.data, made.out, multi_label="true", mirror=False, val_fraction=0.25, norm_batches=2, seed=1)
    yield made
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A classifier whose evidence is brightness, of CT."""
    folder = tmp_path_factory.mktemp("blob")
    yield save_classifier(folder, blob_network(), ["dark", "bright"], [2.0] * 3, [24] * 3, modality="mr")
    shutil.rmtree(folder)


def scans(folder: Path, *names: str) -> Path:
    rng = np.random.default_rng(3)
    for name in names:
        voxels = rng.normal(100, 10, (20, 22, 18)).astype(np.float32)
        voxels[4:14, 5:15, 3:13] += 100
        write_nifti(folder / f"{name}.nii.gz", voxels)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


class TestSeveralLabels:
    def test_training_learns_and_tells_what_it_was(self, several: Trained) -> None:
        loss = losses(several.out)
        assert len(loss) == 6 and np.isfinite(list(loss.values())).all()
        parts = [scalars(several.out, f"val_{name}")[2] for name in ("auc", "accuracy", "probability")]
        assert scalars(several.out, "val_score")[2] == pytest.approx(sum(parts) / 3)
        record = read_record(several.weights)
        assert record["classes"] == ["left", "right"] and record["multi_label"] is True
        assert record["modality"] == "mr" and record["spacing"] == [2.0] * 3 and record["hu_window"] == [-1000, 1000]

    def test_evaluation_and_inference_agree_with_the_network(self, several: Trained, tmp_path: Path) -> None:
        options = {"dataset_dir": str(several.data), "weights": str(several.weights), "bootstrap_samples": 20}
        run("evaluate", **options, output_dir=str(tmp_path / "scores"))
        infer(several.data, tmp_path / "out", several.weights)
        scored, found = (
            read_table(tmp_path / "scores" / "predictions.csv"),
            read_table(tmp_path / "out/predictions.csv"),
        )
        assert list(scored) == sorted(found) and len(found) == 16
        network = ClassificationNet(10, 2).eval()
        network.load_state_dict(torch.load(several.weights, weights_only=True))
        voxels = np.asarray(nib.load(several.data / "s0.nii.gz").dataobj, dtype=np.float64)
        voxels = np.clip(voxels, *np.percentile(voxels, [0.5, 99.5]))
        voxels = ((voxels - voxels.mean()) / voxels.std())[1:17, :16, :14]
        image = torch.from_numpy(np.pad(voxels, [(0, 16 - n) for n in voxels.shape])).float()[None, None]
        expected = network(image, torch.tensor([[16, 16, 14]])).sigmoid()[0].tolist()
        for row in (scored["s0"], found["s0"]):
            assert [float(row["p_left"]), float(row["p_right"])] == pytest.approx(expected, abs=1e-3)
        for case, row in scored.items():
            assert row["prediction"] == found[case]["prediction"]
            names = [name for name in ("left", "right") if float(row[f"p_{name}"]) >= 0.5]
            assert row["prediction"] == ("|".join(names) or "none")
        assert scored["s2"]["truth"] == "left|right" and scored["s3"]["truth"] == "none"
        report = json.loads((tmp_path / "scores" / "scores.json").read_text())
        right = np.mean([r["prediction"] == r["truth"] for r in scored.values()])
        assert report["multi_label"] is True and report["summary"]["exact"]["value"] == pytest.approx(right)
        assert set(report["summary"]["per_class"]) == {"left", "right"}

    def test_resume_needs_the_same_kind_of_labels(self, several: Trained, tmp_path: Path) -> None:
        shutil.copytree(several.out, tmp_path / "run")
        rows = [(f"s{i}", ("left", "right")[i % 2]) for i in range(16)]
        labels = str(write_labels(tmp_path / "l.csv", rows))
        message = refusal(lambda: train(several.data, tmp_path / "run", labels=labels, resume=True, max_epochs=3))
        assert "the training has multi_label True, now it is False" in message
        shutil.rmtree(tmp_path / "run")


class TestInference:
    def test_command_writes_everything(self, weights: Path, tmp_path: Path) -> None:
        folder = scans(tmp_path / "in", "one", "two")
        options = {"dataset_dir": folder, "output_dir": tmp_path / "out", "weights": weights, "heatmap": "true"}
        done = run_command("inference", **options)
        assert done.returncode == 0, done.stderr
        ends = ("_class.json", "_class.png", *HEAT)
        names = {f"{case}{end}" for case in ("one", "two") for end in ends}
        assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, "predictions.csv", "predictions.png"}
        rows = read(tmp_path / "out" / "predictions.csv")
        assert list(rows[0]) == ["case", "p_dark", "p_bright", "prediction", "status", "reason"]
        report = json.loads((tmp_path / "out" / "one_class.json").read_text())
        assert report["weights_sha256"] == file_sha256(weights) and report["heatmap_of"] == report["prediction"]
        assert report["probabilities"]["bright"] == pytest.approx(float(rows[0]["p_bright"]), abs=1e-6)
        assert report["bundle"]["name"].endswith("ResNet-10") and report["input_size"] == [24] * 3
        sheet = imread(tmp_path / "out" / "predictions.png")
        assert sheet.shape[1] > sheet.shape[0] and sheet[..., :3].max() > 0.8

    def test_heat_maps_in_the_input_folder_are_no_scans(self, weights: Path, tmp_path: Path) -> None:
        folder = scans(tmp_path, "one")
        infer(folder, folder, weights, heatmap=True)
        assert (folder / "one_heatmap.nii.gz").is_file()
        assert [case["case"] for case in find_cases(folder)] == ["one"]

    def test_a_failed_case_is_told_and_its_old_files_are_set_aside(self, weights: Path, tmp_path: Path) -> None:
        folder = scans(tmp_path / "in", "bad", "good")
        infer(folder, tmp_path / "out", weights, heatmap=True)
        os.truncate(folder / "bad.nii.gz", 500)
        message = refusal(lambda: infer(folder, tmp_path / "out", weights))
        assert "bad.nii.gz: cannot be read" in message
        names = {p.name for p in (tmp_path / "out").iterdir()}
        assert not any(name.startswith("bad") and not name.endswith(".old") for name in names)
        assert {"bad_class.json.old", "bad_heatmap.nii.gz.old", "predictions.csv.old"} <= names
        assert {"good_heatmap.nii.gz.old", "good_heatmap.png.old", "good_class.json"} <= names  # none was made now
        bad, good = read(tmp_path / "out" / "predictions.csv")
        assert bad["status"] == "failed" and "cannot be read" in bad["reason"] and bad["p_bright"] == ""
        assert good["status"] == "done" and good["reason"] == ""

    def test_finished_cases_are_left_out(
        self, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = scans(tmp_path / "in", "one")
        infer(folder, tmp_path / "out", weights)
        before = read(tmp_path / "out" / "predictions.csv")[0]
        scans(tmp_path / "in", "one", "two")
        os.utime(folder / "one.nii.gz", ns=(1, 1))
        infer(folder, tmp_path / "out", weights)
        infer(folder, tmp_path / "out", weights, skip_finished="true")
        assert "2 of 2 cases are finished already" in capsys.readouterr().out
        rows = read(tmp_path / "out" / "predictions.csv")
        assert [row["status"] for row in rows] == ["skipped"] * 2 and rows[0]["p_dark"] == before["p_dark"]
        assert imread(tmp_path / "out" / "predictions.png").shape[1] > 300
        infer(folder, tmp_path / "out", weights, skip_finished=True, heatmap=True, sheet_cases=1)
        assert [row["status"] for row in read(tmp_path / "out" / "predictions.csv")] == ["done"] * 2

    @pytest.mark.parametrize("shape", [(20, 22, 2), (3, 3, 3), (40, 40, 40)])
    def test_of_two_slices_tiny_or_larger_than_the_input(
        self, shape: tuple[int, int, int], weights: Path, tmp_path: Path
    ) -> None:
        voxels = np.random.default_rng(0).normal(100, 10, shape).astype(np.float32)
        write_nifti(tmp_path / "in" / "s.nii.gz", voxels, np.diag([2.0, 2.0, 5.0, 1.0]))
        infer(tmp_path / "in", tmp_path / "out", weights, heatmap=True, heatmap_class="bright")
        found = nib.load(tmp_path / "out" / "s_heatmap.nii.gz")
        assert found.shape == shape and np.isfinite(np.asarray(found.dataobj)).all()
        assert np.isfinite(float(read(tmp_path / "out" / "predictions.csv")[0]["p_bright"]))

    def test_ct_is_read_by_its_window_and_checked(self, tmp_path: Path) -> None:
        weights = save_classifier(
            tmp_path, blob_network(), ["dark", "bright"], [2.0] * 3, [24] * 3, modality="ct", hu_window=[-1000, 400]
        )
        voxels = np.random.default_rng(0).normal(40, 5, (24, 24, 24)).astype(np.float32)
        write_nifti(tmp_path / "in" / "soft.nii.gz", voxels)
        message = refusal(lambda: infer(tmp_path / "in", tmp_path / "out", weights))
        assert "soft.nii.gz: is not CT in Hounsfield units" in message
        infer(tmp_path / "in", tmp_path / "out", weights, check_ct="false")
        before = float(read(tmp_path / "out" / "predictions.csv")[0]["p_bright"])
        voxels[::3] = -900
        write_nifti(tmp_path / "in" / "soft.nii.gz", voxels)
        infer(tmp_path / "in", tmp_path / "out", weights)
        assert float(read(tmp_path / "out" / "predictions.csv")[0]["p_bright"]) != before

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ({"heatmap_class": "grey"}, "heatmap_class='grey': the classes are dark, bright"),
            ({"heatmap": "maybe"}, "'maybe' is neither on nor off"),
            ({"modality": "us"}, "modality='us': allowed are ct and mr"),
            ({"weights": "nowhere/model.pt"}, "nowhere/model.pt"),
        ],
    )
    def test_refusals(self, override: dict[str, Any], words: str, weights: Path, tmp_path: Path) -> None:
        folder = scans(tmp_path / "in", "one")
        options = {"dataset_dir": str(folder), "output_dir": str(tmp_path / "out"), "weights": str(weights)}
        assert words in refusal(lambda: run("inference", **options | override))
        assert not (tmp_path / "out" / "predictions.csv").exists()

    def test_weights_without_their_record(self, weights: Path, tmp_path: Path) -> None:
        shutil.copy(weights, tmp_path)
        folder = scans(tmp_path / "in", "one")
        message = refusal(lambda: infer(folder, tmp_path / "out", tmp_path / "model.pt"))
        assert "classifier.json: no record of a trained classifier" in message
        (tmp_path / "model.pt").unlink()


TABLES: dict[str, tuple[str, str]] = {
    "empty": ("", "has no column case and no column label"),
    "header alone": ("case,label\n", "has no row below its header"),
    "wrong columns": ("file,class\none,x\n", "has no column case and no column label. Its columns: file, class"),
    "case twice": ("case,label\none,x\none,y\ntwo,x\n", "one: more than one row for a case"),
    "no label": ("case,label\none,x\ntwo,\n", "line 3: no label in this row"),
    "unknown class": ("case,label\none,x\ntwo,z\n", "case two: unknown label 'z'. The classes: x, y"),
    "one class": ("case,label\none,x\ntwo,x\n", "No case of class number 1 is for training"),
}


@pytest.mark.parametrize("name", TABLES)
def test_bad_tables(name: str, tmp_path: Path) -> None:
    text, words = TABLES[name]
    folder = scans(tmp_path / "in", "one", "two")
    (folder / "labels.csv").write_text(text)
    message = refusal(lambda: train(folder, tmp_path / "out", classes=["x", "y"], val_fraction=0))
    assert words in message and ("labels.csv" in message or name == "one class") and "\n" not in message
    assert not list(tmp_path.rglob("*.pt"))


def test_exports_compute_the_same(several: Trained, tmp_path: Path) -> None:
    """TorchScript and ONNX by MONAI's own commands, for a size that is not the example's."""
    options = {
        "net_id": "network_def",
        "ckpt_file": str(several.weights),
        "meta_file": str(BUNDLE / "configs" / "metadata.json"),
        "config_file": config("inference"),
        "weights": str(several.weights),
    }
    network = ClassificationNet(10, 2).eval()
    network.load_state_dict(torch.load(several.weights, weights_only=True))
    image = torch.randn(1, 1, 24, 16, 33, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(image)
    ckpt_export(filepath=str(tmp_path / "model.ts"), use_trace=False, **options)
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), expected, atol=1e-4, rtol=1e-4)
    onnx_export(filepath=str(tmp_path / "model.onnx"), use_trace=True, input_shape=[1, 1, 24, 16, 33], **options)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_the_table_of_the_example_keeps_the_sides_of_a_person_together(tmp_path: Path) -> None:
    """Forty cases of twenty people, by number; the label is the sum of both parts against the training median."""
    entries = []
    for number in range(1, 41):
        voxels = np.zeros((6, 6, 6), np.uint8)
        voxels[:2, :, : 1 + number % 5] = 1
        voxels[3:5, :, : 1 + number % 3] = 2
        name = f"hippocampus_{number:03d}.nii.gz"
        for kind in ("imagesTr", "labelsTr"):
            write_nifti(tmp_path / "data" / kind / name, voxels)
        entries.append({"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"})
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"training": entries}))
    volume_task.make(str(tmp_path / "data"), str(tmp_path / "out"))
    rows = read(tmp_path / "out" / "labels.csv")
    assert len(rows) == 40 and [row["patient"] for row in rows[:4]] == ["p001", "p001", "p002", "p002"]
    splits = {row["patient"]: {other["split"] for other in rows if other["patient"] == row["patient"]} for row in rows}
    assert all(len(found) == 1 for found in splits.values()) and splits["p001"] == {"test"}
    total = np.array([float(row["anterior_ml"]) + float(row["posterior_ml"]) for row in rows])
    median = np.median(total[[row["split"] == "training" for row in rows]])
    assert [row["label"] for row in rows] == ["large" if value > median else "small" for value in total]
    assert float(rows[0]["anterior_ml"]) == pytest.approx(2 * 6 * 2 * 0.008)
    volume_task.make(str(tmp_path / "data"), str(tmp_path / "out"), multi_label=True)
    several = {row["label"] for row in read(tmp_path / "out" / "labels.csv")}
    assert several <= {"none", "large_anterior", "large_posterior", "large_anterior|large_posterior"}
    assert len(several) > 2


def test_the_bundle_stays_as_it_is() -> None:
    assert {path.name for path in BUNDLE.iterdir()} == {"LICENSE", "configs", "docs", "large_files.yml"}


@pytest.mark.slow
def test_learns_where_a_ball_is(tmp_path: Path) -> None:
    """Train, evaluate unseen cases, and infer with a heat map."""
    data = write_blobs(tmp_path / "data", 32)
    rows = [(row["case"], row["label"], "test" if i >= 22 else "") for i, row in enumerate(read(data / "labels.csv"))]
    rows = [
        (case, label, split or ("validation" if i >= 16 else "training")) for i, (case, label, split) in enumerate(rows)
    ]
    write_labels(data / "labels.csv", rows, ("case", "label", "split"))
    train(data, tmp_path / "run", mirror=False, max_epochs=8, norm_batches=4, checkpoint_interval=8)
    weights = tmp_path / "run" / "model.pt"
    run("evaluate", dataset_dir=str(data), weights=str(weights), output_dir=str(tmp_path / "scores"))
    summary = json.loads((tmp_path / "scores" / "scores.json").read_text())["summary"]
    assert summary["auc"]["value"] >= 0.9
    infer(data / "s31.nii.gz", tmp_path / "out", weights, heatmap=True)
    assert np.asarray(nib.load(tmp_path / "out" / "s31_heatmap.nii.gz").dataobj).max() == pytest.approx(1, abs=0.2)
    shutil.rmtree(tmp_path / "run")
