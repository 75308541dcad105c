"""The co-training network and its loss."""

from __future__ import annotations

import copy

import pytest
import torch

from med3d_nets import CoTraining, DomainInferer, DomainLoss, InputError, MultiDomainNet
from med3d_nets.heads import HEADS
from med3d_nets.multidomain import UNKNOWN

DOMAINS = {"liver": 2, "hippocampus": 3}


@pytest.fixture(params=list(HEADS))
def net(request: pytest.FixtureRequest) -> MultiDomainNet:
    torch.manual_seed(0)
    return MultiDomainNet(10, DOMAINS, head=request.param).eval()


@torch.inference_mode()
def test_branches_are_parts_of_the_whole_output(net: MultiDomainNet) -> None:
    x = torch.randn(2, 1, 33, 24, 17)
    whole = net(x)
    assert whole.shape == (2, 5, 33, 24, 17)
    torch.testing.assert_close(net.branch("liver")(x), whole[:, :2])
    torch.testing.assert_close(net.branch("hippocampus")(x), whole[:, 2:])


@torch.inference_mode()
def test_a_mixed_batch_gives_each_sample_its_branch(net: MultiDomainNet) -> None:
    x = torch.randn(3, 1, 16, 24, 17)
    logits = CoTraining(net)(x, ["hippocampus", "liver", "hippocampus"])
    assert [tuple(one.shape) for one in logits] == [(3, 16, 24, 17), (2, 16, 24, 17), (3, 16, 24, 17)]
    whole = net(x)
    for index, part in enumerate((slice(2, 5), slice(0, 2), slice(2, 5))):
        torch.testing.assert_close(logits[index], whole[index, part])


def test_a_step_is_that_of_the_plain_network() -> None:
    """Channels last changes neither the loss nor a gradient beyond rounding, and no name of a weight."""
    plain = MultiDomainNet(10, DOMAINS, head="fpn").train()
    x, label = torch.randn(2, 1, 24, 32, 16), torch.randint(0, 2, (2, 1, 24, 32, 16))
    training = CoTraining(copy.deepcopy(plain)).train()
    losses = []
    for logits in (plain(x)[:, :2], training(x, ["liver", "liver"])):
        losses.append(DomainLoss()(list(logits), label))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    wanted = {name: value.grad for name, value in plain.named_parameters() if "hippocampus" not in name}
    found = {name: value.grad for name, value in training.network.named_parameters() if "hippocampus" not in name}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()), msg=name)
    assert training.network.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert training.network.state_dict().keys() == plain.state_dict().keys()


def test_a_sample_trains_its_own_branch_alone() -> None:
    net = MultiDomainNet(10, DOMAINS, head="fpn")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    label = torch.randint(0, 2, (1, 1, 16, 16, 16))
    for domain in ("hippocampus", "liver"):  # the second step must not move the first branch by momentum or decay
        before = {name: value.clone() for name, value in net.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        DomainLoss()(CoTraining(net)(torch.randn(1, 1, 16, 16, 16), [domain]), label).backward()
        optimizer.step()
        moved = {name for name, value in net.named_parameters() if not torch.equal(before[name], value)}
        assert {name.split(".")[1] for name in moved if name.startswith("branches.")} == {domain}
        assert any(name.startswith("backbone.") for name in moved)


def test_unknown_voxels_teach_nothing() -> None:
    logits = torch.randn(3, 8, 8, 8, requires_grad=True)
    label = torch.randint(0, 3, (1, 1, 8, 8, 8))
    label[:, :, :4] = UNKNOWN
    DomainLoss()([logits], label).backward()
    assert logits.grad is not None
    assert not logits.grad[:, :4].any() and logits.grad[:, 4:].any()
    nothing = DomainLoss()([logits], torch.full_like(label, UNKNOWN))
    assert nothing.item() == 0 and nothing.requires_grad


def test_frozen_norms_keep_their_statistics() -> None:
    training = CoTraining(MultiDomainNet(10, DOMAINS, head="fpn"))
    training.freeze_norm = True
    before = {name: value.clone() for name, value in training.named_buffers()}
    training.train()(torch.randn(2, 1, 16, 16, 16), ["liver", "liver"])
    assert all(torch.equal(before[name], value) for name, value in training.named_buffers())
    training.freeze_norm = False
    training.train()(torch.randn(2, 1, 16, 16, 16), ["liver", "liver"])
    moved = {name for name, value in training.named_buffers() if not torch.equal(before[name], value)}
    assert any("backbone" in name for name in moved) and not any("hippocampus" in name for name in moved)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(20, 33, 16), (10, 40, 24)])
def test_windows_are_no_larger_than_the_volume(shape: tuple[int, ...]) -> None:
    net = MultiDomainNet(10, DOMAINS, head="fpn").eval()
    seen: list[torch.Size] = []
    net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    out = DomainInferer((96, 24, -1), divisor=8, padding_mode="constant")(torch.randn(1, 1, *shape), net, ["liver"])
    assert out.shape == (1, 2, *shape)
    assert {tuple(one) for one in seen} == {(max(16, -(-shape[0] // 8) * 8), 24, shape[2])}


def test_bad_arguments(net: MultiDomainNet) -> None:
    with pytest.raises(InputError, match="domain='lung': this network has no such branch. It has liver, hippocampus"):
        net.branch("lung")
    for domains, message in (({}, "at least one domain"), ({"a.b": 2}, "dot"), ({"a": 1}, "1 classes")):
        with pytest.raises(ValueError, match=message):
            MultiDomainNet(10, domains)
    with pytest.raises(ValueError, match="head='unet': allowed are"):
        MultiDomainNet(10, DOMAINS, head="unet")
