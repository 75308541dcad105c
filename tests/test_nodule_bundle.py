"""The nodule bundle as a user runs it: crops or points in, probabilities or embeddings out; trained, scored."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from med3d_nets import ClassificationNet
from tests.nodule_runs import BUNDLE, many_nodules, run
from tools.bundle_ship import ship

SMALL = {"input_size": [24, 24, 16], "spacing": [1.5, 1.5, 1.5]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a record."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(ClassificationNet(10, 2, output_stride=16).state_dict(), folder / "model.pt")
    record = {"classes": ["malign", "rating_4_5"], **SMALL, "patients": ["p00"]}
    (folder / "classifier.json").write_text(json.dumps(record))
    return folder / "model.pt"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_crops(tmp_path: Path, weights: Path) -> None:
    run(
        "inference", dataset_dir=str(many_nodules(tmp_path / "data", 3)), output_dir=str(tmp_path), weights=str(weights)
    )
    rows = read(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["case", "p_malign", "p_rating_4_5", "warning"]
    assert [row["case"] for row in rows] == ["p00_R_1", "p01_R_1", "p02_R_1"]
    assert all(0 < float(row["p_malign"]) < 1 for row in rows)
    assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run.json").read_text())["spacing"] == [1.5, 1.5, 1.5]


def test_a_crop_and_its_point_in_a_scan_are_told_alike(tmp_path: Path, weights: Path) -> None:
    """What is around a crop is lung; a scan that is lung around it gives the same cube."""
    voxels = np.full((31, 31, 9), -850, np.float32)
    voxels[11:20, 10:21, 3:6] = 60
    voxels[:2] = -950  # a mirrored or shifted cube would show
    affine = np.diag([-0.8, -0.8, 2.0, 1.0])
    (tmp_path / "crops").mkdir()
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "crops" / "n.nii.gz")
    whole = np.full((91, 81, 39), -850, np.float32)
    whole[20:51, 30:61, 10:19] = voxels
    affine[:3, 3] = [30, 40, -7]
    nib.save(nib.Nifti1Image(whole, affine), tmp_path / "scans" / "s.nii.gz")
    x, y, z = nib.affines.apply_affine(affine, [20 + 15, 30 + 15, 10 + 4])
    (tmp_path / "points.csv").write_text(f"case,seriesuid,coordX,coordY,coordZ\nn,s,{-x},{-y},{z}\n")
    common = {"weights": str(weights), "flips": False}
    run("inference", dataset_dir=str(tmp_path / "crops"), output_dir=str(tmp_path / "a"), **common)
    points = {"points": str(tmp_path / "points.csv"), "output_dir": str(tmp_path / "b")}
    run("inference", dataset_dir=str(tmp_path / "scans"), **points, **common)
    crop, point = read(tmp_path / "a" / "predictions.csv")[0], read(tmp_path / "b" / "predictions.csv")[0]
    assert float(crop["p_malign"]) == pytest.approx(float(point["p_malign"]), abs=1e-5)
    assert (point["seriesuid"], float(point["coordX"]), float(point["coordZ"])) == ("s", -x, z)


def test_features(tmp_path: Path, weights: Path) -> None:
    data = str(many_nodules(tmp_path / "data", 2))
    run("inference", dataset_dir=data, output_dir=str(tmp_path), weights=str(weights), output="features")
    assert len(read(tmp_path / "embeddings.csv")[0]) == 1 + 512
    assert np.load(tmp_path / "p01_R_1_features.npz")["embedding"].shape == (512,)
    assert not (tmp_path / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "masks"}, "allowed are probabilities and features"),
        ({"points": "none.csv"}, "none.csv: no such file"),
        ({"weights": "elsewhere/model.pt"}, "no record of a trained classifier"),
        ({"weights": []}, "weights is an empty list"),
    ],
)
def test_bad_options(tmp_path: Path, weights: Path, options: dict, message: str) -> None:
    own = {"dataset_dir": str(many_nodules(tmp_path / "data", 1)), "weights": str(weights), **options}
    with pytest.raises(RuntimeError) as error:
        run("inference", output_dir=str(tmp_path / "out"), **own)
    assert message in str(error.value.__cause__)
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_one_bad_crop_does_not_stop_the_others(tmp_path: Path, weights: Path) -> None:
    data = many_nodules(tmp_path / "data", 3)
    (data / "imagesTr" / "p01_R_1.nii.gz").write_bytes(b"no volume")
    with pytest.raises(RuntimeError) as error:
        run("inference", dataset_dir=str(data), output_dir=str(tmp_path), weights=str(weights), flips=False)
    assert "1 of 3 cases failed" in str(error.value.__cause__) and "p01_R_1.nii.gz" in str(error.value.__cause__)
    assert [row["case"] for row in read(tmp_path / "predictions.csv")] == ["p00_R_1", "p02_R_1"]


def test_the_record_is_shipped_with_the_weights(tmp_path: Path, weights: Path) -> None:
    folder = Path(shutil.copytree(BUNDLE, tmp_path / BUNDLE.name, ignore=shutil.ignore_patterns("models")))
    assert ship(weights, folder).is_file()
    assert (folder / "models" / "classifier.json").read_text() == (weights.parent / "classifier.json").read_text()


def test_evaluation_leaves_seen_patients_out(tmp_path: Path, weights: Path) -> None:
    data = str(many_nodules(tmp_path / "data", 5))
    run("evaluate", dataset_dir=data, output_dir=str(tmp_path), weights=str(weights), flips=False, bootstrap_samples=20)
    assert [row["patient"] for row in read(tmp_path / "predictions.csv")] == ["p01", "p02", "p03", "p04"]
    summary = json.loads((tmp_path / "scores.json").read_text())["summary"]
    assert summary["malign"]["diameter_auc"]["value"] == 1.0
    assert (tmp_path / "calibration.png").stat().st_size > 1000


@pytest.mark.slow
def test_train_resume_and_evaluate(tmp_path: Path) -> None:
    """Large and small balls are told apart, after a training that was cut in two as after one that was not."""
    data, common = str(many_nodules(tmp_path / "data", 20)), {"backbone_weights": "", "num_workers": 0, **SMALL}
    keys = {"dataset_dir": data, "batch_size": 4, "norm_batches": 2, "checkpoint_interval": 1, **common}
    run("train", output_dir=str(tmp_path / "a"), max_epochs=4, **keys)
    run("train", output_dir=str(tmp_path / "b"), max_epochs=4, **keys)
    (tmp_path / "b" / "checkpoints" / "checkpoint_epoch=4.pt").unlink()
    run("train", output_dir=str(tmp_path / "b"), max_epochs=4, resume=True, **keys)
    one, two = (torch.load(tmp_path / run_ / "model_last.pt", weights_only=True) for run_ in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)
    weights = str(tmp_path / "a" / "model.pt")
    assert json.loads((tmp_path / "a" / "classifier.json").read_text())["calibration"]["cases"] > 0
    run("evaluate", dataset_dir=data, output_dir=str(tmp_path), weights=weights, bootstrap_samples=20)
    assert json.loads((tmp_path / "scores.json").read_text())["summary"]["malign"]["auc"]["value"] == 1.0
