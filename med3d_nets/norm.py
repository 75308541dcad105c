"""Norm statistics for the network that is used, not for the last few batches of its training.

With one or two patches a step, running averages of batch norm follow the last ten patches, and a network in evaluation
mode differs from the one that was trained. Estimating them anew over many batches removes that (Wu and Johnson 2021,
Rethinking "Batch" in BatchNorm, section 3, "PreciseBN").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn


class PreciseNorm:
    """Training handler that estimates the statistics of all batch norms anew before they are used.

    It comes before validation in the list of handlers. The course of the training does not change: in training mode a
    batch norm uses its batch. Norms of a frozen backbone are left alone.

    Args:
        network: network in training, also when wrapped for several processes.
        dataloader: of the training; its batches are dicts with ``image``, (B, C, X, Y, Z).
        device: where the network is.
        batches: number of batches to average over; 0 leaves the running averages as they are.
        interval: epochs between estimates; there is one after the last epoch too.
    """

    def __init__(self, network: nn.Module, dataloader: Any, device: Any, batches: int, interval: int = 1) -> None:
        self.network = network
        self.dataloader = dataloader
        self.device = torch.device(device)
        self.batches = batches
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Estimate, every ``interval`` epochs and after the last."""
        if self.batches and (engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs):
            estimate_norm_statistics(self.network, islice(self._images(), self.batches))

    def _images(self) -> Iterator[torch.Tensor]:
        while True:
            yield from (batch["image"].to(self.device) for batch in self.dataloader)


@torch.no_grad()
def estimate_norm_statistics(network: nn.Module, images: Iterable[torch.Tensor]) -> None:
    """Set the running mean and variance of batch norms to their averages over batches.

    ``torch.optim.swa_utils.update_bn`` would also reset the norms of a frozen backbone; here norms that stay in
    evaluation mode keep theirs.

    Args:
        network: any network; left in the mode in which it came.
        images: batches, (B, C, X, Y, Z), on the network's device.
    """
    module = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    was_training = module.training
    module.train()
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    for image in images:
        module(image)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.train(was_training)
