"""How certain a network is of a scan: passes in which dropout leaves out other channels each time.

Gal and Ghahramani 2016, Dropout as a Bayesian Approximation. The score of a scan is a project choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

_Net = TypeVar("_Net", bound=nn.Module)


def dropout_only(network: _Net) -> _Net:
    """Set a network to evaluation mode but for its dropout, in place; batch norms keep their statistics."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
    return network


@torch.no_grad()
def uncertainty(passes: Iterable[torch.Tensor]) -> float:
    """Score a scan by the entropy of the mean of several passes, in the voxels where any of them found something.

    The region keeps the field of view from mattering: air around the patient is certain.

    Args:
        passes: logits of each pass, (classes, X, Y, Z).

    Returns:
        0 (all passes are sure of the same) to 1 (all classes are as likely). 1 where no pass finds anything, because
        such a scan is either none of the organ or one that the network fails at; both are for a human to see.
    """
    total, found, count = torch.zeros(()), torch.zeros((), dtype=torch.bool), 0
    for logits in passes:
        plain = torch.as_tensor(logits).as_subclass(torch.Tensor).float()
        total = total.to(plain.device) + plain.softmax(dim=0)
        found = found.to(plain.device) | (plain.argmax(dim=0) > 0)
        count += 1
    if count == 0:
        raise ValueError("passes: at least one is needed.")
    if not found.any():
        return 1.0
    mean = total[:, found] / count
    return float(torch.special.entr(mean).sum(dim=0).mean() / math.log(len(mean)))
