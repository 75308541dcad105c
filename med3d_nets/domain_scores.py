"""Dice of each domain while a co-training is validated."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from ignite.metrics import Metric
from monai.metrics import compute_dice

from med3d_nets.multidomain import UNKNOWN


class DomainDice(Metric):
    """Mean Dice over the domains, and ``dice_DOMAIN`` of each, the mean over its cases and classes.

    Voxels of ``UNKNOWN`` label are left out; so are classes that a case does not have.
    """

    def reset(self) -> None:
        """Forget all cases."""
        self._cases: dict[str, list[float]] = defaultdict(list)

    def iteration_completed(self, engine: Engine) -> None:
        """Score the batch that the engine has run; it is not decollated."""
        output: Any = engine.state.output
        domains = engine.state.batch["domain"]  # type: ignore[index,call-overload]
        for scored in zip(output["pred"], output["label"], domains, strict=True):
            self.update(scored)

    def update(self, output: tuple[torch.Tensor, torch.Tensor, str]) -> None:
        """Score one case.

        Args:
            output: logits or probabilities (C, X, Y, Z), label (1, X, Y, Z), domain.
        """
        pred, label, domain = output
        known = label[0] != UNKNOWN
        found, true = pred.argmax(0)[known], label[0][known]
        classes = range(1, pred.shape[0])
        found, true = (torch.stack([volume == index for index in classes])[None].float() for volume in (found, true))
        dice = compute_dice(found, true, ignore_empty=True)[0]
        if not dice.isnan().all():
            self._cases[domain].append(float(dice.nanmean()))

    def compute(self) -> float:
        """Mean over the domains of all processes; NaN where there is no case."""
        return float(self._by_domain().get("", float("nan")))

    def completed(self, engine: Engine, name: str) -> None:
        """Put the mean under its own name, each domain's under ``dice_DOMAIN``."""
        scores = self._by_domain()
        engine.state.metrics[name] = scores.pop("", float("nan"))
        engine.state.metrics.update({f"dice_{domain}": score for domain, score in scores.items()})

    def _by_domain(self) -> dict[str, float]:
        """Mean of each domain, and of these under the empty name."""
        parts: list[Any] = [dict(self._cases)]
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, dict(self._cases))
        cases: dict[str, list[float]] = defaultdict(list)
        for part in parts:
            for domain, scores in part.items():
                cases[domain] += scores
        means = {domain: statistics.fmean(scores) for domain, scores in sorted(cases.items())}
        return {**means, "": statistics.fmean(means.values())} if means else {}
