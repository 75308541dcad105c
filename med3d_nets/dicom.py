"""One DICOM series of a folder as a volume, with its headers checked.

MONAI's ITKReader reads whichever series of a folder sorts first, leaves gaps between slices unnoticed and
straightens a tilted gantry. Here the headers (pydicom) decide which files form the volume, in which order and
on which grid (DICOM PS3.3, C.7.6.2.1.1); only the pixels are ITK's (GDCM): stored × slope + intercept.
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import itk
import numpy as np
from monai.data import ITKReader
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from med3d_nets.errors import InputError

_TAGS = [
    "Modality",
    "SeriesInstanceUID",
    "SeriesDescription",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceThickness",
    "SpacingBetweenSlices",
]
_NO_VOLUME = ("SEG", "RTDOSE", "RTSTRUCT", "SR", "PR", "KO")  # objects about a series, often stored beside it
_SAME_PLACE = 0.01  # mm
_UNEVEN = 0.25  # largest distance of a slice from the regular grid, as a part of the slice distance

Slice = tuple[Path, Dataset]


def holds_dicom(folder: Path) -> bool:
    """Whether a file directly in the folder, of any name, is DICOM; the index file DICOMDIR is not."""
    return any(is_dicom(file) for file in _files(folder))


def is_dicom(file: Path) -> bool:
    """Whether a file is DICOM: `DICM` after 128 bytes, or (old files) a data set from group 0008 on."""
    with file.open("rb") as stream:
        start = stream.read(132)
    if start[128:] == b"DICM":
        return True
    return start[:2] == b"\x08\x00" and "SOPClassUID" in _read_header(file, ["SOPClassUID"])


def series_grid(folder: Path) -> tuple[list[Path], tuple[int, int, int], NDArray[np.float64]]:
    """Check the headers of the one series of slices that a folder holds.

    Args:
        folder: a folder whose DICOM images, with any file names, are the slices of one series.

    Returns:
        The files in order along the slice normal; the shape (columns, rows, slices) in voxels; the 4 × 4
        affine from voxel index to millimetres in RAS, sheared if the gantry was tilted.

    Raises:
        InputError: no image, two series, slices missing, duplicate, unequal or uneven.
    """
    slices = _only_series(folder, [item for item in _headers(folder) if _is_image(item[1])])
    _check_equal(folder, slices)
    slices, affine = _stack(folder, slices)
    return [file for file, _ in slices], (*_size(slices[0][1]), len(slices)), affine


def series_uid(folder: Path) -> str:
    """SeriesInstanceUID of the one series of slices that a folder holds.

    Raises:
        InputError: no image, or two series.
    """
    return str(_only_series(folder, [item for item in _headers(folder) if _is_image(item[1])])[0][1].SeriesInstanceUID)


def read_pixels(folder: Path, files: list[Path]) -> NDArray[np.float32]:
    """Read the slices' rescaled values (HU for CT) in their order, float32, shape (columns, rows, slices).

    Raises:
        InputError: a file is truncated or cannot be decoded.
    """
    try:
        data, _ = ITKReader().get_data(itk.imread([str(file) for file in files], itk.F))
    except RuntimeError as error:
        broken = [file.name for file in files if not _decodes(file)]
        raise InputError(
            f"{folder}: the pixels of {', '.join(broken[:5]) or 'its slices'} cannot be read. "
            "The files are truncated, damaged or compressed in an unknown way; export them again."
        ) from error
    return np.asfortranarray(data, dtype=np.float32)


def _files(folder: Path) -> list[Path]:
    """The folder's visible files, sorted by name."""
    names = (f for f in folder.iterdir() if not f.name.startswith(".") and f.name.upper() != "DICOMDIR")
    return sorted(f for f in names if f.is_file())


def _headers(folder: Path) -> list[Slice]:
    """The headers of the folder's DICOM files, without pixels."""
    found: list[Slice] = []
    for file in filter(is_dicom, _files(folder)):
        try:
            found.append((file, _read_header(file, _TAGS)))
        except Exception as error:  # pydicom raises many kinds on damaged files
            raise InputError(
                f"{file}: the DICOM header cannot be read ({error}). Copy the file again or remove it."
            ) from error
    return found


def _read_header(file: Path, tags: list[str]) -> Dataset:
    with warnings.catch_warnings():  # about odd values in fields that are not used here
        warnings.simplefilter("ignore")
        return dcmread(file, stop_before_pixels=True, force=True, specific_tags=list[Any](tags))


def _is_image(header: Dataset) -> bool:
    return "Rows" in header and "Columns" in header and header.get("Modality") not in _NO_VOLUME


def _only_series(folder: Path, slices: list[Slice]) -> list[Slice]:
    """The slices, if they are of one series."""
    if not slices:
        raise InputError(f"{folder}: its DICOM files hold no image slices. Give the folder of a CT series.")
    series: dict[str, list[Dataset]] = {}
    for _, header in slices:
        series.setdefault(str(header.get("SeriesInstanceUID", "no UID")), []).append(header)
    if len(series) > 1:
        listing = "\n".join(
            f"  {uid} '{headers[0].get('SeriesDescription', '')}', number of slices: {len(headers)}"
            for uid, headers in series.items()
        )
        raise InputError(
            f"{folder}: holds {len(series)} DICOM series, one is allowed (a localiser counts as one).\n"
            f"{listing}\nMove each series into a folder of its own."
        )
    return slices


def _check_equal(folder: Path, slices: list[Slice]) -> None:
    """Refuse slices that cannot be stacked: multi-frame, colour, of unequal size, spacing or orientation."""
    first_file, first = slices[0]
    size, plane = _size(first), _plane(first_file, first)
    for file, header in slices:
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise InputError(
                f"{file}: is a multi-frame DICOM object; one slice per file is allowed. "
                "Convert it to NIfTI (for example with dcm2niix) and give that file."
            )
        if int(header.get("SamplesPerPixel") or 1) > 1:
            raise InputError(f"{file}: has colour (RGB) pixels, CT has one value each. Give the original series.")
        if _size(header) != size:
            differ = f"sizes: {size[0]} x {size[1]} pixels and {_size(header)[0]} x {_size(header)[1]}"
        elif not np.allclose(_plane(file, header), plane, atol=1e-3):
            differ = "orientations or pixel spacings"
        else:
            continue
        raise InputError(
            f"{folder}: {first_file.name} and {file.name} have unequal {differ}. "
            "Remove the files that are not of the volume (a localiser?)."
        )


def _size(header: Dataset) -> tuple[int, int]:
    return int(header.Columns), int(header.Rows)


def _plane(file: Path, header: Dataset) -> NDArray[np.float64]:
    """The slice's in-plane steps in mm (LPS), shape (2, 3): from column to column, and from row to row."""
    directions = _numbers(file, header, "ImageOrientationPatient", 6).reshape(2, 3)
    row_step, column_step = _numbers(file, header, "PixelSpacing", 2)
    return directions * [[column_step], [row_step]]


def _numbers(file: Path, header: Dataset, name: str, count: int) -> NDArray[np.float64]:
    """A header field of so many numbers."""
    try:
        values = np.array([float(value) for value in header[name].value], dtype=np.float64)
    except (KeyError, TypeError, ValueError, AttributeError):
        values = np.empty(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise InputError(
            f"{file}: the DICOM header has no valid {name} ({count} numbers), so its place in space "
            "is unknown. Export the original series."
        )
    return values


def _stack(folder: Path, slices: list[Slice]) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices in order along their normal, and the RAS affine of the grid that they form."""
    plane = _plane(*slices[0])
    normal = np.cross(*_numbers(*slices[0], "ImageOrientationPatient", 6).reshape(2, 3))
    places = np.array([_numbers(file, header, "ImagePositionPatient", 3) for file, header in slices])
    order = np.argsort(places @ normal, kind="stable")
    slices, places = [slices[i] for i in order], places[order]
    if len(slices) == 1:
        step = normal * _thickness(slices[0][1])
    else:
        _check_distances(folder, [file.name for file, _ in slices], places @ normal)
        step = (places[-1] - places[0]) / (len(slices) - 1)
        _check_even(folder, places, step)
    affine = np.eye(4)
    affine[:3] = np.column_stack([plane[0], plane[1], step, places[0]])
    return slices, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM is LPS


def _thickness(header: Dataset) -> float:
    """The slice distance in mm that the header of a single slice states, or 0."""
    return float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 0.0)


def _check_distances(folder: Path, names: list[str], heights: NDArray[np.float64]) -> None:
    """Refuse two slices at one place, and a gap; heights are sorted, in mm along the slice normal."""
    distances = [float(d) for d in np.diff(heights)]
    usual = statistics.median_low(distances)
    for i, distance in enumerate(distances):
        if distance < _SAME_PLACE:
            raise InputError(
                f"{folder}: {names[i]} and {names[i + 1]} are duplicates, both at {heights[i]:.2f} mm. "
                "Remove the copy, or put each phase or time point into a folder of its own."
            )
    for i, distance in enumerate(distances):
        if distance > 1.5 * usual:
            raise InputError(
                f"{folder}: missing slice, about {round(distance / usual) - 1 or 1}, between "
                f"{heights[i]:.2f} mm ({names[i]}) and {heights[i + 1]:.2f} mm ({names[i + 1]}): the gap is "
                f"{distance:.2f} mm, the usual distance {usual:.2f} mm. Export the complete series."
            )


def _check_even(folder: Path, positions: NDArray[np.float64], step: NDArray[np.float64]) -> None:
    """Refuse positions (n, 3) in mm off a regular grid: one affine could not place them."""
    grid = positions[0] + np.arange(len(positions))[:, None] * step
    worst = float(np.linalg.norm(positions - grid, axis=1).max())
    length = float(np.linalg.norm(step))
    if worst > _UNEVEN * length:
        raise InputError(
            f"{folder}: the slices are unevenly spaced, up to {worst:.2f} mm off a grid of {length:.2f} mm. "
            "Export a series with one slice distance, or resample it."
        )


def _decodes(file: Path) -> bool:
    try:
        itk.imread(str(file), itk.F)
    except RuntimeError:
        return False
    return True
