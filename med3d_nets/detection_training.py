"""The loss of a detector, and its score while it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import nn

from med3d_nets.detection import BoxDetector
from med3d_nets.detection_data import IGNORED
from med3d_nets.froc import ScanHits, froc, match
from med3d_nets.processes import parts


class DetectionLoss(nn.Module):
    """Classification and box regression of MONAI's detector, with hard negatives.

    Args:
        detector: matches anchors, draws negatives, and computes the losses.
        patch_size: voxels of the patches.
        box_weight: of the box regression; that of the classification is 1.
    """

    def __init__(self, detector: BoxDetector, patch_size: Sequence[int], box_weight: float = 1.0) -> None:
        super().__init__()
        self._detector = [detector]  # not a child: its network is the trainer's
        self.patch_size = [int(n) for n in patch_size]
        self.box_weight = box_weight

    def forward(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            output: of DetectionNet, (B, classes + 6, anchors).
            label: of RandBoxPatchd, (B, max_boxes, 7).
        """
        output = output.float()
        losses = self._detector[0].losses(output, [_target(one) for one in label], self.patch_size)
        classification, boxes = losses["classification"], losses["box_regression"].to(output.device)
        # Without a nodule in the batch no gradient would reach the regression head, which a process group waits for.
        return classification + self.box_weight * boxes + 0.0 * output.sum()


class Cpm(Metric):
    """Mean sensitivity at 1/8 to 8 false positives per scan over the validation's scans (LUNA16's CPM)."""

    def reset(self) -> None:
        """Forget all scans."""
        self._scans: list[ScanHits] = []

    def iteration_completed(self, engine: Engine) -> None:
        """Match one scan's findings."""
        output, batch = engine.state.output[0], engine.state.batch[0]  # type: ignore[index]
        self.update((output["pred"], batch))

    def update(self, output: tuple[torch.Tensor, dict[str, Any]]) -> None:
        """Match findings with the truth.

        Args:
            output: findings of WorldBoxesd, (n, 7), and the case with ``points`` and ``excluded``.
        """
        found, case = output
        values = np.asarray(found.cpu(), dtype=np.float64)
        self._scans.append(match(values[:, :3], values[:, 6], case["points"], case["excluded"]))

    def compute(self) -> float:
        """The CPM over the scans of all processes; NaN where no scan has a nodule."""
        return froc([scan for part in parts(self._scans) for scan in part]).cpm


def _target(label: torch.Tensor) -> dict[str, torch.Tensor]:
    kinds = label[:, 6]
    nodules = label[kinds >= 0]
    return {"boxes": nodules[:, :6], "labels": nodules[:, 6].long(), "ignored": label[kinds == IGNORED, :6]}
