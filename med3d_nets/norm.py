"""Norm statistics for the network that is used, not for the last few batches of its training.

With one or two patches a step, running averages of batch norm follow the last ten patches, and a network in evaluation
mode differs from the one that was trained. Estimating them anew over many batches removes that (Wu and Johnson 2021,
Rethinking "Batch" in BatchNorm, section 3, "PreciseBN").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn


class PreciseNorm:
    """Training handler that estimates the statistics of all batch norms anew before they are used.

    It comes before validation in the list of handlers. The course of the training does not change: in training mode a
    batch norm uses its batch. Norms of a frozen backbone are left alone.

    Asked to, it ends that mode: the network goes on training with the statistics that it will be used with. A
    co-training needs that, because a batch of one domain is unlike the average over all.

    Args:
        network: network in training, also when wrapped for several processes.
        dataloader: of the training; its batches are dicts with ``image``, (B, C, X, Y, Z).
        device: where the network is.
        batches: number of batches to average over; 0 leaves the running averages as they are.
        interval: epochs between estimates; there is one after the last epoch too.
        extra_keys: keys of a batch that the network takes after ``image``.
        freeze_after: epoch after which the norms keep their statistics, 0 for never; the network then has a
            ``freeze_norm`` that its ``train()`` heeds.
    """

    def __init__(
        self,
        network: nn.Module,
        dataloader: Any,
        device: Any,
        batches: int,
        interval: int = 1,
        extra_keys: Sequence[str] = (),
        freeze_after: int = 0,
    ) -> None:
        self.network: Any = bare(network)
        self.dataloader = dataloader
        self.device = torch.device(device)
        self.batches = int(batches)
        self.interval = interval
        self.extra_keys = extra_keys
        self.freeze_after = int(freeze_after)

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._freeze)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Estimate, every ``interval`` epochs, after the last, and before the statistics are kept."""
        epoch = engine.state.epoch
        due = epoch % self.interval == 0 or epoch in (engine.state.max_epochs, self.freeze_after)
        if self.batches and due and not 0 < self.freeze_after < epoch:
            estimate_norm_statistics(self.network, islice(self._inputs(), self.batches))

    def _freeze(self, engine: Engine) -> None:
        if 0 < self.freeze_after < engine.state.epoch:
            self.network.freeze_norm = True

    def _inputs(self) -> Iterator[tuple[Any, ...]]:
        while True:
            for batch in self.dataloader:
                yield (batch["image"].to(self.device), *(batch[key] for key in self.extra_keys))


@torch.no_grad()
def estimate_norm_statistics(network: nn.Module, inputs: Iterable[torch.Tensor | tuple[Any, ...]]) -> None:
    """Set the running mean and variance of batch norms to their averages over batches, of all processes.

    ``torch.optim.swa_utils.update_bn`` would also reset the norms of a frozen backbone; here norms that stay in
    evaluation mode, or that no batch reaches, keep theirs.

    Args:
        network: any network; left in the mode in which it came.
        inputs: batches, (B, C, X, Y, Z), on the network's device, or tuples of all that the network takes.
    """
    module = bare(network)
    was_training = module.training
    module.train()
    norms: list[Any] = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    for one in inputs:
        module(*one) if isinstance(one, tuple) else module(one)
    for norm, (momentum, mean, var) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if not _average_over_processes(norm):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    module.train(was_training)


def _average_over_processes(norm: Any) -> bool:
    """Give all processes the average over the batches of all; tell whether there was any batch."""
    count = norm.num_batches_tracked
    if not dist.is_initialized():
        return bool(count > 0)
    own = count.clone()
    dist.all_reduce(count)
    for statistic in (norm.running_mean, norm.running_var):
        statistic *= own
        dist.all_reduce(statistic)
        statistic /= count.clamp(min=1)
    return bool(count > 0)


def bare(network: nn.Module) -> nn.Module:
    """Get the network itself, also where it is wrapped for several processes."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
