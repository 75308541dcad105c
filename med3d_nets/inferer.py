"""Inference of whole volumes: one pass where memory allows, windows as large as possible where it does not."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from monai.inferers import Inferer, sliding_window_inference
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from med3d_nets.errors import InputError

_logger = logging.getLogger(__name__)

_LEAST = 16  # voxels: the smallest edge of a pass
_SMALLEST = 32  # voxels: edge under which windows are not divided further
_SHARE = 0.7  # of the free memory: the rest is for the result and for what the estimate does not know
_FLOAT, _UNSEEN = 4, 200.0  # bytes of a value, and of a voxel where nothing is known
_EDGE = 256  # voxels of the volume by which memory is estimated
_CGROUP = Path("/sys/fs/cgroup")


class WholeVolumeInferer(Inferer):
    """Segment a volume in one pass, or in the largest windows that fit into memory.

    Windows compute their overlap twice and see less context; a whole volume of usual size needs 1 to 2 GiB. When a
    pass runs out of memory nevertheless, the longest edge of the windows is halved and the volume begun again.

    Args:
        window: ``auto`` plans by the free memory, ``whole`` is one pass whatever it takes, and three edges in voxels,
            -1 for the volume's own, are windows of that size.
        overlap: share of its edge that a window has in common with its neighbour.
        divisor: voxels, the encoder's stride or a multiple of it, to whose multiples a volume is padded, half at each
            end.
        padding_mode: of ``torch.nn.functional.pad``; ``constant`` pads with zeros.
        memory_bytes: what a pass may take; 0 for 70 % of what is free on the volume's device.
        progress: show a bar.

    Raises:
        InputError: window is none of these.
    """

    def __init__(
        self,
        window: str | Sequence[int] = "auto",
        overlap: float = 0.25,
        divisor: int = 16,
        padding_mode: str = "replicate",
        memory_bytes: float = 0,
        progress: bool = False,
    ) -> None:
        self.window = _checked(window)
        self.overlap = overlap
        self.divisor = divisor
        self.padding_mode = padding_mode
        self.memory_bytes = memory_bytes
        self.progress = progress

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the logits of one volume.

        Args:
            inputs: the volume, (1, C, X, Y, Z).
            network: maps it to (1, classes, X, Y, Z).
            args: what else the network takes.
            kwargs: the same by name.

        Returns:
            Logits, (1, classes, X, Y, Z).

        Raises:
            torch.cuda.OutOfMemoryError: the smallest windows do not fit, or ``whole`` does not.
        """
        size = inputs.shape[2:]
        whole = [max(_LEAST, self.divisor * math.ceil(n / self.divisor)) for n in size]
        before = [(full - n) // 2 for n, full in zip(size, whole, strict=True)]
        pads = [pad for i in (2, 1, 0) for pad in (before[i], whole[i] - size[i] - before[i])]
        padded = F.pad(inputs, pads, mode=self.padding_mode) if any(pads) else inputs
        inside = [slice(start, start + n) for start, n in zip(before, size, strict=True)]
        for window in self._windows(whole, padded, network):
            try:
                logits = self._run(padded, network, window, *args, **kwargs)
                return logits[:, :, inside[0], inside[1], inside[2]]
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                _logger.warning("A pass of %s voxels does not fit into memory.", " x ".join(map(str, window)))
        raise torch.cuda.OutOfMemoryError(
            f"A volume of {' x '.join(map(str, size))} voxels does not fit into memory, not even in small windows. "
            "Close other programs, use a machine with more memory, or give a larger spacing."
        )

    def _windows(self, whole: list[int], inputs: torch.Tensor, network: nn.Module) -> Iterator[list[int]]:
        """Sizes of a window to try, the first by the key or by the estimate, the next ever smaller."""
        if self.window == "whole":
            yield whole
            return
        window = list(whole)
        if self.window == "auto":
            per_voxel = bytes_per_voxel(network, inputs.shape[1])
            allowed = self.memory_bytes or _SHARE * free_memory(inputs.device)
            while math.prod(window) * per_voxel > allowed and max(window) > _SMALLEST:
                window = self._halved(window)
        else:
            edges = [int(edge) for edge in self.window]
            window = [min(full, edge) if edge > 0 else full for edge, full in zip(edges, whole, strict=True)]
        yield window
        while max(window) > _SMALLEST:
            window = self._halved(window)
            yield window

    def _halved(self, window: Sequence[int]) -> list[int]:
        axis = max(range(3), key=lambda i: window[i])
        half = max(_SMALLEST, self.divisor * math.ceil(window[axis] / 2 / self.divisor))
        return [half if i == axis else edge for i, edge in enumerate(window)]

    def _run(self, inputs: torch.Tensor, network: nn.Module, window: list[int], *args: Any, **kwargs: Any) -> Any:
        if list(inputs.shape[2:]) == window:
            with tqdm(total=1, disable=not self.progress) as bar:
                logits = network(inputs, *args, **kwargs)
                bar.update()
            return logits
        return sliding_window_inference(
            inputs, window, 1, network, self.overlap, "gaussian", 0.125, "constant", progress=self.progress, **kwargs
        )


@torch.no_grad()
def bytes_per_voxel(network: nn.Module, channels: int = 1) -> float:
    """Estimate the peak memory of a pass in inference mode, over the voxels of its input.

    A pass without data (device ``meta``) tells the size of all maps. At the peak there are the largest input and
    output of one layer, the largest map that the head waits for, and the logits; kernels need half as much again. The
    volume of that pass is large enough for ``SlabNet`` to divide it.

    Args:
        network: any network of three axes; one whose layers cannot be seen (TorchScript), copied (it holds an engine of
            another library) or run without data (operators of its own) counts as ``_UNSEEN``.
        channels: of its input.
    """
    layers, waiting = [0], [0]

    def note_layer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, torch.Tensor):
            read = sum(one.numel() for one in inputs if isinstance(one, torch.Tensor))
            layers.append((read + output.numel()) * _FLOAT)

    def note_waiting(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, list):
            waiting.append(max(one.numel() for one in output) * _FLOAT)

    if isinstance(network, torch.jit.ScriptModule):
        return _UNSEEN
    states = [*network.parameters(), *network.buffers()]
    try:
        # A copy that takes states without data for copies of the network's: no memory, and the network stays untouched.
        bare = copy.deepcopy(network, {id(state): torch.empty_like(state, device="meta") for state in states})
        for module in bare.modules():
            if module is not bare and not any(module.children()):
                module.register_forward_hook(note_layer)
            module.register_forward_hook(note_waiting)
        logits = bare(torch.empty(1, channels, *[_EDGE] * 3, device="meta"))
        return 1.5 * (max(layers) + max(waiting) + logits.numel() * _FLOAT) / _EDGE**3
    # Of layers that need data, and of deepcopy. A fault of the network itself is raised by the pass that follows.
    except (RuntimeError, NotImplementedError, TypeError):
        return _UNSEEN


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken on a device; on a CPU also within the limit of its container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    free = float(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        kinds = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        kept = float(kinds["inactive_file"])  # of files that were read, given back when memory is needed
        return free if limit == "max" else min(free, float(limit) - float(used) + kept)
    except (OSError, ValueError, KeyError):
        return free


def _checked(window: str | Sequence[int]) -> str | list[int]:
    if window in ("auto", "whole"):
        return str(window)
    try:
        edges = [int(edge) for edge in window] if not isinstance(window, str) else []
    except (TypeError, ValueError):
        edges = []
    if len(edges) != 3 or any(edge != -1 and edge < _LEAST for edge in edges):
        raise InputError(
            f"window={window!r}: allowed are auto, whole, or three edges in voxels, each -1 (the volume's) or at least "
            f"{_LEAST}, for example [160, 160, 160]."
        )
    return edges


def _is_out_of_memory(error: Exception) -> bool:
    """The allocator of the CPU raises a plain RuntimeError."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)
