"""What an exactly resumable training needs beyond MONAI's handlers.

MONAI's CheckpointSaver writes in place, so a run that is killed while it saves leaves a broken newest checkpoint; what
is written here takes its name when it is whole.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite import distributed as idist
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.norm import bare


class RandomState:
    """Handler that puts all randomness of a training into its checkpoints.

    At the start of every epoch the transforms are seeded from torch's generator, so that the states of python, numpy
    and torch at an epoch's end determine everything that follows.

    Args:
        dataset: training dataset whose random transforms are seeded.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the transforms for the epoch that starts, differently in each process."""
        set_rnd(self.dataset, int(torch.randint(2**31, (1,))) + idist.get_rank())

    def state_dict(self) -> dict[str, Any]:
        """States of all generators in all processes, of types that load with ``weights_only=True``."""
        name, keys, position, has_gauss, gauss = np.random.get_state()
        mine = {
            "python": random.getstate(),
            "numpy": (str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }
        return {"processes": _of_all_processes(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all generators of this process to the states of ``state_dict``."""
        processes, rank = state["processes"], idist.get_rank()
        mine = processes[rank % len(processes)]
        random.setstate(mine["python"])
        name, keys, position, has_gauss, gauss = mine["numpy"]
        np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
        torch.set_rng_state(mine["torch"].cpu())
        if len(mine["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in mine["cuda"]])
        if len(processes) != idist.get_world_size():  # the same cannot go on, but no two may draw alike
            torch.manual_seed(int(torch.randint(2**31, (1,))) + rank)


class OneCycle(OneCycleLR):
    """torch's OneCycleLR whose length is its own, not a checkpoint's, so that a training may go on for longer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over where the cycle is, and not how long it is."""
        super().load_state_dict(
            {key: v for key, v in state_dict.items() if key not in ("total_steps", "_schedule_phases")}
        )


class BestModel:
    """Validation handler that keeps the weights with the best key metric as a bare state dict.

    Args:
        path: file to write.
        network: network to save.
    """

    def __init__(self, path: str | Path, network: nn.Module) -> None:
        self.path = Path(path)
        self.network = network
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator of the validation."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save when the key metric is better than ever before."""
        score = float(engine.state.metrics[engine.state.key_metric_name])  # type: ignore[attr-defined]
        if score > self.best:
            self.best = score
            if idist.get_rank() == 0:
                _save(bare(self.network).state_dict(), self.path)

    def state_dict(self) -> dict[str, float]:
        """The best score so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's best score."""
        self.best = state["best"]


class Checkpoints:
    """Training handler that writes ``checkpoint_epoch=N.pt`` and, asked to resume, starts from the newest.

    It comes last in the list of handlers: what the others draw from the random generators belongs to the epoch. It
    takes the trainer that it is attached to, because a config cannot refer to the trainer among its own handlers.

    Args:
        folder: folder of the checkpoints; the last two are kept.
        model_path: file for the bare state dict of the network, written along with every checkpoint.
        network: network to save, also when wrapped for several processes.
        objects: whatever else has a state (optimiser, scheduler, random states) by name.
        interval: epochs between checkpoints.
        resume: start from the newest checkpoint in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        model_path: str | Path,
        network: nn.Module,
        objects: dict[str, Any],
        interval: int = 1,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.model_path = Path(model_path)
        self.network = network
        self.objects = objects
        self.interval = interval
        self.resume_from = latest_checkpoint(folder) if resume else None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        """Bring everything to the state of the checkpoint; nothing when not resuming."""
        if self.resume_from is None:
            return
        states = torch.load(self.resume_from, map_location="cpu", weights_only=True)
        epoch, max_epochs = states["trainer"]["epoch"], engine.state.max_epochs or 0
        if epoch >= max_epochs:
            raise InputError(
                f"{self.resume_from}: {epoch} epochs are done and max_epochs is {max_epochs}. Raise it to go on."
            )
        try:
            bare(self.network).load_state_dict(states["network"])
        except RuntimeError as error:
            raise InputError(
                f"{self.resume_from}: is not of this network. Resume with the settings of that training, or give "
                "another output_dir."
            ) from error
        for name, thing in {**self.objects, **_scaler(engine)}.items():
            thing.load_state_dict(states[name])
        engine.load_state_dict({"epoch": epoch, "max_epochs": max_epochs, "epoch_length": engine.state.epoch_length})

    def save(self, engine: Engine) -> None:
        """Write the checkpoint and the weights, every ``interval`` epochs and after the last."""
        epoch, max_epochs = engine.state.epoch, engine.state.max_epochs
        if epoch % self.interval and epoch != max_epochs:
            return
        network = bare(self.network).state_dict()
        states = {name: thing.state_dict() for name, thing in {**self.objects, **_scaler(engine)}.items()}
        if idist.get_rank() != 0:
            return
        content = {"network": network, "trainer": {"epoch": epoch, "iteration": engine.state.iteration}, **states}
        _save(content, self.folder / f"checkpoint_epoch={epoch}.pt")
        _save(network, self.model_path)
        for old in _checkpoints(self.folder)[:-2]:
            old.unlink()


def latest_checkpoint(folder: str | Path) -> str:
    """Path of the newest ``checkpoint_epoch=N.pt`` in a folder.

    Raises:
        InputError: there is none, so that nothing can be resumed.
    """
    found = _checkpoints(Path(folder))
    if not found:
        raise InputError(f"{folder}: no checkpoint to resume from. Check output_dir, or train without --resume.")
    return str(found[-1])


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_epoch=*.pt"), key=lambda path: int(path.stem.split("=")[1]))


def _scaler(engine: Engine) -> dict[str, Any]:
    """The trainer's gradient scaler, when it trains with mixed precision."""
    scaler = getattr(engine, "scaler", None)
    return {} if scaler is None else {"scaler": scaler}


def _of_all_processes(mine: Any) -> list[Any]:
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def _save(content: Any, path: Path) -> None:
    with replacing(path) as hidden:
        torch.save(content, hidden)
