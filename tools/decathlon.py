"""The eight tasks of the Medical Segmentation Decathlon that Med3D was pre-trained on (3DSeg-8), ready for co-training.

    python -m tools.decathlon fetch --root ROOT [--tasks Task09_Spleen,…] [--hold_out 0.2]
    python -m tools.decathlon prepare --root ROOT [--hold_out 0.2]

`fetch` takes the addresses and hashes of MONAI's DecathlonDataset, which reads what it unpacks, and goes on where an
earlier run stopped: with an archive at the byte, with a finished task not at all. It ends with `prepare`, which writes
ROOT/manifest.json for the `train.json` of med3d_multidomain_segmentation. Two tasks have images of several MRI
sequences; of these one is taken (project choice, CHANNELS) and written as volumes of their own.

Chen, Ma, Zheng, arXiv 1904.00625, table 1.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from monai.apps import DecathlonDataset, extractall
from monai.apps.utils import HashCheckError
from tqdm import tqdm

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.manifest import read_manifest
from med3d_nets.weights.download import Patience, SourceError, StoreError, download

DOMAINS = {
    "brain_tumour_mr": "Task01_BrainTumour",
    "hippocampus_mr": "Task04_Hippocampus",
    "prostate_mr": "Task05_Prostate",
    "liver_ct": "Task03_Liver",
    "heart_mr": "Task02_Heart",
    "pancreas_ct": "Task07_Pancreas",
    "vessel_ct": "Task08_HepaticVessel",
    "spleen_ct": "Task09_Spleen",
}
CHANNELS = {"Task01_BrainTumour": 0, "Task05_Prostate": 0}  # FLAIR, T2


def fetch(
    root: str, tasks: str | tuple[str, ...] = "", hold_out: float = 0.0, patience: Patience | None = None
) -> None:
    """Download, verify and unpack the tasks, then write the manifest.

    Args:
        root: folder for them, made if it is not there.
        tasks: some of the eight by name; all by default.
        hold_out: share of each task's patients that the manifest keeps from training; the paper's is 0.
        patience: how long to try a download.

    Raises:
        InputError: an unknown task, a download that fails or has another md5, or a disk that is full.
    """
    names = [name for name in ([tasks] if isinstance(tasks, str) else tasks) for name in name.split(",") if name]
    unknown = sorted(set(names) - set(DOMAINS.values()))
    if unknown:
        raise InputError(f"{', '.join(unknown)}: not of 3DSeg-8, whose tasks are {', '.join(DOMAINS.values())}.")
    folder = Path(root).expanduser()
    for task in names or DOMAINS.values():
        if (folder / task / "dataset.json").is_file():
            print(f"{task}: is there already")
        else:
            _fetch_task(folder, task, patience or Patience())
            print(f"{task}: fetched")
    prepare(root, hold_out)


def prepare(root: str, hold_out: float = 0.0) -> None:
    """Write ROOT/manifest.json of the tasks that are there, and single volumes where images have several sequences.

    Args:
        root: folder of the unpacked tasks.
        hold_out: share of each task's patients that is kept from training.

    Raises:
        InputError: none of the tasks is there, or a file of one is faulty.
    """
    folder = Path(root).expanduser()
    entries = []
    for name, task in DOMAINS.items():
        if (folder / task / "dataset.json").is_file():
            path = _one_channel(folder, task, CHANNELS[task]) if task in CHANNELS else task
            entries.append({"name": name, "path": path, "hold_out": hold_out})
    if not entries:
        raise InputError(f"{folder}: none of {', '.join(DOMAINS.values())} is there. Run fetch first, or unpack them.")
    manifest = folder / "manifest.json"
    with replacing(manifest) as hidden:
        hidden.write_text(f"{json.dumps({'domains': entries}, indent=2)}\n")
    for domain in read_manifest(manifest):
        print(f"{domain.name}: {len(domain.cases)} cases, {', '.join(domain.classes)} ({domain.modality})")
    print(f"{manifest}: {len(entries)} of {len(DOMAINS)} domains")


def _fetch_task(folder: Path, task: str, patience: Patience) -> None:
    """Unpack beside the final place, so that a folder of the task's name is whole."""
    url, work = DecathlonDataset.resource[task], folder / f".partial_{task}"
    archive = work / f"{task}.tar"
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / task, ignore_errors=True)  # half unpacked
    try:
        download(url, archive, None, patience, progress=True)
        # DecathlonDataset(download=True) would start an archive anew and take a half unpacked folder for whole
        extractall(archive, work, hash_val=DecathlonDataset.md5[task], hash_type="md5")
        os.replace(work / task, folder / task)
    except (SourceError, StoreError, OSError, RuntimeError, ValueError, HashCheckError, tarfile.TarError) as error:
        if isinstance(error, HashCheckError):
            archive.unlink(missing_ok=True)  # what is wrong is not gone on with
        raise InputError(
            f"{task}: {url} could not be fetched ({error}). Run the command again; it goes on where it stopped. "
            f"Or unpack the archive (md5 {DecathlonDataset.md5[task]}) to {folder / task} by hand."
        ) from error
    shutil.rmtree(work)


def _one_channel(folder: Path, task: str, channel: int) -> str:
    """Write one sequence of each image as a volume; return the new folder's name. What is there is kept."""
    source, name = folder / task, f"{task}_one_sequence"
    index: dict[str, Any] = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    modality = index["modality"][str(channel)]
    for entry in tqdm(index["training"], desc=f"{task}: {modality}", disable=None):
        image, label = source / entry["image"], source / entry["label"]
        target = folder / name / "imagesTr" / image.name
        if not target.is_file():
            loaded: Any = nib.load(image)
            voxels = np.asarray(loaded.dataobj[..., channel]) if loaded.ndim == 4 else np.asarray(loaded.dataobj)
            with replacing(target) as hidden:
                nib.save(nib.Nifti1Image(voxels, loaded.affine), hidden)
        entry.update(image=f"imagesTr/{image.name}", label=os.path.relpath(label, folder / name))
    index.update(modality={"0": modality}, tensorImageSize="3D", test=[], numTest=0)
    with replacing(folder / name / "dataset.json") as hidden:
        hidden.write_text(json.dumps(index, indent=1) + "\n")
    return name


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"fetch": fetch, "prepare": prepare})
