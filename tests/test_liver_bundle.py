"""The liver bundle's whole life on small bodies: LiTS folder, training of both stages, masks, scores, nothing found."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from numpy.typing import NDArray

from med3d_nets.errors import InputError
from tests.test_bad_input import BAD
from tests.torchrun import torchrun

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "liver_ct_segmentation_resnet10"
METADATA = str(BUNDLE / "configs" / "metadata.json")
SPACING = 6.0  # mm
SMALL: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "device": "cpu",
    "spacing": [SPACING] * 3,
    "coarse_spacing": [2 * SPACING] * 3,
    "margin_mm": 12.0,
}
TRAINING: dict[str, Any] = {
    "patch_size": [32, 32, 32],
    "samples_per_epoch": 8,
    "max_epochs": 2,
    "val_interval": 1,
    "norm_batches": 2,
    "num_workers": 0,
    "val_fraction": 0.25,
}

pytestmark = pytest.mark.filterwarnings("ignore:DenseASPP")  # of the bundle's rates on small maps


def config(name: str) -> str:
    return str(BUNDLE / "configs" / f"{name}.json")


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield


def run(name: str, **options: Any) -> ConfigWorkflow:
    """Run a config of the bundle in this process."""
    workflow = ConfigWorkflow(config_file=config(name), meta_file=METADATA, **{**SMALL, **options})
    workflow.initialize()
    workflow.run()
    return workflow


def body(seed: int, liver: bool = True) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A body of fat, HU, with a liver that has a tumour in it, and its labels; x grows to the patient's right."""
    rng = np.random.default_rng(seed)
    grid = np.indices((48, 40, 40)).astype(float)
    centre = np.array([32, 22, 20]) + rng.uniform(-2, 2, 3)

    def ball(middle: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
        return np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, middle, strict=True))) < radius

    image = np.full(grid.shape[1:], -1000.0)
    image[3:45, 3:37] = -100
    label = np.zeros(grid.shape[1:], dtype=np.uint8)
    if liver:
        label[ball(centre, 9)] = 1
        label[ball(centre + 2, 3)] = 2
    image[label == 1], image[label == 2] = 110, 60
    return (image + rng.normal(0, 10, image.shape)).astype(np.int16), label


def write(path: Path, voxels: NDArray[Any], flip: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels[::flip], np.diag([flip * SPACING, SPACING, SPACING, 1])), path)
    return path


@pytest.fixture(scope="module")
def lits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scans as LiTS has them, in folders of its batches."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(4):
        batch = folder / f"Training Batch {1 + number // 2}"
        for name, voxels in zip(("volume", "segmentation"), body(number), strict=True):
            write(batch / f"{name}-{number}.nii", voxels)
    return folder


@pytest.fixture(scope="module")
def trained(lits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run("train", dataset_dir=str(lits), output_dir=str(out), **{**TRAINING, "max_epochs": 14, "val_interval": 7})
    return out / "model_last.pt"


def test_training_writes_what_inference_loads(trained: Path) -> None:
    state = torch.load(trained, weights_only=True)
    assert {key.split(".")[0] for key in state} == {"backbone", "coarse", "head"}
    assert state["head.classify.weight"].shape[0] == 2
    assert (trained.parent / "model.pt").is_file() and (
        trained.parent / "checkpoints" / "checkpoint_epoch=14.pt"
    ).is_file()


@pytest.mark.parametrize("flip", [1, -1])
def test_a_scan_becomes_a_mask_in_its_own_space(trained: Path, tmp_path: Path, flip: int) -> None:
    """A liver of a body that was not trained on, on grids of either orientation; volume and mean HU beside it."""
    image, label = body(9)
    scan = write(tmp_path / "scan.nii.gz", image, flip)
    run("inference", dataset_dir=str(scan), output_dir=str(tmp_path / "out"), weights=str(trained))
    mask = nib.load(tmp_path / "out" / "scan_seg.nii.gz")
    np.testing.assert_allclose(mask.affine, nib.load(scan).affine)
    found, true = np.asarray(mask.dataobj) > 0, label[::flip] > 0
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.6
    report = json.loads((tmp_path / "out" / "scan_seg.json").read_text())
    liver = report["labels"]["liver"]
    assert liver["volume_ml"] == pytest.approx(found.sum() * SPACING**3 / 1000, abs=0.1)
    assert liver["mean_hu"] == pytest.approx(np.clip(image[::flip], -200, 250)[found].mean(), abs=3)
    assert (tmp_path / "out" / "scan_seg.png").stat().st_size > 10_000
    assert report["settings"]["coarse_spacing"] == [2 * SPACING] * 3


def test_no_liver_is_an_empty_mask_and_a_warning(trained: Path, tmp_path: Path) -> None:
    """Not an error, and not a guess: here the first stage finds nothing as large as it asks for."""
    scan = write(tmp_path / "scan.nii.gz", body(3, liver=False)[0])
    run("inference", dataset_dir=str(scan), output_dir=str(tmp_path), weights=str(trained), least_ml=1e5)
    assert not np.asarray(nib.load(tmp_path / "scan_seg.nii.gz").dataobj).any()
    report = json.loads((tmp_path / "scan_seg.json").read_text())
    assert "no voxel of liver found" in report["warnings"] and report["labels"]["liver"]["mean_hu"] is None


def test_scores_of_lits(trained: Path, lits: Path, tmp_path: Path) -> None:
    run("evaluate", dataset_dir=str(lits), output_dir=str(tmp_path), weights=str(trained), section="training")
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["case"] for row in rows] == [f"volume-{number}" for number in range(4)]
    assert {"dice", "voe", "rvd", "assd_mm", "mssd_mm", "rmsd_mm"} <= set(rows[0])
    true = (body(0)[1] > 0).sum() * SPACING**3 / 1000  # the tumour is liver
    assert float(rows[0]["true_ml"]) == pytest.approx(true, rel=1e-3)
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["global_dice"]["liver"] == pytest.approx(report["summary"]["liver"]["dice"]["mean"], abs=0.1)


def test_tumours_as_a_class(lits: Path, tmp_path: Path) -> None:
    three: dict[str, Any] = {"merge_tumour": False, "dataset_dir": str(lits)}
    run("train", output_dir=str(tmp_path / "run"), **TRAINING, **three)
    weights = str(tmp_path / "run" / "model_last.pt")
    assert torch.load(weights, weights_only=True)["head.classify.weight"].shape[0] == 3
    run("evaluate", output_dir=str(tmp_path / "scores"), weights=weights, section="training", **three)
    assert list(json.loads((tmp_path / "scores" / "scores.json").read_text())["summary"]) == ["liver", "tumour"]


def test_resume(lits: Path, tmp_path: Path) -> None:
    """A training that is stopped and resumed ends with the weights of one that is not."""
    for name, epochs in (("whole", (2,)), ("part", (1, 2))):
        for count in epochs:
            options = {**TRAINING, "samples_per_epoch": 2, "max_epochs": count}
            options["lr_scheduler#lr_lambda"] = "$lambda epoch: 1.0"
            resume = count > 1 and name == "part"
            run("train", dataset_dir=str(lits), output_dir=str(tmp_path / name), resume=resume, **options)
    one, two = (torch.load(tmp_path / name / "model_last.pt", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "openvino"}, "openvino"),
        ({"coarse_spacing": [3.0] * 3}, "factor="),
        ({"merge_tumour": "perhaps"}, "perhaps"),
    ],
)
def test_wrong_keys(trained: Path, tmp_path: Path, options: dict, told: str) -> None:
    scan = write(tmp_path / "scan.nii.gz", body(1)[0])
    with pytest.raises(Exception) as error:
        run("inference", dataset_dir=str(scan), output_dir=str(tmp_path / "out"), weights=str(trained), **options)
    assert told in repr(error.getrepr(chain=True))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input(trained: Path, tmp_path: Path, name: str) -> None:
    """What the lung bundle refuses, in the same words, and no file is left."""
    make, words = BAD[name]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    with pytest.raises((InputError, RuntimeError, OSError)) as error:
        run("inference", dataset_dir=str(path), output_dir=str(tmp_path / "out"), weights=str(trained))
    told = repr(error.getrepr(chain=True))
    assert all(word in told for word in (str(path), *words))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_two_processes_train(lits: Path, tmp_path: Path) -> None:
    options = {**SMALL, **TRAINING, "dataset_dir": str(lits), "output_dir": str(tmp_path / "out")}
    done = torchrun(tmp_path / "start", BUNDLE, ["train", "multi_gpu_train"], **options)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out" / "model_last.pt").is_file()


@pytest.mark.real_data
@pytest.mark.slow
def test_on_a_real_scan(trained: Path, real_data: Path, tmp_path: Path) -> None:
    """Trained on balls of six millimetres it finds no liver worth the name; mask and report are there all the same."""
    scan = real_data / "liver_ct" / "imagesTr" / "totalseg_dicom.nii.gz"
    run("inference", dataset_dir=str(scan), output_dir=str(tmp_path), weights=str(trained))
    mask, image = nib.load(tmp_path / "totalseg_dicom_seg.nii.gz"), nib.load(scan)
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
