"""Whole volumes in one pass, in windows, and what happens when memory ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from med3d_nets import InputError, SegmentationNet, WholeVolumeInferer, accelerate
from med3d_nets import inferer as module
from med3d_nets.inferer import bytes_per_voxel, free_memory


class Seen(nn.Module):
    """Gives back its input, notes the size of each pass, and has no memory for more than ``most`` voxels."""

    def __init__(self, most: int = 10**9, error: type[Exception] = torch.cuda.OutOfMemoryError) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "meta":  # the estimate of the memory
            self.sizes.append(tuple(x.shape[2:]))
        if x.device.type != "meta" and x[0, 0].numel() > self.most:
            raise self.error("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return x * 1.0


def test_one_pass_padded_at_both_ends() -> None:
    net, x = Seen(), torch.randn(1, 1, 20, 33, 5)
    torch.testing.assert_close(WholeVolumeInferer()(x, net), x)
    assert net.sizes == [(32, 48, 16)]
    net = Seen()
    WholeVolumeInferer(divisor=8)(x, net)
    assert net.sizes == [(24, 40, 16)]


def test_windows_of_a_size() -> None:
    net, x = Seen(), torch.randn(1, 1, 64, 48, 40)
    torch.testing.assert_close(WholeVolumeInferer((32, -1, 96))(x, net), x, rtol=0, atol=1e-5)
    assert set(net.sizes) == {(32, 48, 48)} and len(net.sizes) > 2


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError, MemoryError])
def test_steps_down_when_memory_ends(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    net, x = Seen(64 * 40 * 32, error), torch.randn(1, 1, 96, 64, 64)
    torch.testing.assert_close(WholeVolumeInferer(memory_bytes=1e12)(x, net), x, rtol=0, atol=1e-5)
    assert list(dict.fromkeys(net.sizes)) == [(96, 64, 64), (48, 64, 64), (48, 32, 64), (48, 32, 32)]
    assert "A pass of 96 x 64 x 64 voxels does not fit into memory." in caplog.text


def test_plans_by_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bytes_per_voxel", lambda *_: 100.0)
    net, x = Seen(), torch.randn(1, 1, 96, 64, 64)
    WholeVolumeInferer(memory_bytes=100 * 50 * 64 * 64)(x, net)
    assert set(net.sizes) == {(48, 64, 64)}
    monkeypatch.setattr(module, "free_memory", lambda _: 100 * 50 * 64 * 64 / 0.7)
    net = Seen()
    WholeVolumeInferer()(x, net)
    assert set(net.sizes) == {(48, 64, 64)}


def test_no_memory_at_all() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="96 x 64 x 64 voxels does not fit .* larger spacing"):
        WholeVolumeInferer()(torch.zeros(1, 1, 96, 64, 64), Seen(1))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        WholeVolumeInferer("whole", memory_bytes=1)(torch.zeros(1, 1, 96, 64, 64), Seen(1))


def test_other_errors_are_not_taken_for_it() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        WholeVolumeInferer()(torch.zeros(1, 1, 16, 16, 16), Wrong())


@pytest.mark.parametrize("window", ["half", (8, 32, 32), (32, 32), 32, "[96, 96, 96]"])
def test_bad_windows(window: Any) -> None:
    with pytest.raises(InputError, match="allowed are auto, whole, or three edges in voxels"):
        WholeVolumeInferer(window)


def test_memory() -> None:
    """The stem's 64 maps at stride 2 are read and written and wait for the head: 3 x 32 bytes a voxel at least."""
    few, many = (bytes_per_voxel(SegmentationNet(10, classes, head="fpn").eval()) for classes in (2, 117))
    assert 100 < few < 300
    assert 115 * 4 < many - few < 115 * 20
    assert bytes_per_voxel(SegmentationNet(50, 2)) > 100
    # By slabs, half of the stem's width waits, and of many classes' logits there is one whole map, not two.
    slabs, wide = (bytes_per_voxel(accelerate(SegmentationNet(10, n, head="fpn"), "float32")) for n in (2, 117))
    assert 16 + 8 < slabs < 0.6 * few
    assert 115 * 4 < wide - slabs < 115 * 8
    assert bytes_per_voxel(torch.jit.script(SegmentationNet(10, 2))) == 200
    held = nn.Conv3d(1, 1, 1)
    held.engine = threading.Lock()  # type: ignore[assignment]  # cannot be copied
    assert bytes_per_voxel(held) == 200
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@torch.inference_mode()
def test_the_estimate_leaves_the_network_alone() -> None:
    """A module that a network has twice, too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv3d(1, 1, 3, padding=1)
            self.other = nn.Sequential(self.one)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(x) + self.one(x)

    x = torch.randn(1, 1, 16, 32, 48)
    for network in (Twice(), accelerate(SegmentationNet(10, 2, head="fpn"), "float32")):
        wanted = network(x)
        assert bytes_per_voxel(network) < 100
        assert {one.device.type for one in network.parameters()} == {"cpu"}
        torch.testing.assert_close(WholeVolumeInferer()(x, network), wanted, rtol=0, atol=0)
        assert not any(module._forward_hooks for module in network.modules())
