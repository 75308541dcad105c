"""Nodules cut out of real CT: read with their masks, and put into other lungs with a border that blends.

A nodule is turned by chance in the axial plane and mirrored, which lungs are too. Its size is that which its readers
measured, unless it is magnified to a mass. Where its mask ends, the host shows through within ``FADE_MM``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from med3d_nets import read_datalist, split_by_patient
from med3d_nets.errors import InputError
from med3d_nets.tables import read_rows

MANIFEST = Path(__file__).parent / "manifests" / "real8.json"
FADE_MM = 2.5
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Crop:
    """Where a nodule's crop lies, and what its readers said.

    Attributes:
        name: case, ``LIDC-IDRI-0001_R_1``.
        patient: the case's patient.
        image: path of the crop in HU.
        label: path of its mask.
        diameter: mm, as measured by the readers.
    """

    name: str
    patient: str
    image: str
    label: str
    diameter: float


@dataclass(frozen=True)
class Nodule:
    """A nodule on a grid of 1 mm, its middle the grid's middle.

    Attributes:
        hu: HU, (X, Y, Z).
        weight: share of the nodule against what is around it, 0 to 1, same shape.
        inside: its mask, same shape.
        diameter: mm.
    """

    hu: Array
    weight: Array
    inside: NDArray[np.bool_]
    diameter: float


def read_crops(data: str | Path) -> tuple[list[Crop], list[Crop]]:
    """List the crops of ``DATA/nodule_ct``: those to train with, and those of the patients that are held out.

    The patients are those that the manifest ``real8.json`` holds out of every training.

    Raises:
        InputError: the folder lacks its index or the table of its readers.
    """
    folder = Path(data) / "nodule_ct"
    table = folder / "metadata.csv"
    if not table.is_file():
        raise InputError(f"{table} not found. Give the folder that has nodule_ct with its metadata.csv.")
    rows = read_rows(table, ("patient_id", "nodule_id", "diameter_mm"))
    sizes = {f"{row['patient_id']}_R_{row['nodule_id']}": float(row["diameter_mm"]) for row in rows}
    domains = json.loads(MANIFEST.read_text(encoding="utf-8"))["domains"]
    domain = next(one for one in domains if one["name"] == "nodule_ct")
    cases = [one for one in read_datalist(folder, "training", domain["patient_pattern"]) if one["case"] in sizes]
    parts = split_by_patient(cases, domain["hold_out"])
    train, test = (
        [Crop(one["case"], one["patient"], one["image"], one["label"], sizes[one["case"]]) for one in part]
        for part in parts
    )
    return train, test


def read_nodule(crop: Crop, rng: np.random.Generator, magnified: float = 1.0) -> Nodule:
    """Read a crop, turn and mirror it by chance, and bring it onto 1 mm.

    Args:
        crop: the nodule.
        rng: of turn and mirrors.
        magnified: how many times as large it becomes.
    """
    image, label = (nib.as_closest_canonical(nib.load(path)) for path in (crop.image, crop.label))
    hu = np.asarray(image.dataobj, dtype=np.float32)
    mask = np.asarray(label.dataobj) > 0
    step = magnified * np.array(image.header.get_zooms()[:3], dtype=float)
    middle = np.argwhere(mask).mean(axis=0)
    reach = np.ptp(np.argwhere(mask) * step, axis=0) / 2 + step
    half = np.ceil(np.hypot(reach[0], reach[1]) + FADE_MM + 2), np.ceil(reach[2] + FADE_MM + 2)
    sizes = [int(half[0]) * 2 + 1, int(half[0]) * 2 + 1, int(half[1]) * 2 + 1]
    offset = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in sizes], indexing="ij"))
    angle, signs = rng.uniform(0, 2 * np.pi), rng.choice([-1.0, 1.0], 3)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    index = np.einsum("ij,jxyz->ixyz", turn * signs[:, None], offset) / step[:, None, None, None]
    index += middle[:, None, None, None]
    fine = ndimage.map_coordinates(hu, index, order=1, mode="nearest")
    inside = ndimage.map_coordinates(mask.astype(np.float32), index, order=1, mode="constant") > 0.5
    outside = ndimage.distance_transform_edt(~inside)
    ramp = np.clip(1 - (outside - 0.5) / FADE_MM, 0, 1)
    weight = (0.5 - 0.5 * np.cos(np.pi * ramp)).astype(np.float32)
    return Nodule(fine, weight, inside, magnified * crop.diameter)


def insert(
    hu: Array,
    spacing: tuple[float, float, float],
    voxel: NDArray[np.int64],
    nodule: Nodule,
    within: NDArray[np.bool_] | None = None,
) -> None:
    """Put a nodule into a scan, in place.

    Args:
        hu: the scan, HU, (X, Y, Z), axes to the right, front and head.
        spacing: mm.
        voxel: index of the nodule's middle.
        nodule: what to put there.
        within: where the scan may change, same shape; None: anywhere.
    """
    step = np.array(spacing)
    half = (np.array(nodule.hu.shape) - 1) / 2
    low = np.maximum(np.floor(voxel - half / step).astype(int), 0)
    high = np.minimum(np.ceil(voxel + half / step).astype(int) + 1, hu.shape)
    index = np.stack(np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high, strict=True)], indexing="ij"))
    place = (index - voxel[:, None, None, None]) * step[:, None, None, None] + half[:, None, None, None]
    blur = [0.4 * max(0.0, s - 1.0) for s in step]  # a voxel of the host averages what lies in it
    weighted = ndimage.gaussian_filter(nodule.hu * nodule.weight, blur)
    weight = ndimage.gaussian_filter(nodule.weight, blur)
    part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    share = ndimage.map_coordinates(weight, place, order=1, mode="constant")
    blended = hu[part] * (1 - share) + ndimage.map_coordinates(weighted, place, order=1, mode="constant")
    hu[part] = blended if within is None else np.where(within[part], blended, hu[part])
