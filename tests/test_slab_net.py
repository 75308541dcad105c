"""A network computed slab by slab is the network, and its finest maps never exist whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from med3d_nets import MultiDomainNet, SegmentationNet, accelerate, slab_net
from med3d_nets.slab_net import SlabNet, _slabs

NETWORKS = {
    "10": lambda: SegmentationNet(10, 3, head="fpn"),
    "50, stride 16": lambda: SegmentationNet(50, 2, head="fpn", output_stride=16),
    "branch": lambda: MultiDomainNet(10, {"a": 2, "b": 3}, head="fpn", in_channels=2).branch("b"),
}


@pytest.fixture(params=[(1, 2), (700, 3)], ids=str)
def small_slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("_SLAB", "_LEAST"), request.param, strict=True):
        monkeypatch.setattr(slab_net, name, value)


@torch.inference_mode()
@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(33, 40, 18), (62, 17, 31), (16, 16, 16)], ids=str)
def test_the_same_function(name: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network: Any = NETWORKS[name]().eval()
    x = torch.randn(2, network.backbone.in_channels, *size)
    fast: Any = accelerate(network, "float32")
    assert isinstance(fast.network, SlabNet)
    wanted, found = network(x), fast(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert found.is_contiguous()


@torch.inference_mode()
def test_no_fine_map_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_net, "_SLAB", 16 * 16**2)
    network: Any = accelerate(SegmentationNet(10, 2, head="fpn"), "float32")
    rows: dict[str, list[int]] = {"conv1": [], "classify": []}
    for name, module in (("conv1", network.network.backbone.conv1), ("classify", network.network.head.classify)):
        module.register_forward_hook(lambda _, __, output, name=name: rows[name].append(output.shape[2]))
    network(torch.zeros(1, 1, 256, 32, 32))
    assert len(rows["conv1"]) == len(rows["classify"]) == 8
    assert max(rows["conv1"]) == 16 + 3 and max(rows["classify"]) == 2 * 16


class OtherNet(SegmentationNet):
    """Computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


def test_others_stay_as_they_are() -> None:
    others = (SegmentationNet(10, 2), MultiDomainNet(10, {"a": 2, "b": 3}, head="fpn"), nn.Conv3d(1, 1, 1))
    for network in (*others, OtherNet(10, 2, head="fpn")):
        assert type(accelerate(network, "float32").network) is type(network)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (136, 14_144), (20, 10**7), (15, 10**7), (999, 300)])
def test_slabs_are_even_and_not_thin(rows: int, size: int) -> None:
    found = list(_slabs(rows, size, 16))
    heights = [stop - start for start, stop in found]
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == rows
    assert min(heights) >= min(rows, 16) and max(heights) - min(heights) <= 1
