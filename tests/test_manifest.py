"""Manifests and fingerprints: what they say, and every fault named before a training starts."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from med3d_nets import InputError, fingerprints, read_manifest
from med3d_nets.fingerprint import table
from tests.small_domains import write_domain, write_manifest


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    write_manifest(folder)
    return folder


@pytest.fixture
def data(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "data"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_fingerprint(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = read_manifest(source / "manifest.json")
    found = fingerprints(domains, tmp_path)
    assert found["balls"]["spacing_mm"] == [1.0, 1.0, 2.0] and found["balls"]["size_voxels"] == [32, 28, 20]
    assert list(found["boxes"]["class_volume_ml"]) == ["near", "far"] and found["boxes"]["class_cases"]["far"] == 5
    label = np.asarray(nib.load(source / "balls" / "labelsTr" / "case0.nii.gz").dataobj)
    volumes = [
        float((np.asarray(nib.load(path).dataobj) == 1).sum()) * 2 / 1000
        for path in sorted((source / "balls" / "labelsTr").iterdir())
    ]
    assert label.any() and found["balls"]["class_volume_ml"]["ball"] == pytest.approx(np.median(volumes), abs=1e-4)
    assert table(found) in capsys.readouterr().out


def test_spacing_is_told_along_the_patient(tmp_path: Path) -> None:
    """The axes of the file may be in any order."""
    folder = write_domain(tmp_path / "d", 2)
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        turned = nib.as_closest_canonical(image).as_reoriented([[2, 1], [0, 1], [1, -1]])
        voxels = np.asarray(turned.dataobj)
        nib.save(nib.Nifti1Image(voxels, turned.affine), path)
    [found] = fingerprints(read_manifest(write_manifest(tmp_path, {"name": "d"})), tmp_path / "f", quiet=True).values()
    assert found["spacing_mm"] == [1.0, 1.0, 2.0]


def test_what_was_measured_is_read_again_until_a_file_changes(data: Path, tmp_path: Path) -> None:
    domains = read_manifest(data / "manifest.json")
    fingerprints(domains, tmp_path, quiet=True)
    cached = tmp_path / "balls.json"
    edit(cached, cases=99)
    assert fingerprints(domains, tmp_path, quiet=True)["balls"]["cases"] == 99
    image = data / "balls" / "imagesTr" / "case0.nii.gz"
    os.utime(image, (1, 1))
    assert fingerprints(domains, tmp_path, quiet=True)["balls"]["cases"] == 4


def test_classes_are_kept_merged_and_ignored(data: Path) -> None:
    path = write_manifest(data, {"name": "boxes", "classes": {"box": [1, 2]}})
    [domain] = read_manifest(path)
    assert dict(domain.classes) == {"box": (1, 2)} and domain.num_classes == 2
    path = write_manifest(data, {"name": "boxes", "classes": {"far": 2}, "ignore": [1]})
    [domain] = read_manifest(path)
    assert dict(domain.classes) == {"far": (2,)} and domain.ignore == (1,)


def test_cases_of_one_patient_stay_together(data: Path) -> None:
    path = write_manifest(data, {"name": "balls", "same_patient": [["case1", "case0"]], "hold_out": ["case1"]})
    [domain] = read_manifest(path)
    assert [case["case"] for case in domain.held_out_cases()] == ["case0", "case1"]


def test_a_domain_is_left_out(data: Path) -> None:
    assert [domain.name for domain in read_manifest(data / "manifest.json", leave_out="balls")] == ["boxes"]
    assert [domain.name for domain in read_manifest(data / "manifest.json", leave_out=["balls"])] == ["boxes"]
    with pytest.raises(InputError, match="leaves no domain"):
        read_manifest(data / "manifest.json", leave_out="balls, boxes")
    with pytest.raises(InputError, match="leave_out names 'ball', which is no domain of it"):
        read_manifest(data / "manifest.json", leave_out="ball")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "balls"}, {"name": "balls"}], "the name 'balls' is given 2 times"),
        ([{"name": "nowhere"}], "nowhere: no dataset.json in it"),
        ([{"name": "boxes", "classes": {"far": 2}}], r"domain boxes: the label 1 \(near\) of .* is in none of"),
        ([{"name": "boxes", "classes": {"a": 1, "b": [1, 2]}}], r"the values \[1\] have more than one meaning"),
        ([{"name": "boxes", "classes": {"a": [0, 1, 2]}}], "0 is background and no class"),
        ([{"name": "boxes", "classes": {"a": "x"}}], "label values 'x': needed is an integer"),
        ([{"name": "boxes", "clases": {}}], "domain boxes: unknown keys clases; allowed are"),
        ([{"name": "a.b"}], "domain 'a.b': a name starts with a letter"),
        ([{"name": "balls", "weight": 0}], "weight=0; needed is a number above 0"),
        ([{"name": "train"}], "domain 'train': torch keeps this name for itself"),
        ([{"name": "balls", "hold_out": ["case9"]}], r"domain balls: hold_out \['case9'\] are not in the data"),
        (
            [{"name": "balls", "hold_out": [f"case{i}" for i in range(4)]}],
            r"domain balls: hold_out=.* leaves no patient",
        ),
        ([{"name": "balls", "hold_out": "many"}], "domain balls: hold_out='many'"),
        ([{"name": "balls", "hold_out": 1}], "domain balls: hold_out=1; needed is a share, 0 to below 1"),
        ([{"name": "balls", "same_patient": [["case0", "case9"]]}], "same_patient: case9 is no case"),
        ([{"name": "balls", "same_patient": [["case0", "case1"], ["case1"]]}], "same_patient: case1 comes 2 times"),
        ([{"name": "balls", "same_patient": ["case0"]}], "needed are lists of cases"),
    ],
)
def test_faults_of_a_manifest(data: Path, entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_manifest(write_manifest(data, *entries))


def test_all_faults_of_a_manifest_are_told(data: Path) -> None:
    path = write_manifest(data, {"name": "nowhere"}, {"name": "boxes", "weight": -1}, {"name": "balls"})
    with pytest.raises(InputError) as told:
        read_manifest(path)
    assert "nowhere" in str(told.value) and "weight=-1" in str(told.value)


def test_a_domain_of_one_case(data: Path) -> None:
    index = data / "balls" / "dataset.json"
    edit(index, training=json.loads(index.read_text())["training"][:1])
    with pytest.raises(InputError, match=r"domain balls: .*balls has one case; at least 2 are needed"):
        read_manifest(data / "manifest.json")


def test_a_folder_of_lits(data: Path) -> None:
    """It has no ``dataset.json``, so that the manifest tells the classes."""
    for kind, folder in (("volume", "imagesTr"), ("segmentation", "labelsTr")):
        for number in (0, 1):
            source = data / "balls" / folder / f"case{number}.nii.gz"
            (data / "lits").mkdir(exist_ok=True)
            shutil.copy(source, data / "lits" / f"{kind}-{number}.nii.gz")
    [domain] = read_manifest(write_manifest(data, {"name": "lits", "classes": {"ball": 1}}))
    assert len(domain.cases) == 2 and domain.modality == "unknown"
    with pytest.raises(InputError, match="domain lits: no class, neither in the manifest nor"):
        read_manifest(write_manifest(data, {"name": "lits"}))


@pytest.mark.parametrize("labels", [{"background": 0, "ball": 1}, ["background", "ball"]])
def test_labels_of_another_layout(data: Path, labels: Any) -> None:
    edit(data / "balls" / "dataset.json", labels=labels)
    with pytest.raises(InputError, match=r"domain balls: .*dataset.json: labels are .* needed are names by value"):
        read_manifest(data / "manifest.json")


def test_modality_as_text(data: Path) -> None:
    edit(data / "balls" / "dataset.json", modality="CT")
    assert {domain.name: domain.modality for domain in read_manifest(data / "manifest.json")}["balls"] == "CT"


def test_no_manifest_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such manifest"):
        read_manifest(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_manifest(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text('{"domains": {}}')
    with pytest.raises(InputError, match="needed is"):
        read_manifest(tmp_path / "manifest.json")


def rewrite(path: Path, voxels: np.ndarray | None = None, affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    voxels = np.asarray(image.dataobj) if voxels is None else voxels
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), path)


def test_all_faulty_files_are_named_with_their_reason(data: Path, tmp_path: Path) -> None:
    labels = data / "balls" / "labelsTr"
    shape = nib.load(labels / "case0.nii.gz").shape
    rewrite(labels / "case0.nii.gz", np.zeros(shape, np.uint8))
    rewrite(labels / "case1.nii.gz", np.full(shape, 7, np.uint8))
    rewrite(labels / "case2.nii.gz", affine=np.diag([1.0, 1.0, 1.0, 1.0]))
    broken = data / "boxes" / "imagesTr" / "case3.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError) as told:
        fingerprints(read_manifest(data / "manifest.json"), tmp_path, quiet=True)
    text = str(told.value)
    for name, reason in (
        ("balls: .*case0", "all is background"),
        ("balls: .*case1", r"label values \[7.0\]; allowed are 0 to 1"),
        ("balls: .*case2", "the label's grid differs from its image's"),
        ("boxes: .*case3", "cannot be read"),
    ):
        assert re.search(f"{name}.*{reason}", text), (name, text)
    assert not (tmp_path / "balls.json").exists()


def test_empty_cases_may_be_allowed(data: Path, tmp_path: Path) -> None:
    label = data / "balls" / "labelsTr" / "case0.nii.gz"
    rewrite(label, np.zeros(nib.load(label).shape, np.uint8))
    path = write_manifest(data, {"name": "balls", "allow_empty": True})
    [found] = fingerprints(read_manifest(path), tmp_path, quiet=True).values()
    assert found["class_cases"] == {"ball": 3}
