"""Training of both stages at once: pairs of patches, one around the organ and one of the whole at low resolution.

Chen, Ma, Zheng, arXiv 1904.00625, experiment on LiTS: crops around the liver with random expansion, rotation and
translation. Their sizes are not told, nor how the first stage was trained: project choices.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.losses import DiceCELoss
from monai.transforms import MapTransform, Randomizable
from monai.transforms.utils import create_rotate
from torch import nn
from torch.nn import functional as F

from med3d_nets.coarse_to_fine import CoarseToFineNet
from med3d_nets.heads import upsample
from med3d_nets.training_network import TrainingNetwork


class RandStagesd(Randomizable, MapTransform):
    """Cut the patches of both stages, turned and scaled by chance: channel 0 the fine one, channel 1 the coarse one.

    The fine patch lies around the organ: its middle is drawn in the organ's box, enlarged or shrunk by half a patch
    less ``expansion``, so that a large organ is seen part by part; without an organ anywhere. The coarse patch has the
    volume's middle, moved by chance, and averages ``factor`` voxels, as CoarseToFineInferer does. Beyond the volume
    both are 0.

    Args:
        keys: image and label, (1, X, Y, Z), of the fine stage's voxels.
        patch_size: voxels of both patches.
        factor: edge of the coarse stage's voxels over that of the fine one's, for each axis.
        label_keys: those of ``keys`` that are labels.
        expansion: voxels by which the fine patch may reach beyond the organ's box, at most.
        translation: of the coarse patch, at most, as a share of its size.
        rotation: largest angle about each axis, radians.
        scaling: largest relative change of size.
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int],
        factor: Sequence[float],
        label_keys: Sequence[str] = ("label",),
        expansion: int = 16,
        translation: float = 0.2,
        rotation: float = 0.2,
        scaling: float = 0.2,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.patch_size = np.array(patch_size, dtype=int)
        self.factor = np.array(factor, dtype=float)
        self.label_keys = tuple(label_keys)
        self.expansion = expansion
        self.translation = translation
        self.rotation = rotation
        self.scaling = scaling
        self._fine = self._coarse = np.eye(4)

    def randomize(self, label: torch.Tensor) -> None:  # type: ignore[override]
        """Draw both patches for a label, (1, X, Y, Z)."""
        size = np.array(label.shape[1:])
        found = torch.nonzero(torch.as_tensor(label)[0] > 0).numpy()
        low, high = (found.min(axis=0), found.max(axis=0)) if len(found) else (np.zeros(3), size - 1)
        reach = self.patch_size / 2 - self.expansion
        low, high = low + reach, high - reach
        low, high = np.minimum(low, high), np.maximum(low, high)
        self._fine = self._placed(self.R.uniform(low, high))
        moved = self.R.uniform(-1, 1, 3) * self.translation * self.patch_size * self.factor
        self._coarse = self._placed((size - 1) / 2 + moved)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with tensors of (2, X, Y, Z) for each key: images float32, labels uint8.

        The coarse label is 1 where half of the averaged voxels are of any class.
        """
        d = dict(data)
        self.randomize(d[self.label_keys[0]])
        for key in self.key_iterator(d):
            x = torch.as_tensor(d[key]).as_subclass(torch.Tensor).float()
            is_label = key in self.label_keys
            small = [max(1, round(n / f)) for n, f in zip(x.shape[1:], self.factor, strict=True)]
            coarse = F.interpolate((x > 0).float()[None] if is_label else x[None], small, mode="area")[0]
            fine = _sampled(x, self._fine, self.patch_size, "nearest" if is_label else "bilinear")
            # The coarse volume's voxels are ``scale`` of the fine one's, and its first one's middle is between theirs.
            scale = np.array(x.shape[1:]) / np.array(small)
            into = np.diag([*(1 / scale), 1.0])
            into[:3, 3] = 0.5 / scale - 0.5
            whole = _sampled(coarse, into @ self._coarse @ np.diag([*self.factor, 1.0]), self.patch_size, "bilinear")
            both = torch.cat((fine, (whole >= 0.5).float() if is_label else whole))
            d[key] = both.to(torch.uint8) if is_label else both
        return d

    def _placed(self, middle: np.ndarray) -> np.ndarray:
        """Turn and scale about a point of the volume, from offsets to the patch's middle; (4, 4)."""
        matrix = create_rotate(3, self.R.uniform(-self.rotation, self.rotation, 3).tolist())
        matrix = np.asarray(matrix) @ np.diag([*(1 / (1 + self.R.uniform(-self.scaling, self.scaling, 3))), 1.0])
        matrix[:3, 3] = middle
        return matrix


def _sampled(x: torch.Tensor, matrix: np.ndarray, patch_size: np.ndarray, mode: str) -> torch.Tensor:
    """Sample a volume, (1, X, Y, Z), where ``matrix`` maps the offsets to the patch's middle; 0 beyond it."""
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in patch_size.tolist()]
    offsets = torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(patch_size.tolist())], dim=-1)
    voxels = offsets @ torch.as_tensor(matrix[:3], dtype=torch.float32).T
    size = torch.tensor(x.shape[1:], dtype=torch.float32)
    grid = (2 * voxels + 1) / size - 1  # the convention of align_corners=False
    return F.grid_sample(x[None], grid.flip(-1)[None], mode=mode, padding_mode="zeros", align_corners=False)[0]


class TwoStageTraining(TrainingNetwork):
    """What a training step runs: both patches through the encoder at once, each through its stage's head.

    In one pass, because batch norms then see in training what they keep: patches of both resolutions.

    Args:
        network: the network to train, of one input channel, as ``.network``.
    """

    def __init__(self, network: CoarseToFineNet) -> None:
        super().__init__(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches, (B, 2, X, Y, Z), fine and coarse, to logits of both stages, (B, classes + 2, X, Y, Z)."""
        net, count = self.network, len(x)
        fine, coarse = x[:, :1], x[:, 1:]
        features = net.backbone(torch.cat((fine, coarse)).contiguous(memory_format=torch.channels_last_3d))
        one = upsample(net.head([maps[:count] for maps in features]), net.head.stride, fine)
        two = upsample(net.coarse([maps[count:] for maps in features]), net.coarse.stride, coarse)
        return torch.cat((one, two), dim=1)


class TwoStageLoss(nn.Module):
    """Dice and cross-entropy of both stages.

    Args:
        coarse_weight: of the coarse stage's; the fine one's is 1.
    """

    def __init__(self, coarse_weight: float = 0.5) -> None:
        super().__init__()
        self.coarse_weight = coarse_weight
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)

    def forward(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Compare logits, (B, classes + 2, X, Y, Z), with labels of both patches, (B, 2, X, Y, Z)."""
        fine: torch.Tensor = self.loss(logits[:, :-2], label[:, :1])
        return fine + self.coarse_weight * self.loss(logits[:, -2:], label[:, 1:])
