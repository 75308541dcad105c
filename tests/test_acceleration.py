"""A network made ready for inference computes what it computed before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from med3d_nets import InputError, MultiDomainNet, SegmentationNet, accelerate, acceleration


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
