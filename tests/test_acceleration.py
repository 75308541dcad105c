"""A network made ready for inference computes what it computed before."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from med3d_nets import (
    ClassificationNet,
    EmbeddingNet,
    InputError,
    MultiDomainNet,
    SegmentationNet,
    WholeVolumeInferer,
    accelerate,
    acceleration,
)
from med3d_nets.inferer import bytes_per_voxel


def trained(network: nn.Module) -> nn.Module:
    """Norms as after a training: no statistic and no factor is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            for values, low in ((module.running_mean, -0.1), (module.running_var, 0.9), (module.weight.data, 0.9)):
                values.uniform_(low, low + 0.2, generator=generator)  # type: ignore[union-attr]
            module.bias.data.uniform_(-0.1, 0.1, generator=generator)
    return network.eval()


NETWORKS = {
    "10 fpn": lambda: SegmentationNet(10, 3, head="fpn"),
    "18 medicalnet": lambda: SegmentationNet(18, 2, head="medicalnet"),
    "50 linear": lambda: SegmentationNet(50, 2, head="linear"),
    "10 domains": lambda: MultiDomainNet(10, {"a": 2, "b": 3}, head="fpn"),
    "10 branch": lambda: MultiDomainNet(10, {"a": 2, "b": 3}, head="medicalnet").branch("b"),
    "10 features": lambda: EmbeddingNet(10),
    "10 classifier": lambda: ClassificationNet(10, 3),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    network = trained(NETWORKS[name]())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(1, 1, 33, 40, 18)
    fast = accelerate(network, "float32")
    wanted = network(x)
    torch.testing.assert_close(fast(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fast.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    short = accelerate(network, "bfloat16")(x)
    assert short.dtype == torch.float32
    assert (short - wanted).square().mean().sqrt() < 0.05 * wanted.std()


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_knows_what_is_padding(precision: str) -> None:
    """What a network takes beside the image reaches it, and its features are shifted and scaled in float32."""
    network = trained(ClassificationNet(10, 3))
    network.head[0].mean.fill_(100.1)  # bfloat16 would make 100 of it
    network.head[0].std.fill_(0.5)
    x, size = torch.randn(2, 1, 24, 24, 24), torch.tensor([[24, 24, 24], [9, 24, 12]])
    wanted, fast = network(x, size), accelerate(network, precision)
    assert not torch.allclose(network(x), wanted, atol=1e-3)
    assert fast.network.head[0].mean.dtype == fast.network.head[2].weight.dtype == torch.float32
    tolerance = 1e-5 * float(wanted.abs().max()) if precision == "float32" else 0.05
    torch.testing.assert_close(fast(x, size), wanted, rtol=0, atol=tolerance)


@torch.inference_mode()
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled() -> None:
    """The same labels at every size, compiled at the first pass and not by the estimate of memory before it."""
    network = trained(SegmentationNet(10, 2, head="linear"))
    fast = accelerate(network, "float32", compile=True)
    compiled, calls = fast._compiled, []
    fast._compiled = lambda *args: calls.append(args[0].device.type) or compiled(*args)
    assert bytes_per_voxel(fast) == bytes_per_voxel(accelerate(network, "float32")) and calls == []
    for shape in ((32, 32, 16), (48, 16, 64)):
        x = torch.randn(1, 1, *shape)
        found, wanted = WholeVolumeInferer()(x, fast), WholeVolumeInferer()(x, network)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert torch.equal(found.argmax(dim=1), wanted.argmax(dim=1))
    assert calls == ["cpu", "cpu"] and fast._compiled is not None


@torch.inference_mode()
def test_what_cannot_be_compiled_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    network, x = trained(SegmentationNet(10, 2)), torch.randn(1, 1, 16, 16, 16)
    fast = accelerate(network, "float32", compile=True)

    def fail(*args: torch.Tensor) -> torch.Tensor:
        raise TorchDynamoException("invalid ranges\nand more")

    fast._compiled = fail
    for _ in range(2):
        torch.testing.assert_close(fast(x), network(x), rtol=0, atol=1e-5)
    assert [record.message for record in caplog.records] == [
        "The network could not be compiled and runs as it is (invalid ranges)."
    ]


@torch.inference_mode()
def test_other_errors_of_a_compiled_network_are_raised() -> None:
    fast = accelerate(SegmentationNet(10, 2), "float32", compile=True)

    def fail(*args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not enough memory")

    fast._compiled = fail
    with pytest.raises(RuntimeError, match="not enough memory"):
        fast(torch.zeros(1, 1, 16, 16, 16))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["10 fpn", "18 medicalnet", "10 branch"])
def test_openvino(name: str) -> None:
    """Runs where the extra is installed; the same function at every size, from one conversion."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    network = trained(NETWORKS[name]())
    fast = accelerate(network, "auto", "openvino")
    for shape in ((33, 40, 18), (17, 24, 35)):
        x = torch.randn(1, 1, *shape)
        wanted = network(x)
        torch.testing.assert_close(fast(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert bytes_per_voxel(fast) == bytes_per_voxel(fast.network) != 200  # that of networks which cannot be seen


def test_openvino_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"backend='openvino': the package openvino is missing. Run pip install"):
        accelerate(SegmentationNet(10, 2), backend="openvino")


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"compile": True}], ids=str)
def test_what_openvino_cannot(options: dict) -> None:
    with pytest.raises(InputError, match="backend='openvino' runs on the CPU, in float32 and without compile"):
        accelerate(SegmentationNet(10, 2), **options, backend="openvino")


def test_bad_backend() -> None:
    with pytest.raises(InputError, match="backend='onnx': allowed are torch, openvino"):
        accelerate(SegmentationNet(10, 2), backend="onnx")


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    network = SegmentationNet(10, 2)
    monkeypatch.setattr(acceleration, "multiplies_bfloat16", lambda: False)
    assert accelerate(network).dtype == torch.float32
    monkeypatch.setattr(acceleration, "multiplies_bfloat16", lambda: True)
    for slower in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(acceleration, "_seconds", lambda net, slower=slower: 2.0 if net.dtype == slower else 1.0)
        assert accelerate(network).dtype != slower


def test_bad_precision() -> None:
    with pytest.raises(InputError, match="precision='half': allowed are auto, float32, bfloat16"):
        accelerate(SegmentationNet(10, 2), "half")
