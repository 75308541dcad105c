"""Independent forward pass of the Med3D encoder, the yardstick of ``tests/test_exactness.py``.

Written from the definition alone (Chen, Ma, Zheng, arXiv 1904.00625, section 3.2, and the layer names of the
MedicalNet release): one convolution after the other with ``torch.nn.functional``, no class of ``med3d_nets``,
parameters of its own making in a plain dict. What it computes, in float64, is kept in
``tests/golden/encoder.json``; from the repository's root

    python -m tests.reference

makes that file again in about two minutes.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden" / "encoder.json"
INPUT_SHAPE = (1, 1, 33, 36, 43)  # layer4 5 x 5 x 6 at stride 8, so that dilation 4 sees more than padding
BOTTLENECK = (50, 101, 152, 200)
BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
STRIDES = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1), 32: (1, 2, 2, 2)}
DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 1), 32: (1, 1, 1, 1)}
EVERY_NETWORK = [(depth, shortcut, stride) for depth in BLOCKS for shortcut in "AB" for stride in STRIDES]

State = dict[str, torch.Tensor]


def encoder_shapes(depth: int, shortcut: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of an encoder, in MedicalNet's order, by rule from depth and shortcut.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        shortcut: ``"A"`` or ``"B"``.

    Returns:
        Shape by state-dict key; ``num_batches_tracked`` is a scalar, shape ().
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 1, 7, 7, 7), **_norm_shapes("bn1", 64)}
    channels = 64
    for layer, (width, blocks) in enumerate(zip((64, 128, 256, 512), BLOCKS[depth], strict=True), start=1):
        out = 4 * width if depth in BOTTLENECK else width
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            if depth in BOTTLENECK:
                convs = [(width, channels, 1), (width, width, 3), (out, width, 1)]
            else:
                convs = [(width, channels, 3), (width, width, 3)]
            for number, (outputs, inputs, size) in enumerate(convs, start=1):
                shapes[f"{name}.conv{number}.weight"] = (outputs, inputs, size, size, size)
                shapes.update(_norm_shapes(f"{name}.bn{number}", outputs))
            # The first block of layer2 to 4 changes the width, that of layer1 in bottleneck networks only.
            if shortcut == "B" and channels != out:
                shapes[f"{name}.downsample.0.weight"] = (out, channels, 1, 1, 1)
                shapes.update(_norm_shapes(f"{name}.downsample.1", out))
            channels = out
    return shapes


@lru_cache(maxsize=1)
def encoder_state(depth: int, shortcut: str, dtype: torch.dtype = torch.float32) -> State:
    """Parameters and norm statistics, the same on every machine, with activations near 1 at every depth.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        shortcut: ``"A"`` or ``"B"``.
        dtype: floating type; the values are those of float32 in any case.

    Returns:
        Tensor by state-dict key. Not to be changed: it is kept for the next call.
    """
    return {
        key: _tensor(key, shape, last_norm="bn3" if depth in BOTTLENECK else "bn2").to(
            torch.int64 if key.endswith(".num_batches_tracked") else dtype
        )
        for key, shape in encoder_shapes(depth, shortcut).items()
    }


def encoder_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Image of noise over a ramp, (1, 1, 33, 36, 43), odd along two axes."""
    return (_uniform("input", INPUT_SHAPE, -1.5, 1.5) + torch.arange(INPUT_SHAPE[-1]) / 16 - 1.0).to(dtype)


def encoder_maps(state: State, x: torch.Tensor, depth: int, shortcut: str, output_stride: int) -> list[torch.Tensor]:
    """Evaluate the encoder: conv1, norm, ReLU, max-pooling, layer1 to layer4.

    Args:
        state: tensors by MedicalNet's names.
        x: image, (B, 1, X, Y, Z).
        depth: 10, 18, 34, 50, 101, 152 or 200.
        shortcut: ``"A"`` or ``"B"``.
        output_stride: 8 (published), 16 or 32.

    Returns:
        The five maps: after the stem's ReLU and after each layer.
    """
    x = F.relu(_norm(state, "bn1", F.conv3d(x, state["conv1.weight"], stride=2, padding=3)))
    maps = [x]
    x = F.max_pool3d(x, kernel_size=3, stride=2, padding=1)
    for layer in range(4):
        stride, dilation = STRIDES[output_stride][layer], DILATIONS[output_stride][layer]
        for block in range(BLOCKS[depth][layer]):
            name = f"layer{layer + 1}.{block}"
            step = stride if block == 0 else 1
            convolutions = _bottleneck if depth in BOTTLENECK else _basic
            out = convolutions(state, name, x, step, dilation)
            x = F.relu(out + _shortcut(state, name, x, out, step, shortcut))
        maps.append(x)
    return maps


def summary(maps: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Shape, mean, standard deviation, maximum and 16 scattered values of each map, for the golden file."""
    records = []
    for feature_map in maps:
        values = feature_map.detach().double().flatten()
        positions = torch.tensor([len(values) * i * 0.6180339887 % len(values) for i in range(1, 17)]).long()
        records.append(
            {
                "shape": list(feature_map.shape),
                "mean": _rounded(values.mean()),
                "std": _rounded(values.std(correction=0)),
                "max": _rounded(values.max()),
                "samples": [_rounded(value) for value in values[positions]],
            }
        )
    return records


def network_name(depth: int, shortcut: str, output_stride: int) -> str:
    """Key of a network in the golden file, ``resnet10_A_stride8``."""
    return f"resnet{depth}_{shortcut}_stride{output_stride}"


def _basic(state: State, name: str, x: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    w1, w2 = state[f"{name}.conv1.weight"], state[f"{name}.conv2.weight"]
    x = F.relu(_norm(state, f"{name}.bn1", F.conv3d(x, w1, stride=stride, padding=dilation, dilation=dilation)))
    return _norm(state, f"{name}.bn2", F.conv3d(x, w2, padding=dilation, dilation=dilation))


def _bottleneck(state: State, name: str, x: torch.Tensor, stride: int, dilation: int) -> torch.Tensor:
    w1, w2, w3 = (state[f"{name}.conv{number}.weight"] for number in (1, 2, 3))
    x = F.relu(_norm(state, f"{name}.bn1", F.conv3d(x, w1)))
    x = F.relu(_norm(state, f"{name}.bn2", F.conv3d(x, w2, stride=stride, padding=dilation, dilation=dilation)))
    return _norm(state, f"{name}.bn3", F.conv3d(x, w3))


def _shortcut(state: State, name: str, x: torch.Tensor, out: torch.Tensor, stride: int, shortcut: str) -> torch.Tensor:
    if x.shape == out.shape:
        return x
    if shortcut == "B":
        return _norm(state, f"{name}.downsample.1", F.conv3d(x, state[f"{name}.downsample.0.weight"], stride=stride))
    padded = torch.zeros_like(out)
    padded[:, : x.shape[1]] = F.avg_pool3d(x, kernel_size=1, stride=stride)
    return padded


def _norm(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    mean, variance, weight, bias = (
        state[f"{name}.{part}"].view(1, -1, 1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def _norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (channels,) for part in parts}, f"{name}.num_batches_tracked": ()}


def _tensor(key: str, shape: tuple[int, ...], last_norm: str) -> torch.Tensor:
    module, part = key.split(".")[-2:]
    if part == "num_batches_tracked":
        return torch.tensor(1000)
    if len(shape) == 5:  # a convolution: uniform with He's variance, so that the scale is kept
        bound = math.sqrt(6 / math.prod(shape[1:]))
        return _uniform(key, shape, -bound, bound)
    if part == "running_var":
        return _uniform(key, shape, 0.6, 1.6)
    if part == "weight":  # small on the last norm of a block, or 70 blocks would add up to very large values
        return _uniform(key, shape, 0.05, 0.2) if module == last_norm else _uniform(key, shape, 0.7, 1.3)
    return _uniform(key, shape, -0.3, 0.3)


def _uniform(key: str, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    # RandomState's stream is frozen (NumPy's NEP 19); that of default_rng or torch may change with a version.
    values = np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape)
    return torch.from_numpy((low + (high - low) * values).astype(np.float32))


def _rounded(value: torch.Tensor) -> float:
    return float(f"{value.item():.9g}")


def _golden() -> dict[str, list[dict[str, Any]]]:
    records = {}
    for network in EVERY_NETWORK:
        state = encoder_state(*network[:2], dtype=torch.float64)
        with torch.no_grad():
            records[network_name(*network)] = summary(encoder_maps(state, encoder_input(torch.float64), *network))
        print(network_name(*network), flush=True)
    return records


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(f'"{name}": {json.dumps(maps)}' for name, maps in _golden().items()) + "\n}\n")
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
