"""Where a co-training keeps its prepared volumes: in memory, or in files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.data import CacheDataset, Dataset, PersistentDataset, pickle_hashing

from med3d_nets.datalist import Case
from med3d_nets.errors import InputError
from med3d_nets.fingerprint import Fingerprint
from med3d_nets.inferer import free_memory

_BYTES = 5  # of a voxel: the image in float32, the label in uint8


def cached_dataset(
    cases: Sequence[Case],
    transform: Callable[[Any], Any],
    found: Mapping[str, Fingerprint],
    folder: str = "",
    rate: float = 1.0,
    workers: int = 0,
) -> Dataset:
    """Make a dataset that does not read and resample a volume again for every patch.

    Args:
        cases: as ``with_settings`` gives them; their ``fingerprint`` changes with the files.
        transform: what is done up to its first random transform is kept.
        found: fingerprints of the domains.
        folder: keep the volumes in files there, about as large as in memory; a file is made when its case is first
            drawn, and further trainings use it. Empty: in memory.
        rate: share of the cases kept in memory.
        workers: threads that fill the memory before the training starts; 0 fills it with one.

    Raises:
        InputError: the volumes would not fit into the memory that is free.
    """
    if folder:
        return PersistentDataset(cases, transform, cache_dir=folder, hash_transform=pickle_hashing)
    needed = _memory_needed(cases, found) * float(rate) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"{len(cases)} prepared volumes need about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free. "
            "Keep them in files (--cache_dir FOLDER, as large), or fewer of them in memory (--cache_rate 0.2)."
        )
    return CacheDataset(cases, transform, cache_rate=float(rate), num_workers=workers)


def _memory_needed(cases: Sequence[Case], found: Mapping[str, Fingerprint]) -> int:
    """Bytes of the prepared volumes, images and labels, from the median sizes of their domains."""
    return sum(_BYTES * math.prod(found[case["domain"]]["size_voxels"]) for case in cases)
