"""One answer of several classifiers and of mirrored images, and probabilities that mean what they say.

Deep ensembles: Lakshminarayanan et al., NeurIPS 2017. Calibration: Platt, Probabilistic Outputs for Support Vector
Machines, 1999: a slope and an offset of the logit, fitted on patients that were not trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from med3d_nets.classifier_record import note, read_record
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.weights import load_checkpoint

_MIRRORS = [list(axes) for axes in chain.from_iterable(combinations((2, 3, 4), n) for n in range(4))]  # 8, none first


class ClassifierEnsemble(nn.Module):
    """Mean of the logits of several classifiers, over an image and, asked to, its seven mirror images.

    Args:
        networks: classifiers that take (B, C, X, Y, Z) and give (B, classes).
        flips: also look at the mirror images.

    Example:
        >>> from med3d_nets import ClassificationNet
        >>> ClassifierEnsemble([ClassificationNet(10, 2)], flips=True).eval()(torch.zeros(1, 1, 24, 24, 16)).shape
        torch.Size([1, 2])
    """

    def __init__(self, networks: Sequence[nn.Module], flips: bool = False) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.mirrors = _MIRRORS if flips else _MIRRORS[:1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, C, X, Y, Z) to logits (B, classes)."""
        logits = [network(torch.flip(x, axes)) for network in self.networks for axes in self.mirrors]
        return torch.stack(logits).mean(dim=0)


def load_ensemble(network: nn.Module, weights: str | Path | Sequence[str | Path], flips: bool = False) -> nn.Module:
    """Fill copies of a classifier with weights.

    Args:
        network: the classifier.
        weights: file of its weights, or several, for example of the folds.
        flips: see ClassifierEnsemble.

    Raises:
        InputError: no file, weights do not fit, or the files are of classifiers for different questions.
    """
    files = [weights] if isinstance(weights, (str, Path)) else list(weights)
    if not files:
        raise InputError("weights is an empty list; give one file or several.")
    records = [{key: read_record(file)[key] for key in ("classes", "spacing", "input_size")} for file in files]
    for file, record in zip(files, records, strict=True):
        if record != records[0]:
            raise InputError(
                f"{file}: its classifier.json has {record}, that of {files[0]} {records[0]}. An ensemble needs "
                "classifiers of the same classes, spacing and input_size."
            )
    networks = [copy.deepcopy(network) for _ in files]
    for one, file in zip(networks, files, strict=True):
        load_checkpoint(one, file)
    return ClassifierEnsemble(networks, flips)


def calibrate(
    network: Any, path: str | Path, batches: Iterable[Mapping[str, Any]], device: Any, flips: bool = False
) -> dict[str, list[float]]:
    """Fit slope and offset of each logit on validation cases, and fold them into the weights' linear layer.

    The weights then give calibrated probabilities wherever they are loaded, with the order of cases unchanged. Does
    nothing where a logit's cases are all of one kind, or where they would turn its order round.

    Args:
        network: the ClassificationNet of the weights; it keeps its own.
        path: the weights, replaced; ``classifier.json`` beside them gets the key ``calibration``.
        batches: ``image`` and ``label``, (B, classes), 0 or 1; not trained on.
        device: where the network runs.
        flips: fit for the mean over mirror images.

    Returns:
        ``slope`` and ``offset`` of each logit.
    """
    net = copy.deepcopy(network)
    load_checkpoint(net, path)
    ensemble = ClassifierEnsemble([net], flips).to(device).eval()
    logits, labels = [], []
    with torch.inference_mode():
        for batch in batches:
            logits.append(ensemble(batch["image"].to(device)).double().cpu())
            labels.append(torch.as_tensor(batch["label"]).double().cpu())
    fits = [fit_platt(*pair) for pair in zip(torch.cat(logits).T.clone(), torch.cat(labels).T.clone(), strict=True)]
    slope, offset = (torch.tensor(values) for values in zip(*fits, strict=True))
    state = net.state_dict()
    weight, bias = "head.2.weight", "head.2.bias"
    state[weight] = state[weight] * slope[:, None].to(state[weight])
    state[bias] = state[bias] * slope.to(state[bias]) + offset.to(state[bias])
    with replacing(path) as hidden:
        torch.save(state, hidden)
    result = {"slope": slope.tolist(), "offset": offset.tolist()}
    note(path, {"calibration": {**result, "cases": len(torch.cat(labels))}})
    return result


def fit_platt(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Slope and offset of a logit by maximum likelihood, with Platt's smoothed targets.

    Args:
        logits: (n,), float64.
        labels: 0 or 1, (n,), float64.

    Returns:
        Slope and offset; 1 and 0 where all labels are equal or the slope would not be above 0.
    """
    positive = float(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return 1.0, 0.0
    targets = torch.where(labels > 0.5, (positive + 1) / (positive + 2), 1 / (negative + 2))
    values = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(values[0] * logits + values[1], targets)
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    slope, offset = values.tolist()
    return (slope, offset) if slope > 0 else (1.0, 0.0)
