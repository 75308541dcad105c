"""Two stages: where the box lies, what is outside it, and nothing found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from med3d_nets import CoarseToFineInferer, CoarseToFineNet, InputError, accelerate


class Bright(nn.Module):
    """Organ where the volume is above 0.5, and its second class above 1.5; notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, tuple[int, ...]]] = []

    def forward(self, x: torch.Tensor, coarse: bool = False, sign: float = 1.0) -> torch.Tensor:
        if x.device.type != "meta":
            self.seen.append((coarse, tuple(x.shape[2:])))
        x = sign * x
        return torch.cat((1 - x, x) if coarse else (1 - x, x, 2 * x - 1.5), dim=1)


def volume(*boxes: tuple[float, tuple[slice, slice, slice]]) -> torch.Tensor:
    x = torch.zeros(1, 1, 96, 80, 64)
    for value, where in boxes:
        x[(0, 0, *where)] = value
    return x


ORGAN = (slice(24, 56), slice(40, 64), slice(8, 32))
SPOT = (slice(32, 40), slice(48, 56), slice(16, 24))


def test_inside_the_box_and_outside() -> None:
    net, x = Bright(), volume((1.0, ORGAN), (2.0, SPOT))
    inferer = CoarseToFineInferer(3, factor=2, margin=(8, 4, 0))
    box = (slice(None), slice(None), slice(16, 64), slice(36, 68), slice(8, 32))
    assert inferer.locate(x, net) == box
    net.seen.clear()
    logits = inferer(x, net)
    assert [coarse for coarse, _ in net.seen] == [True, False]
    assert net.seen == [(True, (48, 48, 32)), (False, (48, 32, 32))]  # padded to multiples of 16
    torch.testing.assert_close(logits[box], net(x)[box])
    labels = logits.argmax(dim=1)[0]
    wanted = torch.zeros(96, 80, 64, dtype=torch.long)
    wanted[ORGAN], wanted[SPOT] = 1, 2
    assert torch.equal(labels, wanted)
    logits[box] = torch.tensor([20.0, -20.0, -20.0]).view(1, 3, 1, 1, 1)
    assert float(logits.softmax(dim=1)[:, 1:].max()) < 1e-15


@pytest.mark.parametrize("factor", [1, 1.7, (3, 2, 2.5)])
@pytest.mark.parametrize("size", [(97, 80, 64), (50, 33, 41)])
def test_the_box_holds_the_organ(factor: Any, size: tuple[int, ...]) -> None:
    x = torch.zeros(1, 1, *size)
    x[0, 0, 20:37, 11:29, 17:40] = 1
    found = CoarseToFineInferer(2, factor, margin=4).locate(x, Bright())
    assert found is not None
    for side, (start, stop), edge in zip(found[2:], ((20, 37), (11, 29), (17, 40)), size, strict=True):
        assert max(0, start - 7) <= side.start <= start and stop <= side.stop <= min(edge, stop + 7)


def test_the_largest_structure() -> None:
    x = volume((1.0, ORGAN), (3.0, (slice(70, 80), slice(4, 14), slice(44, 54))))
    labels = CoarseToFineInferer(3, margin=2)(x, Bright()).argmax(dim=1)[0]
    assert labels[ORGAN].all() and not labels[70:80].any()


@pytest.mark.parametrize("least, size", [(1, 0), (100, 8)])
def test_nothing_found_is_background(least: int, size: int) -> None:
    x = volume((1.0, (slice(8, 8 + size), slice(8, 8 + size), slice(8, 8 + size))))
    net = Bright()
    logits = CoarseToFineInferer(3, least_voxels=least)(x, net)
    assert logits.shape == (1, 3, 96, 80, 64) and not logits.argmax(dim=1).any()
    assert all(coarse for coarse, _ in net.seen)


def test_windows_in_the_fine_stage_alone() -> None:
    net, x = Bright(), volume((1.0, ORGAN))
    whole = CoarseToFineInferer(3, margin=16)(x, net)
    net.seen.clear()
    parts = CoarseToFineInferer(3, margin=16, window=(32, 32, 32))(x, net)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert net.seen[0] == (True, (48, 48, 32)) and {size for _, size in net.seen[1:]} == {(32, 32, 32)}


def test_further_arguments_reach_the_network() -> None:
    x = volume((1.0, ORGAN))
    assert CoarseToFineInferer(3)(-x, Bright(), sign=-1.0).argmax(dim=1).any()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"factor": 0.5}, "factor=0.5: a number of at least 1"),
        ({"factor": (2, 2)}, "factor=(2, 2): a number of at least 1 is needed, or three"),
        ({"margin": -1}, "margin=-1: a number of at least 0"),
        ({"window": "large"}, "window='large'"),
    ],
)
def test_wrong_options(options: dict, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        CoarseToFineInferer(2, **options)


def test_one_volume_at_a_time() -> None:
    with pytest.raises(InputError, match="2 volumes at once"):
        CoarseToFineInferer(3)(torch.zeros(2, 1, 32, 32, 32), Bright())


OPTIONS: dict[str, Any] = {"head_options": {"rates": [1, 2], "growth": 8, "bottleneck": 16}}


class TestNetwork:
    def test_two_heads_on_one_encoder(self) -> None:
        net, x = CoarseToFineNet(10, 3, **OPTIONS).eval(), torch.randn(1, 1, 33, 24, 17)
        with torch.no_grad():
            assert net(x).shape == (1, 3, 33, 24, 17) and net(x, coarse=True).shape == (1, 2, 33, 24, 17)
        assert {key.split(".")[0] for key in net.state_dict()} == {"backbone", "coarse", "head"}

    def test_each_stage_trains_its_head(self) -> None:
        for coarse in (False, True):
            net = CoarseToFineNet(10, 2, **OPTIONS)
            net(torch.randn(2, 1, 32, 24, 32), coarse=coarse).square().mean().backward()
            moved = {key.split(".")[0] for key, value in net.named_parameters() if value.grad is not None}
            assert moved == {"backbone", "coarse" if coarse else "head"}

    def test_accelerated(self) -> None:
        net, x = CoarseToFineNet(10, 3, **OPTIONS).eval(), torch.randn(1, 1, 48, 64, 40)
        fast = accelerate(net, "float32")
        with torch.no_grad():
            for coarse in (False, True):
                wanted = net(x, coarse=coarse)
                torch.testing.assert_close(
                    fast(x, coarse=coarse), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
                )

    def test_wrong_head(self) -> None:
        with pytest.raises(ValueError, match="coarse_head='unet': allowed are 'medicalnet'"):
            CoarseToFineNet(10, 2, coarse_head="unet")
