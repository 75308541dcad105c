"""CT in Hounsfield units passes, everything else is refused with the values found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from med3d_nets.errors import InputError
from med3d_nets.inputs import CheckCTd, LoadVolumed, find_cases

SHAPE = (16, 12, 5)


def ct(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Air, lung, fat, soft tissue and bone with noise, in HU."""
    rng = np.random.default_rng(0)
    tissues = rng.choice([-1000, -850, -100, 40, 300], size=shape, p=[0.3, 0.25, 0.1, 0.3, 0.05])
    return (tissues + rng.normal(0, 12, shape)).astype(np.int16)


def padded(value: int) -> np.ndarray:
    data = ct((32, 32, 8))
    data[:6], data[-6:] = value, value
    return data


def mri() -> np.ndarray:
    """Bright head on noise, with the undershoot of a cubic interpolation at its edge."""
    rng = np.random.default_rng(1)
    data = np.abs(rng.normal(0, 10, (32, 32, 8)))
    data[8:24, 8:24] = rng.normal(800, 200, (16, 16, 8))
    data[7, 8:12, 0] = -150
    return data


def plain(*tissues: tuple[float, float]) -> np.ndarray:
    """Values in the given parts, without noise."""
    return np.concatenate([np.full(int(1000 * part), value) for value, part in tissues])[None]


CT = {
    "chest": ct(),
    "one slice": ct((32, 32, 1)),
    "float": ct().astype(np.float64) + 0.25,
    "padded -2048": padded(-2048),
    "padded -3024": padded(-3024),
    "clipped": ct().clip(-1000, 400),
    "metal": np.where(ct() > 310, 31743, ct()),
    "abdomen without air": plain((-100, 0.1), (40, 0.6), (110, 0.2), (300, 0.1)),
    "mostly air": plain((-1000, 0.97), (40, 0.03)),
    "lung alone": plain((-850, 0.9), (-520, 0.1)),
}
NOT_CT = {
    "constant": np.full(SHAPE, -1000),
    "0-255": (np.clip(ct(), -1000, 500) + 1000) * 0.17,
    "0-1": (ct().clip(-1000, 500) + 1000) / 1500,
    "-1-1": ct().clip(-1000, 1000) / 1000,
    "stored values": ct().clip(-1024) + 1024,
    "stored values with noise in air": ct((32, 32, 32)) + 1000 + np.random.default_rng(2).normal(0, 40, (32,) * 3),
    "padded stored values": np.where(padded(-2000) > -1900, padded(-2000) + 1024, -2000),
    "MRI": mri(),
    "z-scored MRI": (mri() - mri().mean()) / mri().std(),
    "mask": (ct() > 0).astype(np.uint8),
    "beyond 16 bit": ct().astype(np.float64) * 100,
    "air alone": plain((-1000, 0.5), (-980, 0.5)),
}


@pytest.mark.parametrize("name", CT)
def test_ct_is_accepted_unchanged(name: str) -> None:
    image = MetaTensor(torch.as_tensor(CT[name].astype(np.float32))[None], affine=torch.eye(4))
    assert CheckCTd("image")({"image": image})["image"] is image


@pytest.mark.parametrize("name", NOT_CT)
def test_other_images_are_refused(name: str) -> None:
    data = NOT_CT[name].astype(np.float32)
    image = MetaTensor(torch.as_tensor(data)[None], meta={"filename_or_obj": "x"})
    with pytest.raises(InputError, match="x: is not CT in Hounsfield units") as caught:
        CheckCTd("image")({"image": image})
    assert f"{data.max():g}" in str(caught.value)


def test_missing_key_follows_the_flag() -> None:
    assert CheckCTd("image", allow_missing_keys=True)({"other": 1}) == {"other": 1}
    with pytest.raises(KeyError):
        CheckCTd("image")({"other": 1})


@pytest.mark.real_data
@pytest.mark.parametrize(
    "folder",
    ["chest_ct_dicom/series", "lung_ct/imagesTr", "unlabelled_ct", "liver_ct/imagesTr", "abdomen_organs_ct/imagesTr"],
)
def test_real_ct_is_accepted(folder: str, real_data: Path) -> None:
    for case in find_cases(real_data / folder):
        CheckCTd("image")(LoadVolumed("image")(case))


@pytest.mark.real_data
@pytest.mark.parametrize(
    "folder", ["brain_tumour_mr", "ms_lesion_mr/imagesTr", "spinal_cord_mr/imagesTr", "prostate_us/imagesTr"]
)
def test_real_mri_and_ultrasound_are_refused(folder: str, real_data: Path) -> None:
    for case in find_cases(real_data / folder):
        with pytest.raises(InputError, match="is not CT"):
            CheckCTd("image")(LoadVolumed("image")(case))
