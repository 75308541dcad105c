"""What the networks promise: names, shapes, gradients, errors, FlexibleUNet.

That the encoder computes the right numbers is in ``tests/test_exactness.py``.
"""

from __future__ import annotations

import importlib
import re
from math import ceil

import pytest
import torch
from monai.networks.nets import FlexibleUNet
from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE
from torch import nn

from med3d_nets import DEPTHS, WEIGHTS, Med3DEncoder, Med3DResNet, SegmentationNet, flexunet
from med3d_nets.heads import HEADS, upsample
from med3d_nets.registry import encoders
from med3d_nets.resnet import ShortcutA
from tests import reference

# The design's table: depth, released shortcut, encoder parameters, state-dict tensors.
TABLE = {
    10: ("B", 14_355_520, 72),
    18: ("A", 32_986_176, 102),
    34: ("A", 63_295_808, 198),
    50: ("B", 46_155_072, 318),
    101: ("B", 85_201_216, 624),
    152: ("B", 117_359_936, 930),
    200: ("B", 126_559_552, 1218),
}
NAMES = [f"med3d_resnet{depth}" for depth in TABLE]
State = dict[str, torch.Tensor]


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


class TestRegistry:
    def test_is_the_table_of_the_release(self) -> None:
        found = {depth: (d.shortcut, d.encoder_parameters, d.tensors) for depth, d in DEPTHS.items()}
        assert found == TABLE
        assert {depth: record.layers for depth, record in DEPTHS.items()} == reference.BLOCKS

    def test_weights_say_what_they_are(self) -> None:
        assert len(encoders()) == 11
        assert {weight.depth for weight in encoders()} == set(TABLE)
        assert len({weight.sha256 for weight in WEIGHTS.values()}) == len(WEIGHTS)
        for weight in encoders():
            assert (weight.shortcut, weight.output_stride, weight.licence) == (
                TABLE[weight.depth][0],
                8,
                "MIT",
            )
            assert re.fullmatch(r"[0-9a-f]{64}", weight.sha256) and weight.datasets
            assert re.fullmatch(r"main|[0-9a-f]{40}", weight.revision)
            place = f"/MedicalNet-Resnet{weight.depth}/resolve/{weight.revision}/{weight.name}.pth"
            assert weight.url.endswith(place)
            if weight.size:  # four bytes a parameter and the file's own structure
                assert 0 < weight.size - 4 * TABLE[weight.depth][1] < 1_000_000


@pytest.mark.parametrize("depth", TABLE)
class TestEncoder:
    def test_released_form(self, depth: int) -> None:
        with torch.device("meta"):
            net = Med3DResNet(depth)
        shortcut, parameters, tensors = TABLE[depth]
        assert net.shortcut_type == shortcut
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert len(net.state_dict()) == tensors

    @pytest.mark.parametrize("shortcut", ["A", "B"])
    @pytest.mark.parametrize("output_stride", [8, 16, 32])
    def test_keys_and_maps(self, depth: int, shortcut: str, output_stride: int) -> None:
        """MedicalNet's names in its order; five maps whose channels and strides are as announced."""
        with torch.device("meta"):
            net = Med3DResNet(depth, shortcut, output_stride=output_stride)
            maps = net(torch.empty(2, 1, 33, 64, 100))
        assert list(_shapes(net.state_dict()).items()) == list(reference.encoder_shapes(depth, shortcut).items())
        strides = (2, 4, 8, *{8: (8, 8), 16: (16, 16), 32: (16, 32)}[output_stride])
        widths = (64, 256, 512, 1024, 2048) if depth >= 50 else (64, 64, 128, 256, 512)
        assert (net.feature_strides, net.feature_channels) == (strides, widths)
        for found, width, stride in zip(maps, widths, strides, strict=True):
            assert tuple(found.shape) == (2, width, *(ceil(n / stride) for n in (33, 64, 100)))


class TestShortcuts:
    def test_a_passes_the_gradient(self) -> None:
        """Type A has no parameters; what arrives at the kept voxels is the gradient, not zero."""
        shortcut = ShortcutA(4, 6, stride=2)
        assert not shortcut.state_dict()
        x = torch.randn(2, 4, 5, 6, 7, requires_grad=True)
        y = shortcut(x)
        assert y.shape == (2, 6, 3, 3, 4)
        assert torch.equal(y[:, :4], x[:, :, ::2, ::2, ::2]) and not y[:, 4:].any()
        upstream = torch.randn_like(y)
        y.backward(upstream)
        wanted = torch.zeros_like(x)
        wanted[:, :, ::2, ::2, ::2] = upstream[:, :4]
        assert x.grad is not None and torch.equal(x.grad, wanted)

    @pytest.mark.parametrize("shortcut", ["A", "B"])
    @pytest.mark.parametrize("depth", [10, 50])
    def test_gradient_without_residual_branches(self, depth: int, shortcut: str) -> None:
        """With every residual branch at zero the gradient can only come through the shortcuts."""
        net = Med3DResNet(depth, shortcut).eval()
        for name, parameter in net.named_parameters():
            if re.search(r"bn3\." if depth == 50 else r"layer.*bn2\.", name):
                nn.init.zeros_(parameter)
        x = torch.randn(1, 1, 17, 18, 19, requires_grad=True)
        net(x)[-1].sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0

    @pytest.mark.parametrize("shortcut", ["A", "B"])
    @pytest.mark.parametrize("depth", [10, 50])
    def test_every_parameter_learns(self, depth: int, shortcut: str) -> None:
        net = Med3DResNet(depth, shortcut)
        layer4 = net(torch.randn(2, 1, 17, 24, 33))[-1]
        (layer4 * torch.randn_like(layer4)).sum().backward()
        assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize(
    "arguments, allowed",
    [
        ({"depth": 11}, "10, 18, 34, 50, 101, 152, 200"),
        ({"shortcut_type": "C"}, "'A', 'B'"),
        ({"shortcut_type": "b"}, "'A', 'B'"),
        ({"output_stride": 4}, "8, 16, 32"),
        ({"in_channels": 0}, "at least 1"),
        ({"head": "unet"}, "'medicalnet', 'linear', 'fpn'"),
        ({"out_channels": 0}, "at least 1"),
    ],
)
def test_invalid_argument(arguments: dict, allowed: str) -> None:
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")) as error:
        SegmentationNet(**{"depth": 10, "out_channels": 2, **arguments})
    assert allowed in str(error.value)


@pytest.mark.filterwarnings("ignore:DenseASPP")  # of the published rates on small maps
@pytest.mark.parametrize("head", HEADS)
class TestSegmentationNet:
    @pytest.mark.parametrize("output_stride", [8, 16, 32])
    def test_sizes(self, head: str, output_stride: int) -> None:
        """Logits at the head's own scale, and at the input's size for any size from 16 on."""
        net = SegmentationNet(10, 3, head, in_channels=2, output_stride=output_stride).eval()
        with torch.no_grad():
            for size in [(16, 16, 16), (17, 33, 16), (33, 17, 50)]:
                x = torch.randn(1, 2, *size)
                top = [ceil(n / output_stride) for n in size]
                own = {"medicalnet": [2 * n for n in top], "linear": top, "denseaspp": top}
                own["fpn"] = [2 * ceil(n / 2) for n in size]
                assert net.head(net.backbone(x)).shape == (1, 3, *own[head])
                assert net(x).shape == (1, 3, *size)

    def test_dropout_is_active_in_training_only(self, head: str) -> None:
        options = {"layer_dropout": 0.0} if head == "denseaspp" else {}
        net = SegmentationNet(10, 2, head, dropout=0.5, head_options=options)
        plain, x = SegmentationNet(10, 2, head, head_options=options), torch.randn(1, 1, 24, 24, 24)
        plain.load_state_dict(net.state_dict())
        with torch.no_grad():
            assert torch.equal(net.eval()(x), plain.eval()(x))
            assert torch.equal(plain.train()(x), plain(x))
            net.train()
            passes = [net(x) for _ in range(8)]
        assert any(not torch.equal(passes[0], other) for other in passes[1:])

    @pytest.mark.parametrize("frozen", [True, False])
    def test_freezing_the_backbone(self, head: str, frozen: bool) -> None:
        """Frozen means weights and norm statistics, after ``train()`` too; the head learns in both cases."""
        net = SegmentationNet(10, 2, head, freeze_backbone=frozen)
        net.eval()
        net.train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        net(torch.randn(2, 1, 17, 24, 33)).square().mean().backward()
        optimiser.step()
        changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
        backbone = {key for key in before if key.startswith("backbone.")}
        assert any(key.endswith("weight") for key in changed - backbone)
        assert changed & backbone == (set() if frozen else backbone)
        assert all((p.grad is None) == frozen for p in net.backbone.parameters())


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [16, 17, 19, 23, 29])
def test_upsampling_moves_nothing(factor: int, size: int) -> None:
    """A map whose blocks hold their centre's position gives back each voxel's position, for any size."""
    blocks = ceil(size / factor)
    positions = factor * torch.arange(blocks, dtype=torch.float32) + (factor - 1) / 2
    found = upsample(positions.expand(1, 1, blocks, blocks, blocks), factor, torch.empty(1, 1, size, size, size))
    wanted = torch.arange(size, dtype=torch.float32).clamp(positions[0], positions[-1])
    torch.testing.assert_close(found, wanted.expand(1, 1, size, size, size))


def test_medicalnet_head_is_the_original() -> None:
    """Names and shapes of ``conv_seg`` in MedicalNet's fine-tuning code, for a ResNet-50 and 3 classes."""
    with torch.device("meta"):
        head = SegmentationNet(50, 3).head
    norm = {
        "weight": (32,),
        "bias": (32,),
        "running_mean": (32,),
        "running_var": (32,),
        "num_batches_tracked": (),
    }
    assert _shapes(head.state_dict()) == {
        "conv_seg.0.weight": (2048, 32, 2, 2, 2),
        "conv_seg.0.bias": (32,),
        **{f"conv_seg.1.{part}": shape for part, shape in norm.items()},
        "conv_seg.3.weight": (32, 32, 3, 3, 3),
        **{f"conv_seg.4.{part}": shape for part, shape in norm.items()},
        "conv_seg.6.weight": (3, 32, 1, 1, 1),
    }


class TestFlexibleUNet:
    @pytest.mark.parametrize("depth", TABLE)
    def test_encoder_is_ours(self, depth: int) -> None:
        with torch.device("meta"):
            net = FlexibleUNet(in_channels=1, out_channels=2, backbone=f"med3d_resnet{depth}", spatial_dims=3)
            assert net(torch.empty(1, 1, 32, 64, 96)).shape == (1, 2, 32, 64, 96)
        assert _shapes(net.encoder.state_dict()) == reference.encoder_shapes(depth, TABLE[depth][0])

    def test_registration_is_idempotent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = dict(FLEXUNET_BACKBONE.register_dict)
        assert [name for name in before if name.startswith("med3d_")] == NAMES
        flexunet.register()
        monkeypatch.setattr(flexunet, "Med3DEncoder", Med3DEncoder)  # put back after the reload
        importlib.reload(flexunet)
        after = FLEXUNET_BACKBONE.register_dict
        assert list(after) == list(before) and all(after[name] is before[name] for name in before)

    @pytest.mark.parametrize("depth", [10, 50])
    def test_trains(self, depth: int) -> None:
        """A few steps on "where is it bright" lower the loss, and reach the encoder's first weights."""
        net = FlexibleUNet(1, 2, f"med3d_resnet{depth}", decoder_channels=(32, 16, 16, 8, 8), spatial_dims=3)
        x = nn.functional.interpolate(torch.randn(2, 1, 4, 4, 4), size=32, mode="trilinear")
        target = (x[:, 0] > 0).long()
        stem = net.encoder.conv1.weight.detach().clone()
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            loss = nn.functional.cross_entropy(net(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert not torch.equal(net.encoder.conv1.weight, stem)

    @pytest.mark.parametrize(
        "arguments, message", [({"spatial_dims": 2}, "3D"), ({"pretrained": True}, "load_backbone")]
    )
    def test_refuses(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FlexibleUNet(**{"in_channels": 1, "out_channels": 2, "backbone": NAMES[0], "spatial_dims": 3, **arguments})
