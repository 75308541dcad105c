"""Pairs of patches: where they lie, what they show; one pass, one loss for both stages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from med3d_nets import CoarseToFineNet
from med3d_nets.two_stage_training import RandStagesd, TwoStageLoss, TwoStageTraining

STILL: dict[str, Any] = {"rotation": 0.0, "scaling": 0.0, "translation": 0.0}


def item(size: tuple[int, int, int] = (64, 56, 48)) -> dict[str, torch.Tensor]:
    """A ramp that tells each voxel's place, and an organ of 20 x 16 x 12 voxels."""
    grid = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in size], indexing="ij")
    label = torch.zeros(1, *size)
    label[0, 30:50, 20:36, 10:22] = 2
    return {"image": (grid[0] + 100 * grid[1] + 10_000 * grid[2])[None] + 1, "label": label}


def cut(seed: int = 0, **options: Any) -> dict[str, Any]:
    transform = RandStagesd(("image", "label"), options.pop("patch_size", (32, 32, 32)), (2, 2, 2), **options)
    return transform.set_random_state(seed)(item(options.pop("size", (64, 56, 48))))


def test_fine_and_coarse_of_a_still_patch() -> None:
    """Without turning, the coarse patch is the volume averaged in blocks of 2³, its middle that of the patch."""
    found = cut(**STILL)
    image, label = found["image"], found["label"]
    assert image.shape == label.shape == (2, 32, 32, 32)
    assert image.dtype == torch.float32 and label.dtype == torch.uint8
    whole = torch.nn.functional.avg_pool3d(item()["image"][None], 2)[0, 0]  # 32 x 28 x 24
    torch.testing.assert_close(image[1, :, 2:30, 4:28], whole, rtol=1e-5, atol=0.5)
    assert float(image[1, :, :2].max()) < 10 and float(image[1, ..., 28:].max()) < 10  # rounding of the grid
    organ = label[1, :, 2:30, 4:28]
    assert organ[15:25, 10:18, 5:11].all() and organ.sum() == 10 * 8 * 6


@pytest.mark.parametrize("seed", range(5))
def test_image_and_label_go_together(seed: int) -> None:
    """Turned, scaled and moved: what the ramp says of a voxel is what the label says of it."""
    found = cut(seed, expansion=4)
    place = found["image"][0].double() - 1
    z = torch.floor(place / 10_000 + 1e-4)
    inside = (found["label"][0] == 2) & (found["image"][0] > 0)
    assert inside.sum() > 500
    assert float(z[inside].min()) >= 9 and float(z[inside].max()) <= 22


@pytest.mark.parametrize("seed", range(8))
def test_the_fine_patch_shows_the_organ(seed: int) -> None:
    """An organ smaller than the patch is seen whole; of a larger one always a part, in other places."""
    assert (cut(seed, expansion=0, **STILL)["label"][0] == 2).sum() == 20 * 16 * 12
    small = cut(seed, patch_size=(16, 16, 16), expansion=8, **STILL)["label"][0]
    assert small.any()


def test_chance_is_seeded() -> None:
    one, same, other = cut(3), cut(3), cut(4)
    assert torch.equal(one["image"], same["image"]) and not torch.equal(one["image"], other["image"])


def test_without_an_organ() -> None:
    data = item()
    data["label"].zero_()
    middles = set()
    transform = RandStagesd(("image", "label"), (16, 16, 16), (2, 2, 2), expansion=0, **STILL)
    for seed in range(5):
        found = transform.set_random_state(seed)(data)
        assert not found["label"].any()
        middles.add(float(found["image"][0, 8, 8, 8]))
    assert len(middles) == 5


class TestStep:
    @pytest.fixture
    def network(self) -> CoarseToFineNet:
        torch.manual_seed(0)
        return CoarseToFineNet(10, 3, head_options={"rates": [1, 2], "growth": 8, "bottleneck": 16, "layer_dropout": 0})

    def test_is_both_stages(self, network: CoarseToFineNet) -> None:
        network.eval()
        x = torch.randn(2, 2, 32, 24, 17)
        with torch.no_grad():
            found = TwoStageTraining(network)(x)
            torch.testing.assert_close(found[:, :3], network(x[:, :1]), rtol=0, atol=1e-4)
            torch.testing.assert_close(found[:, 3:], network(x[:, 1:], coarse=True), rtol=0, atol=1e-4)

    def test_loss_falls(self, network: CoarseToFineNet) -> None:
        """A few steps on one pair, through both heads and the encoder."""
        data = cut(**STILL)
        x = (data["image"] / data["image"].max())[None]
        x = x + data["label"][None] * 0.5
        step, loss = TwoStageTraining(network), TwoStageLoss(0.5)
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            value = loss(step(x), data["label"][None])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            losses.append(float(value))
        assert losses[-1] < 0.8 * losses[0]
        assert all(
            p.grad is not None and p.grad.any() for p in (network.coarse.conv.weight, network.head.classify.weight)
        )

    def test_the_coarse_weight(self) -> None:
        logits = torch.randn(2, 5, 8, 8, 8)
        label = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (2, 2, 8, 8, 8)))
        values = [float(TwoStageLoss(weight)(logits, label)) for weight in (0.0, 1.0, 2.0)]
        assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-4) and values[1] > values[0]
