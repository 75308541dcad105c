"""The two ways from a CT to its mask that the benchmark compares, each run in a process of its own.

    python -m tools.benchmark_chain WAY CT.nii.gz FOLDER

WAY is `stock` (MONAI's transforms and windows, as bundles have them), `ours`, `ours_float32`, or `reference` (one pass
of the plain network in float32 over the whole volume, padded as ours is, then MONAI's transforms on the logits). Writes
FOLDER/WAY.nii.gz and FOLDER/WAY.json: seconds of each part and peak memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fire
import torch
from isal import igzip
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    ScaleIntensityRanged,
    Spacingd,
)
from torch import nn

from med3d_nets import (
    LoadVolumed,
    NativeLabelsd,
    ResampleRASd,
    SegmentationNet,
    WholeVolumeInferer,
    accelerate,
    load_network,
)
from med3d_nets.case_writer import COMPRESSION
from med3d_nets.results import nifti
from tools.bundle_run import ROOT, peak_bytes

WAYS = ("stock", "ours", "ours_float32", "reference")
WEIGHTS = ROOT / "bundles" / "lung_ct_segmentation_resnet10" / "models" / "model.pt"
SPACING = (2.0, 2.0, 2.0)  # mm
SCALE = ScaleIntensityRanged("image", -1000, 600, 0, 1, clip=True)


class Parts:
    """Seconds of the parts of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a part."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def main(way: str, image: str, folder: str) -> None:
    """Run one way and write its mask and its figures.

    Args:
        way: one of ``WAYS``.
        image: path of a CT, .nii.gz.
        folder: for the results.
    """
    network: nn.Module = load_network(SegmentationNet(10, out_channels=3, head="fpn"), str(WEIGHTS)).eval()
    if way.startswith("ours"):
        network = accelerate(network, "float32" if way == "ours_float32" else "auto")
    parts = Parts()
    with torch.inference_mode():
        if way.startswith("ours"):
            _ours(network, image, Path(folder) / f"{way}.nii.gz", parts)
        else:
            inferer: Any = (
                SlidingWindowInferer((96, 96, 96), 1, 0.25) if way == "stock" else WholeVolumeInferer("whole")
            )
            _stock(network, inferer, image, Path(folder), way, parts)
    figures = {**parts.seconds, "whole": sum(parts.seconds.values()), "bytes": peak_bytes()}
    (Path(folder) / f"{way}.json").write_text(json.dumps(figures))


def _ours(network: nn.Module, image: str, out: Path, parts: Parts) -> None:
    with parts("read"):
        data = LoadVolumed("image")({"image": image})
    with parts("resample"):
        data = ResampleRASd("image", SPACING)(data)
        data = dict(SCALE(data))
    with parts("network"):
        data["pred"] = WholeVolumeInferer()(data["image"][None], network)[0]
    with parts("after"):
        labels = NativeLabelsd("pred")(data)["pred"]
    with parts("write"), igzip.open(out, "wb", compresslevel=COMPRESSION) as stream:
        nifti(labels[0].numpy(), labels.affine.numpy()).to_stream(stream)


def _stock(network: nn.Module, inferer: Any, image: str, folder: Path, way: str, parts: Parts) -> None:
    resample = Compose(
        [Orientationd("image", axcodes="RAS", labels=None), Spacingd("image", SPACING, mode="bilinear"), SCALE]
    )
    after = Compose(
        [
            Activationsd("pred", softmax=way == "stock"),
            Invertd("pred", resample, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
        ]
    )
    with parts("read"):
        data: Any = LoadImaged("image", ensure_channel_first=True)({"image": image})
    with parts("resample"):
        data = resample(data)
    with parts("network"):
        data["pred"] = MetaTensor(inferer(data["image"][None], network)[0], meta=data["image"].meta)
    with parts("after"):
        data = after(data)
    with parts("write"):
        save = SaveImaged("pred", output_dir=folder, output_postfix=way, output_dtype="uint8", separate_folder=False)
        save(data)
    next(folder.glob(f"*_{way}.nii.gz")).rename(folder / f"{way}.nii.gz")


if __name__ == "__main__":
    fire.Fire(main)
