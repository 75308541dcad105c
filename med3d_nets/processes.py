"""Several processes on one list of cases: each gets a part, and at the end they meet."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from datetime import timedelta
from itertools import zip_longest
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from monai.data import partition_dataset

from med3d_nets.errors import InputError
from med3d_nets.inputs import find_cases

Case = dict[str, str]

_LONGEST = timedelta(days=30)  # that a process may wait for the others, which have more or larger cases
_FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def join_processes() -> None:
    """Join the processes that torchrun started.

    By gloo: no tensor is exchanged, so GPUs need no nccl and may be shared.

    torchrun keeps one store of addresses over its restarts (pytorch/pytorch issue 135712), in which a restarted process
    would find those of dead ones and wait for ever. On one machine each attempt therefore gets a part of its own; on
    several, which count attempts apart, torchrun must be told to make a new store.

    Raises:
        InputError: restarts on several machines are asked for and torchrun was not told so.
    """
    told = os.environ
    one_machine = told["LOCAL_WORLD_SIZE"] == told["WORLD_SIZE"]
    restarts, shared = told.get("TORCHELASTIC_MAX_RESTARTS", "0"), told.get("TORCHELASTIC_USE_AGENT_STORE", "")
    if not one_machine and restarts != "0" and shared == "True":
        raise InputError(
            f"With --max-restarts on several machines, a restart would hang. Set {_FRESH_STORE}=1 before torchrun "
            "on each."
        )
    store, number, count = next(dist.rendezvous("env://", timeout=_LONGEST))
    if one_machine:
        store = dist.PrefixStore(f"attempt {told.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=_LONGEST)


def share_cases(dataset_dir: str) -> list[Case]:
    """Share the cases of ``find_cases`` out among the processes of torch.distributed.

    The first process lists them for all, so that no list is taken while another process writes to the same folder.

    Args:
        dataset_dir: see ``find_cases``; the same path in every process.

    Returns:
        This process's part, empty where there are fewer cases than processes.

    Raises:
        InputError: see ``find_cases``.
    """
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [find_cases(dataset_dir)]
        except InputError as error:  # of all processes, which would wait for ever
            found = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise InputError(found[0])
    cases: list[Case] = found[0]
    count = min(dist.get_world_size() if dist.is_initialized() else 1, len(cases))  # MONAI refuses empty parts
    return partition_dataset(cases, num_partitions=count)[rank()] if rank() < count else []


def rank() -> int:
    """Number of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def parts(mine: Any) -> list[Any]:
    """What each process has, in their order; all wait for each other here.

    Args:
        mine: of this process; can be pickled.

    Raises:
        SystemExit: another process has ended.
    """
    if not dist.is_initialized():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, mine)
    except RuntimeError as error:
        raise SystemExit(f"Another process of this run ended early: start the same command again. ({error})") from error
    return found


def gather(mine: dict[str, Any]) -> dict[str, Any]:
    """The items of all processes, sorted by key."""
    return dict(sorted(item for part in parts(mine) for item in part.items()))


def gather_rows(mine: Sequence[Any]) -> list[Any]:
    """One item per case of all processes, in the order that the cases had before ``share_cases``.

    Args:
        mine: one item, not None, for each case of this process.
    """
    return [row for rows in zip_longest(*parts(list(mine))) for row in rows if row is not None]


class StopRequest:
    """While it is open, a SIGTERM is noted in ``asked`` and does not end the process; a second one does.

    torchrun sends one to all other processes when one has failed. Outside the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, self._before)
