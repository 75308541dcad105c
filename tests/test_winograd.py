"""Winograd's products are the convolution, and are used where they pay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from med3d_nets import SegmentationNet, accelerate, winograd
from med3d_nets.winograd import WinogradConv, has_form, pays, use_winograd

SHAPES = [
    # in, out, dilation, (B, X, Y, Z)
    (5, 7, 1, (1, 6, 7, 5)),
    (8, 6, 2, (2, 7, 5, 9)),
    (4, 9, 4, (1, 13, 11, 10)),
    (4, 3, 4, (3, 3, 4, 9)),  # fewer planes than the dilation
    (3, 4, 4, (2, 5, 3, 2)),
    (2, 3, 3, (1, 1, 1, 1)),
    (16, 16, 2, (1, 8, 8, 8)),  # blocks fill the volume
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def dilated(inside: int, out: int, dilation: int, bias: bool = True) -> nn.Conv3d:
    return nn.Conv3d(inside, out, 3, padding=dilation, dilation=dilation, bias=bias)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_convolution(shape: tuple, bias: bool, layout: torch.memory_format) -> None:
    inside, out, dilation, (batch, *size) = shape
    conv = dilated(inside, out, dilation, bias).to(memory_format=layout)
    x = torch.randn(batch, inside, *size).contiguous(memory_format=layout)
    wanted = conv.double()(x.double())
    found = winograd.winograd(x, conv.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
        {"kernel_size": 3, "padding": 1, "dilation": 2},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (2, 2, 1), "dilation": (2, 2, 1)},
        {"kernel_size": (3, 3, 1), "padding": (2, 2, 0), "dilation": 2},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_not_the_form(options: dict) -> None:
    assert not has_form(nn.Conv3d(4, 4, **options))


@pytest.mark.parametrize(
    ("size", "dilation", "wanted"),
    [
        ((16, 16, 16), 4, True),
        ((32, 32, 26), 4, True),  # of the last block a quarter
        ((12, 12, 64), 4, False),  # a quarter of the blocks along two axes is beyond the volume
        ((15, 16, 16), 1, False),  # few voxels
    ],
)
def test_where_it_pays(size: tuple[int, ...], dilation: int, wanted: bool) -> None:
    assert pays(torch.empty(1, 2, *size, device="meta"), dilated(2, 2, dilation)) == wanted


def test_small_or_other_volumes_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "winograd", lambda x, conv: pytest.fail("used"))
    layer = WinogradConv(dilated(2, 3, 2))
    layer(torch.zeros(1, 2, 5, 5, 5))
    large = torch.zeros(1, 2, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        layer(large)
    with torch.inference_mode(False):
        trained = WinogradConv(dilated(2, 3, 2))
        trained(torch.zeros(1, 2, 16, 16, 16, requires_grad=True)).sum().backward()
        assert trained.conv.weight.grad is not None
    layer.bfloat16()(large.bfloat16())
    layer.float().to("meta")(torch.zeros(1, 2, 500, 500, 500, device="meta"))


@pytest.mark.parametrize("depth", [10, 50])
def test_of_a_network(depth: int) -> None:
    """Wide convolutions of the encoder have the form, and a network of them is the same."""
    network = SegmentationNet(depth, 2, head="fpn").eval()
    x = torch.randn(1, 1, 128, 128, 128)
    use_winograd(network)
    fast = [name for name, module in network.named_modules() if isinstance(module, WinogradConv)]
    if depth == 10:
        assert fast == ["backbone.layer3.0.conv2", "backbone.layer4.0.conv1", "backbone.layer4.0.conv2"]
    else:
        assert len(fast) == 6 + 3
    found = network(x)
    torch.testing.assert_close(found, plain(network)(x), rtol=0, atol=1e-5 * float(found.abs().max()))


def plain(network: nn.Module) -> nn.Module:
    """The network with its convolutions as they were."""
    for name, child in list(network.named_children()):
        if isinstance(child, WinogradConv):
            setattr(network, name, child.conv)
        else:
            plain(child)
    return network


def test_used_in_float32() -> None:
    network = SegmentationNet(10, 2)
    for precision, wanted in (("float32", True), ("bfloat16", False)):
        modules = accelerate(network, precision).modules()
        assert any(isinstance(module, WinogradConv) for module in modules) == wanted
    assert not any(
        isinstance(module, WinogradConv) for module in accelerate(network, "float32", compile=True).modules()
    )
