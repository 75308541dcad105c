"""Synthetic CT of chest and abdomen with labels of the lungs, for training, tests and users without data.

    python -m tools.phantom make --out DIR --count 20 --seed 1
    python -m tools.phantom sample chest.nii.gz

`make` writes a Decathlon-style folder (imagesTr, labelsTr, dataset.json). Labels: 0 background, 1 left lung,
2 right lung. The anatomy is drawn from formulas and random numbers (`tools.phantom_anatomy`); no patient's scan is
in it. Vessels, bronchi and disease within the lung belong to the lung; trachea, main bronchi, hilar vessels and
pleural fluid do not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from tools import liver_tissue, phantom_lungs, phantom_scanner, phantom_tissue
from tools import phantom_anatomy as anatomy
from tools.phantom_shapes import Array, Space, cover, paint

LABELS = {"0": "background", "1": "left lung", "2": "right lung"}
# name: (lowest, highest) middle of the volume and (lowest, highest) length, mm of an average patient; None: as asked
REGIONS: dict[str, tuple[tuple[float, float], tuple[float, float] | None]] = {
    "thorax": ((-45, -35), None),
    "chest_abdomen": ((-160, -120), (480, 560)),
    "abdomen": ((-290, -230), (220, 320)),
    "apices": ((70, 130), (90, 160)),
    "slab": ((-110, 50), (40, 140)),
    "crop": ((-80, 20), (160, 300)),  # a narrow field of view, often of one lung alone
}
_OFTEN = {"thorax": 0.55, "chest_abdomen": 0.14, "abdomen": 0.08, "apices": 0.05, "slab": 0.1, "crop": 0.08}


@dataclass
class Phantom:
    """A synthetic scan.

    Attributes:
        image: float32 HU, shape (X, Y, Z); x grows to the patient's right, y to the front, z to the head.
        label: uint8 of the same shape: 0 background, 1 left lung, 2 right lung; or 1 liver, 2 tumour.
        affine: (4, 4) voxel to RAS mm.
        info: what was drawn.
    """

    image: Array
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    info: dict[str, Any] = field(default_factory=dict)


def make_phantom(
    seed: int,
    size_mm: Sequence[float] = (360, 260, 300),
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    region: str = "thorax",
    pathology: str | None = "random",
    noise: float | None = None,
    organ: str = "lungs",
) -> Phantom:
    """Make one synthetic CT; the same arguments give the same scan.

    Args:
        seed: of all random numbers.
        size_mm: field of view per axis. Regions other than "thorax" draw the length in z themselves.
        spacing: voxel size in mm per axis.
        region: one of `REGIONS`, or "random".
        pathology: one of `tools.phantom_lungs.DISEASES`, None for healthy lungs, or "random" (disease in 40 %).
        noise: standard deviation in HU, 0 for none, None for a random one.
        organ: what is labelled: "lungs" (1 left, 2 right), or "liver" (1 liver, 2 tumour), which then has veins and
            lesions too.

    Raises:
        InputError: an unknown region, pathology or organ, or a spacing or size that is not positive.
    """
    _check(size_mm, spacing, region, pathology, organ)
    rng = np.random.default_rng(seed)
    if region == "random":
        region = str(rng.choice(list(_OFTEN), p=list(_OFTEN.values())))
    patient = anatomy.Patient.draw(rng)
    space, fine = _space(rng, patient, size_mm, spacing, region)
    image, label, body, drawn = _draw(space, patient, _diseases(rng, pathology), organ)
    image = phantom_scanner.acquire(image, space, rng, body, noise)
    image, label = _thicken(image, label, fine)
    image = phantom_scanner.cut(image, label, space, rng)
    affine = np.diag([*map(float, spacing), 1.0])
    affine[:3, 3] = space.origin
    affine[2, 3] += (fine - 1) / 2 * space.spacing[2]
    info = {"seed": int(seed), "region": region, **drawn}
    return Phantom(image.astype(np.float32), label, affine, info)


def save_phantom(phantom: Phantom, image_path: str | Path, label_path: str | Path | None = None) -> None:
    """Write the image (int16) and the label (uint8) as NIfTI; a file appears whole or not at all."""
    _save(np.rint(phantom.image).astype(np.int16), phantom.affine, Path(image_path))
    if label_path is not None:
        _save(phantom.label, phantom.affine, Path(label_path))


def make(
    out: str,
    count: int = 10,
    seed: int = 0,
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    region: str = "random",
    pathology: str | None = "random",
) -> None:
    """Write `count` phantoms as a Decathlon-style folder; phantom i has the seed `seed + i`.

    Args:
        out: folder to write, made if needed.
        count: number of phantoms.
        seed: seed of the first.
        spacing: voxel size in mm per axis.
        region: "thorax", "chest_abdomen", "abdomen", "apices", "slab", "crop" or "random".
        pathology: a disease's name, None or "random".
    """
    folder = Path(out)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    training = []
    for i in range(int(count)):
        phantom = make_phantom(seed + i, field_of_view(seed + i), spacing, region, pathology)
        name = f"phantom_{i:04d}.nii.gz"
        save_phantom(phantom, folder / "imagesTr" / name, folder / "labelsTr" / name)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        print(f"{i + 1}/{count} {name} {phantom.info['region']} {phantom.info['pathology']}", flush=True)
    _write_index(folder, training)


def sample(path: str, seed: int = 7, spacing: Sequence[float] = (1.5, 1.5, 2.0), label: str | None = None) -> None:
    """Write one healthy chest CT (and its label, where a path is given)."""
    save_phantom(make_phantom(seed, spacing=spacing, pathology=None, noise=12.0), path, label)
    print(path)


def _check(size_mm: Sequence[float], spacing: Sequence[float], region: str, pathology: str | None, organ: str) -> None:
    if region != "random" and region not in REGIONS:
        raise InputError(f"region is {region!r}; use one of {[*REGIONS, 'random']}")
    if pathology not in (None, "random") and pathology not in phantom_lungs.DISEASES:
        raise InputError(f"pathology is {pathology!r}; use None, 'random' or one of {list(phantom_lungs.DISEASES)}")
    if organ not in ("lungs", "liver"):
        raise InputError(f"organ is {organ!r}; use 'lungs' or 'liver'")
    for name, values in (("size_mm", size_mm), ("spacing", spacing)):
        numbers = np.shape(values) == (3,) and all(isinstance(v, (int, float, np.number)) for v in values)
        if not numbers or not all(np.isfinite(v) and v > 0 for v in values):
            raise InputError(f"{name} is {values!r}; give three positive numbers in mm")


def _diseases(rng: np.random.Generator, pathology: str | None) -> list[str]:
    if pathology != "random":
        return [] if pathology is None else [pathology]
    if rng.random() > 0.45:
        return []
    count = int(rng.integers(1, 4))
    return sorted(rng.choice(list(phantom_lungs.DISEASES), count, replace=False).tolist())


def field_of_view(seed: int) -> tuple[float, float, float]:
    """Size (mm) of a random scan: from a tight chest to a wide field with the whole table."""
    rng = np.random.default_rng((seed, 1))
    width = rng.uniform(300, 430)
    return width, float(np.clip(width * rng.uniform(0.62, 1.0), 210, 400)), rng.uniform(240, 330)


def _space(
    rng: np.random.Generator, p: anatomy.Patient, size_mm: Sequence[float], spacing: Sequence[float], region: str
) -> tuple[Space, int]:
    """The grid to draw on: the asked one, with thick slices drawn as several thin ones."""
    middle, length = REGIONS[region]
    size = np.array(size_mm, dtype=float)
    if length is not None:
        size[2] = rng.uniform(*length)
    centre = np.array([rng.normal(0, 6), rng.normal(-8, 6), p.scale * rng.uniform(*middle)])
    if region == "crop":
        size[:2] = rng.uniform(150, 250, 2)
        centre[:2] += rng.uniform([-80, -25], [80, 25])
    step = np.array(spacing, dtype=float)
    fine = max(1, int(np.ceil(step[2] / 3 - 1e-6))) if step[2] > 1.5 * step[0] else 1
    shape = np.maximum(np.rint(size / step), 2).astype(int) * [1, 1, fine]
    step[2] /= fine
    return Space(rng, shape, step, centre - (shape - 1) * step / 2, p.scale, rng.uniform(2, 6)), fine


def _draw(
    space: Space, p: anatomy.Patient, diseases: list[str], organ: str
) -> tuple[Array, NDArray[np.uint8], Array, dict]:
    rng, tissue = p.rng, phantom_tissue.Tissue.draw(p.rng)
    arms = str(rng.choice(["up", "down", "none"], p=[0.65, 0.25, 0.1]))
    prone = bool(rng.random() < 0.05)
    cage, body = anatomy.cage(space, p), anatomy.body(space, p)
    body = phantom_tissue.add_limbs(space, p, body, arms)
    skin = phantom_tissue.add_breasts(space, p, body) if rng.random() < 0.4 else body
    organs = anatomy.mediastinum(space, p)
    left, right, under = anatomy.lungs(space, p, organs.mediastinum)
    image = np.full(space.shape, -1000, dtype=np.float32)
    phantom_tissue.draw_body(image, space, p, tissue, body, cage, skin)
    liver = phantom_tissue.draw_abdomen(image, space, p, tissue, cage, under)
    soft = image.copy()
    phantom_tissue.draw_mediastinum(image, space, p, tissue, organs)
    phantom_tissue.draw_bones(image, space, p, tissue, cage, arms)
    liver[np.abs(image - soft) > 5] = 0  # HU: drawn over
    lungs = phantom_lungs.parenchyma(space, p, left, right, prone)
    phantom_lungs.draw_vessels(lungs, tissue.veins)
    phantom_lungs.draw_fissures(lungs)
    for name in diseases:
        phantom_lungs.DISEASES[name](lungs)
    motion = np.float32(rng.uniform(0, 10) if rng.random() < 0.5 else 0)  # breathing blurs the diaphragm
    moving = np.clip(1 - np.abs(under) / 15, 0, 1) * np.clip(-cage / 10 - 0.5, 0, 1)
    paint(image, cover(lungs.both, space.edge + motion * moving), lungs.hu)
    paint(liver, cover(lungs.both, space.edge), 0.0)
    if lungs.fluid is not None:
        paint(image, cover(lungs.fluid, space.edge), rng.uniform(0, 30))
        paint(liver, cover(lungs.fluid, space.edge), 0.0)
    phantom_tissue.draw_airway(image, space, tissue, organs)
    phantom_scanner.draw_table(image, space, rng, skin, prone)
    drawn: dict[str, Any] = {
        "pathology": diseases,
        "arms": arms,
        "prone": prone,
        "blood_hu": round(tissue.blood),
        "scale": round(p.scale, 3),
    }
    if organ == "liver":
        phase = 0 if tissue.blood < 60 else 1 if tissue.veins < 0.7 * tissue.blood else 2
        label, drawn["lesions"] = liver_tissue.finish(image, liver, space, phase, rng)
        drawn["phase"] = liver_tissue.PHASES[phase]
    else:
        label = _label_lungs(space, lungs, organs)
    return image, label, skin, drawn


def _label_lungs(space: Space, lungs: phantom_lungs.Lungs, organs: anatomy.Organs) -> NDArray[np.uint8]:
    label = np.zeros(space.shape, dtype=np.uint8)
    label[lungs.sides[0] < 0] = 1
    label[lungs.sides[1] < 0] = 2
    for name in ("trachea", "right_bronchus", "left_bronchus"):
        label[organs.tubes[name] < 1] = 0
    return label


def _thicken(image: Array, label: NDArray[np.uint8], fine: int) -> tuple[Array, NDArray[np.uint8]]:
    """Join `fine` thin slices into one: mean of the image, majority of the label."""
    if fine == 1:
        return image, label
    x, y, _ = image.shape
    stacked = label.reshape(x, y, -1, fine)
    joined = np.zeros(stacked.shape[:3], dtype=np.uint8)
    for value in (1, 2):
        joined[(stacked == value).mean(axis=3) >= 0.5] = value
    return image.reshape(x, y, -1, fine).mean(axis=3), joined


def _save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    picture = nib.Nifti1Image(array, affine)
    picture.set_sform(affine, code=1)
    picture.set_qform(affine, code=1)
    picture.header.set_xyzt_units("mm")
    with replacing(path) as hidden:
        nib.save(picture, hidden)


def _write_index(folder: Path, training: list[dict[str, str]]) -> None:
    index = {
        "name": "lung_ct_phantom",
        "description": "synthetic CT of chest and abdomen with the lungs labelled",
        "licence": "Apache-2.0",
        "modality": {"0": "CT"},
        "labels": LABELS,
        "numTraining": len(training),
        "numTest": 0,
        "training": training,
        "test": [],
    }
    with replacing(folder / "dataset.json") as hidden:
        hidden.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    import fire

    clear_errors()
    fire.Fire({"make": make, "sample": sample})
