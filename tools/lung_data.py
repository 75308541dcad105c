"""The training folder of the lung bundles: real scans with left and right lung, and phantoms.

    python -m tools.lung_data make --source DATA_DIR --out OUT_DIR [--phantoms 48] [--spacing 2.0]
    python -m tools.lung_data look OUT_DIR --png PICTURE_DIR

`make` writes a Decathlon-style folder: canonical orientation, native grid, int16 images, uint8 labels (0 background,
1 left lung, 2 right lung), and in dataset.json a patient per case, so that a split never parts a patient. The one
whole chest with a label by hand, cip64, is the test list and is never trained on. What is there already is kept.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fire
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pydicom
from monai.transforms import LoadImage
from scipy import ndimage

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from tools.lung_labels import (
    BONE_ABOVE_HU,
    LEFT,
    LUNG_BELOW_HU,
    RIGHT,
    central_airway,
    close,
    dilate,
    label_lungs,
    outside_air,
    part_sides,
)
from tools.phantom import field_of_view, make_phantom

LABELS = {"0": "background", "1": "left lung", "2": "right lung"}
FIRST_SEED = 1000  # of the phantoms; tests and demo use lower ones
Box = tuple[int, int, int, int]
Spacing = tuple[float, float, float]
Labeller = Callable[[np.ndarray, Spacing, Path], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A real scan: where it lies below the data folder, whose it is and how its label is made.

    `weight` is how often training draws it, a phantom's being 1; `slices` keeps only those axial slices (from the
    feet) of a volume with damaged ends.
    """

    name: str
    path: str
    patient: str
    labeller: Labeller
    weight: float = 1.0
    held_out: bool = False
    slices: tuple[int, int] | None = None


def make(source: str, out: str, phantoms: int = 48, spacing: float = 2.0) -> None:
    """Build the folder.

    Args:
        source: folder with lung_ct, chest_ct_dicom and unlabelled_ct.
        out: folder to write; cases that it holds already are kept.
        phantoms: number of synthetic scans.
        spacing: voxel size of the phantoms in mm.

    Raises:
        InputError: `source` lacks one of the scans.
    """
    root, folder = Path(source), Path(out)
    missing = [case.path for case in CASES if not (root / case.path).exists()]
    if missing:
        raise InputError(f"{root}: {', '.join(missing)} not found; give --source the folder that holds lung_ct")
    entries: dict[str, list[dict[str, Any]]] = {"training": [], "test": []}
    for case in CASES:
        kind = "test" if case.held_out else "training"
        entry = _add(folder, case.name, case.held_out, partial(_real, root, case))
        entries[kind].append({**entry, "patient": case.patient, "weight": case.weight})
    for number in range(phantoms):
        name = f"phantom_{number:03d}"
        entry = _add(folder, name, False, partial(_phantom, FIRST_SEED + number, spacing))
        entries["training"].append({**entry, "patient": name, "weight": 1.0})
    index = {
        "name": "lung_ct_left_right",
        "description": "lungs in CT, labelled by hand or by the classical method of tools.lung_labels; phantoms",
        "modality": {"0": "CT"},
        "labels": LABELS,
        "numTraining": len(entries["training"]),
        "numTest": len(entries["test"]),
        **entries,
    }
    with replacing(folder / "dataset.json") as hidden:
        hidden.write_text(json.dumps(index, indent=1) + "\n")
    print(f"{folder}/dataset.json: {len(entries['training'])} for training, {len(entries['test'])} held out")


def look(folder: str, png: str) -> None:
    """Draw each case of a folder to PNG: three planes through the mask's centre, left red, right blue."""
    root, pictures = Path(folder), Path(png)
    index_path = root / "dataset.json"
    if not index_path.is_file():
        raise InputError(f"{index_path} not found; make the folder first (python -m tools.lung_data make)")
    index = json.loads(index_path.read_text())
    pictures.mkdir(parents=True, exist_ok=True)
    for entry in index["training"] + index["test"]:
        image, label = _canonical(root / entry["image"]), _canonical(root / entry["label"])
        name = Path(entry["image"]).name.removesuffix(".nii.gz")
        _draw(np.asarray(image.dataobj), np.asarray(label.dataobj), image.header.get_zooms(), name, pictures)


def read_boxes(boxes_dir: Path, series_dir: Path) -> dict[int, Box]:
    """A reader's boxes by slice number from the feet; (xmin, ymin, xmax, ymax) in DICOM columns and rows.

    Args:
        boxes_dir: VOC files, each named after the SOPInstanceUID of its slice.
        series_dir: DICOM files of the series.
    """
    heights = {}
    for path in series_dir.glob("*.dcm"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        heights[str(header.SOPInstanceUID)] = float(header.ImagePositionPatient[2])
    order = sorted(heights, key=lambda uid: heights[uid])
    boxes: dict[int, Box] = {}
    for path in sorted(boxes_dir.glob("*.xml")):
        box = ET.parse(path).getroot().find("object/bndbox")
        if box is not None and path.stem in heights:
            x0, y0, x1, y1 = (int(box.findtext(key, "0")) for key in ("xmin", "ymin", "xmax", "ymax"))
            boxes[order.index(path.stem)] = (x0, y0, x1, y1)
    return boxes


def include_mass(
    label: np.ndarray, hu: np.ndarray, spacing: Spacing, boxes: Mapping[int, Box], side: int
) -> np.ndarray:
    """Give a solid mass at the lung's wall, which a threshold leaves out, to the lung as a reader would.

    It is the soft tissue in the ellipse that each slice's box holds (the aorta is in a box's corner), up to the inner
    side of the rib cage: ribs of the neighbouring slices, joined by a closing.

    Args:
        label: uint8 (X, Y, Z) in canonical order, 0, 1 left, 2 right.
        hu: image in HU, same shape.
        spacing: mm.
        boxes: slice number to box, as `read_boxes` gives them.
        side: label that the mass belongs to.
    """
    result = label.copy()
    plane = spacing[:2]
    for z, box in boxes.items():
        near = ndimage.gaussian_filter(hu[:, :, max(0, z - 2) : z + 3], [0.8, 0.8, 0.0]).max(axis=2)
        wall = dilate(close(near > BONE_ABOVE_HU, plane, 12.0), plane, 2.0)
        free = (label[:, :, z] == 0) & ~wall
        lung = label[:, :, z] == side
        grown = close(lung | (free & _ellipse(wall.shape, box)), plane, 5.0) & (lung | free)
        pieces, _ = ndimage.label(grown)
        largest = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
        result[:, :, z][ndimage.binary_fill_holes(largest) & (lung | free)] = side
    return result


def _classical(hu: np.ndarray, spacing: Spacing, path: Path) -> np.ndarray:
    return label_lungs(hu, spacing)


def _empty(hu: np.ndarray, spacing: Spacing, path: Path) -> np.ndarray:
    return np.zeros(hu.shape, np.uint8)


def _classical_with_mass(hu: np.ndarray, spacing: Spacing, path: Path) -> np.ndarray:
    boxes = read_boxes(path.parent / "tumour_boxes_voc", path)
    return include_mass(label_lungs(hu, spacing), hu, spacing, boxes, LEFT)


def _given_parted(hu: np.ndarray, spacing: Spacing, path: Path) -> np.ndarray:
    """The given label of both lungs, parted."""
    return part_sides(_given(path), hu, np.zeros(hu.shape, bool), spacing)


def _given_right(hu: np.ndarray, spacing: Spacing, path: Path) -> np.ndarray:
    """The given right lung without hilum and airway, and the strip of left lung at the view's left edge."""
    given = _given(path)
    own = label_lungs(hu, spacing) > 0
    outside, air_hu = outside_air(hu, spacing)
    gas = (hu < LUNG_BELOW_HU) & ~outside
    lumen = central_airway(hu, gas, spacing, air_hu)
    airway = dilate(lumen, spacing, 2.0)
    lungs = (given | gas) & ~airway
    left = np.zeros(given.shape, bool)
    for z in range(given.shape[2]):
        pieces, _ = ndimage.label(lungs[:, :, z])
        front = np.argwhere(lumen[:, :, z])[:, 1].max(initial=0)  # gas behind the airway is the oesophagus's
        at_edge = np.setdiff1d(pieces[0, front:], pieces[int(15 / spacing[0]) :])
        left[:, :, z] = np.isin(pieces, at_edge[at_edge > 0])
    right = given & close(own & given, spacing, 8.0) & ~airway & ~left
    return np.where(right, RIGHT, np.where(left, LEFT, 0)).astype(np.uint8)


CASES = (
    Case("cip64", "lung_ct/imagesTr/cip64.nii.gz", "cip64", _given_parted, held_out=True),
    Case("elastix_baseline", "lung_ct/imagesTr/elastix_baseline.nii.gz", "elastix", _given_right, 5.0),
    Case("elastix_followup", "lung_ct/imagesTr/elastix_followup.nii.gz", "elastix", _given_right, 5.0),
    Case("totalseg_abdomen", "lung_ct/imagesTr/totalseg_abdomen.nii.gz", "totalseg_abdomen", _classical, 6.0),
    Case("chest_dicom", "chest_ct_dicom/series", "chest_dicom", _classical_with_mass, 12.0),
    Case("totalseg_aorta", "unlabelled_ct/totalseg_aorta.nii.gz", "totalseg_aorta", _classical, 8.0),
    Case("totalseg_pulmonary", "unlabelled_ct/totalseg_pulmonary.nii.gz", "totalseg_aorta", _classical, 6.0),
    Case("ctfm_s0335", "unlabelled_ct/ctfm_s0335.nii.gz", "ctfm_s0335", _classical, 5.0),
    Case("ctfm_ts0002", "unlabelled_ct/ctfm_ts0002.nii.gz", "ctfm_ts0002", _empty, 3.0, slices=(9, 99)),
    Case("ctfm_ts0003", "unlabelled_ct/ctfm_ts0003.nii.gz", "ctfm_ts0003", _classical, 5.0),
    Case("ctfm_ts0009", "unlabelled_ct/ctfm_ts0009.nii.gz", "ctfm_ts0009", _empty, 3.0),
)


def _ellipse(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Ellipse inscribed in a DICOM box, in the canonical array, whose axes run the other way."""
    x0, y0, x1, y1 = box
    i, j = np.indices(shape)
    centre = (shape[0] - 1 - (x0 + x1) / 2, shape[1] - 1 - (y0 + y1) / 2)
    return np.asarray(((i - centre[0]) / ((x1 - x0) / 2)) ** 2 + ((j - centre[1]) / ((y1 - y0) / 2)) ** 2 <= 1.0)


def _canonical(path: Path) -> nib.Nifti1Image:
    if path.is_dir():
        volume = LoadImage(reader="ITKReader", image_only=True, dtype=np.int16)(path)
        return nib.as_closest_canonical(nib.Nifti1Image(volume.numpy(), volume.affine.numpy()))
    return nib.as_closest_canonical(nib.load(path))


def _given(image_path: Path) -> np.ndarray:
    label_path = image_path.parent.parent / "labelsTr" / image_path.name
    return np.asarray(_canonical(label_path).dataobj) > 0


def _real(root: Path, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scan = _canonical(root / case.path)
    hu = np.asarray(scan.dataobj, dtype=np.float32)
    x, y, z = (float(step) for step in scan.header.get_zooms()[:3])
    label = case.labeller(hu, (x, y, z), root / case.path)
    affine = scan.affine
    if case.slices:
        kept = slice(*case.slices)
        hu, label = hu[:, :, kept], label[:, :, kept]
        affine = scan.slicer[:, :, kept].affine
    return hu, label, affine


def _phantom(seed: int, spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    phantom = make_phantom(seed, field_of_view(seed), (spacing, spacing, spacing), region="random")
    return phantom.image, phantom.label, phantom.affine


def _add(
    folder: Path,
    name: str,
    held_out: bool,
    build: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> dict[str, str]:
    """Write one case unless it is there, and return its paths in the folder."""
    part = "Ts" if held_out else "Tr"
    image, label = f"images{part}/{name}.nii.gz", f"labels{part}/{name}.nii.gz"
    if not ((folder / image).is_file() and (folder / label).is_file()):
        hu, mask, affine = build()
        _write_nifti(folder / image, np.rint(np.clip(hu, -1100, 3200)).astype(np.int16), affine)
        _write_nifti(folder / label, mask.astype(np.uint8), affine)
        print(f"{name}: left {int((mask == LEFT).sum())}, right {int((mask == RIGHT).sum())} voxels", flush=True)
    return {"image": f"./{image}", "label": f"./{label}"}


def _write_nifti(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    with replacing(path) as hidden:
        nib.save(nib.Nifti1Image(data, affine), hidden)


def _draw(image: np.ndarray, label: np.ndarray, spacing: Spacing, name: str, folder: Path) -> None:
    centre = np.argwhere(label).mean(axis=0) if label.any() else np.array(image.shape) / 2
    figure, axes = plt.subplots(1, 3, figsize=(18, 6))
    for panel, axis in zip(axes, (2, 1, 0), strict=True):
        across, up = (a for a in range(3) if a != axis)
        at = int(centre[axis])
        aspect = spacing[up] / spacing[across]
        panel.imshow(image.take(at, axis).T, cmap="gray", vmin=-1100, vmax=300, origin="lower", aspect=aspect)
        for side, colour in ((LEFT, "red"), (RIGHT, "deepskyblue")):
            cut = (label.take(at, axis) == side).T
            if cut.any():
                panel.contour(cut, [0.5], colors=colour, linewidths=0.8)
        if axis != 0:
            panel.invert_xaxis()  # the patient's right at the picture's left, as radiologists look
        panel.axis("off")
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"make": make, "look": look})
