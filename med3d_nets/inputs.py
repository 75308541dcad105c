"""From a path that the user gives to checked volumes.

`find_cases` lists the volumes of a file, folder or table, `LoadVolumed` reads one and refuses unsound ones,
`CheckCTd` refuses what is not CT in Hounsfield units. Every refusal is an `InputError` that names the file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray

from med3d_nets import dicom
from med3d_nets.errors import InputError
from med3d_nets.tables import read_rows
from med3d_nets.volume_files import read_volume

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")

_FORMS = (
    f"a volume file ({', '.join(VOLUME_SUFFIXES)}), a folder of them, a folder holding one DICOM series, "
    "a folder of such folders, or a table of them (.csv, column image)"
)
_NO_NAME = re.compile(r"[/\\\x00-\x1f]|^\.")


def find_cases(dataset_dir: str | Path) -> list[dict[str, str]]:
    """List the volumes that a path stands for.

    Args:
        dataset_dir: one volume file; a folder whose files are volumes or the slices of a DICOM series (of any
            name); a folder whose direct sub-folders each hold such a series; or a mix. Hidden files, files
            that are no images, and results of an earlier run are ignored. Or a table (.csv, UTF-8) with the column
            `image`, a volume file or the folder of a DICOM series, absolute or relative to the table's folder, and
            optionally `case`, a unique name; other columns are ignored.

    Returns:
        One `{"image": absolute path, "case": name}` per volume, sorted by path, those of a table in its order. The
        name is the table's, or the file's without suffix, or the folder's; names that would be equal keep the
        suffix, so that they are unique.

    Raises:
        InputError: the path is missing, or nothing at or in it is a volume; or a table cannot be read, lacks the
            column or a value, or names what is no volume, or a case twice.
    """
    path = Path(os.path.abspath(Path(dataset_dir).expanduser()))
    if not str(dataset_dir) or not path.exists():
        raise InputError(f"dataset_dir '{dataset_dir}' does not exist. Give {_FORMS}.")
    if path.suffix.lower() == ".csv" and path.is_file():
        return _listed(path)
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

    The volume is a float32 MetaTensor of shape (1, X, Y, Z) with its affine in RAS millimetres. Its `meta`
    holds `filename_or_obj`, `affine`, `original_affine`, `spatial_shape`, `original_channel_dim` and `space`.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load each key's path.

        Raises:
            InputError: the file is missing or damaged; is not 3-D; has vector or complex voxels, none at all,
                or NaN or infinite ones; has a spacing outside 0.05 to 30 mm or a singular affine; or the
                DICOM folder holds anything but one complete series.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = load_volume(d[key])
        return d


class CheckCTd(MapTransform):
    """Refuse an image that is not CT in Hounsfield units (HU); pass CT on unchanged.

    What marks CT is a part clearly below zero (fat, lung, air), which neither MRI, nor 8-bit or scaled data,
    nor stored values without rescale intercept have, and little that is denser than bone. The thresholds were
    set on public CT, MRI and ultrasound. Voxels below -1100 HU are padding and left out. CT cropped to the
    inside of one organ, without any fat, is refused too.
    """

    limits = (-32768.0, 32767.0)  # HU
    padding = -1100.0  # HU, below is padding: scanners use -2000, -2048 or -3024
    darkest_maximum = -700.0  # HU; the darkest crop of lung alone had -506
    negative, least_negative = -50.0, 0.01  # HU, part; the ringing of interpolated MRI reached 0.005
    dense, most_dense = 700.0, 0.3  # HU, part; CT had up to 0.12, scans without their intercept over 0.34

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check each key's image, of any shape.

        Raises:
            InputError: an image is not CT in HU; says which values it has.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            reason = self._fault(np.asarray(torch.as_tensor(d[key]).cpu(), dtype=np.float32).ravel(order="K"))
            if reason:
                name = getattr(d[key], "meta", {}).get("filename_or_obj", f"image '{key}'")
                raise InputError(
                    f"{name}: is not CT in Hounsfield units: {reason}. Allowed: CT where air is about -1000, "
                    "fat -100, soft tissue 0 to 100 HU. If it is CT, apply its rescale (HU = stored value x "
                    "slope + intercept) or export it anew; for MRI and others use a model made for them."
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
        if high < self.darkest_maximum or not tissue.size:
            return f"nothing but air (found {found})"
        if np.mean(tissue < self.negative) < self.least_negative:
            return f"almost no voxel below {self.negative:g}, where fat, lung and air are (found {found})"
        if np.mean(tissue > self.dense) > self.most_dense:
            return f"too many voxels above {self.dense:g}, as if the intercept were missing (found {found})"
        return ""


def load_volume(path: str | Path) -> MetaTensor:
    """Read and check one volume; see `LoadVolumed`."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: does not exist. Give {_FORMS}.")
    voxels, affine = read_volume(path)
    bad = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels.T)  # of all at once: another array
    if bad:
        raise InputError(
            f"{path}: has {bad} NaN or infinite voxels of {voxels.size}; all must be finite. "
            "Replace them, for CT by -1024 (air), or export the volume anew."
        )
    meta = {
        "filename_or_obj": str(path),
        "original_affine": torch.as_tensor(affine),
        "spatial_shape": np.asarray(voxels.shape),  # an array, as MONAI has it: MONAI Label compares it
        "original_channel_dim": 0,
        "space": "RAS",
    }
    return MetaTensor(torch.from_numpy(voxels)[None], affine=torch.as_tensor(affine), meta=meta)


def _is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def _volumes_in(folder: Path) -> list[Path]:
    """The folder's volume files and DICOM folders, sorted; a broken link counts, so that it is reported."""
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    files = [p for p in visible if _is_volume(p) and not p.is_dir() and not _is_result(p)]
    series = [p for p in [folder, *visible] if p.is_dir() and dicom.holds_dicom(p)]
    return sorted(files + series)


def _listed(table: Path) -> list[dict[str, str]]:
    """The cases of a table."""
    rows = read_rows(table, ["image"])
    paths = [Path(os.path.abspath(table.parent / Path(row["image"]).expanduser())) for row in rows]
    for line, path in enumerate(paths, start=2):
        if not path.exists() or not (dicom.holds_dicom(path) if path.is_dir() else _is_volume(path)):
            wrong = "is no volume" if path.exists() else "does not exist"
            raise InputError(
                f"{table}, line {line}: {path} {wrong}. Allowed as image: a volume file ({', '.join(VOLUME_SUFFIXES)}) "
                "or a folder holding one DICOM series, absolute or relative to the table's folder."
            )
    names = [row["case"] for row in rows] if "case" in rows[0] else _unique_names(paths)
    first: dict[str, int] = {}
    for line, name in enumerate(names, start=2):
        if not name or _NO_NAME.search(name):
            wrong = f"'{name}' cannot be part of a file's name" if name else "no case in this row"
            raise InputError(
                f"{table}, line {line}: {wrong}. Give each case a name without / and \\ or dot at its start."
            )
        earlier = first.setdefault(name.lower(), line)
        if earlier != line:
            raise InputError(
                f"{table}, line {line}: the case '{name}' is that of line {earlier} too. Results are named after "
                "cases: give each another name, also where upper and lower case are the same."
            )
    return [{"image": str(path), "case": name} for path, name in zip(paths, names, strict=True)]


def _is_result(path: Path) -> bool:
    """Whether an earlier run wrote a file (mask, probabilities, heat map) with report and picture into its folder."""
    stem = path.name.removesuffix(".nii.gz").removesuffix("_prob")
    if stem.endswith("_heatmap"):
        return all(path.with_name(name).is_file() for name in (f"{stem}.png", f"{stem[:-8]}_class.json"))
    return stem.endswith("_seg") and all(path.with_name(stem + ending).is_file() for ending in (".json", ".png"))


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
