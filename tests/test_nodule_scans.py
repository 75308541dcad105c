"""Scans with known nodules: where they are put, what they look like there, and that held-out ones stay out."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from med3d_nets import CheckPointsd, InputError, LoadVolumed, read_luna
from tools.lung_labels import LEFT, RIGHT
from tools.nodule_crops import Crop, Nodule, insert, read_crops, read_nodule
from tools.nodule_places import APART_MM, OFF_MEDIASTINUM_MM, Places, mediastinum
from tools.nodule_scans import MASS_MM, Host, _write


@pytest.fixture
def crop(tmp_path: Path) -> Crop:
    """A nodule of 10 mm and 40 HU in lung, cut tightly along z as LIDC's crops are."""
    x, y, z = np.indices((44, 44, 4))
    inside = ((x - 21) * 0.7) ** 2 + ((y - 22) * 0.7) ** 2 + ((z - 1.5) * 2.5) ** 2 <= 25
    for name, voxels in (("image", np.where(inside, 40, -850)), ("label", inside)):
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.diag([-0.7, -0.7, 2.5, 1])), tmp_path / f"{name}.nii.gz")
    return Crop("one", "patient", str(tmp_path / "image.nii.gz"), str(tmp_path / "label.nii.gz"), 10.0)


def lungs() -> NDArray[np.uint8]:
    """Left and right lung, voxels of 3 mm, the mediastinum between them."""
    label = np.zeros((80, 50, 50), np.uint8)
    label[5:32, 5:45, 5:45] = LEFT
    label[48:75, 5:45, 5:45] = RIGHT
    return label


class TestInsert:
    def test_it_lies_where_it_was_put(self, crop: Crop) -> None:
        hu = np.full((60, 60, 40), -850, np.float32)
        nodule = read_nodule(crop, np.random.default_rng(0))
        insert(hu, (1.0, 1.0, 1.5), np.array([30, 25, 20]), nodule)
        bright = np.argwhere(hu > -400)
        np.testing.assert_allclose(bright.mean(axis=0), [30, 25, 20], atol=1.0)
        extent = np.ptp(bright, axis=0) * [1, 1, 1.5]
        assert (np.abs(extent - 10) <= 3).all()
        assert hu.max() == pytest.approx(40, abs=30)

    def test_the_border_blends(self, crop: Crop) -> None:
        """The host is untouched beyond the border, and between it and the nodule there is no step of the crop's air."""
        hu = np.full((60, 60, 40), -600, np.float32)
        insert(hu, (1.0, 1.0, 1.0), np.array([30, 30, 20]), read_nodule(crop, np.random.default_rng(0)))
        x, y, z = np.indices(hu.shape)
        away = np.sqrt((x - 30) ** 2 + (y - 30) ** 2 + (z - 20) ** 2)
        assert (hu[away > 11] == -600).all()
        assert hu[(away > 6) & (away < 11)].min() >= -855

    def test_at_the_volumes_end(self) -> None:
        ball = np.ones((9, 9, 9), np.float32)
        hu = np.zeros((10, 10, 10), np.float32)
        insert(hu, (1.0, 1.0, 1.0), np.array([0, 9, 5]), Nodule(ball * 50, ball, ball > 0, 9.0))
        assert hu[0, 9, 5] == pytest.approx(50)


class TestPlaces:
    def test_inside_a_lung_off_the_mediastinum_and_apart(self) -> None:
        label = lungs()
        places = Places(np.full(label.shape, -850, np.float32), label, (3.0, 3.0, 3.0))
        between = np.argwhere(mediastinum(label))
        assert between[:, 0].min() == 32 and between[:, 0].max() == 47
        rng, taken = np.random.default_rng(0), []
        for _ in range(12):
            voxel = places.draw(6.0, taken, rng)
            assert voxel is not None
            assert label[tuple(voxel)]
            assert np.linalg.norm((between - voxel) * 3, axis=1).min() >= 6 + OFF_MEDIASTINUM_MM
            assert all(np.linalg.norm((voxel - other) * 3) >= 12 + APART_MM for other, _ in taken)
            taken.append((voxel.astype(float), 6.0))

    def test_no_room(self) -> None:
        label = np.zeros((20, 20, 20), np.uint8)
        places = Places(np.zeros(label.shape, np.float32), label, (3.0, 3.0, 3.0))
        assert places.draw(5.0, [], np.random.default_rng(0)) is None


class TestFolder:
    def test_is_read_as_luna16_and_every_point_is_on_its_nodule(self, crop: Crop, tmp_path: Path) -> None:
        label = lungs()
        affine = np.diag([3.0, 3.0, 3.0, 1.0])
        affine[:3, 3] = [-100, 40, 7]
        air = np.where(label > 0, -850, 30).astype(np.float32)
        tumour = [("", 1.0, 2.0, 60.0, 30.0)]
        hosts = [Host("chest", lambda: (air, label, affine, tumour), 2)]
        _write(tmp_path / "train", hosts, [crop], np.random.default_rng(0))
        cases = read_luna(tmp_path / "train")
        assert [case["case"] for case in cases] == ["chest_0", "chest_1"]
        for case in cases:
            assert case["excluded"] == [[-1.0, -2.0, 60.0, 30.0]]
            image = CheckPointsd("image")(LoadVolumed("image")(case))["image"]
            assert case["points"]
            for x, y, z, diameter in case["points"]:
                voxel = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), [x, y, z])).astype(int)
                assert image[(0, *voxel)] > -300 and diameter == 10.0

    def test_a_mass_stays_inside_its_lung(self, crop: Crop, tmp_path: Path) -> None:
        label = lungs()
        affine = np.diag([3.0, 3.0, 3.0, 1.0])
        air = np.where(label > 0, -850, 30).astype(np.float32)
        hosts = [Host("chest", lambda: (air, label, affine, []), 1)]
        large = Crop(crop.name, crop.patient, crop.image, crop.label, 14.0)
        _write(tmp_path / "train", hosts, [large], np.random.default_rng(0), np.random.default_rng(1))
        (case,) = read_luna(tmp_path / "train")
        masses = [point for point in case["points"] if point[3] >= MASS_MM[0]]
        assert len(masses) == 1 and masses[0][3] <= MASS_MM[1]
        _write(tmp_path / "without", hosts, [large], np.random.default_rng(0))
        hu, without = (np.asarray(nib.load(tmp_path / name / "chest.nii.gz").dataobj) for name in ("train", "without"))
        assert label[hu != without].all()
        voxel = np.rint(np.array(masses[0][:3]) / 3).astype(int)
        assert hu[tuple(voxel)] > -300 and label[tuple(voxel)]


def test_without_the_crops(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metadata.csv not found"):
        read_crops(tmp_path)


@pytest.mark.real_data
def test_held_out_patients_stay_out(real_data: Path) -> None:
    """The test's nodules are of the patients that no training of this project has seen."""
    train, test = read_crops(real_data)
    assert len(train) > 500 and len(test) > 100
    assert not {one.patient for one in train} & {one.patient for one in test}
