"""Running the shipped lung bundle as a user does, and scans for it to read; shared by the tests of inference."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import itk
import monai.bundle
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = Path(os.environ.get("MED3D_BUNDLE", ROOT / "bundles" / "lung_ct_segmentation_resnet10"))
ENDINGS = (".nii.gz", ".json", ".png")
LABELS = {1: "left lung", 2: "right lung"}
THRESHOLD = -380.0  # HU, of AirNet
BY_HU = {"network_def": {"_target_": "tests.bundle_runs.AirNet"}, "network": "$@network_def.to(@device).eval()"}

Array = NDArray[Any]


class AirNet(torch.nn.Module):
    """A network whose mask is known: air is lung, and the half towards the patient's left is the left one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        air = (THRESHOLD + 1000) / 1600 - x
        left = (torch.arange(x.shape[2], device=x.device) < x.shape[2] / 2).reshape(-1, 1, 1).expand(x.shape)
        return torch.cat([-air, torch.where(left, air, -1.0), torch.where(left, -1.0, air)], dim=1)


@pytest.fixture(scope="session")
def weights() -> Path:
    """The trained weights that the bundle ships."""
    path = BUNDLE / "models" / "model.pt"
    assert path.is_file(), f"{path} is missing"
    return path


@pytest.fixture(autouse=True)
def restored_excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The excepthook that a run of the bundle sets does not outlive the test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def options(dataset_dir: Path | str, output_dir: Path | str) -> dict[str, str]:
    """Arguments of `monai.bundle run` as the bundle's README has them."""
    return {
        "config_file": str(BUNDLE / "configs" / "inference.json"),
        "bundle_root": str(BUNDLE),
        "dataset_dir": str(dataset_dir),
        "output_dir": str(output_dir),
    }


def run(dataset_dir: Path | str, output_dir: Path | str, **overrides: Any) -> None:
    """The function behind `python -m monai.bundle run`, in this process."""
    monai.bundle.run(**{**options(dataset_dir, output_dir), **overrides})


def refusal(dataset_dir: Path | str, output_dir: Path | str, **overrides: Any) -> str:
    """Run what must fail; return all that is printed on the error where it ends a process, with exit code 1."""
    try:
        run(dataset_dir, output_dir, **overrides)
    except Exception:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return printed.getvalue()
    raise AssertionError(f"{dataset_dir} was not refused")


def run_command(
    cwd: Path, dataset_dir: Path | str, output_dir: Path | str, *more: str
) -> subprocess.CompletedProcess[str]:
    """`python -m monai.bundle run` as a process of its own, started in some folder."""
    pairs = [word for name, value in options(dataset_dir, output_dir).items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "monai.bundle", "run", *pairs, *more]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def mask_of(output_dir: Path, case: str) -> nib.Nifti1Image:
    return nib.load(output_dir / f"{case}_seg.nii.gz")


def assert_on_own_grid(mask: nib.Nifti1Image, path: Path) -> None:
    """A label map of the shape and affine of the image at a path."""
    image = nib.load(path)
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
    np.testing.assert_array_equal(mask.affine, image.affine)
    sform, code = mask.get_sform(coded=True)
    np.testing.assert_array_equal(sform, image.affine)
    assert code == 1
    qform, code = mask.get_qform(coded=True)
    if code:  # none where the affine has a shear, which a qform cannot tell
        np.testing.assert_allclose(qform, image.affine, atol=1e-3)


def names(folder: Path) -> set[str]:
    """All that lies in a folder, hidden things too; nothing where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def dice(one: Array, two: Array) -> float:
    return 2 * np.count_nonzero(one & two) / (np.count_nonzero(one) + np.count_nonzero(two))


def resample(image: Array, affine: Array, shape: tuple[int, ...], new_affine: Array) -> Array:
    """Linear interpolation onto another grid by world coordinates, with the lowest value beyond the image."""
    step = np.linalg.inv(affine) @ new_affine
    options: dict[str, Any] = {"order": 1, "mode": "grid-constant", "cval": float(image.min())}
    return ndimage.affine_transform(image.astype(np.float32), step, output_shape=shape, **options)


def grid(
    spacing: tuple[float, float, float], size: tuple[float, float, float], turn: Array | None = None
) -> tuple[tuple[int, ...], Array]:
    """Shape and affine of a grid around the world's origin that covers a box of a size in mm, also when turned."""
    axes = np.eye(3) if turn is None else turn
    shape = np.ceil(np.abs(np.linalg.inv(axes)) @ size / spacing).astype(int)
    axes = axes * spacing
    return tuple(int(n) for n in shape), nib.affines.from_matvec(axes, -axes @ ((shape - 1) / 2))


def two_ellipsoids(shape: tuple[int, ...], affine: Array) -> tuple[Array, Array]:
    """A scan known in every point: HU, and the label that AirNet gives, for lungs of 115 x 130 x 190 mm each."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = nib.affines.apply_affine(affine, index)
    from_centre = np.abs(world) - [75.0, 0.0, 0.0]
    reach = np.linalg.norm(from_centre / [57.5, 65.0, 95.0], axis=-1)  # 1 at the surface
    hu = np.clip(THRESHOLD + 900 * (reach - 1), -800, 40)
    return hu, np.where(hu < THRESHOLD, np.where(world[..., 0] < 0, 1, 2), 0)


def small_scan() -> tuple[Array, Array]:
    """HU and affine of a scan that loads and runs at once."""
    shape, affine = grid((10, 10, 10), (300, 220, 240))
    return np.rint(two_ellipsoids(shape, affine)[0]), affine


def write_volume(path: Path, image: Array, affine: Array) -> Path:
    """Write int16 as NIfTI, NRRD or MetaImage."""
    voxels = np.rint(image).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(voxels, affine), path)
        return path
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = nib.affines.voxel_sizes(affine)
    picture = itk.image_from_array(voxels.T.copy())
    picture.SetSpacing(spacing)
    picture.SetOrigin(lps[:3, 3])
    picture.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / spacing)))
    itk.imwrite(picture, str(path), compression=True)
    return path


def write_series(folder: Path, image: Array, affine: Array, prefix: str = "IM") -> Path:
    """Write the slices along the last axis as one CT series, stored as HU + 1024."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = nib.affines.voxel_sizes(affine)
    series = generate_uid()
    for number in range(image.shape[2]):
        item = pydicom.Dataset()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = CTImageStorage
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = generate_uid()
        item.SeriesInstanceUID, item.SeriesDescription, item.Modality = series, "Lung", "CT"
        item.ImageOrientationPatient = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
        item.ImagePositionPatient = list((lps @ [0, 0, number, 1])[:3])
        item.PixelSpacing, item.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 1
        item.RescaleSlope, item.RescaleIntercept = 1, -1024
        pixels = np.rint(image[:, :, number].T).astype(np.int16) + np.int16(1024)
        item.Rows, item.Columns = pixels.shape
        item.PixelData = pixels.tobytes()
        item.save_as(folder / f"{prefix}{number:04d}", enforce_file_format=True)
    return folder
