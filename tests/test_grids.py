"""One step onto the network's grid and one back give what MONAI's chains of transforms give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    Invertd,
    KeepLargestConnectedComponentd,
    Orientationd,
    Spacingd,
)
from scipy.ndimage import binary_fill_holes, gaussian_filter

from med3d_nets import CleanLabelsd, NativeLabelsd, ResampleRASd, grids
from med3d_nets.grids import axis_map, map_between, onto_grid

ORIENTATIONS = ("RAS", "LPS", "PIR", "SAL", "ILA")


def scan(
    orientation: str, spacing: Sequence[float], shape: Sequence[int], turn: float = 0.0, order: str = "C"
) -> MetaTensor:
    """Smooth random values whose axes are oriented and turned by an angle about two axes, in radians."""
    values = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 1.5) * 1000
    axes = nib.orientations.axcodes2ornt(orientation)
    affine = nib.orientations.inv_ornt_aff(axes, shape) @ np.diag([*spacing, 1.0])
    rotation = np.eye(4)
    rotation[:3, :3] = nib.eulerangles.euler2mat(turn, turn / 2, 0)
    affine = rotation @ affine
    affine[:3, 3] += (-30.0, 12.5, 7.0)
    meta = {"original_affine": affine, "spatial_shape": shape, "filename_or_obj": "scan.nii", "space": "RAS"}
    voxels = torch.from_numpy(np.asarray(values, dtype=np.float32, order=order))  # type: ignore[call-overload]
    return MetaTensor(voxels[None], affine=torch.from_numpy(affine), meta=meta)


CASES = [
    (one, (0.9, 0.7, 2.5), (30, 41, 17), turn, order) for one in ORIENTATIONS for turn, order in ((0, "F"), (0.3, "C"))
]
CASES += [("RAS", (2.0, 2.0, 2.0), (20, 20, 20), 0.0, "F"), ("LAS", (0.6, 0.6, 8.0), (40, 30, 1), 0.1, "F")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("spacing, softmax", [((2.0, 2.0, 2.0), False), ((0.8, 1.3, 1.0), True)], ids=str)
def test_there_and_back(case: tuple[Any, ...], spacing: tuple[float, ...], softmax: bool) -> None:
    image = scan(*case)
    slow = Compose([Orientationd("image", axcodes="RAS", labels=None), Spacingd("image", spacing, mode="bilinear")])
    theirs = slow({"image": image.clone()})
    ours = ResampleRASd("image", spacing)({"image": image})
    assert ours["image"].shape == theirs["image"].shape
    np.testing.assert_allclose(ours["image"].affine, theirs["image"].affine, atol=1e-9)
    torch.testing.assert_close(ours["image"].as_tensor(), theirs["image"].as_tensor(), rtol=0, atol=2e-3)

    noise = np.random.default_rng(1).standard_normal((4, *theirs["image"].shape[1:])).astype(np.float32)
    logits = torch.from_numpy(gaussian_filter(noise, (0, 1, 1, 1)) * 10)
    theirs["pred"] = MetaTensor(logits, meta=theirs["image"].meta)
    theirs = Activationsd("pred", softmax=softmax)(theirs)
    back = Invertd("pred", slow, orig_keys="image", nearest_interp=False, to_tensor=True)(theirs)
    labels = AsDiscreted("pred", argmax=True)(back)["pred"]
    found = NativeLabelsd("pred", probabilities=True, softmax=softmax)({**ours, "pred": logits})
    assert found["pred"].dtype == torch.uint8 and found["pred"].shape == image.shape
    assert torch.equal(found["pred"].affine, image.affine)
    top = back["pred"].as_tensor().topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(found["pred"].as_tensor()[0][clear], labels.as_tensor()[0][clear].to(torch.uint8))
    soft = back["pred"].as_tensor()
    soft = soft if softmax else soft.softmax(dim=0)
    torch.testing.assert_close(found["pred_probabilities"].as_tensor().float(), soft, rtol=0, atol=1e-3)


def test_axes_that_are_not_parallel() -> None:
    """Turned against each other, each voxel is interpolated on its own; a linear function is kept exactly."""
    source, target = scan("RAS", (1, 1, 1), (24, 24, 24)), scan("LPS", (1.2, 0.8, 1.0), (9, 8, 7), turn=0.2)
    matrix = map_between(np.asarray(source.affine), np.asarray(target.affine), target.shape[1:])
    assert axis_map(matrix) is None
    index = np.stack(np.meshgrid(*map(np.arange, source.shape[1:]), indexing="ij"), axis=-1)
    places = np.stack(np.meshgrid(*map(np.arange, target.shape[1:]), indexing="ij"), axis=-1) @ matrix[:3, :3].T
    places = np.clip(places + matrix[:3, 3], 0, 23)
    values = torch.from_numpy((index @ [1.0, 2.0, -3.0]).astype(np.float32))[None]
    found = onto_grid(values, matrix, target.shape[1:])
    np.testing.assert_allclose(found[0], places @ [1.0, 2.0, -3.0], atol=1e-3)


def test_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop of a larger tensor is not contiguous, in either order of its axes; over several slabs and blocks."""
    monkeypatch.setattr(grids, "_SLAB", 5000)
    monkeypatch.setattr(grids, "_BLOCK", 7)
    image = scan("PIR", (0.9, 0.7, 2.5), (30, 41, 17), order="F")
    matrix = map_between(
        np.asarray(image.affine), np.asarray(scan("RAS", (1, 1, 1), (25, 33, 40)).affine), (25, 33, 40)
    )
    whole = image.as_tensor().repeat(3, 1, 1, 1) * torch.tensor([1.0, -2.0, 3.0]).reshape(3, 1, 1, 1)
    large = torch.nn.functional.pad(whole, [4, 3, 2, 1, 5, 6], value=1e6)
    for turned in (large, large.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)):
        crop = turned[:, 5:35, 2:43, 4:21]
        found, wanted = (onto_grid(one, matrix, (25, 33, 40)) for one in (crop, whole))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)  # of values up to 1000


def test_clean_labels() -> None:
    noise = gaussian_filter(np.random.default_rng(3).standard_normal((40, 50, 60)), 2)
    labels = np.where(noise > 0.02, 1, np.where(noise < -0.06, 2, 0)).astype(np.uint8)
    labels[:12, :12, :12] = 0
    labels[4:8, 4:8, 4:8] = 1  # a piece of its own, with a hole
    labels[5:7, 5:7, 5:7] = 0
    data = {"pred": MetaTensor(torch.from_numpy(labels)[None], meta={"a": 1})}
    pieces: Any = KeepLargestConnectedComponentd("pred", applied_labels=[1, 2], is_onehot=False, independent=True)
    pieces = pieces({"pred": data["pred"].clone()})  # it writes into its input
    found = CleanLabelsd("pred", [1, 2, 3], fill=False)(data)["pred"]
    assert torch.equal(found.as_tensor(), pieces["pred"].as_tensor()) and found.meta["a"] == 1
    assert not torch.equal(found.as_tensor(), data["pred"].as_tensor())

    wanted = labels.copy()
    for value in (1, 2):
        wanted[binary_fill_holes(wanted == value) & (wanted == 0)] = value
    found = CleanLabelsd("pred", [1, 2], largest=False)(data)["pred"]
    np.testing.assert_array_equal(found[0], wanted)
    assert (wanted != labels).any()
    unchanged = CleanLabelsd("pred", [1, 2], largest=False, fill=False)(data)["pred"]
    assert torch.equal(unchanged.as_tensor(), data["pred"].as_tensor())


def test_logits_of_another_size() -> None:
    data = {"image": scan("RAS", (1, 1, 1), (8, 8, 8)), "pred": torch.zeros(2, 4, 4, 4)}
    with pytest.raises(ValueError, match=r"pred has \(4, 4, 4\) voxels, its image \(8, 8, 8\)"):
        NativeLabelsd("pred")(data)
