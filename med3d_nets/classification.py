"""A Med3D encoder with a linear classifier, and what its training needs: feature scales and learning rates."""

# mypy: disable-error-code="operator"
# (it takes buffers for modules, and TorchScript takes neither their annotation nor a comment beside their use)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from med3d_nets.norm import bare
from med3d_nets.resnet import Med3DResNet, freeze_stages, stages


class ClassificationNet(nn.Module):
    """Classifier of volumes: ``.backbone`` (Med3DResNet), layer4 pooled over space, ``.head``.

    The head is a linear layer on features that are shifted and scaled by two fixed vectors (``Standardise``), which
    do nothing until ``FeatureScale`` has set them.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        num_classes: number of logits, at least 1: classes that exclude each other (softmax), or questions that are
            answered each for itself (sigmoid).
        dropout: probability with which a feature is dropped before the linear layer.
        pooling: ``average`` or ``max`` of each feature over space.
        shortcut_type: see Med3DResNet.
        in_channels: channels of the input.
        output_stride: see Med3DResNet.
        freeze_backbone: linear probing: the backbone gets no gradient and its batch norms keep their running
            statistics, whatever ``train()`` is called with.
        freeze_norm: the backbone's batch norms keep their running statistics while the rest is trained (the
            authors' advice for small data).
        frozen_stages: the first stages of the backbone, 0 to 5, are not trained; see ``freeze_stages``.

    Raises:
        ValueError: an argument is not one of the above.

    Example:
        >>> ClassificationNet(10, num_classes=2)(torch.zeros(1, 1, 33, 40, 17)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        dropout: float = 0.0,
        pooling: str = "average",
        shortcut_type: str | None = None,
        in_channels: int = 1,
        output_stride: int = 8,
        freeze_backbone: bool = False,
        freeze_norm: bool = False,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: at least 1 is needed.")
        if pooling not in ("average", "max"):
            raise ValueError(f"pooling={pooling!r}: allowed are average and max.")
        self.pooling = pooling
        self.backbone = Med3DResNet(depth, shortcut_type, in_channels, output_stride)
        self.stride = self.backbone.feature_strides[-1]
        channels = self.backbone.feature_channels[-1]
        self.head = nn.Sequential(Standardise(channels), nn.Dropout(dropout), nn.Linear(channels, num_classes))
        self.frozen_stages = 5 if freeze_backbone else frozen_stages
        self.freeze_norm = freeze_norm
        self.train()

    def forward(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Compute logits.

        Args:
            x: images, (B, in_channels, X, Y, Z).
            size: voxels of each image along the three axes, (B, 3), where images are padded at their ends; the
                average leaves out what is padding alone. None: nothing is padded.

        Returns:
            Logits, (B, num_classes).
        """
        return self.head(self.features(x, size))

    def features(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the pooled layer4, (B, channels), of the arguments of ``forward``."""
        return pool(self.backbone(x)[4], self.stride, size, self.pooling)

    def train(self, mode: bool = True) -> ClassificationNet:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        freeze_stages(self.backbone, self.frozen_stages)
        if self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class Standardise(nn.Module):
    """(x - mean) / std per feature, with fixed values: 0 and 1 until they are set.

    Args:
        channels: number of features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, channels) to the same shape."""
        return (x - self.mean) / self.std


class FeatureScale:
    """Training handler that sets the ``Standardise`` of a ClassificationNet before the first step.

    Features of an encoder differ by orders of magnitude, and their mean is large beside what tells classes apart, so
    that a linear layer on them would learn slowly and with a rate of its own for every encoder. An encoder that is
    trained from scratch has no such features yet: measured with norms that saw no batch, their scale is off by far.

    Args:
        network: the ClassificationNet, also when wrapped for several processes.
        batches: batches of training volumes, dicts with ``image`` and, of padded ones, ``size``; each is used once.
        device: where the network is.
        enabled: off when the network comes with its scales, that is from a checkpoint or trained weights, and when
            the encoder starts from scratch.
    """

    def __init__(
        self, network: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: Any, enabled: bool = True
    ) -> None:
        self.network: Any = bare(network)
        self.batches = batches
        self.device = torch.device(device)
        self.enabled = enabled

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Estimate mean and standard deviation of each feature over the batches; a constant feature keeps scale 1."""
        if not self.enabled:
            return
        net, was_training = self.network, self.network.training
        net.eval()
        features = torch.cat(
            [net.features(batch["image"].to(self.device), batch.get("size")) for batch in self.batches]
        )
        net.train(was_training)
        std = features.std(dim=0, correction=0)
        net.head[0].mean.copy_(features.mean(dim=0))
        net.head[0].std.copy_(torch.where(std > 1e-6 * std.max(), std, 1.0))


def class_loss(weights: Sequence[float], multi_label: bool = False) -> nn.Module:
    """Loss of a classifier's training on its logits, (B, num_classes).

    Args:
        weights: of ``class_weights``, one per class.
        multi_label: several classes may be true at once.

    Returns:
        Cross-entropy, for the index of the class; with ``multi_label`` binary cross-entropy of each class, for one
        number per class, 0 or 1, float32.
    """
    values = torch.tensor([float(weight) for weight in weights])
    return nn.BCEWithLogitsLoss(pos_weight=values) if multi_label else nn.CrossEntropyLoss(weight=values)


def pool(
    feature: torch.Tensor, stride: int, size: torch.Tensor | None = None, pooling: str = "average"
) -> torch.Tensor:
    """Average or maximum of a map over space, without the voxels whose centre is in the padding.

    Args:
        feature: map of images padded at their ends, (B, C, x, y, z).
        stride: image voxels per voxel of the map.
        size: voxels of the images without padding, (B, 3); None: there is none.
        pooling: ``average`` or ``max``.

    Returns:
        (B, C), float32.
    """
    feature = feature.float()
    if size is None:
        return feature.mean(dim=(2, 3, 4)) if pooling == "average" else feature.amax(dim=(2, 3, 4))
    # a map's voxel i has its centre at the image's voxel stride * i
    counts = torch.div(size.to(feature.device) + (stride - 1), stride, rounding_mode="floor")
    mask = _inside(feature, 2, counts[:, 0]).unsqueeze(2).unsqueeze(3)
    mask = mask * _inside(feature, 3, counts[:, 1]).unsqueeze(1).unsqueeze(3)
    mask = (mask * _inside(feature, 4, counts[:, 2]).unsqueeze(1).unsqueeze(2)).unsqueeze(1)
    if pooling == "max":  # features are at least 0, after the last ReLU
        return (feature * mask).amax(dim=(2, 3, 4))
    return (feature * mask).sum(dim=(2, 3, 4)) / mask.sum(dim=(2, 3, 4))


def parameter_groups(
    network: nn.Module, learning_rate: float, new_layer_lr_factor: float = 1.0, layer_lr_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters of a ClassificationNet with the learning rate of each part, for an optimiser.

    Args:
        network: the network, also when wrapped for several processes.
        learning_rate: of layer4.
        new_layer_lr_factor: learning rate of the head over that of layer4.
        layer_lr_decay: learning rate of each earlier stage over that of the next: 1 is one rate for the whole
            backbone, 0.5 halves it from layer4 to layer3, layer2, layer1 and the stem.

    Returns:
        One group per part that has anything to train; the head comes first.
    """
    net: Any = bare(network)
    backbone = net.backbone
    rated = [([net.head], learning_rate * new_layer_lr_factor)]
    rated += [(part, learning_rate * layer_lr_decay**age) for age, part in enumerate(reversed(stages(backbone)))]
    groups = [
        {"params": [p for module in modules for p in module.parameters() if p.requires_grad], "lr": rate}
        for modules, rate in rated
    ]
    return [group for group in groups if group["params"]]


def _inside(feature: torch.Tensor, axis: int, counts: torch.Tensor) -> torch.Tensor:
    """1 for the first ``counts`` voxels along an axis, else 0; (B, length of the axis)."""
    index = torch.arange(feature.shape[axis], device=feature.device)
    return (index.unsqueeze(0) < counts.unsqueeze(1)).to(feature.dtype)
