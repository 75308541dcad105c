"""The training folder of the liver bundles: real scans, scans made from label maps, and drawn chests.

    python -m tools.liver_data make --source DATA_DIR --out OUT_DIR [--count 60] [--chests 30] [--real true]

It writes a Decathlon-style folder with labels 0 background, 1 liver, 2 tumour. Made scans come from the label maps of
abdomen_organs_ct (`tools.organ_scans`) in turn, and belong to the patient of their map: with the one map of today
they cannot be parted into training and validation (val_fraction=0). That map ends below the dome of the liver; chests
drawn from formulas (`tools.phantom`) show it, under lungs and heart. One scan of liver_ct, of another patient and
scanner, is the test list and is never trained on. What is there already is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np

from med3d_nets.datalist import Case, read_datalist
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.switches import is_on
from tools.organ_scans import Anatomy, make_scan
from tools.phantom import Phantom, field_of_view, make_phantom, save_phantom

LABELS = {"0": "background", "1": "liver", "2": "tumour"}
HELD_OUT = "totalseg_dicom"
_REGIONS = ("thorax", "thorax", "thorax", "crop")  # those that end a little below the dome


def make(
    source: str, out: str, count: int = 60, chests: int = 30, spacing: float = 2.0, real: bool = True, seed: int = 0
) -> None:
    """Build the folder.

    Args:
        source: folder with liver_ct and abdomen_organs_ct, both Decathlon-style.
        out: folder to write; cases that it holds already are kept.
        count: number of scans made from label maps.
        chests: number of drawn chests, whose abdomen below the dome is too plain to learn from.
        spacing: voxel size of both in the plane, mm.
        real: put real scans into the training list too, together as often as a quarter of the made ones.
        seed: of the first made scan and the first chest; number i has ``seed + i``.

    Raises:
        InputError: a folder lacks its dataset.json or files, or nothing is left to train on.
    """
    if min(count, chests) < 0 or spacing <= 0:
        raise InputError(f"count={count}, chests={chests}, spacing={spacing}: no count is negative, no spacing is 0.")
    folder = Path(out)
    scans = read_datalist(Path(source) / "liver_ct")
    used = [case for case in scans if is_on(real) and case["case"] != HELD_OUT]
    training = [_real(folder, case, "Tr") for case in used]
    for entry in training:
        entry["weight"] = max(1.0, count / 4 / len(training))
    anatomies = read_datalist(Path(source) / "abdomen_organs_ct") if count else []
    for number in range(count):
        training.append(_made(folder, anatomies[number % len(anatomies)], seed + number, spacing))
    training += [_drawn(folder, seed + number, spacing) for number in range(chests)]
    if not training:
        raise InputError("Nothing to train on: give a count above 0, or real=true with scans in liver_ct.")
    test = [_real(folder, case, "Ts") for case in scans if case["case"] == HELD_OUT]
    index = {
        "name": "liver_ct_made",
        "description": "liver in CT: real scans with a model's labels, scans made from a label map, drawn chests",
        "modality": {"0": "CT"},
        "labels": LABELS,
        "numTraining": len(training),
        "numTest": len(test),
        "training": training,
        "test": test,
    }
    with replacing(folder / "dataset.json") as hidden:
        hidden.write_text(json.dumps(index, indent=1) + "\n")
    print(f"{folder}/dataset.json: {len(training)} for training, {len(test)} held out")


def _real(folder: Path, case: Case, part: str) -> dict[str, Any]:
    """Add a scan as it is, unless it is there."""
    entry = _entry(case["case"], part)
    if not _is_there(folder, entry):
        image, label = (nib.Nifti1Image.from_filename(case[key]) for key in ("image", "label"))
        liver = (np.asarray(label.dataobj) > 0).astype(np.uint8)
        save_phantom(
            Phantom(np.asarray(image.dataobj, dtype=np.float32), liver, image.affine),
            folder / entry["image"],
            folder / entry["label"],
        )
    return {**entry, "patient": case["patient"]}


def _made(folder: Path, case: Case, seed: int, spacing: float) -> dict[str, Any]:
    """Add a made scan unless it is there; of the patient whose anatomy it has, so that no split parts them."""
    entry = _entry(f"made_{seed:04d}", "Tr")
    if not _is_there(folder, entry):
        image, labels = (
            nib.as_closest_canonical(nib.Nifti1Image.from_filename(case[key])) for key in ("image", "label")
        )
        zooms = np.array(image.header.get_zooms()[:3], dtype=float)
        anatomy = Anatomy(np.asarray(image.dataobj, dtype=np.float32), np.asarray(labels.dataobj).astype(int), zooms)
        scan = make_scan(anatomy, seed, spacing)
        save_phantom(scan, folder / entry["image"], folder / entry["label"])
        print(f"{entry['image']}: {scan.info['phase']}, {scan.info['lesions']} lesions", flush=True)
    return {**entry, "patient": case["patient"], "weight": 1.0}


def _drawn(folder: Path, seed: int, spacing: float) -> dict[str, Any]:
    """Add a drawn chest unless it is there."""
    entry = _entry(f"chest_{seed:04d}", "Tr")
    if not _is_there(folder, entry):
        region = _REGIONS[seed % len(_REGIONS)]
        phantom = make_phantom(seed, field_of_view(seed), (spacing, spacing, spacing), region, organ="liver")
        save_phantom(phantom, folder / entry["image"], folder / entry["label"])
        print(f"{entry['image']}: {phantom.info['phase']}, {phantom.info['lesions']} lesions", flush=True)
    return {**entry, "weight": 1.0}


def _entry(name: str, part: str) -> dict[str, Any]:
    return {"image": f"./images{part}/{name}.nii.gz", "label": f"./labels{part}/{name}.nii.gz"}


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    return all((folder / entry[key]).is_file() for key in ("image", "label"))


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"make": make})
