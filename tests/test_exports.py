"""The table of exports: every task is in it, as the CSV says, and what is told as working is equal to 1e-4."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from tools import exports
from tools.bundle_run import ROOT


def rows() -> list[dict[str, str]]:
    with exports.CSV.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_task_is_in_the_page_as_in_the_csv() -> None:
    tasks = {path.name for path in (ROOT / "bundles").glob("*_resnet10")}
    assert {row["bundle"] for row in rows()} == tasks
    assert exports.table(rows()) in exports.PAGE.read_text()


def test_every_export_is_equal() -> None:
    assert {row["form"] for row in rows()} == {"TorchScript", "ONNX"}
    assert all(row["reason"] == "" and float(row["difference"]) <= 1e-4 for row in rows())


def test_what_fails_says_why() -> None:
    row = {"bundle": "b", "weights": "random", "size": "", "difference": "", "reason": "no such operator"}
    found = exports.table(
        [{**row, "form": "TorchScript"}, {**row, "form": "ONNX", "reason": "", "difference": "2e-05"}]
    )
    assert "| no: no such operator | 2e-05 | no |" in found


def test_a_difference_is_a_share_of_the_largest_value() -> None:
    assert exports._difference(torch.tensor([1.0, 4.5]), torch.tensor([1.0, -5.0])) == pytest.approx(1.9)


def test_forms_are_run_at_another_size(tmp_path) -> None:
    network, image = nn.Conv3d(1, 2, 3, padding=1).eval(), torch.rand(1, 1, 8, 8, 8)
    other = torch.rand(1, 1, 9, 7, 12)
    with torch.inference_mode():
        for export in (exports._torchscript, exports._onnx):
            run = export(network, image, tmp_path / "net")
            torch.testing.assert_close(run(other), network(other), atol=1e-5, rtol=1e-5)
