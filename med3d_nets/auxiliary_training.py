"""Training of a classifier that is asked for more than it will be asked for later: what readers noted, the diameter.

Several hundred nodules are few; a yes or no for each tells little of why. What radiologists noted of the same nodules
(spiculation, margin, texture, …) and their diameter are predicted from the same features by a layer that is dropped
after training. Multi-task learning of nodules: Shen et al., HSCNN, Expert Systems with Applications 2019, section 3;
the form of it here is a project choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from med3d_nets.classification import ClassificationNet
from med3d_nets.datalist import Case
from med3d_nets.errors import InputError
from med3d_nets.tables import read_rows
from med3d_nets.training_network import TrainingNetwork

# Columns of the LIDC table; a diameter counts by its logarithm, since it spans a factor of ten.
COLUMNS = (
    *("diameter_mm", "Malignancy_value", "Calcification_value", "Lobulation_value", "Margin_value"),
    *("Sphericity_value", "Spiculation_value", "Subtlety_value", "Texture_value"),
)


class AuxiliaryTraining(TrainingNetwork):
    """What a training step runs: the classifier and, beside its last layer, another for the auxiliary values.

    Args:
        network: the classifier to train, as ``.network``.
        layer: maps its pooled features to the auxiliary values; without outputs there are none.
    """

    def __init__(self, network: ClassificationNet, layer: nn.Linear) -> None:
        super().__init__(network, channels_last=False)
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, C, X, Y, Z) to logits and, in training, auxiliary values: (B, classes + values)."""
        net = self.network
        features = net.head[1](net.head[0](net.features(x)))  # scaled, some dropped
        logits: torch.Tensor = net.head[2](features)
        if not self.training or not self.layer.out_features:
            return logits
        return torch.cat((logits, self.layer(features)), dim=1)


class AuxiliaryLoss(nn.Module):
    """Binary cross-entropy of the logits, and squared error of the standardised auxiliary values after them.

    Args:
        pos_weight: weight of the label 1, one per logit.
        weight: of the auxiliary values' mean squared error.
    """

    def __init__(self, pos_weight: Sequence[float], weight: float = 2.0) -> None:
        super().__init__()
        self.pos_weight = torch.tensor(pos_weight)
        self.weight = weight

    def forward(self, prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compare (B, logits + values) with labels of the same shape."""
        count = len(self.pos_weight)
        logits, values = prediction[:, :count].float(), prediction[:, count:].float()
        loss = F.binary_cross_entropy_with_logits(
            logits, label[:, :count], pos_weight=self.pos_weight.to(logits.device)
        )
        return loss + self.weight * F.mse_loss(values, label[:, count:]) if values.shape[1] else loss


def known_columns(metadata: str | Path) -> list[str]:
    """Those of the usual auxiliary columns that a table has with a value in each row.

    Args:
        metadata: the table of nodules, see ``read_nodules``.
    """
    rows = read_rows(Path(metadata).expanduser(), ())
    return [name for name in COLUMNS if all(row.get(name) for row in rows)]


def with_auxiliary(cases: Sequence[Case], metadata: str | Path, columns: Sequence[str]) -> list[Case]:
    """Put the auxiliary values behind each case's ``label``, with mean 0 and standard deviation 1 over these cases.

    Args:
        cases: of ``read_nodules``, those for training.
        metadata: their table.
        columns: numeric columns of it; of ``diameter_mm`` the logarithm is taken. Empty: the cases stay as they are.

    Raises:
        InputError: the table lacks a column, or a value is no number (of the diameter, not above 0).
    """
    if not columns:
        return list(cases)
    path = Path(metadata).expanduser()
    rows = {f"{row['patient_id']}_R_{row['nodule_id']}": row for row in read_rows(path, tuple(columns))}
    raw = np.array([[_value(path, case["case"], name, rows[case["case"]][name]) for name in columns] for case in cases])
    spread = raw.std(axis=0)
    values = (raw - raw.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return [{**case, "label": [*case["label"], *own]} for case, own in zip(cases, values.tolist(), strict=True)]


def _value(path: Path, case: str, column: str, text: str) -> float:
    try:
        value = float(text)
        return math.log2(value) if column == "diameter_mm" else value
    except ValueError as error:
        raise InputError(
            f"{path}, {case}: {column} is {text!r}; needed is a number. Correct it, or leave it out of auxiliary."
        ) from error
