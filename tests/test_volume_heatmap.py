"""Grad-CAM lands where the evidence is, on the scan's own grid, whatever its orientation, spacing and size."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.visualize import GradCAM

from med3d_nets import ClassificationNet
from med3d_nets.heatmap import LAYER, HeatMapper, on_image, on_own_grid
from tests.volume_runs import blob_network, infer, save_classifier, write_nifti

SHAPE = (44, 30, 18)
BLOB = (slice(28, 40), slice(3, 14), slice(3, 13))  # voxels of the scan as stored


def scan(axes: str, spacing: tuple[float, float, float]) -> nib.Nifti1Image:
    """A grey scan with a soft bright blob near a corner, its axes towards ``axes``."""
    places = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    parts = zip(places, BLOB, strict=True)
    distance = sum((2 * (place - (one.start + one.stop - 1) / 2) / (one.stop - one.start)) ** 2 for place, one in parts)
    voxels = np.random.default_rng(0).normal(100, 5, SHAPE) + 400 * np.exp(-2 * distance)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (letter, size) in enumerate(zip(axes, spacing, strict=True)):
        row = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[row, axis] = size if letter in "RAS" else -size
    affine[:3, 3] = 17
    return nib.Nifti1Image(voxels.astype(np.float32), affine)


@pytest.mark.parametrize(
    ("axes", "spacing"),
    [("RAS", (1.0, 1.0, 1.0)), ("LPS", (1.0, 1.2, 2.0)), ("SLA", (1.0, 0.8, 2.0)), ("ILP", (1.0, 1.5, 2.5))],
)
def test_the_peak_is_in_the_blob(axes: str, spacing: tuple[float, float, float], tmp_path: Path) -> None:
    """Of a network that is constructed so that brightness is the evidence for ``bright``.

    It looks every 8 mm, and the blob is wider than that in every direction.
    """
    image = scan(axes, spacing)
    write_nifti(tmp_path / "in" / "scan.nii.gz", np.asarray(image.dataobj), image.affine)
    weights = save_classifier(tmp_path / "run", blob_network(), ["dark", "bright"], [1.0] * 3, [48] * 3)
    infer(tmp_path / "in", tmp_path / "out", weights, heatmap="true", heatmap_class="bright")
    found = nib.load(tmp_path / "out" / "scan_heatmap.nii.gz")
    assert found.shape == image.shape and nib.aff2axcodes(found.affine) == tuple(axes)
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-4)
    heat = np.asarray(found.dataobj)
    peak = np.argwhere(heat == heat.max()).mean(axis=0)  # beyond the outermost places the values go on
    assert all(part.start <= place <= part.stop - 1 for part, place in zip(BLOB, peak, strict=True)), peak
    assert heat.max() == pytest.approx(1, abs=0.15) and heat.min() == 0
    assert heat[:16].mean() < 0.2 * heat[BLOB].mean()
    assert (tmp_path / "out" / "scan_heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_network_has_not_seen_is_zero(tmp_path: Path) -> None:
    """input_size keeps the centre of the scan; the map ends where that does, to half a voxel."""
    image = scan("LPS", (2.0, 2.0, 2.0))
    write_nifti(tmp_path / "in" / "scan.nii.gz", np.asarray(image.dataobj), image.affine)
    weights = save_classifier(tmp_path / "run", blob_network(), ["dark", "bright"], [2.0] * 3, [24, 24, 24])
    infer(tmp_path / "in", tmp_path / "out", weights, heatmap=True, heatmap_class="bright")
    heat = np.asarray(nib.load(tmp_path / "out" / "scan_heatmap.nii.gz").dataobj)
    inside = np.zeros(SHAPE, bool)
    inside[10:34, 3:27, :] = True
    assert not heat[~inside].any() and heat[inside].mean() > 0


def test_equals_monai_without_padding_and_leaves_padding_out() -> None:
    torch.manual_seed(0)
    net = ClassificationNet(10, 3).eval()
    image = MetaTensor(torch.randn(1, 40, 24, 33), affine=np.diag([2.0, 2.0, 3.0, 1.0]))
    expected = GradCAM(ClassificationNet(10, 3).eval(), LAYER)
    expected.nn_module.model.load_state_dict(net.state_dict())
    raw = expected.compute_map(image.as_tensor()[None], class_idx=1)[0].detach()
    mapper = HeatMapper(net)
    heat = mapper(image, 1)
    assert heat.shape == (1, 5, 3, 5)
    torch.testing.assert_close(heat.as_tensor(), raw / raw.max())
    np.testing.assert_allclose(heat.affine, np.diag([16.0, 16.0, 24.0, 1.0]))
    part = mapper(image, 1, [17, 24, 8])
    assert part.shape == (1, 3, 3, 1) and float(part.max()) == 1
    assert on_image(part, image, [17, 24, 8]).shape == (17, 24, 8)


def test_no_evidence_is_an_empty_map() -> None:
    net = blob_network()
    image = MetaTensor(torch.ones(1, 16, 16, 16), affine=torch.eye(4))
    image.meta.update(original_affine=torch.eye(4), spatial_shape=torch.tensor([16, 16, 16]))
    heat = HeatMapper(net)(image, 0)  # brightness speaks against it
    assert not heat.any() and not on_own_grid(heat, image).any()
