"""Norm statistics estimated over many batches."""

from __future__ import annotations

import torch
from torch import nn

from med3d_nets import SegmentationNet
from med3d_nets.norm import estimate_norm_statistics


def test_statistics_are_those_of_all_batches() -> None:
    net = nn.Sequential(nn.BatchNorm3d(2))
    images = [torch.randn(2, 2, 4, 4, 4) * 3 + shift for shift in (-5.0, 0.0, 8.0)]
    estimate_norm_statistics(net, images)
    means = torch.stack([image.mean(dim=(0, 2, 3, 4)) for image in images]).mean(dim=0)
    variances = torch.stack([image.transpose(0, 1).flatten(1).var(dim=1) for image in images]).mean(dim=0)
    torch.testing.assert_close(net[0].running_mean, means)
    torch.testing.assert_close(net[0].running_var, variances)
    assert net[0].momentum == 0.1


def test_mode_and_weights_stay() -> None:
    net = SegmentationNet(10, 2).eval()
    before = {name: value.clone() for name, value in net.named_parameters()}
    estimate_norm_statistics(net, [torch.randn(1, 1, 17, 16, 16)])
    assert not net.training
    assert all(torch.equal(before[name], value) for name, value in net.named_parameters())


def test_a_frozen_backbone_keeps_its_statistics() -> None:
    net = SegmentationNet(10, 2, freeze_backbone=True)
    before = {name: value.clone() for name, value in net.named_buffers()}
    estimate_norm_statistics(net, [torch.randn(1, 1, 16, 16, 16) for _ in range(2)])
    after = dict(net.named_buffers())
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(same[name] for name in same if name.startswith("backbone."))
    assert not any(same[name] for name in same if name.startswith("head.") and "running" in name)
