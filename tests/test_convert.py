"""Conversion between the forms of weights keeps the function, to the last key."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from monai.networks import nets
from monai.networks.nets.resnet import ResNet, get_inplanes
from torch.nn import functional as F

from med3d_nets import DEPTHS, InputError, Med3DResNet, SegmentationNet
from med3d_nets.weights import convert, load_backbone, load_checkpoint, read_state_dict
from tests import reference
from tests.small_training import parse

State = dict[str, torch.Tensor]
CLASSES = 3


def _conv_seg(channels: int) -> State:
    """Tensors of MedicalNet's segmentation head, by the names and shapes of its released code."""
    generator = torch.Generator().manual_seed(7)
    shapes: dict[str, tuple[int, ...]] = {
        "0.weight": (channels, 32, 2, 2, 2),
        "0.bias": (32,),
        **{f"1.{part}": (32,) for part in ("weight", "bias", "running_mean", "running_var")},
        "3.weight": (32, 32, 3, 3, 3),
        **{f"4.{part}": (32,) for part in ("weight", "bias", "running_mean", "running_var")},
        "6.weight": (CLASSES, 32, 1, 1, 1),
    }
    state = {f"conv_seg.{k}": 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    state |= {key: value.abs() + 0.5 for key, value in state.items() if "running_var" in key}
    return {**state, **{f"conv_seg.{n}.num_batches_tracked": torch.tensor(9) for n in (1, 4)}}


def _original_logits(state: State, x: torch.Tensor, depth: int) -> torch.Tensor:
    """The original network's output, with torch.nn.functional alone."""

    def norm_relu(name: str, x: torch.Tensor) -> torch.Tensor:
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *parts))

    x = reference.encoder_maps(state, x, depth, DEPTHS[depth].shortcut, 8)[-1]
    x = F.conv_transpose3d(x, state["conv_seg.0.weight"], state["conv_seg.0.bias"], stride=2)
    x = F.conv3d(norm_relu("conv_seg.1", x), state["conv_seg.3.weight"], padding=1)
    return F.conv3d(norm_relu("conv_seg.4", x), state["conv_seg.6.weight"])


def _finetuned(path: Path, depth: int) -> tuple[Path, State]:
    """A checkpoint as the original train.py writes it."""
    state = {**reference.encoder_state(depth, DEPTHS[depth].shortcut), **_conv_seg(DEPTHS[depth].feature_channels[-1])}
    content = {"ecpoch": 3, "batch_id": 0, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save({**content, "optimeizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, path)
    return path, state


@pytest.mark.parametrize(
    "depth", [pytest.param(depth, marks=pytest.mark.slow if depth > 50 else ()) for depth in DEPTHS]
)
def test_finetuned_medicalnet(depth: int, tmp_path: Path) -> None:
    """The original network's checkpoint becomes a bundle's model with the same logits, at every depth."""
    source, state = _finetuned(tmp_path / "train_epoch_3_batch_0.pth.tar", depth)
    done = convert(source, tmp_path / "model.pt")
    source.unlink()
    assert (done.found, done.to, done.depth, done.notes) == ("medicalnet", "bundle", depth, ())
    with torch.device("meta"):
        net = SegmentationNet(depth, CLASSES, head="medicalnet")
    net.to_empty(device="cpu").eval()
    account = load_checkpoint(net, tmp_path / "model.pt")
    assert len(account.loaded) == len(state) == done.tensors
    image = reference.encoder_input()[..., :24]
    with torch.no_grad():
        logits, expected = net.head(net.backbone(image)), _original_logits(state, image, depth)
    assert logits.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _finetuned(tmp_path_factory.mktemp("finetuned") / "w.pth.tar", 10)[0]


class TestForms:
    def test_directly(self, finetuned: Path) -> None:
        """Without conversion: into the whole network, and its encoder alone into a backbone."""
        net, state = SegmentationNet(10, CLASSES, head="medicalnet"), read_state_dict(finetuned)
        load_checkpoint(net, finetuned)
        for key, value in net.state_dict().items():
            assert torch.equal(value, state[key.removeprefix("backbone.").removeprefix("head.")]), key
        account = load_backbone(Med3DResNet(10), finetuned)
        assert len(account.loaded) == 72 and len(account.head) == 14
        with pytest.raises(InputError, match=r"head\.top\.weight.*14 unexpected \(head\.conv_seg\.0"):
            load_checkpoint(SegmentationNet(10, CLASSES, head="fpn"), finetuned)

    def test_training_starts_from_it(self, finetuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """train.json of the lung bundle, with the file's path and with a name that the store knows."""
        places = {"resnet_10_23dataset": finetuned, str(finetuned): finetuned}
        monkeypatch.setattr("med3d_nets.features.resolve", places.__getitem__)
        state = read_state_dict(finetuned)
        for weights in (str(finetuned), "resnet_10_23dataset"):
            net = parse("network", backbone_weights=weights)
            assert all(torch.equal(value, state[key]) for key, value in net.backbone.state_dict().items())

    def test_there_and_back(self, finetuned: Path, tmp_path: Path) -> None:
        """Original to bundle (safetensors) to original: the same tensors in the same wrapping."""
        assert convert(finetuned, tmp_path / "model.safetensors").to == "bundle"
        assert all(
            k.startswith(("backbone.", "head.")) for k in safetensors.torch.load_file(tmp_path / "model.safetensors")
        )
        done = convert(tmp_path / "model.safetensors", tmp_path / "again.pth", to="medicalnet")
        assert done.found == "bundle"
        state = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
        expected = torch.load(finetuned, weights_only=True)["state_dict"]
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)

    def test_encoder(self, finetuned: Path, tmp_path: Path) -> None:
        done = convert(finetuned, tmp_path / "encoder.pt", to="encoder")
        assert any("head is left out" in note for note in done.notes) and done.tensors == 72
        assert set(torch.load(tmp_path / "encoder.pt", weights_only=True)) == set(Med3DResNet(10).state_dict())

    def test_other_heads_stay(self, tmp_path: Path) -> None:
        saved = SegmentationNet(10, CLASSES, head="fpn")
        torch.save(saved.state_dict(), tmp_path / "model.pt")
        assert convert(tmp_path / "model.pt", tmp_path / "model.safetensors").to == "bundle"
        load_checkpoint(net := SegmentationNet(10, CLASSES, head="fpn"), tmp_path / "model.safetensors")
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in net.state_dict().items())


def _monai(depth: int, shortcut: str, **arguments: Any) -> ResNet:
    """MONAI's network with random norms and, where it has them, biases."""
    torch.manual_seed(1)
    record = DEPTHS[depth]
    settings = {"n_input_channels": 1, "conv1_t_stride": 2, "num_classes": 2, **arguments}
    net = ResNet(record.block, list(record.layers), get_inplanes(), shortcut_type=shortcut, **settings)
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(0, 0.3)
    return net.eval()


def _layer4(net: ResNet, image: torch.Tensor) -> torch.Tensor:
    maps = []
    handle = net.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    net(image)
    handle.remove()
    return maps[0]


class TestMonai:
    @pytest.mark.parametrize(
        "depth, shortcut, bias, feed_forward",
        [(10, "B", True, True), (10, "B", False, False), (10, "A", True, True), (50, "B", True, False)],
    )
    def test_from_monai(self, depth: int, shortcut: str, bias: bool, feed_forward: bool, tmp_path: Path) -> None:
        """The same function at output stride 32, in training mode too, and another at 8."""
        monai_net = _monai(depth, shortcut, bias_downsample=bias, feed_forward=feed_forward)
        torch.save(monai_net.state_dict(), tmp_path / "monai.pt")
        done = convert(tmp_path / "monai.pt", tmp_path / "ours.pt")
        assert (done.to, done.depth, done.shortcut) == ("encoder", depth, shortcut)
        has_bias = bias and shortcut == "B"
        assert any("running means" in note for note in done.notes) == has_bias
        assert any("the function is not" in note for note in done.notes) == (has_bias or feed_forward)
        assert any("fc.weight, fc.bias" in note for note in done.notes) == feed_forward
        ours = Med3DResNet(depth, shortcut, output_stride=32).eval()
        load_backbone(ours, tmp_path / "ours.pt")
        published = Med3DResNet(depth, shortcut).eval()
        load_backbone(published, tmp_path / "ours.pt")
        image = torch.randn(2, 1, 64, 48, 40)
        with torch.no_grad():
            expected = _layer4(monai_net, image)
            torch.testing.assert_close(ours(image)[-1], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
            averages = [x.mean((2, 3, 4)) for x in (published(image)[-1], expected)]
            assert (averages[0] - averages[1]).norm() > 0.05 * averages[1].norm()
            expected = _layer4(monai_net.train(), image)
            torch.testing.assert_close(ours.train()(image)[-1], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))

    @pytest.mark.parametrize("bias", [False, True])
    def test_to_monai(self, bias: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """MONAI's own strict loader takes the file; the warning is logged."""
        caplog.set_level(logging.WARNING)
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in reference.encoder_state(10, "B").items()}}, tmp_path / "w.pth"
        )
        convert(tmp_path / "w.pth", tmp_path / "monai.pt", to="monai", bias_downsample=bias)
        assert "the function is not" in caplog.text
        monai_net = nets.resnet10(
            pretrained=str(tmp_path / "monai.pt"),
            n_input_channels=1,
            conv1_t_stride=2,
            feed_forward=False,
            bias_downsample=bias,
        )
        ours = Med3DResNet(10, output_stride=32).eval()
        load_backbone(ours, tmp_path / "w.pth")
        image = torch.randn(1, 1, 64, 48, 40)
        with torch.no_grad():
            torch.testing.assert_close(_layer4(monai_net.eval(), image), ours(image)[-1], rtol=1e-4, atol=1e-5)

    def test_kinetics_form(self, tmp_path: Path) -> None:
        """Three channels, a classifier, no counters: a video network's checkpoint of the same family."""
        net = _monai(10, "B", bias_downsample=False, n_input_channels=3)
        state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
        torch.save({"epoch": 200, "arch": "resnet-10", "state_dict": state}, tmp_path / "r3d.pth")
        done = convert(tmp_path / "r3d.pth", tmp_path / "encoder.pt")
        assert done.in_channels == 3 and any("12 num_batches_tracked set to 0" in note for note in done.notes)
        gray = Med3DResNet(10)
        assert "summed over 3" in load_backbone(gray, tmp_path / "encoder.pt").stem
        torch.testing.assert_close(gray.conv1.weight, net.conv1.weight.sum(1, keepdim=True))


# What is refused: (state dict, arguments, what the message must name).
REFUSED: dict[str, tuple[Any, dict[str, str], str]] = {
    "an encoder as a bundle": (lambda: reference.encoder_state(10, "B"), {"to": "bundle"}, "without a head"),
    "an unknown form": (lambda: reference.encoder_state(10, "B"), {"to": "onnx"}, "allowed are bundle"),
    "a key missing": (
        lambda: {k: v for k, v in reference.encoder_state(10, "B").items() if k != "layer3.0.bn2.bias"},
        {},
        r"1 missing \(layer3\.0\.bn2\.bias\)",
    ),
    "twice as wide, as FMCIB's": (
        lambda: _monai(10, "B", widen_factor=2, feed_forward=False).state_dict(),
        {},
        r"conv1\.weight \(128, 1, 7, 7, 7\) instead of \(64, 1, 7, 7, 7\)",
    ),
    "2D": (lambda: nets.resnet18(spatial_dims=2, n_input_channels=1).state_dict(), {}, "no 3D ResNet of depth 10"),
    "torchvision's": (lambda: {"stem.0.weight": torch.ones(64, 3, 3, 7, 7)}, {}, "torchvision's video ResNet"),
    "Models Genesis": (lambda: {"down_tr64.ops.0.conv1.weight": torch.ones(32, 1, 3, 3, 3)}, {}, "a U-Net"),
    "half a conv_seg": (
        lambda: {**reference.encoder_state(10, "B"), "conv_seg.0.bias": torch.ones(32)},
        {},
        r"is not MedicalNet's conv_seg: 13 missing",
    ),
}


class TestRefusal:
    @pytest.mark.parametrize("case", REFUSED)
    def test_refused(self, case: str, tmp_path: Path) -> None:
        make, arguments, message = REFUSED[case]
        torch.save(make(), tmp_path / "w.pth")
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "w.pth", tmp_path / "out.pt", **arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]

    @pytest.mark.parametrize("name, to", [("out.onnx", "encoder"), ("out", ""), ("out.safetensors", "medicalnet")])
    def test_suffix(self, name: str, to: str, finetuned: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"the suffix of weights to write may be \.pt, \.pth"):
            convert(finetuned, tmp_path / name, to=to)
        assert not list(tmp_path.iterdir())
