"""From a path that the user gives to checked volumes.

`find_cases` lists the volumes of a file or folder, `LoadVolumed` reads one with its grid checked, `CheckCTd` refuses
what is not CT in Hounsfield units. NIfTI is read by nibabel, NRRD and MetaImage by ITK, DICOM by `med3d_nets.dicom`.
MONAI's LoadImage is not used because it repairs or ignores what is checked here: it replaces an sform that
disagrees with pixdim, picks one of several DICOM series, and takes a vector for channels.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray

from med3d_nets import dicom
from med3d_nets.errors import InputError

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")

_FORMS = (
    f"a volume file ({', '.join(VOLUME_SUFFIXES)}), a folder of them, a folder holding one DICOM series, "
    "or a folder of such folders"
)
_SPACING = (0.05, 30.0)  # mm
_SINGULAR = 1e-3  # determinant of the axes' unit vectors; a gantry tilt of 30 degrees has 0.87
_ONE_VALUE = "a volume has one value per voxel. Save one channel as a volume of its own."

Volume = tuple[NDArray[np.float32], NDArray[np.float64]]


def find_cases(dataset_dir: str | Path) -> list[dict[str, str]]:
    """List the volumes that a path stands for.

    Args:
        dataset_dir: one volume file; a folder whose files are volumes or the slices of a DICOM series (of any name);
            a folder whose direct sub-folders each hold such a series; or a mix. Hidden files and other files are
            ignored.

    Returns:
        One `{"image": absolute path, "case": name}` per volume, sorted by path. The name is the file's without
        suffix, or the folder's; names that would be equal keep the suffix, so that they are unique.

    Raises:
        InputError: the path is missing, or nothing at or in it is a volume.
    """
    path = Path(os.path.abspath(Path(dataset_dir).expanduser()))
    if not str(dataset_dir) or not path.exists():
        raise InputError(f"dataset_dir '{dataset_dir}' does not exist. Give {_FORMS}.")
    try:
        paths = _volumes_in(path) if path.is_dir() else [path] if _is_volume(path) else []
        hint = "; it is a DICOM slice: give its folder" if path.is_file() and dicom.is_dicom(path) else ""
    except OSError as error:
        raise InputError(f"dataset_dir '{path}' cannot be read: {error}") from error
    if not paths:
        kind = "holds no volume" if path.is_dir() else "is not a known volume file"
        raise InputError(f"dataset_dir '{path}' {kind}{hint}. Give {_FORMS}.")
    return [{"image": str(p), "case": name} for p, name in zip(paths, _unique_names(paths), strict=True)]


class LoadVolumed(MapTransform):
    """Replace a path, as `find_cases` gives it, by the checked volume at that path.

    The volume is a float32 MetaTensor of shape (1, X, Y, Z) with its affine in RAS millimetres. Its `meta` holds
    `filename_or_obj`, `affine`, `original_affine`, `spatial_shape`, `original_channel_dim` and `space`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load each key's path.

        Raises:
            InputError: the file is missing or damaged; not 3-D; has vector or complex voxels, none at all, or NaN or
                infinite ones; has a spacing outside 0.05 to 30 mm or a singular affine; or the DICOM folder holds
                anything but one complete series.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = load_volume(d[key])
        return d


class CheckCTd(MapTransform):
    """Refuse an image that is not CT in Hounsfield units (HU); pass CT on unchanged.

    The thresholds were set on public CT, MRI and ultrasound. What marks CT is a part clearly below zero (fat, lung,
    air), which neither MRI, nor 8-bit or scaled data, nor stored values without rescale intercept have, and little
    that is denser than bone. Voxels below -1100 HU are padding and left out. CT cropped to the inside of one organ,
    without any fat, is refused too.
    """

    padding = -1100.0  # HU; scanners pad with -2000, -2048 or -3024
    negative = (
        -50.0,
        0.01,
    )  # at least 1 % below -50 HU; the ringing of interpolated MRI reaches 0.9 % below -30
    dense = (700.0, 0.3)  # at most 30 % above 700 HU; without the intercept of -1024 it is 34 % and more
    limits = (-32768.0, 32767.0)  # HU
    darkest_maximum = -700.0  # HU; a crop of lung alone has more

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check each key's image, of any shape.

        Raises:
            InputError: an image is not CT in HU; says which values it has.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            reason = self._fault(np.asarray(torch.as_tensor(d[key]).cpu(), dtype=np.float32).ravel())
            if reason:
                name = getattr(d[key], "meta", {}).get("filename_or_obj", f"image '{key}'")
                raise InputError(
                    f"{name}: is not CT in Hounsfield units: {reason}. Allowed: CT where air is about -1000, "
                    "fat -100, soft tissue 0 to 100 HU. If it is CT, apply its rescale (HU = stored value x slope "
                    "+ intercept) or export it anew; for MRI and other images use a model made for them."
                )
        return d

    def _fault(self, values: NDArray[np.float32]) -> str:
        """What is wrong with the values, or an empty string."""
        low, high = float(values.min()), float(values.max())
        if low == high:
            return f"every voxel is {low:g}"
        sample = values[:: values.size // 2_000_000 | 1]  # an odd step does not stay in one plane
        low_p, middle, high_p = np.percentile(sample, [1, 50, 99])
        found = f"{low:g} to {high:g}; percentiles 1, 50, 99: {low_p:g}, {middle:g}, {high_p:g}"
        tissue = sample[sample >= self.padding]
        if low < self.limits[0] or high > self.limits[1]:
            return f"values beyond {self.limits[0]:g} to {self.limits[1]:g} (found {found})"
        if high < self.darkest_maximum:
            return f"nothing but air (found {found})"
        if np.mean(tissue < self.negative[0]) < self.negative[1]:
            return f"almost no voxel below {self.negative[0]:g}, where fat, lung and air are (found {found})"
        if np.mean(tissue > self.dense[0]) > self.dense[1]:
            return (
                f"too many voxels above {self.dense[0]:g}, as if the intercept were missing (found {found})"
            )
        return ""


def load_volume(path: str | Path) -> MetaTensor:
    """Read and check one volume; see `LoadVolumed`."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: does not exist. Give {_FORMS}.")
    with _reading(path):
        if path.is_dir():
            voxels, affine = _read_dicom(path)
        elif path.name.lower().endswith((".nii", ".nii.gz")):
            voxels, affine = _read_nifti(path)
        else:
            voxels, affine = _read_itk(path)
    bad = int(voxels.size - np.count_nonzero(np.isfinite(voxels)))
    if bad:
        raise InputError(
            f"{path}: has {bad} NaN or infinite voxels of {voxels.size}; all must be finite. "
            "Replace them, for CT by -1024 (air), or export the volume anew."
        )
    meta = {
        "filename_or_obj": str(path),
        "original_affine": torch.as_tensor(affine),
        "spatial_shape": torch.as_tensor(voxels.shape),
        "original_channel_dim": 0,
        "space": "RAS",
    }
    return MetaTensor(torch.from_numpy(voxels)[None], affine=torch.as_tensor(affine), meta=meta)


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def _volumes_in(folder: Path) -> list[Path]:
    """The folder's volume files and DICOM folders, sorted; a broken link counts, so that it is reported."""
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    files = [p for p in visible if _is_volume(p) and not p.is_dir()]
    series = [p for p in [folder, *visible] if p.is_dir() and dicom.holds_dicom(p)]
    return sorted(files + series)


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """One name per path for output files, unique even where upper and lower case are the same."""
    stems = [p.name if p.is_dir() else re.sub(r"(\.nii)?\.\w+$", "", p.name) for p in paths]
    uses = Counter(stem.lower() for stem in stems)
    names: list[str] = []
    for path, stem in zip(paths, stems, strict=True):
        name = stem if uses[stem.lower()] == 1 else path.name.replace(".", "_")
        while name.lower() in {other.lower() for other in names}:
            name += "_2"
        names.append(name)
    return names


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # nibabel, gzip and ITK raise many kinds
        lines = [line for line in str(error).splitlines() if line.strip() and "Reason:" not in line]
        detail = re.sub(r".*ITK ERROR: \w+\(0x\w+\): ", "", lines[-1]).strip() if lines else ""
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {detail}). The file is truncated, damaged or not what "
            "its suffix says; copy or export it again."
        ) from error


def _read_dicom(folder: Path) -> Volume:
    files, shape, affine = dicom.series_grid(folder)
    _check_grid(folder, shape, affine)
    return dicom.read_pixels(folder, files), affine


def _read_nifti(path: Path) -> Volume:
    """Voxels and affine as nibabel sees them: from sform, else qform, else pixdim."""
    image = nib.load(path)
    dtype = image.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        raise InputError(f"{path}: has {'RGB' if dtype.fields else 'complex'} voxels; {_ONE_VALUE}")
    with image.file_map["image"].get_prepare_fileobj(
        "rb"
    ) as stream:  # nibabel mends a bad pixdim; see the file's
        header = type(image).header_class.from_fileobj(stream, check=False)
    shape = _check_grid(path, image.shape, image.affine, header["pixdim"][1:4])
    if path.name.lower().endswith(".gz"):
        _check_gzip(path)
    return np.ascontiguousarray(image.get_fdata(dtype=np.float32).reshape(shape)), image.affine


def _check_gzip(path: Path) -> None:
    """Read to the end, where the checksum is; nibabel stops after the last voxel."""
    with gzip.open(path) as stream:
        while stream.read(1 << 22):
            pass


def _read_itk(path: Path) -> Volume:
    """Voxels and RAS affine of a NRRD or MetaImage file; the header is checked before ITK builds an image."""
    io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if io is None:
        raise ValueError("no NRRD or MetaImage header found")
    io.SetFileName(str(path))
    io.ReadImageInformation()
    axes = range(io.GetNumberOfDimensions())
    if io.GetNumberOfComponents() > 1:
        raise InputError(
            f"{path}: has {io.GetNumberOfComponents()} values per voxel (RGB, vector); {_ONE_VALUE}"
        )
    spacing = np.array([io.GetSpacing(i) for i in axes][:3])
    affine = np.eye(4)
    if len(axes) >= 3:
        affine[:3, :3] = np.column_stack([io.GetDirection(i)[:3] for i in axes[:3]]) * spacing
        affine[:3, 3] = [io.GetOrigin(i) for i in axes[:3]]
    shape = _check_grid(path, [io.GetDimensions(i) for i in axes], affine, spacing)
    if path.suffix.lower() in (".mha", ".mhd"):
        _check_metaimage(path)
    data, meta = ITKReader().get_data(itk.imread(str(path), itk.F))
    return np.ascontiguousarray(data.reshape(shape), dtype=np.float32), meta["original_affine"]


def _check_metaimage(path: Path) -> None:
    """Inflate compressed data to the end; ITK only warns when that fails, and goes on with wrong voxels."""
    content = path.read_bytes()
    ending = re.search(rb"ElementDataFile *= *(\S+)\r?\n?", content)
    if not ending or not re.search(rb"CompressedData *= *True", content[: ending.start()]):
        return
    local = ending[1] == b"LOCAL"
    data = content[ending.end() :] if local else (path.parent / ending[1].decode()).read_bytes()
    stream = zlib.decompressobj()
    for start in range(0, len(data), 1 << 22):
        stream.decompress(data[start : start + (1 << 22)])
    if not stream.eof:
        raise EOFError("the compressed data end early")


def _check_grid(
    path: Path,
    size: Sequence[int],
    affine: NDArray[np.float64],
    stated_spacing: NDArray[np.float64] | None = None,
) -> tuple[int, ...]:
    """Refuse a grid that is no volume in space; return its shape without trailing axes of length one.

    Args:
        path: for the message.
        size: voxels per axis; more than three axes are allowed where the others have one voxel.
        affine: voxel index to millimetres, 4 x 4.
        stated_spacing: in mm, where the header states it apart from the affine.
    """
    shape = tuple(int(n) for n in size)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    text = " x ".join(map(str, shape))
    if len(shape) != 3:
        raise InputError(
            f"{path}: is {len(shape)}-D ({text} voxels); a 3-D volume is allowed. Save one as a file."
        )
    if 0 in shape:
        raise InputError(f"{path}: has no voxels ({text}). Export the volume anew.")
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacings = [np.linalg.norm(axes, axis=0), *([] if stated_spacing is None else [stated_spacing])]
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine has NaN or infinite entries. Correct the header.\n{affine}")
    for spacing in spacings:
        if not all(_SPACING[0] <= s <= _SPACING[1] for s in spacing):
            raise InputError(
                f"{path}: the spacing is {' x '.join(f'{s:.4g}' for s in spacing)} mm; allowed are {_SPACING[0]:g} to "
                f"{_SPACING[1]:g} mm per axis. Correct the header (is the unit millimetres?)."
            )
    if abs(np.linalg.det(axes / spacings[0])) < _SINGULAR:
        raise InputError(
            f"{path}: the affine is singular, two axes point the same way. Correct it.\n{affine}"
        )
    return shape
