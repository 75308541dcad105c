"""Scans made from a label map, and the training folder of the liver bundles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3d_nets.errors import InputError
from tools import liver_data
from tools.liver_tissue import LIVER, PHASES, TUMOUR
from tools.organ_scans import ORGANS, Anatomy, make_scan

SPACING = np.array([6.0, 6.0, 6.0])
SHAPE = (44, 36, 40)


def make_anatomy() -> Anatomy:
    """A body of fat with a liver on the right, a spleen on the left and a spine; nothing of the liver is cut off."""
    grid = np.indices(SHAPE).astype(float)

    def ball(*centre: float, radius: float) -> np.ndarray:
        return np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True))) < radius

    image = np.full(SHAPE, -1000, dtype=np.float32)
    labels = np.zeros(SHAPE, dtype=int)
    image[4:40, 4:32] = -100
    for value, hu, where in ((5, 60, ball(28, 20, 22, radius=8)), (1, 50, ball(12, 18, 22, radius=5))):
        image[where], labels[where] = hu, value
    image[20:24, 6:11], labels[20:24, 6:11] = 300, 30
    image += np.random.default_rng(0).normal(0, 10, SHAPE).astype(np.float32)
    return Anatomy(image, labels, SPACING)


ANATOMY = make_anatomy()


def test_a_seed_is_a_scan() -> None:
    one, same, other = (make_scan(ANATOMY, seed, 4.0) for seed in (3, 3, 4))
    assert np.array_equal(one.image, same.image) and np.array_equal(one.label, same.label) and one.info == same.info
    assert one.image.shape != other.image.shape or not np.allclose(one.image, other.image)


@pytest.mark.parametrize("seed", range(6))
def test_the_label_is_where_the_liver_is(seed: int) -> None:
    """On the patient's right, of a plausible size, with the HU of the phase, the tissue around it being fat."""
    scan = make_scan(ANATOMY, seed, 4.0)
    assert scan.image.dtype == np.float32 and scan.label.dtype == np.uint8 and scan.image.shape == scan.label.shape
    assert np.allclose(nib.affines.voxel_sizes(scan.affine)[:2], 4.0)
    liver = scan.label == LIVER
    litres = (scan.label > 0).sum() * abs(np.linalg.det(scan.affine[:3, :3])) / 1e6
    whole = (ANATOMY.labels == 5).sum() * SPACING.prod() / 1e6
    assert 0.1 * whole < litres < 2 * whole
    assert nib.affines.apply_affine(scan.affine, np.argwhere(liver).mean(axis=0))[0] > 0
    mean, deviation = ORGANS["liver"].hu[PHASES.index(scan.info["phase"])]
    assert abs(np.median(scan.image[liver]) - mean) < 4 * deviation + 50  # 50: a fatty liver
    if not scan.info["lesions"]:
        bright = scan.image > (np.median(scan.image[liver]) - 100) / 2
        inside = liver & bright
        assert inside.sum() > 0.9 * liver.sum()


def test_lesions() -> None:
    """Some scans have tumours; they lie in the liver, and in the portal venous phase they are mostly darker."""
    darker = []
    for seed in range(24):
        scan = make_scan(ANATOMY, seed, 6.0)
        assert set(np.unique(scan.label)) <= {0, LIVER, TUMOUR}
        if not scan.info["lesions"]:
            assert not (scan.label == TUMOUR).any()
        elif scan.info["phase"] == "portal venous" and (scan.label == TUMOUR).sum() > 20:
            darker.append(np.median(scan.image[scan.label == TUMOUR]) < np.median(scan.image[scan.label == LIVER]))
    assert len(darker) >= 3 and np.mean(darker) > 0.5


def test_all_phases_are_drawn() -> None:
    assert {make_scan(ANATOMY, seed, 12.0).info["phase"] for seed in range(12)} == set(PHASES)


def test_wrong_maps() -> None:
    with pytest.raises(InputError, match=re.escape("The image has (44, 36, 40) voxels and its labels (44, 36, 39)")):
        Anatomy(ANATOMY.image, ANATOMY.labels[:, :, :-1], SPACING)
    with pytest.raises(InputError, match="no liver: the number 5 of TotalSegmentator"):
        Anatomy(ANATOMY.image, np.zeros(SHAPE, dtype=int), SPACING)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Folders like the real ones: two scans with a liver, one of them the held-out one, and a label map."""
    for folder, names in (("liver_ct", ("totalseg_abdomen", "totalseg_dicom")), ("abdomen_organs_ct", ("abdomen",))):
        entries = []
        for name in names:
            entry = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
            labels = ANATOMY.labels if folder == "abdomen_organs_ct" else 3 * (ANATOMY.labels == 5)
            for path, voxels in zip(entry.values(), (ANATOMY.image, labels), strict=True):
                (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([*SPACING, 1])), tmp_path / folder / path)
            entries.append(entry)
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"training": entries}))
    return tmp_path


class TestFolder:
    def test_real_and_made(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        liver_data.make(str(source), str(out), count=3, chests=1, spacing=8.0)
        index = json.loads((out / "dataset.json").read_text())
        names = [Path(entry["image"]).name[:-7] for entry in index["training"]]
        assert names == ["totalseg_abdomen", "made_0000", "made_0001", "made_0002", "chest_0000"]
        assert [Path(entry["image"]).name for entry in index["test"]] == ["totalseg_dicom.nii.gz"]
        assert {entry.get("patient") for entry in index["training"][1:]} == {"abdomen", None}
        for entry in (*index["training"], *index["test"]):
            image, label = (nib.load(out / entry[key]) for key in ("image", "label"))
            assert np.array_equal(image.affine, label.affine) and image.shape == label.shape
            assert set(np.unique(np.asarray(label.dataobj))) <= {0, 1, 2}
        real = np.asarray(nib.load(out / index["training"][0]["label"]).dataobj)
        assert np.array_equal(real > 0, ANATOMY.labels == 5)

    def test_what_is_there_is_kept(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        liver_data.make(str(source), str(out), count=1, chests=1, spacing=8.0)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
        liver_data.make(
            str(source), str(out), count=2, chests=1, spacing=8.0, real="false"
        )  # as a command line gives it
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        assert len(json.loads((out / "dataset.json").read_text())["training"]) == 3

    def test_nothing_to_train_on(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="Nothing to train on"):
            liver_data.make(str(source), str(tmp_path / "out"), count=0, chests=0, real=False)
        for wrong in ({"count": -1}, {"chests": -1}, {"spacing": 0.0}):
            with pytest.raises(InputError, match=re.escape("{}={}".format(*next(iter(wrong.items()))))):
                liver_data.make(str(source), str(tmp_path / "out"), **wrong)


@pytest.mark.real_data
def test_of_the_real_map(real_data: Path) -> None:
    paths = [real_data / "abdomen_organs_ct" / part / "totalseg_abdomen.nii.gz" for part in ("imagesTr", "labelsTr")]
    image, labels = (nib.as_closest_canonical(nib.load(path)) for path in paths)
    zooms = np.array(image.header.get_zooms()[:3], dtype=float)
    anatomy = Anatomy(np.asarray(image.dataobj, dtype=np.float32), np.asarray(labels.dataobj).astype(int), zooms)
    for seed in range(4):
        scan = make_scan(anatomy, seed, 3.0)
        litres = (scan.label > 0).sum() * abs(np.linalg.det(scan.affine[:3, :3])) / 1e6
        assert 0.1 < litres < 2.5
