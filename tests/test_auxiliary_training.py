"""What a classifier is asked beside its labels while it is trained, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from med3d_nets import (
    AuxiliaryLoss,
    AuxiliaryTraining,
    ClassificationNet,
    known_columns,
    read_nodules,
    with_auxiliary,
)
from med3d_nets.errors import InputError
from tests.nodule_runs import COLUMNS, write_nodules

ROWS = [("p1", 1, "Malign", 5, 4, 1), ("p2", 1, "Benign", 1, 16, 3), ("p3", 1, "Benign", 3, 8, 2)]


def table(folder: Path, rows: list[tuple] = ROWS) -> Path:
    return write_nodules(folder, rows, (*COLUMNS, "Texture_value")) / "metadata.csv"


def test_values_are_standardised_over_the_cases_and_diameters_by_their_logarithm(tmp_path: Path) -> None:
    path = table(tmp_path)
    cases = with_auxiliary(read_nodules(tmp_path), path, ["diameter_mm", "Texture_value"])
    assert [case["label"][:2] for case in cases] == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    values = torch.tensor([case["label"][2:] for case in cases])
    root = 1.5**0.5
    torch.testing.assert_close(values, torch.tensor([[-root, -root], [root, root], [0.0, 0.0]]))
    assert with_auxiliary(read_nodules(tmp_path), path, []) == read_nodules(tmp_path)


def test_columns_are_those_that_have_a_value_in_each_row(tmp_path: Path) -> None:
    assert known_columns(table(tmp_path)) == ["diameter_mm", "Malignancy_value", "Texture_value"]
    assert known_columns(table(tmp_path, [(*ROWS[0][:5], ""), *ROWS[1:]])) == ["diameter_mm", "Malignancy_value"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("Texture_value", "soft", "p1_R_1: Texture_value is 'soft'"), ("Margin_value", 1, "no column Margin_value")],
)
def test_bad_columns(tmp_path: Path, column: str, value: object, message: str) -> None:
    path = table(tmp_path, [(*ROWS[0][:5], value), *ROWS[1:]])
    with pytest.raises(InputError, match=message):
        with_auxiliary(read_nodules(tmp_path), path, [column])


def test_the_layer_is_there_in_training_alone_and_not_in_the_weights() -> None:
    net = ClassificationNet(10, 2, output_stride=16)
    training = AuxiliaryTraining(net, nn.Linear(512, 3))
    image = torch.randn(2, 1, 24, 24, 16)
    assert training.train()(image).shape == (2, 5)
    with torch.inference_mode():
        assert torch.equal(training.eval()(image), net.eval()(image))
    assert training.state_dict().keys() == net.state_dict().keys()
    assert AuxiliaryTraining(net, nn.Linear(512, 0)).train()(image).shape == (2, 2)


def test_the_loss_is_the_sum_of_both_parts() -> None:
    prediction = torch.tensor([[0.3, -1.0, 0.5], [1.2, 0.1, -0.5]])
    label = torch.tensor([[1.0, 0.0, 1.5], [0.0, 1.0, -0.5]])
    weight = torch.tensor([2.0, 3.0])
    own = nn.functional.binary_cross_entropy_with_logits(prediction[:, :2], label[:, :2], pos_weight=weight)
    torch.testing.assert_close(AuxiliaryLoss([2.0, 3.0], 4.0)(prediction, label), own + 4.0 * 0.5)
    torch.testing.assert_close(AuxiliaryLoss([2.0, 3.0])(prediction[:, :2], label[:, :2]), own)
