"""DenseASPP in 3D against the same layers composed by hand, and rates that fit the map."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.nn import functional as F

from med3d_nets import SegmentationNet, accelerate
from med3d_nets.denseaspp import RATES, DenseASPPHead, scaled_rates

CHANNELS, STRIDES = (64, 64, 128, 256, 24), (2, 4, 8, 8, 8)
State = dict[str, torch.Tensor]


def composed(x: torch.Tensor, state: State, rates: list[tuple[int, int, int]]) -> torch.Tensor:
    """Yang 2018, section 3, one operation after the other, from a state dict: y_l = H(y_0 … y_(l-1), d_l)."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(y, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    outputs = [x]
    for index, rate in enumerate(rates):
        y, at = torch.cat(outputs[::-1], dim=1), 0
        if index:
            y, at = norm(y, f"layers.{index}.0"), 1
        y = F.conv3d(F.relu(y), state[f"layers.{index}.{at + 1}.weight"])
        y = F.relu(norm(y, f"layers.{index}.{at + 2}"))
        last = f"layers.{index}.{at + 4}"
        y = F.conv3d(y, state[f"{last}.weight"], state[f"{last}.bias"], padding=rate, dilation=rate)
        outputs.append(y)
    return F.conv3d(torch.cat(outputs[::-1], dim=1), state["classify.weight"], state["classify.bias"])


def features(size: tuple[int, int, int]) -> list[torch.Tensor]:
    """Maps of which only the last is looked at; with values below zero, so that a ReLU in place would show."""
    return [*[torch.empty(0)] * 4, torch.randn(2, CHANNELS[-1], *size)]


def randomised(head: DenseASPPHead) -> DenseASPPHead:
    for name, buffer in head.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return head.eval()


@pytest.mark.parametrize("rates", [(1, 2), (3, (1, 2, 3), 4), ((2, 1, 1),)], ids=str)
def test_is_the_composition(rates: tuple) -> None:
    head = randomised(DenseASPPHead(CHANNELS, STRIDES, 3, rates=rates, growth=5, bottleneck=7))
    maps = features((9, 8, 7))
    before = maps[-1].clone()
    with torch.no_grad():
        found = head(maps)
        wanted = composed(before, head.state_dict(), [(r,) * 3 if isinstance(r, int) else r for r in rates])
    assert torch.equal(maps[-1], before)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_published_form() -> None:
    """Widths of the paper: 128 in the bottleneck, 64 more after each of five layers."""
    with torch.device("meta"):
        head = DenseASPPHead((256, 512, 512, 1024, 2048), STRIDES, 2)
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items() if value.ndim == 5}
    wanted = {}
    for index in range(5):
        at = int(index > 0)
        wanted[f"layers.{index}.{at + 1}.weight"] = (128, 2048 + 64 * index, 1, 1, 1)
        wanted[f"layers.{index}.{at + 4}.weight"] = (64, 128, 3, 3, 3)
    assert shapes == wanted | {"classify.weight": (2, 2048 + 5 * 64, 1, 1, 1)}
    assert [layer[-2].dilation for layer in head.layers] == [(rate,) * 3 for rate in (3, 6, 12, 18, 24)]
    assert all(layer[-1].p == 0.1 for layer in head.layers) and head.dropout.p == 0.1


class TestRates:
    def test_scaled_to_the_map(self) -> None:
        assert scaled_rates((64, 64, 64)) == [[rate] * 3 for rate in RATES]
        assert scaled_rates((16, 16, 8)) == [[1, 1, 1], [2, 2, 1], [3, 3, 2], [4, 4, 2], [6, 6, 3]]
        assert scaled_rates((1, 1, 1)) == [[1, 1, 1]] * 5

    @pytest.mark.parametrize("size", [(2, 3, 4), (12, 12, 10), (20, 16, 16), (64, 56, 7)])
    def test_scaled_rates_see_the_map(self, size: tuple[int, int, int]) -> None:
        for rate in scaled_rates(size):
            assert all(one < n for one, n in zip(rate, size, strict=True))

    def test_too_large_a_rate_is_told(self) -> None:
        """Such a layer is a 1³ convolution: what its outer taps hold changes nothing."""
        head = randomised(DenseASPPHead(CHANNELS, STRIDES, 2, rates=(1, 6), growth=4, bottleneck=4))
        maps = features((6, 6, 6))
        with pytest.warns(UserWarning, match=re.escape("on maps of (6, 6, 6) the rates [[6, 6, 6]] see padding alone")):
            before = head(maps)
        outer = torch.ones(3, 3, 3, dtype=torch.bool)
        outer[1, 1, 1] = False
        with torch.no_grad(), pytest.warns(UserWarning, match="padding alone"):
            head.layers[1][5].weight[:, :, outer] = 100.0
            assert torch.equal(head(maps), before)

    def test_fitting_rates_are_silent(self) -> None:
        head = DenseASPPHead(CHANNELS, STRIDES, 2, rates=scaled_rates((6, 6, 5)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            head(features((6, 6, 5)))

    @pytest.mark.parametrize("rates", [(), (0,), (1.5,), ((1, 2),), ((1, 2, 0),)], ids=str)
    def test_wrong_rates(self, rates: tuple) -> None:
        with pytest.raises(ValueError, match="rate"):
            DenseASPPHead(CHANNELS, STRIDES, 2, rates=rates)


@pytest.mark.filterwarnings("ignore:DenseASPP")
class TestInANetwork:
    def test_options_reach_the_head(self) -> None:
        net = SegmentationNet(10, 2, "denseaspp", head_options={"rates": [1, [2, 2, 1]], "growth": 8, "bottleneck": 16})
        assert net.head.rates == [[1, 1, 1], [2, 2, 1]] and net.head.classify.in_channels == 512 + 16

    def test_accelerated_and_scripted(self) -> None:
        net = SegmentationNet(10, 3, "denseaspp", head_options={"rates": [1, 2], "growth": 8, "bottleneck": 16}).eval()
        randomised(net.head)
        x = torch.randn(1, 1, 40, 33, 24)
        with torch.no_grad():
            wanted = net(x)
            for other in (accelerate(net, "float32"), torch.jit.script(net), torch.jit.trace(net, x)):
                torch.testing.assert_close(other(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
