"""Time and memory of a segmentation against voxels, classes and depth; each point in a process of its own.

python -m tools.benchmark_growth EDGE DEPTH CLASSES    prints seconds and bytes of one point as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import fire
import numpy as np
import torch
from monai.data import MetaTensor

from med3d_nets import NativeLabelsd, ResampleRASd, SegmentationNet, WholeVolumeInferer, accelerate
from med3d_nets.errors import InputError
from tools.bundle_run import peak_bytes

EDGES = (171, 215, 271, 342)  # cubes of 0.5, 1, 2 and 4 x 10⁷ voxels of 1 mm; the network sees an eighth
CLASSES = (2, 10, 30, 60, 117)
DEPTHS = (10, 18, 34, 50, 101, 152, 200)
BASE = {"edge": 215, "depth": 10, "classes": 3}


def growth(edges: Sequence[int] = EDGES, classes: Sequence[int] = CLASSES, depths: Sequence[int] = DEPTHS) -> list[Any]:
    """Measure all points.

    Args:
        edges: of the cubes, in voxels.
        classes: numbers of classes.
        depths: of the network.

    Returns:
        Rows with ``axis`` (what is varied), ``voxels``, ``classes``, ``depth``, ``seconds`` and ``bytes`` (peak of the
        process).

    Raises:
        InputError: a point failed.
    """
    points = [("voxels", {**BASE, "edge": edge}) for edge in edges]
    points += [("classes", {**BASE, "classes": count}) for count in classes]
    points += [("depth", {**BASE, "depth": depth}) for depth in depths]
    rows = []
    for axis, one in points:
        numbers = [str(one[key]) for key in ("edge", "depth", "classes")]
        command = [sys.executable, "-m", "tools.benchmark_growth", *numbers]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"benchmark growth, {one}: failed.\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"axis": axis, "voxels": one.pop("edge") ** 3, **one, **found})
    return rows


@torch.inference_mode()
def point(edge: int, depth: int, classes: int) -> None:
    """Print the seconds of one volume, from voxels in memory to labels, and the peak bytes of the process."""
    network = accelerate(SegmentationNet(depth, out_channels=classes).eval())
    affine = torch.eye(4, dtype=torch.float64)
    meta = {"original_affine": affine, "spatial_shape": [edge] * 3, "filename_or_obj": "", "space": "RAS"}
    voxels = torch.from_numpy(np.random.default_rng(0).standard_normal((1, edge, edge, edge), dtype=np.float32))
    start = time.perf_counter()
    data = ResampleRASd("image", (2, 2, 2))({"image": MetaTensor(voxels, affine=affine, meta=meta)})
    data["pred"] = WholeVolumeInferer()(data["image"][None], network)[0]
    NativeLabelsd("pred")(data)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": peak_bytes()}))


if __name__ == "__main__":
    fire.Fire(point)
