"""How fast from file to file, against MONAI's usual chain and the plain network, as ratios of one run.

    python -m tools.benchmark chain --shape 512,512,300 [--json FILE] [--repeats 3]
    python -m tools.benchmark network --depth 10 --shape 56,448,448 [--json FILE]
    python -m tools.benchmark nets --shape 96,96,96
    python -m tools.benchmark growth [--to CSV]
    python -m tools.benchmark table

Ways take turns, so that a busy machine slows all of them; figures are medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import FlexibleUNet, UNet
from numpy.typing import NDArray
from torch import nn

from med3d_nets import SegmentationNet, accelerate, load_network
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.grids import map_between, onto_grid
from tools import benchmark_growth
from tools.benchmark_chain import WEIGHTS
from tools.benchmark_report import CHAIN_CSV, GROWTH_CSV, growth_plot, table, write_rows
from tools.bundle_run import commit, machine
from tools.phantom import make_phantom

VOXEL_MM = (1.0, 1.0, 4 / 3)


def chain(
    shape: str | Sequence[int] = (512, 512, 300), json: str = "", repeats: int = 3, to: str = str(CHAIN_CSV)
) -> dict[str, float]:
    """Time CT file to mask file: the stock chain against ours, with the same weights.

    Args:
        shape: voxels of the synthetic CT, of 1 x 1 x 4/3 mm; at 2 mm the network sees a sixth of them.
        json: file for the result.
        repeats: runs of each way.
        to: CSV file for the parts.

    Returns:
        ``ratio`` (seconds of stock over ours), ``dice_float32`` (labels of ours with those of one float32 pass over
        the whole and MONAI's transforms, mean of the classes), ``memory_ratio`` (peak memory of the process,
        ours over stock), ``after_network_ratio`` (logits to labels, stock over ours), and the same for the
        float32 network.
    """
    size = _three(shape)
    runs: dict[str, list[dict[str, float]]] = {"stock": [], "ours": [], "ours_float32": []}
    with tempfile.TemporaryDirectory() as folder:
        _write_ct(size, Path(folder) / "ct.nii.gz")
        for _ in range(int(repeats)):
            for way, found in runs.items():
                found.append(_run(way, folder))
        _run("reference", folder)
        agreement = {way: _dice(folder, way) for way in runs}
    middle = {way: {part: statistics.median(run[part] for run in runs[way]) for part in runs[way][0]} for way in runs}
    more = {"repeats": int(repeats), "commit": commit(), "machine": machine()}
    head = {"shape": "x".join(map(str, size))}
    write_rows(to, [{**head, "way": way, **middle[way], "dice_float32": agreement[way], **more} for way in runs])
    stock, ours, plain = middle["stock"], middle["ours"], middle["ours_float32"]
    result = {
        "ratio": stock["whole"] / ours["whole"],
        "dice_float32": agreement["ours"],
        "memory_ratio": ours["bytes"] / stock["bytes"],
        "after_network_ratio": stock["after"] / ours["after"],
        "ratio_of_float32": stock["whole"] / plain["whole"],
        "dice_float32_of_float32": agreement["ours_float32"],
        "dice_float32_of_stock": agreement["stock"],
    }
    return _tell(result, json)


def network(
    depth: int = 10, shape: str | Sequence[int] = (56, 448, 448), json: str = "", repeats: int = 5
) -> dict[str, float]:
    """Time one pass of the network as it is used against the plain one in float32.

    Depth 10 has the weights of the lung bundle and sees a synthetic chest; other depths have random weights.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        shape: voxels of the volume.
        json: file for the result.
        repeats: passes of each.

    Returns:
        ``ratio`` (seconds of the plain network over ours), ``dice_float32`` (labels of both, mean of the classes),
        and the same for ours in float32.
    """
    size = _three(shape)
    plain = _network(int(depth))
    x = torch.from_numpy(np.clip((_ct(size) + 1000) / 1600, 0, 1))[None, None].float()
    forms = {"plain": plain, "auto": accelerate(plain), "float32": accelerate(plain, "float32")}
    with torch.inference_mode():
        labels = {name: net(x)[0].argmax(dim=0).numpy() for name, net in forms.items()}
        seconds = _turns(forms, x, int(repeats))
    classes = range(3)
    return _tell(
        {
            "ratio": seconds["plain"] / seconds["auto"],
            "dice_float32": _mean_dice(labels["auto"], labels["plain"], classes),
            "ratio_of_float32": seconds["plain"] / seconds["float32"],
            "dice_float32_of_float32": _mean_dice(labels["float32"], labels["plain"], classes),
            "seconds_plain": seconds["plain"],
        },
        json,
    )


def nets(shape: str | Sequence[int] = (96, 96, 96), repeats: int = 5) -> str:
    """Time our networks beside MONAI's at one window, two classes, random weights.

    Args:
        shape: voxels of the window.
        repeats: passes of each.

    Returns:
        A Markdown table: seconds, and the ratio to the plain ResNet-10.
    """
    size = _three(shape)
    made: dict[str, nn.Module] = {}
    for depth in (10, 50):
        plain = SegmentationNet(depth, out_channels=2).eval()
        made |= {f"Med3D ResNet-{depth}, plain": plain, f"Med3D ResNet-{depth}": accelerate(plain)}
        made[f"FlexibleUNet resnet{depth}"] = FlexibleUNet(1, 2, f"resnet{depth}", spatial_dims=3).eval()
    made["UNet"] = UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2).eval()
    x = torch.randn(1, 1, *size)
    with torch.inference_mode():
        seconds = _turns(made, x, int(repeats))
    base = seconds["Med3D ResNet-10, plain"]
    lines = [f"| network, {' x '.join(map(str, size))} | s | plain ResNet-10 = 1 |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {one:.2f} | {one / base:.2f} |" for name, one in seconds.items()])


def growth(to: str = str(GROWTH_CSV)) -> None:
    """Measure time and memory against voxels, classes and depth, and draw them.

    Args:
        to: CSV file; the figure goes beside it.
    """
    more = {"commit": commit(), "machine": machine()}
    write_rows(to, [{**row, **more} for row in benchmark_growth.growth()])
    growth_plot(to, str(Path(to).with_suffix(".png")))


def _network(depth: int) -> nn.Module:
    if depth == 10:
        return load_network(SegmentationNet(10, out_channels=3, head="fpn"), str(WEIGHTS)).eval()
    torch.manual_seed(0)
    return SegmentationNet(depth, out_channels=3).eval()


def _turns(networks: dict[str, nn.Module], x: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a pass of each, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(repeats):
        for name, net in networks.items():
            start = time.perf_counter()
            net(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def _run(way: str, folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tools.benchmark_chain", way, f"{folder}/ct.nii.gz", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"benchmark {way}: failed.\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads((Path(folder) / f"{way}.json").read_text())
    return figures


def _ct(size: Sequence[int]) -> NDArray[np.float32]:
    """A synthetic chest over the whole volume, HU, with the noise of a scan."""
    extent = [n * mm for n, mm in zip(size, VOXEL_MM, strict=True)]
    phantom = make_phantom(0, size_mm=[max(edge, 200.0) for edge in extent], spacing=(4, 4, 4), pathology=None, noise=0)
    affine = np.diag([*VOXEL_MM, 1.0])
    source = np.diag([4.0, 4.0, 4.0, 1.0])
    source[:3, 3] = [(edge - 4 * n) / 2 for edge, n in zip(extent, phantom.image.shape, strict=True)]
    image = onto_grid(torch.from_numpy(phantom.image)[None], map_between(source, affine, size), size)[0].numpy()
    image += np.random.default_rng(0).normal(0, 20, image.shape).astype(np.float32)
    return image


def _write_ct(size: Sequence[int], path: Path) -> None:
    nib.save(nib.Nifti1Image(np.rint(_ct(size)).astype(np.int16), np.diag([*VOXEL_MM, 1.0])), path)


def _dice(folder: str, way: str) -> float:
    one, other = (
        np.asarray(nib.Nifti1Image.from_filename(Path(folder) / f"{name}.nii.gz").dataobj)
        for name in (way, "reference")
    )
    return _mean_dice(one, other, range(1, 3))


def _mean_dice(one: NDArray[Any], other: NDArray[Any], classes: Sequence[int]) -> float:
    """Mean over the classes that either has."""
    found = []
    for value in classes:
        a, b = one == value, other == value
        if a.any() or b.any():
            found.append(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))
    return float(np.mean(found))


def _three(shape: str | Sequence[int]) -> list[int]:
    edges = [int(edge) for edge in (shape.split(",") if isinstance(shape, str) else shape)]
    if len(edges) != 3 or min(edges) < 16:
        raise InputError(f"shape={shape!r}: three edges of at least 16 voxels are needed, for example 512,512,300.")
    return edges


def _tell(result: dict[str, float], path: str) -> dict[str, float]:
    rounded = {key: round(value, 4) for key, value in result.items()}
    if path:
        with replacing(path) as hidden:
            hidden.write_text(f"{json.dumps(rounded)}\n")
    return rounded


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"chain": chain, "network": network, "nets": nets, "growth": growth, "table": table})
