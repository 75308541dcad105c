"""RandMirrord and CheckLabeld."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from med3d_nets.errors import InputError
from med3d_nets.transforms import CheckLabeld, RandMirrord

AFFINE = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))


def scan() -> dict[str, MetaTensor]:
    """An image whose voxels are numbered, and labels 1 left, 2 right, 3 in the middle; x has 4 voxels."""
    label = torch.zeros(1, 4, 3, 2)
    label[:, 0], label[:, 3], label[:, 1, 0] = 1, 2, 3
    image = torch.arange(24.0).reshape(1, 4, 3, 2)
    return {
        "image": MetaTensor(image, affine=AFFINE, meta={"filename_or_obj": "ct.nii.gz"}),
        "label": MetaTensor(label, affine=AFFINE, meta={"filename_or_obj": "seg.nii.gz"}),
    }


def mirror(prob: float, **options: bool) -> RandMirrord:
    return RandMirrord(["image", "label"], ["label"], [(1, 2)], prob, **options)


def test_mirroring_swaps_sides_and_their_labels() -> None:
    before, after = scan(), mirror(1.0)(scan())
    assert torch.equal(after["image"], before["image"].flip(1))
    assert (after["label"][:, 0] == 1).all() and (after["label"][:, 3] == 2).all(), "left stays left"
    assert (after["label"][:, 2, 0] == 3).all() and (after["label"] == 3).sum() == 2, "unpaired labels move along"


def test_mirroring_twice_gives_the_same() -> None:
    twice = mirror(1.0)(mirror(1.0)(scan()))
    assert all(torch.equal(twice[key], value) for key, value in scan().items())


def test_never() -> None:
    after = mirror(0.0)(scan())
    assert all(torch.equal(after[key], value) for key, value in scan().items())


def test_metadata_and_input_are_kept() -> None:
    data = scan()
    after = mirror(1.0)(data)
    for key, value in scan().items():
        assert torch.equal(data[key], value), "the input is changed in place"
        assert torch.equal(after[key].affine, AFFINE)
        assert after[key].meta["filename_or_obj"] == value.meta["filename_or_obj"]
        assert after[key].dtype == value.dtype


def test_image_and_label_are_mirrored_together_as_often_as_asked() -> None:
    """Under a seed, as the training sets it, and the same again."""
    transform = Compose([mirror(0.3)])
    runs = []
    for _ in range(2):
        transform.set_random_state(seed=5)
        outcomes = [transform(scan()) for _ in range(200)]
        flipped = [bool(out["image"][0, 0, 0, 0] != 0) for out in outcomes]
        assert flipped == [bool(out["label"][0, 1, 0, 0] == 0) for out in outcomes]
        runs.append(flipped)
    assert runs[0] == runs[1]
    assert 35 <= sum(runs[0]) <= 85


def test_a_missing_label() -> None:
    image = {"image": scan()["image"]}
    assert list(mirror(1.0, allow_missing_keys=True)(image)) == ["image"]
    with pytest.raises(KeyError):
        mirror(1.0)(image)


def check(**changed: MetaTensor) -> dict[str, MetaTensor]:
    return CheckLabeld("label", "image", num_classes=4)({**scan(), **changed})  # type: ignore[return-value]


def test_a_good_label_passes_unchanged() -> None:
    assert all(torch.equal(out, value) for out, value in zip(check().values(), scan().values(), strict=True))


@pytest.mark.parametrize("value", [-1.0, 4.0, 1.5, float("nan")])
def test_values_that_are_no_class(value: float) -> None:
    label = scan()["label"]
    label[0, 2, 2, 1] = value
    with pytest.raises(InputError, match=r"^seg\.nii\.gz: label values \[.*\]; allowed are 0 to 3\. "):
        check(label=label)


def test_another_shape() -> None:
    label = scan()["label"][:, :, :, :1]
    with pytest.raises(InputError, match=r"^seg\.nii\.gz: .* shape \(4, 3, 1\) and \(4, 3, 2\), affines equal"):
        check(label=label)


@pytest.mark.parametrize("entry", [(0, 0), (1, 3)])
def test_another_affine(entry: tuple[int, int]) -> None:
    """Another spacing, another origin."""
    affine = AFFINE.clone()
    affine[entry] += 0.5
    label = MetaTensor(scan()["label"].as_tensor(), affine=affine, meta={"filename_or_obj": "seg.nii.gz"})
    with pytest.raises(InputError, match=r"^seg\.nii\.gz: .*affines different. Resample it"):
        check(label=label)


def test_rounding_of_an_affine_is_allowed() -> None:
    affine = AFFINE + torch.from_numpy(np.full((4, 4), 1e-4))
    assert check(label=MetaTensor(scan()["label"].as_tensor(), affine=affine))
