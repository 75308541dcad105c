"""The synthetic CT: what it holds is where it should be, has the HU that it should have, and is the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from med3d_nets.errors import InputError
from tools import phantom as module
from tools.liver_tissue import LIVER, PHASES, TUMOUR
from tools.phantom import Phantom, make, make_phantom, sample, save_phantom
from tools.phantom_lungs import DISEASES

COARSE = (6.0, 6.0, 6.0)


@pytest.fixture(scope="module")
def healthy() -> Phantom:
    """A healthy chest without noise."""
    return make_phantom(3, spacing=(4.0, 4.0, 4.0), pathology=None, noise=0.0)


def _volume_ml(phantom: Phantom, value: int) -> float:
    return float((phantom.label == value).sum() * abs(np.linalg.det(phantom.affine[:3, :3])) / 1000)


def test_types_and_grid(healthy: Phantom) -> None:
    assert healthy.image.dtype == np.float32
    assert healthy.label.dtype == np.uint8
    assert healthy.image.shape == healthy.label.shape == (90, 65, 75)
    assert nib.aff2axcodes(healthy.affine) == ("R", "A", "S")
    np.testing.assert_allclose(nib.affines.voxel_sizes(healthy.affine), 4.0)
    assert set(np.unique(healthy.label)) == {0, 1, 2}
    assert np.isfinite(healthy.image).all()


def test_same_seed_same_scan_other_seed_other_scan() -> None:
    first, again = (make_phantom(11, spacing=COARSE, region="random") for _ in range(2))
    other = make_phantom(12, spacing=COARSE, region="thorax")
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert first.info == again.info
    assert other.image.shape != first.image.shape or not np.array_equal(other.label, first.label)


@pytest.mark.parametrize("seed", range(6))
def test_left_lung_lies_left_and_volumes_are_those_of_people(seed: int) -> None:
    phantom = make_phantom(seed, size_mm=(420, 320, 380), spacing=COARSE, pathology=None)
    left, right = (np.argwhere(phantom.label == value).mean(axis=0) for value in (1, 2))
    assert (phantom.affine @ [*left, 1])[0] + 80 < (phantom.affine @ [*right, 1])[0]
    assert 600 < _volume_ml(phantom, 1) < 5500
    assert 700 < _volume_ml(phantom, 2) < 5500


def test_hu_of_lung_air_and_body(healthy: Phantom) -> None:
    inside = healthy.label > 0
    assert -960 < np.median(healthy.image[inside]) < -650
    assert np.median(healthy.image[:, -1, -1]) < -900  # air in front of the neck
    body = healthy.image[(healthy.image > -300) & ~inside]
    assert -110 < np.median(body) < 120
    assert healthy.image.max() > 300  # bone
    assert (healthy.image[inside] > -500).mean() < 0.25  # vessels and edges alone


def test_trachea_and_gas_of_the_gut_are_background() -> None:
    """Gas with the HU of lung, wrapped in the body, above and below the lungs."""
    found = {"trachea": False, "gut": False}
    for seed in range(3):
        phantom = make_phantom(seed, spacing=(4.0, 4.0, 4.0), region="chest_abdomen", pathology=None, noise=0.0)
        levels = np.flatnonzero((phantom.label > 0).any(axis=(0, 1)))
        gas = phantom.image < -600
        gas &= ndimage.binary_fill_holes(phantom.image > -300, structure=np.ones((3, 3, 1)))
        gas &= phantom.label == 0
        found["trachea"] |= bool(gas[30:60, 20:45, levels[-1] - 3].any())
        found["gut"] |= bool(gas[20:70, 20:50, : levels[0]].any())
    assert found == {"trachea": True, "gut": True}


def test_effusion_is_background() -> None:
    sick = make_phantom(21, spacing=(5.0, 5.0, 5.0), pathology="effusion", noise=0.0)
    assert sick.info["pathology"] == ["effusion"]
    healthy = make_phantom(21, spacing=(5.0, 5.0, 5.0), pathology=None, noise=0.0)
    lost = (healthy.label > 0) & (sick.label == 0)
    assert lost.sum() * 0.125 > 50  # mL
    assert -100 < np.median(sick.image[lost]) < 60
    at = [np.argwhere(mask)[:, 1].mean() for mask in (lost, sick.label > 0)]
    assert at[0] < at[1]  # the fluid lies at the back


@pytest.mark.parametrize("disease", sorted(set(DISEASES) - {"effusion"}))
def test_other_disease_changes_the_lung_and_not_the_label(disease: str) -> None:
    healthy, sick = (make_phantom(5, spacing=COARSE, pathology=p, noise=0.0) for p in (None, disease))
    np.testing.assert_array_equal(healthy.label, sick.label)
    inside = healthy.label > 0
    assert np.abs(healthy.image - sick.image)[inside].max() > 30


@pytest.mark.parametrize("seed", range(2))
def test_liver_is_labelled_beneath_the_right_lung(seed: int) -> None:
    """In the same patient: under the dome, on the right, of the HU of an organ, without gas, bone or fluid."""
    lungs, liver = (
        make_phantom(seed, spacing=(4.0, 4.0, 4.0), pathology=None, noise=0.0, organ=organ)
        for organ in ("lungs", "liver")
    )
    inside = liver.label > 0
    assert not (inside & (lungs.label > 0)).any()
    assert set(np.unique(liver.label)) <= {0, LIVER, TUMOUR} and liver.info["phase"] in PHASES
    assert 50 < inside.sum() * 0.064 < 2500  # mL
    middle, right = (np.argwhere(mask).mean(axis=0) for mask in (inside, lungs.label == 2))
    assert middle[2] < right[2] and middle[0] > liver.image.shape[0] / 2
    hu = liver.image[ndimage.binary_erosion(liver.label == LIVER)]
    assert np.percentile(hu, 1) > 0 and np.percentile(hu, 99) < 250
    assert np.ptp(np.percentile(hu, [25, 75])) < 40  # one organ, veins apart


@pytest.mark.parametrize("region", sorted(module.REGIONS))
def test_regions(region: str) -> None:
    phantom = make_phantom(2, spacing=COARSE, region=region)
    assert phantom.info["region"] == region
    assert phantom.image.shape == phantom.label.shape
    part = float((phantom.label > 0).mean())
    assert part < 0.06 if region == "abdomen" else part > 0.005


def test_thick_slices_keep_the_size_of_the_lung() -> None:
    thin = make_phantom(4, spacing=(5.0, 5.0, 4.0), pathology=None)
    thick = make_phantom(4, spacing=(5.0, 5.0, 8.0), pathology=None)
    assert thick.image.shape == (72, 52, 38)
    for value in (1, 2):
        assert 0.5 < _volume_ml(thick, value) / _volume_ml(thin, value) < 2


def test_nothing_outside_the_reconstructed_circle_is_lung() -> None:
    circles = 0
    for seed in range(8):
        phantom = make_phantom(seed, spacing=(8.0, 8.0, 8.0), region="crop", pathology=None)
        padded = phantom.image < -1500
        circles += padded.any()
        assert phantom.label[padded].sum() == 0
    assert circles > 0


def test_files(tmp_path: Path) -> None:
    phantom = make_phantom(1, spacing=COARSE)
    save_phantom(phantom, tmp_path / "a" / "image.nii.gz", tmp_path / "a" / "label.nii.gz")
    image, label = (nib.load(tmp_path / "a" / f"{name}.nii.gz") for name in ("image", "label"))
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    for picture in (image, label):
        np.testing.assert_allclose(picture.affine, phantom.affine, atol=1e-4)
        assert picture.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.get_fdata(), phantom.image, atol=0.51)
    np.testing.assert_array_equal(np.asarray(label.dataobj), phantom.label)
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["image.nii.gz", "label.nii.gz"]


def test_make_writes_a_decathlon_folder(tmp_path: Path) -> None:
    make(str(tmp_path), count=2, seed=8, spacing=COARSE)
    index = json.loads((tmp_path / "dataset.json").read_text())
    assert index["labels"] == {"0": "background", "1": "left lung", "2": "right lung"}
    assert index["numTraining"] == len(index["training"]) == 2
    for item in index["training"]:
        assert nib.load(tmp_path / item["image"]).shape == nib.load(tmp_path / item["label"]).shape
    assert index["training"][1]["image"] == "./imagesTr/phantom_0001.nii.gz"


def test_sample_is_one_chest(tmp_path: Path) -> None:
    sample(str(tmp_path / "chest.nii.gz"), spacing=COARSE, label=str(tmp_path / "lungs.nii.gz"))
    label = np.asarray(nib.load(tmp_path / "lungs.nii.gz").dataobj)
    assert nib.load(tmp_path / "chest.nii.gz").shape == label.shape
    assert not label[:, :, -1].any()
    assert label[:, :, label.shape[2] // 2].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"region": "knee"}, "knee.*thorax"),
        ({"pathology": "flu"}, "flu.*effusion"),
        ({"spacing": (1, 0, 1)}, "spacing.*positive"),
        ({"spacing": 4}, "spacing is 4; give three positive numbers"),
        ({"size_mm": (100, 100)}, "size_mm.*three"),
        ({"organ": "heart"}, "heart.*'lungs' or 'liver'"),
    ],
)
def test_wrong_arguments(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_phantom(0, **wrong)
