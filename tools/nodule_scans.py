"""Whole scans with known nodules: real nodules (LIDC-IDRI) in the lungs of other scans and of phantoms.

    python -m tools.nodule_scans make --data DATA --out DIR [--phantoms 20] [--copies 5]
    python -m tools.nodule_scans look DIR/test --png PICTURE_DIR

`make` writes DIR/train and DIR/test, each as LUNA16 is: scans (here NIfTI) named after their series, and
annotations.csv with seriesuid, coordX, coordY, coordZ (middle in LPS world mm) and diameter_mm. Each scan to train on
also has a mass at the lung's border, a nodule magnified to 35 to 70 mm, where there is room. The test folder has
nodules of held-out patients alone, in scans that no training folder has: the chest CT of DATA/chest_ct_dicom with
its tumour, which is listed in annotations_excluded.csv (finding it is neither right nor wrong), one real crop, and
phantoms with numbers of their own. DIR/test_real has that chest CT as it is, its tumour as the annotation. What is
there already is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fire
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.tables import csv_text, read_rows
from tools.lung_data import _canonical, _classical_with_mass, read_boxes
from tools.lung_labels import label_lungs
from tools.nodule_crops import Crop, insert, read_crops, read_nodule
from tools.nodule_places import Places
from tools.phantom import field_of_view, make_phantom

COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
ML_PER_NODULE = 350.0  # of lung; scans have 0 to 20 nodules of 3 mm and more, here more than usual, to train on
MOST = 8
LARGEST_MM = 40.0
MASS_MM, LEAST_OF_MASS_MM = (35.0, 70.0), 12.0  # a mass, and the nodule that it is made of
FIRST_SEED, FIRST_TEST_SEED = 7000, 7900  # of the phantoms
Row = tuple[str, float, float, float, float]
Scan = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64], list[Row]]


@dataclass(frozen=True)
class Host:
    """A scan without known nodules.

    Attributes:
        name: first part of its series' names.
        read: gives HU, lungs (1 left, 2 right), affine (RAS) and what is to be excluded.
        copies: how many scans are made of it.
    """

    name: str
    read: Callable[[], Scan]
    copies: int


def make(data: str, out: str, phantoms: int = 20, copies: int = 5, seed: int = 0) -> None:
    """Write the folders.

    Args:
        data: folder with nodule_ct, chest_ct_dicom, unlabelled_ct and lung_ct.
        out: folder to write; scans that it holds already are kept.
        phantoms: synthetic scans to train on; a quarter as many are for the test.
        copies: scans made of each real one, each with other nodules.
        seed: of nodules and places.

    Raises:
        InputError: `data` lacks one of the scans, or nodule_ct.
    """
    train, test = read_crops(data)
    real = {name: partial(_real, Path(data) / path) for name, path in TRAIN_HOSTS.items()}
    hosts = [Host(name, read, copies) for name, read in real.items()]
    hosts += [Host(f"phantom_{i:03d}", partial(_phantom, FIRST_SEED + i), 1) for i in range(phantoms)]
    _write(Path(out) / "train", hosts, train, np.random.default_rng((seed, 0)), np.random.default_rng((seed, 2)))
    held_out = [Host("chest_dicom", partial(_chest, Path(data)), copies)]
    held_out += [Host(name, partial(_real, Path(data) / path), copies) for name, path in TEST_HOSTS.items()]
    held_out += [Host(f"phantom_t{i:02d}", partial(_phantom, FIRST_TEST_SEED + i), 1) for i in range(-(-phantoms // 4))]
    _write(Path(out) / "test", held_out, test, np.random.default_rng((seed, 1)))
    hu, _, affine, tumour = _chest(Path(data))
    _save(Path(out) / "test_real" / "chest_dicom.nii.gz", hu, affine)
    _table(Path(out) / "test_real" / "annotations.csv", [("chest_dicom", *tumour[0][1:])])


def look(folder: str, png: str) -> None:
    """Draw each nodule of a folder to PNG: three planes through its middle, the diameter as a circle."""
    pictures = Path(png)
    pictures.mkdir(parents=True, exist_ok=True)
    rows = read_rows(Path(folder) / "annotations.csv", ("seriesuid",))
    for name in sorted({row["seriesuid"] for row in rows}):
        scan: Any = nib.load(Path(folder) / f"{name}.nii.gz")
        own = [row for row in rows if row["seriesuid"] == name]
        figure, axes = plt.subplots(3, len(own), figsize=(3 * len(own), 9), squeeze=False)
        for column, row in zip(axes.T, own, strict=True):
            _draw(scan, row, column)
        figure.suptitle(name)
        figure.tight_layout()
        figure.savefig(pictures / f"{name}.png", dpi=60)
        plt.close(figure)


def _write(
    folder: Path,
    hosts: Sequence[Host],
    crops: Sequence[Crop],
    rng: np.random.Generator,
    of_masses: np.random.Generator | None = None,
) -> None:
    """Fill every host with nodules, and with a mass where ``of_masses`` draws them.

    The same arguments give the same scans, whatever is there already.
    """
    large = [crop for crop in crops if LEAST_OF_MASS_MM <= crop.diameter <= LARGEST_MM]
    order = _shuffled(crops, rng)
    rows: list[Row] = []
    excluded: list[Row] = []
    for host in hosts:
        hu, lungs, affine, known = host.read()
        x, y, z = (float(step) for step in nib.affines.voxel_sizes(affine))
        places = Places(hu, lungs, (x, y, z))
        count = int(np.clip((lungs > 0).sum() * x * y * z / 1000 / ML_PER_NODULE, 1, MOST))
        for copy in range(host.copies):
            name = f"{host.name}_{copy}" if host.copies > 1 else host.name
            filled, own = _fill(hu, affine, known, places, [next(order) for _ in range(count)], rng)
            if of_masses is not None:
                own += _add_mass(filled, affine, [*own, *known], places, large, of_masses)
            rows += [(name, *row[1:]) for row in own]
            excluded += [(name, *row[1:]) for row in known]
            _save(folder / f"{name}.nii.gz", filled, affine)
            print(f"{folder.name}/{name}: {len(own)} nodules", flush=True)
    _table(folder / "annotations.csv", rows)
    if excluded:
        _table(folder / "annotations_excluded.csv", excluded)


def _shuffled(crops: Sequence[Crop], rng: np.random.Generator) -> Iterator[Crop]:
    """All crops in random order, then again: no nodule comes twice before each came once."""
    while True:
        for index in rng.permutation(len(crops)):
            if crops[index].diameter <= LARGEST_MM:
                yield crops[index]


def _fill(
    hu: NDArray[np.float32],
    affine: NDArray[np.float64],
    known: Sequence[Row],
    places: Places,
    crops: Sequence[Crop],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], list[Row]]:
    """A copy of a scan with nodules, and their rows, without the series' name."""
    x, y, z = (float(step) for step in nib.affines.voxel_sizes(affine))
    taken = _taken(affine, known)
    filled, rows = hu.copy(), []
    for crop in crops:
        voxel = places.draw(crop.diameter / 2, taken, rng)
        nodule = read_nodule(crop, rng)
        if voxel is not None:
            insert(filled, (x, y, z), voxel, nodule)
            taken.append((voxel.astype(float), crop.diameter / 2))
            rows.append(("", *_lps(affine, voxel), crop.diameter))
    return filled, rows


def _add_mass(
    hu: NDArray[np.float32],
    affine: NDArray[np.float64],
    known: Sequence[Row],
    places: Places,
    crops: Sequence[Crop],
    rng: np.random.Generator,
) -> list[Row]:
    """Put a mass into a scan, in place, inside its lungs alone; its row, or none where there is no room."""
    x, y, z = (float(step) for step in nib.affines.voxel_sizes(affine))
    crop, diameter = crops[int(rng.integers(len(crops)))], float(rng.uniform(*MASS_MM))
    voxel = places.draw_mass(diameter / 2, _taken(affine, known), rng)
    if voxel is None:
        return []
    insert(hu, (x, y, z), voxel, read_nodule(crop, rng, diameter / crop.diameter), within=places.lungs)
    return [("", *_lps(affine, voxel), diameter)]


def _taken(affine: NDArray[np.float64], rows: Sequence[Row]) -> list[tuple[NDArray[np.float64], float]]:
    """Middles in voxels and radii in mm."""
    inverse = np.linalg.inv(affine)
    return [(nib.affines.apply_affine(inverse, [-row[1], -row[2], row[3]]), row[4] / 2) for row in rows]


def _lps(affine: NDArray[np.float64], voxel: NDArray[np.int64]) -> tuple[float, float, float]:
    right, front, head = nib.affines.apply_affine(affine, voxel)
    return -float(right), -float(front), float(head)


def _real(path: Path) -> Scan:
    if not path.exists():
        raise InputError(f"{path} not found. Give the folder that has lung_ct and unlabelled_ct.")
    scan = _canonical(path)
    hu = np.asarray(scan.dataobj, dtype=np.float32)
    x, y, z = (float(step) for step in scan.header.get_zooms()[:3])
    return hu, label_lungs(hu, (x, y, z)), scan.affine, []


def _chest(data: Path) -> Scan:
    """The chest CT with a tumour: its lungs with the tumour, and the tumour's middle and mean diameter."""
    path = data / "chest_ct_dicom" / "series"
    if not path.is_dir():
        raise InputError(f"{path} not found. Give the folder that has chest_ct_dicom.")
    scan = _canonical(path)
    hu = np.asarray(scan.dataobj, dtype=np.float32)
    x, y, z = (float(step) for step in scan.header.get_zooms()[:3])
    lungs = _classical_with_mass(hu, (x, y, z), path)
    boxes = read_boxes(path.parent / "tumour_boxes_voc", path)
    columns = np.array(list(boxes.values()), dtype=float)
    size = [(columns[:, 2] - columns[:, 0]).max() * x, (columns[:, 3] - columns[:, 1]).max() * y, len(boxes) * z]
    low, high = columns[:, :2].min(axis=0), columns[:, 2:].max(axis=0)
    # DICOM's columns and rows run the other way than the canonical axes
    middle = [hu.shape[0] - 1 - (low[0] + high[0]) / 2, hu.shape[1] - 1 - (low[1] + high[1]) / 2]
    middle.append((min(boxes) + max(boxes)) / 2)
    return hu, lungs, scan.affine, [("", *_lps(scan.affine, np.array(middle)), float(np.mean(size)))]


def _phantom(seed: int) -> Scan:
    phantom = make_phantom(seed, field_of_view(seed), (1.5, 1.5, 1.5), pathology=None)
    return phantom.image, phantom.label, phantom.affine, []


def _save(path: Path, hu: NDArray[np.float32], affine: NDArray[np.float64]) -> None:
    if not path.is_file():
        with replacing(path) as hidden:
            nib.save(nib.Nifti1Image(np.rint(np.clip(hu, -1100, 3200)).astype(np.int16), affine), hidden)


def _table(path: Path, rows: Sequence[Row]) -> None:
    text = csv_text(COLUMNS, [[name, *(f"{value:.4f}" for value in rest)] for name, *rest in rows])
    with replacing(path) as hidden:
        hidden.write_text(text, encoding="utf-8")


def _draw(scan: Any, row: dict[str, str], panels: NDArray) -> None:
    point = [-float(row["coordX"]), -float(row["coordY"]), float(row["coordZ"])]
    middle = nib.affines.apply_affine(np.linalg.inv(scan.affine), point)
    step, radius = nib.affines.voxel_sizes(scan.affine), float(row["diameter_mm"]) / 2
    hu = np.asarray(scan.dataobj)
    for panel, axis in zip(panels, (2, 1, 0), strict=True):
        across, up = (a for a in range(3) if a != axis)
        plane = hu.take(int(np.clip(round(middle[axis]), 0, hu.shape[axis] - 1)), axis).T
        extent = [-0.5 * step[across], (plane.shape[1] - 0.5) * step[across]]
        extent += [-0.5 * step[up], (plane.shape[0] - 0.5) * step[up]]
        panel.imshow(plane, cmap="gray", vmin=-1100, vmax=300, origin="lower", extent=extent)
        a, b = middle[across] * step[across], middle[up] * step[up]
        panel.add_patch(plt.Circle((a, b), radius * 1.6 + 3, fill=False, color="yellow", linewidth=0.8))
        panel.set_xlim(a - 45, a + 45)
        panel.set_ylim(b - 45, b + 45)
        panel.axis("off")
    panels[0].set_title(f"{float(row['diameter_mm']):.1f} mm", fontsize=8)


TRAIN_HOSTS = {
    "totalseg_aorta": "unlabelled_ct/totalseg_aorta.nii.gz",
    "totalseg_pulmonary": "unlabelled_ct/totalseg_pulmonary.nii.gz",
    "elastix_baseline": "lung_ct/imagesTr/elastix_baseline.nii.gz",
    "elastix_followup": "lung_ct/imagesTr/elastix_followup.nii.gz",
}
TEST_HOSTS = {"ctfm_s0335": "unlabelled_ct/ctfm_s0335.nii.gz"}


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"make": make, "look": look})
