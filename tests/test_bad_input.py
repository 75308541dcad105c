"""Wrong input to the lung bundle: a message that says what to do, exit code 1, and no file in the output folder."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from med3d_nets import SegmentationNet, files, results
from tests.bundle_runs import (
    BY_HU,
    ENDINGS,
    Array,
    names,
    refusal,
    restored_excepthook,
    run_command,
    small_scan,
    weights,
    write_series,
    write_volume,
)

__all__ = ["restored_excepthook", "weights"]  # fixtures

Maker = Callable[[Path], Path]


def altered(change: Callable[[Array], Any]) -> Maker:
    """A file of the small scan after a change of its HU."""
    return lambda folder: nifti(folder, change(small_scan()[0].astype(np.float32)))


def placed(column: list[float]) -> Maker:
    """A file of the small scan whose second axis is another one, in mm."""

    def make(folder: Path) -> Path:
        image, affine = small_scan()
        affine[:3, 1] = column
        return nifti(folder, image.astype(np.int16), affine)

    return make


def nifti(folder: Path, voxels: Array, affine: Array | None = None) -> Path:
    nib.save(nib.Nifti1Image(voxels, small_scan()[1] if affine is None else affine), folder / "x.nii.gz")
    return folder / "x.nii.gz"


def colour(folder: Path) -> Path:
    voxels = np.zeros((8, 8, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nifti(folder, voxels)


def zero_spacing(folder: Path) -> Path:
    """pixdim of the second axis, 4 bytes from 84 on, as a careless program leaves it."""
    path = write_volume(folder / "x.nii", *small_scan())
    content = bytearray(path.read_bytes())
    content[84:88] = bytes(4)
    path.write_bytes(bytes(content))
    return path


def put(voxels: Array, value: float) -> Array:
    voxels[3, 4, 5:7] = value
    return voxels


def mri(hu: Array) -> Array:
    """Bright tissue in noise."""
    noise = np.abs(np.random.default_rng(0).normal(0, 12, hu.shape))
    return np.where(hu > -380, 600, 40) + noise


def truncated(folder: Path) -> Path:
    path = write_volume(folder / "x.nii.gz", *small_scan())
    path.write_bytes(path.read_bytes()[:-100])
    return path


def missing_slice(folder: Path) -> Path:
    series = write_series(folder / "series", *small_scan())
    (series / "IM0009").unlink()
    return series


def two_series(folder: Path) -> Path:
    image, affine = small_scan()
    write_series(folder / "study", image[:, :, :2], affine, prefix="scout")
    return write_series(folder / "study", image, affine)


def no_rescale(folder: Path) -> Path:
    """Stored values in place of HU."""
    image, affine = small_scan()
    return nifti(folder, (image + 1024).astype(np.int16), affine)


BAD: dict[str, tuple[Maker, list[str]]] = {
    "missing path": (lambda d: d / "none", ["dataset_dir", "does not exist", "Give a volume file"]),
    "empty folder": (lambda d: d, ["holds no volume", "a folder holding one DICOM series"]),
    "truncated nii.gz": (truncated, ["cannot be read", "truncated", "copy or export it again"]),
    "2-D": (lambda d: nifti(d, small_scan()[0][:, :, 5]), ["is 2-D (30 x 22 voxels)", "allowed is 3-D"]),
    "4-D": (altered(lambda hu: np.stack([hu, hu], -1)), ["is 4-D (30 x 22 x 24 x 2 voxels)", "allowed is 3-D"]),
    "RGB": (colour, ["has RGB voxels", "one value per voxel"]),
    "NaN": (altered(lambda hu: put(hu, np.nan)), ["2 NaN or infinite voxels", "Replace them"]),
    "infinite": (altered(lambda hu: put(hu, np.inf)), ["2 NaN or infinite voxels", "Replace them"]),
    "zero spacing": (zero_spacing, ["the spacing is 10 x 0 x 10 mm", "allowed are 0.05 to 30 mm"]),
    "absurd spacing": (placed([0, 700, 0]), ["the spacing is 10 x 700 x 10 mm", "is the unit mm?"]),
    "singular affine": (placed([10, 0, 0]), ["the affine is singular", "Correct the header"]),
    "0-255 data": (altered(lambda hu: np.clip((hu + 1000) / 5, 0, 255)), ["is not CT in Hounsfield units", "rescale"]),
    "no rescale": (no_rescale, ["is not CT in Hounsfield units", "slope + intercept"]),
    "MRI": (altered(mri), ["is not CT in Hounsfield units", "for MRI and others use a model made for them"]),
    "two DICOM series": (two_series, ["holds 2 DICOM series", "slices: 2", "slices: 24", "a folder of its own"]),
    "missing DICOM slice": (
        missing_slice,
        ["missing slice", "between -35.00 mm (IM0008) and -15.00 mm (IM0010)", "usual distance 10.00 mm"],
    ),
}


def assert_clear(message: str, *words: str) -> None:
    """The words after "Error:" and nothing else."""
    assert message.startswith("\nError: ") and "Traceback" not in message and len(message) < 1000
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_clear_words(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    assert_clear(refusal(path, tmp_path / "out", **BY_HU), str(path), *words)
    assert names(tmp_path / "out") == set()


def test_output_dir_that_is_a_file(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "x.nii", *small_scan())
    (tmp_path / "out").write_text("mine")
    message = refusal(path, tmp_path / "out", **BY_HU)
    assert_clear(
        message, f"{tmp_path / 'out'}: nothing can be written to this output_dir", "Give a folder that can be written"
    )
    assert names(tmp_path) == {"x.nii", "out"} and (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("full_at", ["save", "write", "rename"])
def test_no_space_to_write(full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_volume(tmp_path / "x.nii", *small_scan())
    where: dict[str, tuple[Any, str]] = {
        "save": (results.nib.Nifti1Image, "to_stream"),
        "write": (results.Path, "write_bytes"),
        "rename": (files.os, "replace"),
    }
    monkeypatch.setattr(*where[full_at], full)
    message = refusal(path, tmp_path / "out", **BY_HU)
    assert_clear(message, "out/x_seg.", "cannot be written (No space left on device)", "Free space")
    assert names(tmp_path / "out") == set()


def absent(path: Path, good: Path) -> None:
    pass


def resnet18(path: Path, good: Path) -> None:
    torch.save(SegmentationNet(18, out_channels=3, head="fpn").state_dict(), path)


def two_classes(path: Path, good: Path) -> None:
    state = torch.load(good, weights_only=True)
    state["head.classify.weight"] = state["head.classify.weight"][:, :2]
    torch.save(state, path)


def cut(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:100_000])


def text(path: Path, good: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1")


BAD_WEIGHTS: dict[str, tuple[Callable[[Path, Path], None], list[str]]] = {
    "absent": (absent, ["no such weights file"]),
    "of another depth": (resnet18, ["weights of a ResNet-18", "the network is a ResNet-10"]),
    "of other classes": (two_classes, ["do not fit the network", "(32, 2, 2, 2, 2) instead of (32, 3, 2, 2, 2)"]),
    "truncated": (cut, ["not a checkpoint that can be read", "truncated", "Download"]),
    "text": (text, ["not a checkpoint that can be read", "Download"]),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused_in_clear_words(name: str, weights: Path, tmp_path: Path) -> None:
    make, words = BAD_WEIGHTS[name]
    make(tmp_path / "w.pt", weights)
    path = write_volume(tmp_path / "x.nii", *small_scan())
    assert_clear(refusal(path, tmp_path / "out", weights=str(tmp_path / "w.pt")), str(tmp_path / "w.pt"), *words)
    assert names(tmp_path / "out") == set()


def test_one_bad_case_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for name in ("a.nii.gz", "c.mha"):
        write_volume(folder / name, *small_scan())
    shutil.move(truncated(tmp_path), folder / "b.nii.gz")
    message = refusal(folder, tmp_path / "out", **BY_HU)
    assert_clear(message, f"1 of 3 cases failed:\n  b: {folder / 'b.nii.gz'}: cannot be read")
    assert names(tmp_path / "out") == {f"{case}_seg{ending}" for case in "ac" for ending in ENDINGS} | {"summary.csv"}
    assert "2 of 3 cases done" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["missing path", "missing DICOM slice"])
def test_command_on_bad_input(name: str, weights: Path, tmp_path: Path) -> None:
    make, words = BAD[name]
    (tmp_path / "in").mkdir()
    assert_refused(run_command(tmp_path, make(tmp_path / "in"), "out"), *words)
    assert names(tmp_path / "out") == set()


def test_command_with_weights_of_another_depth(tmp_path: Path) -> None:
    resnet18(tmp_path / "w.pt", tmp_path)
    path = write_volume(tmp_path / "x.nii", *small_scan())
    done = run_command(tmp_path, path, "out", "--weights", str(tmp_path / "w.pt"))
    assert_refused(done, *BAD_WEIGHTS["of another depth"][1])
    assert names(tmp_path) == {"w.pt", "x.nii"}


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert_clear(done.stderr[done.stderr.index("\nError: ") :], *words)
