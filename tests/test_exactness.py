"""The encoder computes the published network, and so does every form that it can be exported to.

The yardstick is ``tests/reference.py``, which shares no code with the package; its golden file was made in
float64. "Equal" means, in float32: no element of a map differs by more than 1e-5 of that map's largest value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch

from med3d_nets import Med3DResNet, SegmentationNet
from tests import reference

Maps = list[torch.Tensor]
Network = tuple[int, str, int]

TOLERANCE = 1e-5
QUICK_DEPTHS = (10, 50)  # one of each block; the others take the same path with more blocks


def _params(always: tuple[int, ...]) -> list:
    """Every network; those away from the quick depths and from the output strides named are slow."""
    return [
        pytest.param(
            network,
            id=reference.network_name(*network),
            marks=() if network[0] in QUICK_DEPTHS or network[2] in always else pytest.mark.slow,
        )
        for network in reference.EVERY_NETWORK
    ]


def _build(depth: int, shortcut: str, output_stride: int) -> Med3DResNet:
    """Our network with the reference's parameters, every key accounted for."""
    with torch.device("meta"):
        net = Med3DResNet(depth, shortcut, output_stride=output_stride)
    net.load_state_dict(reference.encoder_state(depth, shortcut), strict=True, assign=True)
    return net.eval()


def _assert_equal(found: Maps, wanted: Maps, tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(wanted) == 5
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, f"map {index}"
        assert a.dtype == torch.float32
        difference = ((a - b).abs().max() / b.abs().max()).item()
        assert difference <= tolerance, f"map {index} differs by {difference:.1e} of its maximum"


def _assert_golden(maps: Maps, network: Network) -> None:
    golden = json.loads(reference.GOLDEN.read_text())[reference.network_name(*network)]
    found = reference.summary(maps)
    assert len(found) == len(golden) == 5
    for index, (a, b) in enumerate(zip(found, golden, strict=True)):
        assert a["shape"] == b["shape"], f"map {index}"
        for part in ("mean", "std", "max", "samples"):
            assert a[part] == pytest.approx(b[part], rel=0, abs=TOLERANCE * b["max"]), f"{part} of map {index}"


@pytest.fixture(scope="module", params=_params(always=(8,)))
def computed(request: pytest.FixtureRequest) -> Iterator[tuple[Network, Maps, Maps]]:
    """A network, its maps from the package, its maps from the reference."""
    network = request.param
    x = reference.encoder_input()
    with torch.no_grad():
        ours = _build(*network)(x)
        yield network, ours, reference.encoder_maps(reference.encoder_state(*network[:2]), x, *network)


class TestEncoder:
    def test_equals_the_reference(self, computed: tuple[Network, Maps, Maps]) -> None:
        _, ours, theirs = computed
        _assert_equal(ours, theirs)

    def test_equals_the_golden_outputs(self, computed: tuple[Network, Maps, Maps]) -> None:
        network, ours, _ = computed
        _assert_golden(ours, network)

    def test_reference_equals_the_golden_outputs(self, computed: tuple[Network, Maps, Maps]) -> None:
        network, _, theirs = computed
        _assert_golden(theirs, network)

    def test_input_is_left_alone(self) -> None:
        x = reference.encoder_input()
        with torch.no_grad():
            _build(10, "B", 8)(x)
        assert torch.equal(x, reference.encoder_input())


class TestYardstick:
    def test_golden_file_holds_every_network(self) -> None:
        golden = json.loads(reference.GOLDEN.read_text())
        assert list(golden) == [reference.network_name(*network) for network in reference.EVERY_NETWORK]
        for name, maps in golden.items():
            assert all(0.1 < feature_map["std"] < 10 for feature_map in maps), name

    @pytest.mark.parametrize("layer, dilation", [(2, 1), (2, 3), (3, 1), (3, 3)])
    def test_sees_another_dilation(self, layer: int, dilation: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The comparison fails if layer3 or layer4 is dilated otherwise, by 1 as in MONAI's ResNet too."""
        changed = list(reference.DILATIONS[8])
        changed[layer] = dilation
        monkeypatch.setitem(reference.DILATIONS, 8, tuple(changed))
        state, x = reference.encoder_state(10, "B"), reference.encoder_input()
        with torch.no_grad():
            ours, theirs = _build(10, "B", 8)(x), reference.encoder_maps(state, x, 10, "B", 8)
        with pytest.raises(AssertionError, match=f"map {layer + 1} differs"):
            _assert_equal(ours, theirs, tolerance=100 * TOLERANCE)

    def test_sees_every_kind_of_tensor(self) -> None:
        """A change of 1 % in any tensor of a block shows in the few golden values."""
        x, state = reference.encoder_input(), reference.encoder_state(50, "B")
        net = _build(50, "B", 8)
        keys = [key for key in state if key.startswith("layer3.0.") and "num_batches" not in key]
        assert len(keys) == 20
        for key in keys:
            with torch.no_grad():
                net.load_state_dict({**state, key: state[key] * 1.01}, assign=True)
                maps = net(x)
            with pytest.raises(AssertionError, match=r"of map [34]"):
                _assert_golden(maps, (50, "B", 8))


@pytest.mark.parametrize("network", _params(always=()))
class TestExports:
    """TorchScript, torch.export and ONNX give the maps of the network that they were made from."""

    shape = (1, 1, 17, 24, 19)

    def test_torchscript(self, network: Network) -> None:
        net, x = _build(*network), torch.rand(self.shape)
        with torch.no_grad():
            _assert_equal(torch.jit.script(net)(x), net(x))

    def test_torch_export(self, network: Network) -> None:
        net, x = _build(*network), torch.rand(self.shape)
        with torch.no_grad():
            _assert_equal(torch.export.export(net, (x,)).module()(x), net(x))

    def test_onnx(self, network: Network, tmp_path: Path) -> None:
        net, x = _build(*network), torch.rand(self.shape)
        torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
        with torch.no_grad():
            _assert_equal(_run_onnx(tmp_path / "net.onnx", x), net(x), tolerance=1e-4)


ANY_SIZE = ({0: torch.export.Dim.DYNAMIC, **{axis: torch.export.Dim.DYNAMIC for axis in (2, 3, 4)}},)


class TestDynamicSizes:
    """One export serves every batch and image size, those it was not traced with too."""

    traced = (2, 1, 33, 40, 43)
    other = (1, 1, 50, 17, 64)

    @pytest.mark.parametrize("head, shortcut", [("medicalnet", "A"), ("linear", "B"), ("fpn", "B")])
    def test_segmentation(self, head: str, shortcut: str, tmp_path: Path) -> None:
        net = SegmentationNet(10, 3, head, shortcut_type=shortcut).eval()
        x, path = torch.rand(self.other), tmp_path / "net.onnx"
        program = torch.export.export(net, (torch.rand(self.traced),), dynamic_shapes=ANY_SIZE)
        torch.onnx.export(program, (), path, dynamo=True, verbose=False)
        with torch.no_grad():
            wanted = net(x)
            found = [torch.jit.script(net)(x), program.module()(x), *_run_onnx(path, x)]
        for name, logits in zip(("TorchScript", "torch.export", "ONNX"), found, strict=True):
            assert logits.shape == (1, 3, 50, 17, 64), name
            assert (logits - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


def _run_onnx(path: Path, x: torch.Tensor) -> Maps:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(a) for a in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
