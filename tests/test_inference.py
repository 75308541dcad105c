"""The lung bundle run on files of every kind, as a user runs it: what lies in the output folder afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import monai.bundle
import nibabel as nib
import numpy as np
import pytest

from med3d_nets.inputs import load_volume
from med3d_nets.weights import file_sha256
from tests.bundle_runs import (
    BUNDLE,
    BY_HU,
    ENDINGS,
    LABELS,
    Array,
    assert_on_own_grid,
    dice,
    mask_of,
    names,
    refusal,
    restored_excepthook,
    run,
    run_command,
    small_scan,
    weights,
    write_series,
    write_volume,
)
from tools.lung_labels import label_lungs
from tools.phantom import make_phantom

__all__ = ["restored_excepthook", "weights"]  # fixtures


@pytest.fixture(scope="module")
def chest() -> tuple[Array, Array]:
    """HU and affine of a coarse chest."""
    phantom = make_phantom(7, (300, 220, 240), spacing=(5, 5, 5), pathology=None, noise=10.0)
    return np.rint(phantom.image), np.rint(phantom.affine)


def report_of(output_dir: Path, case: str) -> dict[str, Any]:
    return json.loads((output_dir / f"{case}_seg.json").read_text())


def results_of(case: str) -> set[str]:
    return {f"{case}_seg{ending}" for ending in ENDINGS}


def test_every_file_format_gives_the_same_mask(chest: tuple[Array, Array], weights: Path, tmp_path: Path) -> None:
    image, affine = chest
    for name in ("a.nii", "b.nii.gz", "c.nrrd", "d.mha"):
        write_volume(tmp_path / "in" / name, image, affine)
    write_series(tmp_path / "in" / "series 1.2.840", image, affine)
    run(tmp_path / "in", tmp_path / "out", weights=str(weights))
    cases = ["a", "b", "c", "d", "series 1.2.840"]
    assert names(tmp_path / "out") == set.union(*map(results_of, cases)) | {"summary.csv"}
    first = mask_of(tmp_path / "out", "a")
    assert_on_own_grid(first, tmp_path / "in" / "a.nii")
    assert set(np.unique(np.asarray(first.dataobj))) == {0, 1, 2}
    for case in cases[1:]:
        mask = mask_of(tmp_path / "out", case)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), np.asarray(first.dataobj), err_msg=case)
        np.testing.assert_allclose(mask.affine, affine, atol=1e-4, err_msg=case)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("one slice", np.s_[:, :, 24:25]),
        ("one sagittal slice", np.s_[16:17, :, :]),
        ("three slices", np.s_[:, :, 23:26]),
        ("below the network's least size", np.s_[10:15, 8:14, 20:24]),
        ("left half alone", np.s_[:28, :, :]),
    ],
)
def test_small_volumes_give_a_mask_on_their_grid(
    chest: tuple[Array, Array], weights: Path, name: str, part: tuple[slice, slice, slice], tmp_path: Path
) -> None:
    piece = nib.Nifti1Image(*chest).slicer[part]
    path = write_volume(tmp_path / f"{name}.nii.gz", piece.get_fdata(), piece.affine)
    run(path, tmp_path / "out", weights=str(weights))
    assert_on_own_grid(mask_of(tmp_path / "out", name), path)
    assert names(tmp_path / "out") == results_of(name)
    assert any("touches the border" in warning for warning in report_of(tmp_path / "out", name)["warnings"])


def test_probabilities(chest: tuple[Array, Array], weights: Path, tmp_path: Path) -> None:
    piece = nib.Nifti1Image(*chest).slicer[:, :, 20:30]
    path = write_volume(tmp_path / "chest.nii.gz", piece.get_fdata(), piece.affine)
    where: dict[str, Any] = {"weights": str(weights), "keep_largest": "false", "fill_holes": "false"}
    run(path, tmp_path / "out", probabilities="true", **where)
    soft = nib.load(tmp_path / "out" / "chest_seg_prob.nii.gz")
    mask = mask_of(tmp_path / "out", "chest")
    assert soft.shape == (*mask.shape, 3)
    np.testing.assert_allclose(soft.affine, mask.affine, atol=1e-4)
    values = np.sort(soft.get_fdata(), axis=-1)
    np.testing.assert_allclose(values.sum(axis=-1), 1, atol=0.02)
    clear = values[..., 2] - values[..., 1] > 0.02
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(soft.get_fdata().argmax(axis=-1)[clear], np.asarray(mask.dataobj)[clear])
    run(path, tmp_path / "out", **where)  # what is not of this run does not look so
    assert not (tmp_path / "out" / "chest_seg_prob.nii.gz").exists()


def test_command_in_a_foreign_folder(weights: Path, tmp_path: Path) -> None:
    """Relative paths are the user's, names may have spaces and dots, and progress and results are told."""
    write_volume(tmp_path / "my scans" / "ct v1.2 (b).nii.gz", *small_scan())
    done = run_command(tmp_path, "my scans/ct v1.2 (b).nii.gz", "results 1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == {"my scans", "results 1"}
    assert names(tmp_path / "results 1") == results_of("ct v1.2 (b)")
    for words in ("[1/1] ct v1.2 (b)", "left lung", " mL -> results 1/ct v1.2 (b)_seg.nii.gz", "1 of 1 cases done"):
        assert words in done.stdout
    assert "100%" in done.stderr


def test_run_from_within_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_volume(tmp_path / "ct.nii", *small_scan())
    monkeypatch.chdir(BUNDLE)
    before = names(BUNDLE)
    monai.bundle.run(
        config_file="configs/inference.json", dataset_dir=str(path), output_dir=str(tmp_path / "out"), **BY_HU
    )
    assert names(tmp_path / "out") == results_of("ct")
    assert names(BUNDLE) == before


def test_report_tells_what_is_in_the_mask(weights: Path, tmp_path: Path) -> None:
    path = write_volume(tmp_path / "ct.nii.gz", *small_scan())
    run(path, tmp_path / "out", **BY_HU)
    report, mask = report_of(tmp_path / "out", "ct"), np.asarray(mask_of(tmp_path / "out", "ct").dataobj)
    assert (report["case"], report["image"], report["mask"]) == ("ct", str(path), "ct_seg.nii.gz")
    assert report["shape"] == list(mask.shape) and report["spacing_mm"] == [10, 10, 10]
    for value, name in LABELS.items():
        count = np.count_nonzero(mask == value)
        assert report["labels"][name] == {"value": value, "voxels": count, "volume_ml": float(count)} and count > 0
    assert report["total_volume_ml"] == np.count_nonzero(mask)
    assert report["warnings"] == ["slices 10.0 mm apart: borders are uncertain above 5 mm"]
    assert report["weights_sha256"] == file_sha256(weights)
    meta = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    assert report["bundle"] == {"name": meta["name"], "version": meta["version"]}
    assert report["versions"]["monai"] == monai.__version__ and set(report["versions"]) >= {"med3d_nets", "torch"}


@pytest.mark.parametrize("slices", [24, 1])
def test_picture_shows_scan_and_outlines(slices: int, tmp_path: Path) -> None:
    image, affine = small_scan()
    run(write_volume(tmp_path / "ct.nii.gz", image[:, :, 12 - slices // 2 :][..., :slices], affine), tmp_path, **BY_HU)
    picture = matplotlib.image.imread(tmp_path / "ct_seg.png")[..., :3]
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.1
    for colour in ((0xFF, 0x5A, 0x5F), (0x3F, 0xB8, 0xFF)):
        of_colour = np.abs(picture - np.array(colour) / 255).max(axis=-1) < 0.1
        assert np.count_nonzero(of_colour[: int(0.75 * len(picture))]) > 200  # above the legend


def test_results_are_replaced_whole(tmp_path: Path) -> None:
    """A second run makes new files under the old names; a reader of the old ones keeps them."""
    image, affine = small_scan()
    path, out = write_volume(tmp_path / "ct.nii.gz", image, affine), tmp_path / "out"
    run(path, out, **BY_HU)
    kept = {}
    for name in results_of("ct"):
        os.link(out / name, tmp_path / name)
        kept[name] = (out / name).read_bytes()
    write_volume(path, np.where(np.arange(image.shape[0])[:, None, None] < 15, 40, image), affine)
    run(path, out, **BY_HU)
    assert names(out) == results_of("ct")
    assert report_of(out, "ct")["labels"]["left lung"]["voxels"] == 0
    for name, content in kept.items():
        assert (tmp_path / name).read_bytes() == content != (out / name).read_bytes()


def test_results_beside_the_input_are_no_input(tmp_path: Path) -> None:
    write_volume(tmp_path / "ct.nii.gz", *small_scan())
    for _ in range(2):
        run(tmp_path, tmp_path, **BY_HU)
        assert names(tmp_path) == {"ct.nii.gz", *results_of("ct")}


def test_results_of_a_case_that_fails_now_are_set_aside(tmp_path: Path) -> None:
    path, out = write_volume(tmp_path / "ct.nii.gz", *small_scan()), tmp_path / "out"
    run(path, out, **BY_HU)
    path.write_bytes(path.read_bytes()[:-200])
    assert "ct.nii.gz: cannot be read" in refusal(path, out, **BY_HU)
    assert names(out) == {f"{name}.old" for name in results_of("ct")}


@pytest.mark.real_data
def test_real_chest_series(real_data: Path, weights: Path, tmp_path: Path) -> None:
    run(real_data / "chest_ct_dicom" / "series", tmp_path, weights=str(weights))
    mask = mask_of(tmp_path, "series")
    assert mask.shape == (512, 512, 64)
    for name in LABELS.values():
        assert 1000 < report_of(tmp_path, "series")["labels"][name]["volume_ml"] < 4000, name
    assert not any("on the left" in warning for warning in report_of(tmp_path, "series")["warnings"])
    canonical = nib.as_closest_canonical(mask)
    image = load_volume(real_data / "chest_ct_dicom" / "series")
    hu = nib.as_closest_canonical(nib.Nifti1Image(image[0].numpy(), image.affine.numpy()))
    classical = label_lungs(hu.get_fdata(), tuple(map(float, hu.header.get_zooms())))
    for value, name in LABELS.items():
        assert dice(np.asarray(canonical.dataobj) == value, classical == value) > 0.95, name


@pytest.mark.real_data
def test_real_chest_with_its_label(real_data: Path, weights: Path, tmp_path: Path) -> None:
    run(real_data / "lung_ct" / "imagesTr" / "cip64.nii.gz", tmp_path, weights=str(weights))
    label = np.asarray(nib.load(real_data / "lung_ct" / "labelsTr" / "cip64.nii.gz").dataobj)
    assert dice(np.asarray(mask_of(tmp_path, "cip64").dataobj) > 0, label > 0) >= 0.95
