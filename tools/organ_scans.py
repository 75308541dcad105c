"""Synthetic CT from a label map: one patient's anatomy, deformed, its organs as bright as clinics see them.

A scan and the map of its organs (TotalSegmentator's numbers, version 2) give any number of other ones: organs take HU
of a phase of contrast, the liver gets vessels, tumours and cysts, the body is bent, and a scanner
(``tools.phantom_scanner``) takes the picture. Tissue that the map does not name stays as it was scanned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from med3d_nets.errors import InputError
from tools import liver_tissue, phantom_scanner
from tools.liver_tissue import PHASES
from tools.phantom import Phantom
from tools.phantom_shapes import Array, Space

_LIVER = 5  # in the label map


@dataclass(frozen=True)
class Organ:
    """HU of an organ: (mean, standard deviation) over patients for each of ``PHASES``.

    Args:
        values: its numbers in the label map.
        hu: by phase.
    """

    values: tuple[int, ...]
    hu: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


# Usual values of textbooks at 120 kV; project choice, wider than one scanner's.
ORGANS = {
    "liver": Organ((_LIVER,), ((55, 8), (70, 10), (108, 14))),
    "spleen": Organ((1,), ((48, 5), (120, 18), (122, 12))),
    "kidneys": Organ((2, 3), ((33, 5), (150, 25), (180, 20))),
    "gallbladder": Organ((4,), ((8, 6), (8, 6), (8, 6))),
    "pancreas": Organ((7,), ((40, 6), (95, 15), (88, 12))),
    "adrenals": Organ((8, 9), ((25, 8), (60, 12), (65, 12))),
    "bladder": Organ((21,), ((6, 5), (6, 5), (8, 6))),
    "arteries": Organ((52, 65, 66), ((42, 5), (310, 50), (150, 18))),
    "inferior vena cava": Organ((63,), ((40, 5), (70, 20), (135, 20))),
    "portal vein": Organ((64,), ((40, 5), (90, 30), (165, 20))),
    "iliac veins": Organ((67, 68), ((40, 5), (45, 8), (110, 25))),
    "muscles": Organ(tuple(range(80, 90)), ((52, 6), (58, 6), (62, 6))),
}
_GUT = (6, 18, 19, 20)  # stomach, small bowel, duodenum, colon


@dataclass(frozen=True)
class Anatomy:
    """A scan and the map of its organs on one grid.

    Args:
        image: HU, float32, (X, Y, Z); x grows to the patient's right, y to the front, z to the head (RAS).
        labels: numbers of TotalSegmentator, (X, Y, Z).
        spacing: mm.
    """

    image: Array
    labels: NDArray[np.integer[Any]]
    spacing: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.image.shape != self.labels.shape:
            raise InputError(f"The image has {self.image.shape} voxels and its labels {self.labels.shape}.")
        if not (self.labels == _LIVER).any():
            raise InputError(f"The label map has no liver: the number {_LIVER} of TotalSegmentator (version 2).")


def make_scan(anatomy: Anatomy, seed: int, spacing: float = 2.0) -> Phantom:
    """Make one scan; the same arguments give the same.

    Args:
        anatomy: what is deformed.
        seed: of all random numbers.
        spacing: mm in the plane and, at least, between slices.

    Returns:
        Image in HU, labels 0 to 2 (background, liver, tumour), affine, and what was drawn.
    """
    rng = np.random.default_rng(seed)
    phase = int(rng.integers(len(PHASES)))
    space = _space(anatomy, rng, spacing)
    where = _source_voxels(anatomy, space, rng)
    image = _sampled(anatomy.image, where, cval=-1000)
    image += _sampled(_shift(anatomy, phase, rng), where)
    liver = np.clip(_sampled((anatomy.labels == _LIVER).astype(np.float32), where), 0, 1)
    label, count = liver_tissue.finish(image, liver, space, phase, rng)
    image = phantom_scanner.acquire(image, space, rng, _body(image, space))
    image = phantom_scanner.cut(image, label, space, rng)
    affine = np.diag([*space.spacing, 1.0])
    affine[:3, 3] = space.origin
    return Phantom(image.astype(np.float32), label, affine, {"seed": seed, "phase": PHASES[phase], "lesions": count})


def _space(anatomy: Anatomy, rng: np.random.Generator, spacing: float) -> Space:
    """The new scan's grid: about the source's middle, sometimes a part of its height, in slices of several sizes."""
    step = np.array([spacing, spacing, float(rng.choice([1.0, 1.0, 1.5, 2.5])) * spacing])
    size = np.array(anatomy.image.shape) * anatomy.spacing
    middle = np.zeros(3)
    if rng.random() < 0.6:  # few scans show all of the abdomen
        rows = np.flatnonzero((anatomy.labels == _LIVER).any(axis=(0, 1))) * anatomy.spacing[2] - size[2] / 2
        low = rng.uniform(-size[2] / 2, rows[0] + 0.5 * (rows[-1] - rows[0]))
        high = rng.uniform(max(low + 60, rows[0] + 0.5 * (rows[-1] - rows[0])), size[2] / 2 + 30)
        size[2], middle[2] = high - low, (low + high) / 2
    shape = np.maximum(np.rint(size / step), 16).astype(int)
    return Space(rng, shape, step, middle - (shape - 1) * step / 2, bend=float(rng.uniform(3, 12)))


def _source_voxels(anatomy: Anatomy, space: Space, rng: np.random.Generator) -> NDArray[np.float32]:
    """For each voxel where it is taken from: bent by ``space``, turned, sheared and scaled; (3, X, Y, Z)."""
    scale = rng.uniform(0.82, 1.22) * rng.uniform(0.9, 1.1, 3)
    matrix = np.diag(1 / scale) + rng.uniform(-0.1, 0.1, (3, 3)) * (1 - np.eye(3))
    middle = (np.array(anatomy.image.shape) - 1) / 2
    at = [space.u, space.v, space.w]
    return np.stack(
        [
            sum(np.float32(matrix[i, j] / anatomy.spacing[i]) * at[j] for j in range(3)) + np.float32(middle[i])
            for i in range(3)
        ]
    ).astype(np.float32)


def _sampled(field: Array, where: NDArray[np.float32], cval: float = 0.0) -> Array:
    result: Array = ndimage.map_coordinates(field, where, order=1, mode="constant", cval=cval, prefilter=False)
    return result


def _shift(anatomy: Anatomy, phase: int, rng: np.random.Generator) -> Array:
    """What is added to the source so that its organs have the phase's HU, and less of its noise."""
    shift = np.zeros_like(anatomy.image)
    calm = np.float32(rng.uniform(0, 0.8))
    fat = rng.uniform(10, 50) if rng.random() < 0.25 else 0.0  # of a fatty liver
    for name, organ in ORGANS.items():
        inside = np.isin(anatomy.labels, organ.values)
        if inside.any():
            target = rng.normal(*organ.hu[phase]) - (fat if name == "liver" else 0.0)
            found = anatomy.image[inside]
            middle = np.median(found)
            shift[inside] = target - middle - calm * np.clip(found - middle, -60, 60)
    for value in _GUT:
        inside = (anatomy.labels == value) & (anatomy.image > -100)
        shift[inside] = rng.uniform(80, 300) if rng.random() < 0.2 else rng.normal(0, 12)
    bones = np.isin(anatomy.labels, (*range(25, 51), *range(75, 79), *range(92, 117))) & (anatomy.image > 100)
    shift[bones] = (rng.uniform(0.8, 1.25) - 1) * anatomy.image[bones]
    smooth: Array = ndimage.gaussian_filter(shift, 0.4)
    return smooth


def _body(image: Array, space: Space) -> Array:
    """Signed distance to the body's surface, mm, negative inside."""
    pieces, _ = ndimage.label(image > -350)
    sizes = np.bincount(pieces.ravel())
    inside = pieces == 1 + sizes[1:].argmax() if len(sizes) > 1 else pieces > 0
    inside = ndimage.binary_fill_holes(inside)
    outer = ndimage.distance_transform_edt(~inside, sampling=space.spacing)
    inner = ndimage.distance_transform_edt(inside, sampling=space.spacing)
    return (outer - inner).astype(np.float32)
