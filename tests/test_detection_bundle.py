"""The detection bundle's whole life on small chests: LUNA16's folder, training, findings, FROC, what is refused."""

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

from tests.nodule_scans import SPACING, UID, chest, luna_folder
from tests.torchrun import torchrun

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "lung_nodule_ct_detection_resnet10"
METADATA = str(BUNDLE / "configs" / "metadata.json")
SMALL: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "device": "cpu",
    "spacing": [SPACING] * 3,
    "window": [64, 64, 64],
}
TRAINING: dict[str, Any] = {
    "patch_size": [64, 32, 32],
    "samples_per_epoch": 4,
    "batch_size": 2,
    "max_epochs": 2,
    "val_interval": 1,
    "norm_batches": 2,
    "num_workers": 0,
    "val_subset": "subset1",
}


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


def reason(error: BaseException) -> str:
    """The message of what began an error."""
    cause: BaseException | None = error
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return str(cause)


@pytest.fixture(scope="module")
def luna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return luna_folder(tmp_path_factory.mktemp("luna"), (2, 2, 1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the bundle's network whose every anchor is improbable but for the first logits' noise."""
    from med3d_nets import DetectionNet

    torch.manual_seed(0)
    network = DetectionNet(10, width=32)
    torch.nn.init.normal_(network.classification_head.cls_logits.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
class TestTraining:
    @pytest.fixture(scope="class")
    def trained(self, luna: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """One command with LUNA16's folder."""
        out = tmp_path_factory.mktemp("run")
        run("train", dataset_dir=str(luna), output_dir=str(out), **TRAINING)
        return out

    def test_it_leaves_weights_and_checkpoints(self, trained: Path) -> None:
        assert {"model.pt", "model_last.pt", "checkpoints"} <= {path.name for path in trained.iterdir()}

    def test_the_weights_find_and_are_scored(self, trained: Path, luna: Path, tmp_path: Path) -> None:
        last = str(trained / "model_last.pt")
        run("inference", dataset_dir=str(luna / "subset0"), output_dir=str(tmp_path), weights=last, min_probability=0.0)
        assert len(list(tmp_path.glob("*_findings.json"))) == 2
        run("evaluate", dataset_dir=str(luna), output_dir=str(tmp_path / "scores"), weights=last)
        assert json.loads((tmp_path / "scores" / "froc.json").read_text())["nodules"] == 5

    def test_resumes(self, trained: Path, luna: Path) -> None:
        run("train", dataset_dir=str(luna), output_dir=str(trained), **{**TRAINING, "max_epochs": 3}, resume=True)
        assert (trained / "checkpoints" / "checkpoint_epoch=3.pt").is_file()

    def test_two_processes(self, luna: Path, tmp_path: Path) -> None:
        options = {**SMALL, **TRAINING, "max_epochs": 1, "dataset_dir": str(luna), "output_dir": str(tmp_path / "out")}
        options.pop("bundle_root")
        done = torchrun(tmp_path / "start", BUNDLE, ["train", "multi_gpu_train"], **options)
        assert done.returncode == 0, done.stdout
        assert (tmp_path / "out" / "model_last.pt").is_file()


@pytest.mark.slow
class TestInference:
    def test_findings(self, weights: Path, tmp_path: Path) -> None:
        """Every form of the result tells of the same findings, in the scan's own world."""
        hu, _ = chest(5)
        affine = np.diag([-SPACING, SPACING, SPACING, 1.0])
        affine[:3, 3] = [40, -70, 15]
        nib.save(nib.Nifti1Image(hu[::-1], affine), tmp_path / "scan.nii.gz")
        out = tmp_path / "out"
        run("inference", dataset_dir=str(tmp_path), output_dir=str(out), weights=str(weights), min_probability=0.05)
        report = json.loads((out / "scan_findings.json").read_text())
        with (out / "scan_findings.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert report["lungs_found"] and len(rows) == len(report["findings"]) > 0
        for row, finding in zip(rows, report["findings"], strict=True):
            assert row["seriesuid"] == "scan"
            lps = [float(row[f"coord{axis}"]) for axis in "XYZ"]
            np.testing.assert_allclose(lps, finding["centre_lps_mm"], atol=1e-3)
            np.testing.assert_allclose(lps * np.array([-1, -1, 1]), finding["centre_ras_mm"], atol=1e-3)
            np.testing.assert_allclose((affine @ [*finding["voxel"], 1])[:3], finding["centre_ras_mm"], atol=0.05)
            assert ((np.array(finding["voxel"]) >= 0) & (np.array(finding["voxel"]) <= np.array(hu.shape) - 1)).all()
            assert not finding["picture"] or (out / finding["picture"]).stat().st_size > 1000
        probabilities = [finding["probability"] for finding in report["findings"]]
        assert probabilities == sorted(probabilities, reverse=True)

    def test_a_scan_without_lungs_has_no_findings(self, weights: Path, tmp_path: Path) -> None:
        hu = np.full((40, 40, 30), -1000, np.int16)
        hu[4:36, 4:36] = -90
        hu[10:30, 10:30] = 40
        nib.save(nib.Nifti1Image(hu, np.diag([SPACING] * 3 + [1.0])), tmp_path / "head.nii.gz")
        run("inference", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"), weights=str(weights))
        report = json.loads((tmp_path / "out" / "head_findings.json").read_text())
        assert report["findings"] == [] and not report["lungs_found"]

    def test_what_is_no_ct_fails_and_the_others_finish(self, weights: Path, luna: Path, tmp_path: Path) -> None:
        hu, _ = chest(6)
        nib.save(nib.Nifti1Image(hu, np.diag([SPACING] * 3 + [1.0])), tmp_path / "good.nii.gz")
        nib.save(nib.Nifti1Image(np.ones((30, 30, 30), np.int16), np.eye(4)), tmp_path / "bad.nii.gz")
        with pytest.raises(RuntimeError) as caught:
            run("inference", dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"), weights=str(weights))
        assert "1 of 2 cases failed" in reason(caught.value) and "bad" in reason(caught.value)
        with (tmp_path / "out" / "summary.csv").open() as stream:
            assert [row["status"] for row in csv.DictReader(stream)] == ["failed", "done"]

    def test_finished_cases_are_left_out(
        self, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hu, _ = chest(6)
        nib.save(nib.Nifti1Image(hu, np.diag([SPACING] * 3 + [1.0])), tmp_path / "one.nii.gz")
        for _ in range(2):
            options = {"dataset_dir": str(tmp_path / "one.nii.gz"), "output_dir": str(tmp_path / "out")}
            run("inference", **options, weights=str(weights), skip_finished=True)
        assert "1 of 1 cases are finished already" in capsys.readouterr().out


@pytest.mark.slow
class TestEvaluation:
    def test_writes_curve_picture_and_tables(self, weights: Path, luna: Path, tmp_path: Path) -> None:
        run("evaluate", dataset_dir=str(luna), output_dir=str(tmp_path), weights=str(weights), bootstrap_samples=50)
        names = {"froc.csv", "froc.json", "froc.png", "detections.csv", "nodules.csv"}
        assert {path.name for path in tmp_path.iterdir()} == names
        report = json.loads((tmp_path / "froc.json").read_text())
        assert (report["scans"], report["nodules"]) == (3, 5)
        assert list(report["sensitivity_at_false_positives_per_scan"]) == ["0.125", "0.25", "0.5", "1", "2", "4", "8"]

    def test_a_point_outside_names_its_row(self, weights: Path, luna: Path, tmp_path: Path) -> None:
        table = tmp_path / "wrong.csv"
        table.write_text(f"seriesuid,coordX,coordY,coordZ,diameter_mm\n{UID}0,999,0,0,5\n")
        with pytest.raises(RuntimeError) as caught:
            run(
                "evaluate",
                dataset_dir=str(luna),
                annotations=str(table),
                output_dir=str(tmp_path / "out"),
                weights=str(weights),
            )
        assert f"{table}, line 2: the point (999.0, 0.0, 0.0) mm (LPS) is outside" in reason(caught.value)


@pytest.mark.slow
@pytest.mark.real_data
def test_the_tumour_of_a_real_chest_is_the_first_finding(real_data: Path, tmp_path: Path) -> None:
    """With the shipped weights; the middle is that of the boxes in tumour_boxes_voc, LPS mm, the radius their mean."""
    series = real_data / "chest_ct_dicom" / "series"
    run("inference", dataset_dir=str(series), output_dir=str(tmp_path), spacing=[1.25] * 3, window=[96, 96, 96])
    first = json.loads((tmp_path / "series_findings.json").read_text())["findings"][0]
    assert np.linalg.norm(np.array(first["centre_lps_mm"]) - [40.5, 198.2, -209.0]) < 32.9
    assert (tmp_path / first["picture"]).is_file()
