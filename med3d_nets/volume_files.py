"""Voxels and affine of one volume on disk: NIfTI by nibabel, NRRD and MetaImage by ITK, DICOM by `dicom`.

Headers are checked before voxels. MONAI's LoadImage is not used because it mends or overlooks what is
to be refused here: an sform that disagrees with pixdim is replaced, one of several DICOM series is picked,
vectors become channels; and nibabel and ITK turn zero or negative spacings into positive ones.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
from isal import igzip
from monai.data import ITKReader
from nibabel.arrayproxy import ArrayProxy
from nibabel.fileholders import FileHolder
from numpy.typing import NDArray

from med3d_nets import dicom
from med3d_nets.errors import InputError

_SPACING = (0.05, 30.0)  # mm
_SINGULAR = 1e-3  # determinant of the axes' unit vectors; a gantry tilt of 30 degrees has 0.87
_ONE_VALUE = "a volume has one value per voxel. Save one channel as a volume of its own."
_CHUNK = 1 << 22  # bytes, or voxels

Volume = tuple[NDArray[np.float32], NDArray[np.float64]]


def read_volume(path: Path) -> Volume:
    """Read a volume file or the folder of a DICOM series.

    Returns:
        The voxels as float32, shape (X, Y, Z), with X fastest in memory whatever the format, and the 4 × 4 affine
        from voxel index to millimetres in RAS.

    Raises:
        InputError: unreadable, not 3-D, no scalar voxels, no voxels, a spacing or affine that no scan has, or
            (DICOM) not one complete series.
    """
    with _reading(path):
        if path.is_dir():
            return _read_dicom(path)
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return _read_nifti(path)
        return _read_itk(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # nibabel, gzip and ITK raise many kinds
        lines = [line for line in str(error).splitlines() if line.strip() and not re.search("Reason:|could the", line)]
        detail = re.sub(r".*ITK ERROR: \w+\(0x\w+\): ", "", lines[-1]).strip() if lines else ""
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {detail}). The file is truncated, damaged or "
            "not what its suffix says; copy or export it again."
        ) from error


def _read_dicom(folder: Path) -> Volume:
    files, shape, affine = dicom.series_grid(folder)
    _check_grid(folder, shape, affine)
    return dicom.read_pixels(folder, files), affine


def _read_nifti(path: Path) -> Volume:
    """Voxels and affine as nibabel sees them: from sform, else qform, else pixdim."""
    image: Any = nib.load(path)
    dtype = image.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        raise InputError(f"{path}: has {'RGB' if dtype.fields else 'complex'} voxels; {_ONE_VALUE}")
    with image.file_map["image"].get_prepare_fileobj("rb") as stream:  # as in the file: nibabel mends pixdim
        header = type(image).header_class.from_fileobj(stream, check=False)
    shape = _check_grid(path, image.shape, image.affine, header["pixdim"][1:4])
    # ISA-L inflates four times as fast as zlib
    with igzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        holder = FileHolder(fileobj=stream)
        proxy = type(image).from_file_map({"header": holder, "image": holder}).dataobj
        voxels = _in_parts(stream, proxy)
        while stream.read(_CHUNK):  # to the end, where the checksum is
            pass
    return voxels.reshape(shape, order="F"), image.affine


def _in_parts(stream: Any, proxy: ArrayProxy) -> NDArray[np.float32]:
    """Voxels, (n,), in the order of the file; nibabel would hold all of them in the file's type at the same time."""
    voxels = np.empty(math.prod(proxy.shape), dtype=np.float32)
    for start in range(0, voxels.size, _CHUNK):
        part = voxels[start : start + _CHUNK]
        offset = proxy.offset + start * proxy.dtype.itemsize
        part[:] = np.asanyarray(
            ArrayProxy(stream, (part.shape, proxy.dtype, offset, proxy.slope, proxy.inter), mmap=False),
            dtype=np.float32,
        )
    return voxels


def _read_itk(path: Path) -> Volume:
    """Voxels and RAS affine of a NRRD or MetaImage file; the header is checked before ITK builds an image."""
    io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if io is None:
        raise ValueError("no NRRD or MetaImage header found")
    io.SetFileName(str(path))
    io.ReadImageInformation()
    axes = range(io.GetNumberOfDimensions())
    if io.GetNumberOfComponents() > 1:
        raise InputError(f"{path}: has {io.GetNumberOfComponents()} values per voxel (RGB, vector); {_ONE_VALUE}")
    spacing = np.array([io.GetSpacing(i) for i in axes[:3]])
    affine = np.eye(4)
    if len(axes) >= 3:
        affine[:3, :3] = np.column_stack([io.GetDirection(i)[:3] for i in axes[:3]]) * spacing
        affine[:3, 3] = [io.GetOrigin(i) for i in axes[:3]]
    shape = _check_grid(path, [io.GetDimensions(i) for i in axes], affine, spacing)
    if path.suffix.lower() in (".mha", ".mhd"):
        _check_metaimage(path)
    data, meta = ITKReader().get_data(itk.imread(str(path), itk.F))
    return np.asfortranarray(data.reshape(shape), dtype=np.float32), meta["original_affine"]


def _check_metaimage(path: Path) -> None:
    """Inflate compressed data to the end; ITK only warns when that fails, and goes on with wrong voxels."""
    with path.open("rb") as stream:
        header = re.match(rb"(?s).*?ElementDataFile *= *([^\r\n]+)\r?\n?", stream.read(1 << 16))
    if not header or not re.search(rb"CompressedData *= *True", header[0]):
        return
    local = header[1].strip() == b"LOCAL"
    inflate = zlib.decompressobj()
    with (path if local else path.parent / header[1].strip().decode()).open("rb") as stream:
        stream.seek(header.end() if local else 0)
        while chunk := stream.read(_CHUNK):
            inflate.decompress(chunk)
    if not inflate.eof:
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
        affine: voxel index to millimetres, 4 × 4.
        stated_spacing: in mm, where the header states it apart from the affine.
    """
    shape = tuple(int(n) for n in size)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    text = " x ".join(map(str, shape))
    if len(shape) != 3:
        raise InputError(
            f"{path}: is {len(shape)}-D ({text} voxels), allowed is 3-D. Give one volume, not a slice or a time series."
        )
    if 0 in shape:
        raise InputError(f"{path}: has no voxels ({text}). Export the volume anew.")
    _check_affine(path, np.asarray(affine, dtype=np.float64), stated_spacing)
    return shape


def _check_affine(path: Path, affine: NDArray[np.float64], stated_spacing: NDArray[np.float64] | None) -> None:
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine has NaN or infinite entries. Correct the header.\n{affine}")
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    for spacing in (lengths, lengths if stated_spacing is None else stated_spacing):
        if not all(_SPACING[0] <= s <= _SPACING[1] for s in spacing):
            raise InputError(
                f"{path}: the spacing is {' x '.join(f'{s:.4g}' for s in spacing)} mm, allowed are "
                f"{_SPACING[0]:g} to {_SPACING[1]:g} mm per axis. Correct the header (is the unit mm?)."
            )
    if abs(np.linalg.det(axes / lengths)) < _SINGULAR:
        raise InputError(f"{path}: the affine is singular, axes point the same way. Correct the header.\n{affine}")
