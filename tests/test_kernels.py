"""Every form of a convolution is that convolution, and the fastest is taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from med3d_nets import SegmentationNet, accelerate, acceleration, kernels
from med3d_nets.kernels import TunedConv, columns, other_forms, plain, planes, rewrite, unfolded

DILATED = [
    # in, out, dilation, (B, X, Y, Z)
    (5, 7, 1, (1, 6, 7, 5)),
    (8, 6, 2, (2, 7, 5, 9)),
    (4, 9, 4, (1, 13, 11, 10)),
    (4, 3, 4, (3, 3, 4, 9)),  # fewer planes than the dilation
    (3, 4, 4, (2, 5, 3, 2)),
]
STEMS = [
    # kernel, stride, out, (B, X, Y, Z)
    (7, 2, 6, (1, 16, 17, 18)),
    (7, 2, 5, (2, 9, 11, 13)),
    (7, 1, 4, (1, 8, 7, 9)),
    (5, 2, 4, (1, 9, 8, 7)),
]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_CHOICES", {})
    with torch.inference_mode():
        yield


def volume(channels: int, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape[0], channels, *shape[1:]).to(dtype).contiguous(memory_format=layout)


def assert_same(form: kernels.Form, conv: nn.Conv3d, x: torch.Tensor) -> None:
    """In float32 to rounding; in bfloat16 to that of three terms, each rounded to 8 bits, and of their sums."""
    wanted = conv.float()(x.float())
    conv.to(x.dtype)
    found = form(x, conv)
    assert found.shape == wanted.shape and found.dtype == x.dtype
    tolerance = 1e-5 if x.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
class TestForms:
    @pytest.mark.parametrize("case", DILATED, ids=str)
    @pytest.mark.parametrize("form", [planes, columns])
    def test_dilated(self, form: kernels.Form, case: tuple, layout: torch.memory_format, dtype: torch.dtype) -> None:
        inside, out, dilation, shape = case
        bias = dilation > 1
        conv = nn.Conv3d(inside, out, 3, padding=dilation, dilation=dilation, bias=bias).to(memory_format=layout)
        # weights that bfloat16 holds, so that only sums are rounded
        conv.bfloat16().float()
        assert_same(form, conv, volume(inside, shape, layout, dtype))

    @pytest.mark.parametrize("case", STEMS, ids=str)
    def test_stem(self, case: tuple, layout: torch.memory_format, dtype: torch.dtype) -> None:
        kernel, stride, out, shape = case
        conv = nn.Conv3d(1, out, kernel, stride, kernel // 2, bias=kernel == 7).bfloat16().float()
        assert other_forms(conv) == [unfolded]
        assert_same(unfolded, conv, volume(1, shape, layout, dtype))


def test_columns_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 4 * 9 * 27 * 8 * 2)  # two rows of nine voxels
    conv = nn.Conv3d(8, 6, 3, padding=2, dilation=2)
    assert_same(columns, conv, volume(8, (2, 4, 7, 9), torch.channels_last_3d, torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
        {"kernel_size": 3, "padding": 1, "dilation": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "replicate"},
        {"kernel_size": (3, 3, 1), "padding": (2, 2, 0), "dilation": 2},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_no_other_form(options: dict) -> None:
    assert other_forms(nn.Conv3d(4, 4, **options)) == []


@pytest.mark.parametrize("fast", [planes, columns, plain])
def test_the_fastest_is_remembered(fast: kernels.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[kernels.Form] = []

    def seconds(form: kernels.Form, x: torch.Tensor, conv: nn.Conv3d) -> float:
        timed.append(form)
        return 1.0 if form is fast else 2.0

    monkeypatch.setattr(kernels, "_seconds", seconds)
    monkeypatch.setattr(kernels, "_LITTLE", 0)
    tuned = TunedConv(nn.Conv3d(8, 8, 3, padding=2, dilation=2))
    x = volume(8, (2, 9, 9, 9), torch.channels_last_3d, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(tuned(x), tuned.conv(x), rtol=0, atol=1e-5)
    assert timed == [plain, planes, columns] and list(kernels._CHOICES.values()) == [fast]
    tuned(x[:1])
    assert len(timed) == 6 and len(kernels._CHOICES) == 2


def test_timings_are_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is small beside the pass, yet has the kernel's whole reach along X; and it is a time."""
    seen: list[tuple[int, ...]] = []
    taken = kernels._seconds

    def seconds(form: kernels.Form, x: torch.Tensor, conv: nn.Conv3d) -> float:
        seen.append((len(x), *x.shape[2:]))
        return taken(form, x, conv)

    monkeypatch.setattr(kernels, "_seconds", seconds)
    monkeypatch.setattr(kernels, "_SLAB", 27 * 16 * 16 * 9 * 20 * 5)
    conv = nn.Conv3d(16, 16, 3, padding=4, dilation=4)
    TunedConv(conv)(volume(16, (2, 20, 18, 20), torch.channels_last_3d, torch.float32))
    assert seen == [(1, 9, 5, 20)] * 3
    x = volume(16, (1, 9, 5, 20), torch.channels_last_3d, torch.float32)
    assert all(0 < taken(form, x, conv) < 5 for form in (plain, planes, columns))


def test_little_work_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_seconds", lambda *args: pytest.fail("timed"))
    tuned = TunedConv(nn.Conv3d(2, 2, 3, padding=2, dilation=2))
    tuned(torch.zeros(1, 2, 5, 5, 5))
    tuned.to("meta")(torch.zeros(1, 2, 500, 500, 500, device="meta"))
    assert list(kernels._CHOICES.values()) == [plain]


def test_of_a_network() -> None:
    """The stem and the second half of the encoder have other forms, and a network of them is the same."""
    network = SegmentationNet(10, 2, head="fpn").eval()
    x = torch.randn(1, 1, 33, 40, 18)
    wanted = network(x)
    rewrite(network)
    tuned = [name for name, module in network.named_modules() if isinstance(module, TunedConv)]
    dilated = [f"backbone.layer{layer}.0.conv{conv}" for layer in (3, 4) for conv in (1, 2)]
    assert tuned == ["backbone.conv1", *dilated]
    torch.testing.assert_close(network(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_used_in_bfloat16_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    network = SegmentationNet(10, 2)
    for amx in (False, True):
        monkeypatch.setattr(acceleration, "has_amx", lambda amx=amx: amx)
        for precision in ("float32", "bfloat16"):
            fast = accelerate(network, precision)
            used = any(isinstance(module, TunedConv) for module in fast.modules())
            assert used == (amx and precision == "bfloat16")
