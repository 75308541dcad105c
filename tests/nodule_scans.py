"""Small chests with bright balls for nodules, as folders of LUNA16's form; shared by the tests of detection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm"
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001."
SHAPE, SPACING = (56, 48, 40), 4.0


def ball(
    shape: Sequence[int], affine: NDArray[np.float64], voxel: Sequence[float], diameter: float
) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Air with one ball of 50 HU; its middle in RAS mm."""
    centre = nib.affines.apply_affine(affine, voxel)
    points = nib.affines.apply_affine(affine, np.moveaxis(np.indices(tuple(shape)), 0, -1))
    inside = np.linalg.norm(points - centre, axis=-1) <= diameter / 2
    return np.where(inside, 50, -850).astype(np.int16), centre


def chest(seed: int, nodules: int = 2) -> tuple[NDArray[np.int16], list[list[float]]]:
    """Two lungs in a body, 4 mm, and nodules of 16 mm: index and diameter of each."""
    rng = np.random.default_rng(seed)
    hu = np.full(SHAPE, -1000.0)
    hu[2:54, 2:46] = 30
    hu[6:24, 8:40, 4:36] = -850
    hu[32:50, 8:40, 4:36] = -850
    found = []
    for number in range(nodules):
        low = [9, 11, 8] if number % 2 else [35, 11, 8]
        middle = [a + int(rng.integers(0, n)) for a, n in zip(low, (12, 26, 24), strict=True)]
        x, y, z = np.indices(SHAPE)
        hu[(x - middle[0]) ** 2 + (y - middle[1]) ** 2 + (z - middle[2]) ** 2 <= 4] = 40
        found.append([*map(float, middle), 16.0])
    return (hu + rng.normal(0, 15, SHAPE)).astype(np.int16), found


def write_mhd(path: Path, hu: NDArray[Any], origin: Sequence[float], spacing: Sequence[float]) -> str:
    """Write a scan as LUNA16 has it: header and raw, int16, origin and spacing in LPS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": " ".join(map(str, origin)),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": " ".join(map(str, spacing)),
        "DimSize": " ".join(map(str, hu.shape)),
        "ElementType": "MET_SHORT",
        "ElementDataFile": f"{path.stem}.raw",
    }
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    path.with_suffix(".raw").write_bytes(np.asarray(hu, dtype="<i2").tobytes(order="F"))
    return str(path)


def luna_folder(folder: Path, counts: Sequence[int] = (1, 2, 0)) -> Path:
    """Scans with that many nodules each, in subset0 and, the last, subset1; and a row of a scan that is not there."""
    origin = (-120.0, -90.0, 10.0)
    lines = [HEADER]
    for number, count in enumerate(counts):
        hu, found = chest(number, count)
        subset = "subset1" if number == len(counts) - 1 else "subset0"
        # Of the array, x grows to the right and y to the front; of the file, in LPS, to the left and to the back.
        write_mhd(folder / subset / f"{UID}{number}.mhd", hu[::-1, ::-1], origin, (SPACING,) * 3)
        for x, y, z, diameter in found:
            place = [SHAPE[0] - 1 - x, SHAPE[1] - 1 - y, z]
            at = [o + SPACING * n for o, n in zip(origin, place, strict=True)]
            lines.append(f"{UID}{number},{at[0]},{at[1]},{at[2]},{diameter}")
    lines.append(f"{UID}elsewhere,1,2,3,4")
    (folder / "annotations.csv").write_text("\n".join(lines) + "\n")
    return folder
