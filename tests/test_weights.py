"""Weights load to the last key or not at all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from monai.networks.nets import FlexibleUNet

from med3d_nets import DEPTHS, InputError, Med3DResNet, SegmentationNet, initialise
from med3d_nets.weights import (
    detect_architecture,
    file_sha256,
    load_backbone,
    load_checkpoint,
    load_network,
    read_state_dict,
)
from tests import reference

State = dict[str, torch.Tensor]


def _tiny(shapes: dict[str, tuple[int, ...]]) -> State:
    """A state dict of any size in a small file: the n-th tensor is full of n, one stored element expanded."""
    return {
        key: torch.tensor(n if key.endswith("tracked") else float(n)).expand(shape)
        for n, (key, shape) in enumerate(shapes.items())
    }


def _released(depth: int, shortcut: str | None = None) -> State:
    shapes = reference.encoder_shapes(depth, shortcut or DEPTHS[depth].shortcut)
    return {f"module.{key}": value for key, value in _tiny(shapes).items()}


def _write(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


class TestLoading:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_released_form(self, depth: int, tmp_path: Path) -> None:
        with torch.device("meta"):
            net = Med3DResNet(depth)
        net.to_empty(device="cpu")
        account = load_backbone(net, _write(tmp_path / "w.pth", {"state_dict": _released(depth)}))
        assert account.loaded == tuple(net.state_dict())
        assert not (account.missing or account.unexpected or account.shape_mismatch or account.skipped or account.stem)
        for n, (key, value) in enumerate(net.state_dict().items()):
            assert (value == n).all(), key

    @pytest.mark.parametrize(
        "prefix, dtype",
        [
            ("", torch.float16),
            ("module.", torch.bfloat16),
            ("backbone.", torch.float64),
            ("module.backbone.", torch.float32),
        ],
    )
    def test_other_forms(self, prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
        state = _tiny(reference.encoder_shapes(10, "B"))
        state = {prefix + key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        if "backbone" in prefix:
            state[prefix.replace("backbone", "head") + "conv.weight"] = torch.zeros(3)
        net = Med3DResNet(10)
        account = load_backbone(net, _write(tmp_path / "w.pt", state))
        assert account.head == (("head.conv.weight",) if "backbone" in prefix else ())
        assert net.conv1.weight.dtype == torch.float32
        assert all((value == n).all() for n, value in enumerate(net.state_dict().values()))

    @pytest.mark.parametrize("shortcut", ["A", "B"])
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_architecture_is_read_off(self, depth: int, shortcut: str) -> None:
        assert detect_architecture(_tiny(reference.encoder_shapes(depth, shortcut))) == (depth, shortcut)
        assert detect_architecture({"weight": torch.zeros(1)}) is None

    def test_flexible_unet(self, tmp_path: Path) -> None:
        net = FlexibleUNet(1, 2, "med3d_resnet10", spatial_dims=3)
        load_backbone(net.encoder, _write(tmp_path / "w.pth", {"state_dict": _released(10)}))
        assert (net.encoder.layer4[0].bn2.num_batches_tracked == 65).all()

    def test_whole_network(self, tmp_path: Path) -> None:
        saved, net = SegmentationNet(10, 3, "fpn"), SegmentationNet(10, 3, "fpn")
        path = _write(tmp_path / "model.pt", saved.state_dict())
        assert load_network(net, path) is net
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in net.state_dict().items())
        with pytest.raises(InputError, match=r"ResNet-10 with shortcut B.*ResNet-18 with shortcut A"):
            load_network(SegmentationNet(18, 3, "fpn"), path)
        with pytest.raises(InputError, match=r"14 missing \(head\.conv_seg\.0.*unexpected \(head\.top\.weight"):
            load_network(SegmentationNet(10, 3), path)

    def test_sha256(self, tmp_path: Path) -> None:
        (tmp_path / "abc").write_bytes(b"abc")
        digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert file_sha256(tmp_path / "abc") == digest


class TestAccount:
    def test_safetensors(self, tmp_path: Path) -> None:
        state = {key: value.contiguous() for key, value in _tiny(reference.encoder_shapes(10, "B")).items()}
        safetensors.torch.save_file(state, tmp_path / "w.safetensors")
        net = Med3DResNet(10)
        assert len(load_backbone(net, tmp_path / "w.safetensors").loaded) == 72
        assert all((value == n).all() for n, value in enumerate(net.state_dict().values()))

    def test_module_inside_a_name_stays(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "w.pt", {"module.a.module.b": torch.ones(1)})
        assert list(read_state_dict(path)) == ["a.module.b"]

    def test_is_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        state = {**_released(10), "module.conv_seg.0.weight": torch.zeros(1)}
        account = load_backbone(Med3DResNet(10), _write(tmp_path / "w.pth", {"state_dict": state}))
        assert account.head == ("head.conv_seg.0.weight",)
        assert str(account) == caplog.messages[-1]
        assert "w.pth: 72 tensors loaded; 0 missing; 0 unexpected; 0 of another shape; 1 of a head" in str(account)

    def test_networks_that_have_a_backbone(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "w.pth", {"state_dict": _released(10)})
        for net in (SegmentationNet(10, 2), FlexibleUNet(1, 2, "med3d_resnet10", spatial_dims=3)):
            assert len(load_backbone(net, path).loaded) == 72
        assert initialise(net := SegmentationNet(10, 2), str(path)) is net
        assert (net.backbone.bn1.weight == 1).all() and (net.backbone.bn1.bias == 2).all()
        with pytest.raises(TypeError, match="Linear: no Med3DResNet"):
            load_backbone(torch.nn.Linear(1, 1), path)

    def test_another_head_by_name(self, tmp_path: Path) -> None:
        """A network for other classes keeps its own last layer, only when that is asked for."""
        saved, net = SegmentationNet(10, 3, "fpn"), SegmentationNet(10, 5, "fpn")
        path = _write(tmp_path / "model.pt", saved.state_dict())
        own = {key: value.clone() for key, value in net.state_dict().items()}
        with pytest.raises(InputError, match=r"2 of another shape \(head\.classify\.weight \(32, 3, 2, 2, 2\) instead"):
            load_checkpoint(net, path)
        account = load_checkpoint(net, path, skip=["head.classify"])
        assert len(account.shape_mismatch) == 2 and not account.missing and not account.unexpected
        for key, value in net.state_dict().items():
            same = own[key] if key.startswith("head.classify") else saved.state_dict()[key]
            assert torch.equal(value, same), key

    def test_skip(self, tmp_path: Path) -> None:
        state = {**_without("module.bn1.bias"), "module.extra.weight": torch.ones(2)}
        path = _write(tmp_path / "w.pth", {"state_dict": state})
        net = Med3DResNet(10)
        with pytest.raises(InputError, match=r"1 missing \(bn1\.bias\); 1 unexpected \(extra\.weight\)"):
            load_backbone(net, path)
        with pytest.raises(InputError, match=r"1 missing \(bn1\.bias\); 0 unexpected"):
            load_backbone(net, path, skip="extra")
        account = load_backbone(net, path, skip=["bn1", "extra"])
        assert account.missing == ("bn1.bias",) and account.unexpected == ("extra.weight",)
        assert set(account.skipped) == {
            f"bn1.{n}" for n in ("weight", "running_mean", "running_var", "num_batches_tracked")
        }
        assert (net.bn1.weight == 1).all() and len(account.loaded) == 67
        with pytest.raises(InputError, match=r"skip=\['bn'\]: matches no tensor"):
            load_backbone(net, path, skip=["bn1", "extra", "bn"])


class TestStem:
    """Weights of another number of channels give equal activations on an image repeated over the channels."""

    @pytest.mark.parametrize("saved_for, built_for", [(1, 3), (1, 2), (3, 1)])
    def test_equal_activations(self, saved_for: int, built_for: int, tmp_path: Path) -> None:
        torch.manual_seed(0)
        saved = Med3DResNet(10, in_channels=saved_for).eval()
        net = Med3DResNet(10, in_channels=built_for).eval()
        account = load_backbone(net, _write(tmp_path / "w.pt", saved.state_dict()))
        assert ("repeated" if built_for > 1 else "summed") in account.stem and account.stem in str(account)
        image = torch.randn(1, 1, 24, 16, 20)
        with torch.no_grad():
            expected, got = (one(image.repeat(1, one.in_channels, 1, 1, 1)) for one in (saved, net))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

    def test_no_rule_between_several(self, tmp_path: Path) -> None:
        path = _write(tmp_path / "w.pt", Med3DResNet(10, in_channels=2).state_dict())
        with pytest.raises(InputError, match=r"conv1\.weight \(64, 2, 7, 7, 7\) instead of \(64, 3, 7, 7, 7\)"):
            load_backbone(Med3DResNet(10, in_channels=3), path)


class _Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _without(key: str) -> State:
    return {k: v for k, v in _released(10).items() if k != key}


# What is wrong: (state dict, what the message must name).
UNFIT: dict[str, tuple[Callable[[], State], list[str]]] = {
    "another depth": (lambda: _released(18), ["ResNet-18 with shortcut A", "ResNet-10 with shortcut B"]),
    "another shortcut": (
        lambda: _released(10, "A"),
        ["ResNet-10 with shortcut A", "ResNet-10 with shortcut B"],
    ),
    "a key missing": (lambda: _without("module.layer3.0.bn2.bias"), ["1 missing (layer3.0.bn2.bias)"]),
    "a key too many": (
        lambda: {**_released(10), "module.fc.weight": torch.ones(2)},
        ["1 unexpected (fc.weight)", "a ResNet with a classifier", "convert"],
    ),
    "another shape": (
        lambda: {**_released(10), "module.conv1.weight": torch.ones(64, 1, 5, 5, 5)},
        ["conv1.weight (64, 1, 5, 5, 5) instead of (64, 1, 7, 7, 7)"],
    ),
    "not a number": (
        lambda: {**_released(10), "module.bn1.bias": torch.full((64,), torch.nan)},
        ["1 with NaN or infinity (bn1.bias)"],
    ),
    "integers": (
        lambda: {**_released(10), "module.bn1.bias": torch.ones(64, dtype=torch.int8)},
        ["1 of another kind of number (bn1.bias)"],
    ),
    "a key twice": (
        lambda: {**_released(10), "conv1.weight": torch.ones(64, 1, 7, 7, 7)},
        ["1 there twice", "(conv1.weight)"],
    ),
    "torchvision's video network": (
        lambda: {"stem.0.weight": torch.ones(64, 3, 3, 7, 7), "layer1.0.conv1.0.weight": torch.ones(64, 64, 3, 3, 3)},
        ["72 missing", "torchvision's video ResNet"],
    ),
    "no key in common": (
        lambda: {"a": torch.ones(1), "b": torch.ones(1)},
        ["72 missing", "2 unexpected (a, b)"],
    ),
}


class TestRefusal:
    """Every refusal names the file and leaves the network as it was."""

    @pytest.fixture
    def net(self) -> Med3DResNet:
        return Med3DResNet(10)

    def _refused(self, net: Med3DResNet, path: Path) -> str:
        before = {key: value.clone() for key, value in net.state_dict().items()}
        with pytest.raises(InputError, match=re.escape(str(path))) as error:
            load_backbone(net, path)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        return str(error.value)

    @pytest.mark.parametrize("case", UNFIT)
    def test_unfit(self, case: str, net: Med3DResNet, tmp_path: Path) -> None:
        make, names = UNFIT[case]
        message = self._refused(net, _write(tmp_path / "w.pth", {"state_dict": make()}))
        assert all(name in message for name in names), message

    @pytest.mark.parametrize("content", [b"", b"weights\n", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04junk"])
    def test_no_checkpoint(self, content: bytes, net: Med3DResNet, tmp_path: Path) -> None:
        (tmp_path / "w.pth").write_bytes(content)
        assert "not a checkpoint" in self._refused(net, tmp_path / "w.pth")

    def test_truncated(self, net: Med3DResNet, tmp_path: Path) -> None:
        path = _write(tmp_path / "w.pth", {"state_dict": _released(10)})
        path.write_bytes(path.read_bytes()[:-100])
        assert "not a checkpoint" in self._refused(net, path)

    @pytest.mark.parametrize(
        "content", [[torch.ones(1)], {}, {"epoch": 3}, {0: torch.ones(1)}, {"state_dict": [1]}, torch.ones(2)]
    )
    def test_no_state_dict(self, content: object, net: Med3DResNet, tmp_path: Path) -> None:
        assert "a state dict (tensors by name) is needed" in self._refused(net, _write(tmp_path / "w.pth", content))

    def test_broken_safetensors(self, net: Med3DResNet, tmp_path: Path) -> None:
        (tmp_path / "w.safetensors").write_bytes(b"<!DOCTYPE html>")
        assert "not a checkpoint" in self._refused(net, tmp_path / "w.safetensors")

    def test_absent(self, net: Med3DResNet, tmp_path: Path) -> None:
        assert "no such weights file" in self._refused(net, tmp_path / "none.pth")

    def test_pickled_object_is_not_run(self, net: Med3DResNet, tmp_path: Path) -> None:
        content = {"state_dict": {**_released(10), "extra": _Harmful(tmp_path / "made")}}
        assert "weights_only=True" in self._refused(net, _write(tmp_path / "w.pth", content))
        assert not (tmp_path / "made").exists()
