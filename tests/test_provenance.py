"""Whether evaluation data may have been seen in pre-training is said by dataset name and by case name."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow

from med3d_nets import WEIGHTS, InputError, warn_overlap
from med3d_nets.registry import THREE_D_SEG_8
from med3d_nets.weights import file_sha256, overlap
from med3d_nets.weights.sources import SOURCES
from tests.small_training import config, small, write_dataset


def _dataset(folder: Path, cases: list[str], section: str = "training", **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
    (folder / "dataset.json").write_text(json.dumps({"name": "mine", **texts, section: entries}))
    return folder / "dataset.json"


# Name of the folder, the cases, texts of dataset.json: verdict for the 8-dataset weights, words of the reason.
JUDGED: dict[str, tuple[str, list[str], dict[str, str], str, str]] = {
    "a task as downloaded": ("Task04_Hippocampus", ["hippocampus_001"], {"name": "Hippocampus"}, "seen", "Task04"),
    "its folder's name alone": ("Task01_BrainTumour", ["a", "b"], {}, "seen", "named in 'Task01_BrainTumour'"),
    "a reference": ("x", ["a"], {"reference": "Medical Segmentation Decathlon Task09, MSKCC"}, "seen", "Task09"),
    "MSD and the organ": ("x", ["a"], {"description": "pancreas CT of MSD"}, "seen", "Task07"),
    "its usual name and cases": ("x", ["prostate_16"], {"name": "PROSTATE"}, "seen", "1 of 1 case names"),
    "LiTS": ("x", ["volume-12", "volume-130"], {"name": "LiTS17"}, "seen", "(volume-12, volume-130)"),
    "LiTS, its test part": ("LITS", ["test-volume-3"], {}, "possible", "without public labels"),
    "Task03, its test part": ("Task03_Liver", ["liver_131", "liver_200"], {}, "possible", "without public labels"),
    "cases of a task": ("x", ["BRATS_001", "mine_2"], {}, "possible", "1 of 2 case names are of its form (BRATS_001)"),
    "cases as nnU-Net names them": ("x", ["la_003_0000"], {}, "possible", "Task02"),
    "cases of LiTS": ("x", ["volume-0"], {}, "possible", "Task03"),
    "a usual name alone": ("x", ["a"], {"name": "Spleen"}, "possible", "called 'Spleen'"),
    "a collection of others": ("x", ["a"], {"name": "AbdomenCT-1K"}, "possible", "shares scans"),
    "the Decathlon without an organ": ("x", ["a"], {"name": "MSD"}, "possible", "which task"),
    "Task03 as nnU-Net names it": ("Dataset003_Liver", ["a"], {}, "seen", "Task03"),
    "3D-IRCADb": ("3Dircadb1", ["a"], {}, "possible", "Task03"),
    "BRATS numbers beyond training": ("x", ["BRATS_600"], {}, "no sign", ""),
    "another organ": ("Task06_Lung", ["lung_001"], {"reference": "Medical Segmentation Decathlon"}, "no sign", ""),
    "the Decathlon's layout": (
        *("x", ["a"], {"description": "liver, in Medical Segmentation Decathlon layout"}),
        *("no sign", ""),
    ),
    "an organ in a name": ("my_liver_study", ["patient_12"], {"name": "liver_ct"}, "no sign", ""),
    "a longer case name": ("x", ["my_liver_12", "liver_12b", "volume-12-left"], {}, "no sign", ""),
}


@pytest.mark.parametrize("case", JUDGED)
def test_verdict(case: str, tmp_path: Path) -> None:
    folder, cases, texts, verdict, reason = JUDGED[case]
    path = _dataset(tmp_path / folder, cases, **texts)
    for given in (path, path.parent):
        result = overlap("resnet_50", given)
        assert result.verdict == verdict, result
        assert result.checked == len(cases)
        assert reason in str(result) and str(result).startswith(f"resnet_50 on {path}: {verdict};")
    assert bool(result.reasons) == (verdict != "no sign")
    unpublished = overlap("resnet_50_23dataset", path)
    assert unpublished.verdict == "unknown" and "cannot be ruled out" in str(unpublished)
    assert ("the data look like" in str(unpublished)) == (verdict != "no sign")


def test_every_training_dataset_is_recognised() -> None:
    for entry in THREE_D_SEG_8:
        assert sum(source.is_meant(entry) for source in SOURCES) == 1, entry
    for name in (
        "lung_ct_segmentation_resnet10",
        "liver_ct_segmentation_resnet10",
        "lung_nodule_ct_classification_resnet10",
        "lung_nodule_ct_detection_resnet10",
        "med3d_real8_resnet10",
    ):
        for entry in WEIGHTS[name].datasets:
            assert any(source.is_meant(entry) for source in SOURCES), entry
    assert all(record.datasets for record in WEIGHTS.values())


@pytest.mark.parametrize(
    ("cases", "texts", "verdict"),
    [
        (["LIDC-IDRI-0003_R_2"], {}, "seen"),
        (["a"], {"name": "LUNA16"}, "possible"),
        (["case000003"], {"description": "prostate MRI of DeepReg"}, "seen"),
        (["case000003"], {}, "possible"),
        (["hippocampus_001"], {"name": "hippocampus"}, "seen"),
        (["knee_1"], {}, "no sign"),
    ],
)
def test_verdict_of_the_co_training(cases: list[str], texts: dict[str, str], verdict: str, tmp_path: Path) -> None:
    assert overlap("med3d_real8_resnet10", _dataset(tmp_path / "x", cases, **texts)).verdict == verdict


def test_cases_and_sections(tmp_path: Path) -> None:
    path = _dataset(tmp_path, ["liver_0", "liver_130", "liver_131", "other"], section="test", name="Liver")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "validation": ["./imagesTs/volume-7.nii", 3, {"no": "image"}]}))
    assert overlap("resnet_10", path).cases == ("liver_0", "liver_130", "volume-7")
    result = overlap("resnet_10", path, section="test")
    assert result.cases == ("liver_0", "liver_130") and result.checked == 4
    with pytest.raises(InputError, match=r"no list 'training'.*Its lists: test, validation"):
        overlap("resnet_10", path, section="training")


def test_a_folder_of_lits(tmp_path: Path) -> None:
    """The 8-dataset weights saw these scans; the folder has no dataset.json to say so."""
    for name, verdict in (("LiTS", "seen"), ("scans", "possible")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("volume-0.nii", "segmentation-0.nii", "volume-131.nii", "segmentation-131.nii"):
            (folder / file).touch()
        result = overlap("resnet_10", folder, "training")
        assert (result.verdict, result.cases, result.checked) == (verdict, ("volume-0",), 2)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights file that the registry knows by hash: trained like the lung bundle, of unlisted data, or on the 8."""
    torch.save({"a": torch.ones(3)}, tmp_path / "renamed.pt")
    record = replace(WEIGHTS["resnet_10"], name="own", sha256=file_sha256(tmp_path / "renamed.pt"))
    entries = ("chest CT at two dates (test data of elastix)", "synthetic CT of tools/phantom.py")
    monkeypatch.setitem(WEIGHTS, "own", replace(record, datasets=entries))
    return tmp_path / "renamed.pt"


class TestOwnWeights:
    """Weights of this project: the cases' names decide, since held-out ones lie in the same folder."""

    def test_held_out_case(self, own: Path, tmp_path: Path) -> None:
        assert overlap("own", _dataset(tmp_path / "lung_ct", ["cip64"])).verdict == "no sign"

    def test_training_case_beside_it(self, own: Path, tmp_path: Path) -> None:
        path = _dataset(tmp_path / "lung_ct", ["cip64", "elastix_baseline", "phantom_003", "totalseg_aorta"])
        for weights in ("own", own, str(own)):
            result = overlap(weights, path)
            assert (result.weights, result.verdict) == ("own", "seen")
            assert result.cases == ("elastix_baseline", "phantom_003")

    def test_source_without_a_record(self, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(WEIGHTS, "own", replace(WEIGHTS["own"], datasets=("a hospital's own scans",)))
        result = overlap("own", _dataset(tmp_path / "d", ["a"]))
        assert result.verdict == "unknown" and result.reasons == ("trained on: a hospital's own scans",)


class TestRefusal:
    def test_unknown_weights(self, tmp_path: Path) -> None:
        torch.save({}, tmp_path / "w.pt")
        for weights in ("resnet_11", tmp_path / "w.pt"):
            with pytest.raises(InputError, match=r"training data is not on record.*resnet_10, "):
                overlap(weights, _dataset(tmp_path, ["a"]))

    @pytest.mark.parametrize(
        "content, message", [("{", "is not JSON"), ("[1]", "no object"), (None, "no dataset.json")]
    )
    def test_no_dataset(self, content: str | None, message: str, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(InputError, match=message):
            overlap("resnet_10", tmp_path)


class TestWarning:
    def test_levels(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        seen, unseen = _dataset(tmp_path / "Task03_Liver", ["liver_1"]), _dataset(tmp_path / "mine", ["a"])
        result = warn_overlap("resnet_18", seen.parent)
        assert result is not None and result.verdict == "seen"
        warn_overlap("resnet_18", unseen.parent)
        warn_overlap("resnet_18_23dataset", unseen.parent)
        found = [(record.levelname, record.getMessage().split("; ")[0].split(": ")[-1]) for record in caplog.records]
        assert found == [("WARNING", "seen"), ("INFO", "no sign"), ("WARNING", "unknown")]

    def test_nothing_to_say(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        assert warn_overlap("", tmp_path) is None and not caplog.records
        torch.save({}, tmp_path / "w.pt")
        for weights in (tmp_path / "w.pt", tmp_path / "absent.pt"):
            assert warn_overlap(weights, tmp_path) is None
            assert "not in the registry" in caplog.messages[-1]

    @pytest.mark.parametrize(
        "name, settings",
        [
            ("train", small(backbone_weights="WEIGHTS")),
            ("train", small(initial_weights="WEIGHTS")),
            ("evaluate", {"weights": "WEIGHTS", "section": "training"}),
        ],
    )
    def test_configs_warn(
        self,
        name: str,
        settings: dict[str, Any],
        own: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The lung bundle's train.json and evaluate.json, for weights that a hash in the registry names."""
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr("med3d_nets.initialise", lambda network, *_: network)  # the file holds no network
        data = write_dataset(tmp_path / "data", count=1)
        for case in ("images/phantom_003.nii.gz", "images/other.nii.gz"):
            entry = json.dumps({"training": [{"image": case, "label": "labels/chest0.nii.gz"}]})
            (data / "dataset.json").write_text(entry)
            caplog.clear()
            override = {key: str(own) if value == "WEIGHTS" else value for key, value in settings.items()}
            workflow = ConfigWorkflow(
                config(name), logging_file=False, workflow_type=None, dataset_dir=str(data), **override
            )
            workflow.initialize()
            warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "med3d" in r.name]
            assert len(warnings) == ("phantom" in case)
            assert all("own on " in text and "seen" in text and "phantom_003" in text for text in warnings)
