"""The co-training network of Med3D: one encoder, one light branch for each domain.

Chen, Ma, Zheng, arXiv 1904.00625, section 3.2: the encoder is shared by all datasets, a sample trains the encoder and
the branch of its own dataset alone. What one dataset labels is therefore never background for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import nn

from med3d_nets.errors import InputError
from med3d_nets.heads import HEADS, upsample
from med3d_nets.inferer import WholeVolumeInferer
from med3d_nets.resnet import Med3DResNet, freeze_stages
from med3d_nets.training_network import TrainingNetwork

UNKNOWN = 255
"""Label of voxels of which nothing is known: beyond the volume, or of a class that the manifest says to ignore."""


class MultiDomainNet(nn.Module):
    """Segmentation network of many domains: ``.backbone`` (Med3DResNet) and ``.branches``, one head per domain.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        domains: number of classes of each domain, background included, by its name; the order is that of the output.
        head: head of every branch: ``"linear"`` (the paper's 1³ convolution), ``"medicalnet"``, ``"fpn"`` or
            ``"denseaspp"``.
        dropout: probability of channel dropout before a branch's last convolution.
        width: channels of the ``fpn`` head's pyramid; 32 keeps eight branches small beside the encoder.
        shortcut_type: see Med3DResNet.
        in_channels: channels of the input.
        output_stride: see Med3DResNet.

    Raises:
        ValueError: no domain, a domain of fewer than 2 classes or with a name that no module can have, or another
            argument is not one of the above.

    Example:
        >>> net = MultiDomainNet(10, {"liver": 2, "hippocampus": 3})
        >>> net(torch.zeros(1, 1, 33, 40, 17)).shape, net.branch("liver")(torch.zeros(1, 1, 33, 40, 17)).shape
        (torch.Size([1, 5, 33, 40, 17]), torch.Size([1, 2, 33, 40, 17]))
    """

    def __init__(
        self,
        depth: int,
        domains: Mapping[str, int],
        head: str = "linear",
        dropout: float = 0.0,
        width: int = 32,
        shortcut_type: str | None = None,
        in_channels: int = 1,
        output_stride: int = 8,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head={head!r}: allowed are {', '.join(map(repr, HEADS))}.")
        _check_domains(domains)
        self.domains = {name: int(count) for name, count in domains.items()}
        self.backbone = Med3DResNet(depth, shortcut_type, in_channels, output_stride)
        channels, strides = self.backbone.feature_channels, self.backbone.feature_strides
        options: dict[str, Any] = {"width": width} if head == "fpn" else {}
        self.branches = nn.ModuleDict(
            {name: HEADS[head](channels, strides, count, dropout, **options) for name, count in self.domains.items()}
        )
        self.stride: int = next(iter(self.branches.values())).stride  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all branches.

        Args:
            x: images, (B, in_channels, X, Y, Z), at least 16 voxels per axis.

        Returns:
            Logits of all domains one after the other, (B, sum of the classes, X, Y, Z).
        """
        features = self.backbone(x)
        logits = [branch(features) for branch in self.branches.values()]
        return upsample(torch.cat(logits, dim=1), self.stride, x)

    def branch(self, domain: str) -> DomainNet:
        """Return the network of one domain; it shares its parameters with this one.

        Raises:
            InputError: there is no such domain.
        """
        if domain not in self.domains:
            raise InputError(f"domain={domain!r}: this network has no such branch. It has {', '.join(self.domains)}.")
        return DomainNet(self, domain)


class DomainNet(nn.Module):
    """The encoder with the branch of one domain, as ``MultiDomainNet.branch`` gives it.

    Args:
        network: the network of all domains.
        domain: name of the domain.
    """

    def __init__(self, network: MultiDomainNet, domain: str) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.head = network.branches[domain]
        self.stride = network.stride
        self.training = network.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images, (B, in_channels, X, Y, Z), to logits of the domain's classes, (B, classes, X, Y, Z)."""
        return upsample(self.head(self.backbone(x)), self.stride, x)


class CoTraining(TrainingNetwork):
    """What a training step runs: every sample through the encoder and the branch of its own domain.

    Args:
        network: the network to train, as ``.network``.
        frozen_stages: the first stages of the encoder, 0 to 5, are not trained; see ``freeze_stages``.

    Raises:
        ValueError: frozen_stages is not 0 to 5.

    Attributes:
        freeze_norm: batch norms keep their running statistics, whatever ``train()`` is called with. A batch of one
            domain is unlike the average over all that the network is used with (project choice: PreciseNorm sets it
            for the last part of the training).
    """

    def __init__(self, network: MultiDomainNet, frozen_stages: int = 0) -> None:
        super().__init__(network)
        self.frozen_stages = int(frozen_stages)
        self.freeze_norm = False
        freeze_stages(network.backbone, self.frozen_stages)

    def train(self, mode: bool = True) -> CoTraining:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        freeze_stages(self.network.backbone, self.frozen_stages)
        if self.freeze_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor, domains: Sequence[str]) -> list[torch.Tensor]:
        """Compute the logits of a batch, which may be of one domain or mixed.

        Args:
            x: images, (B, in_channels, X, Y, Z).
            domains: the domain of each image.

        Returns:
            Logits of each image, (classes of its domain, X, Y, Z).
        """
        net = self.network
        features = net.backbone(x.contiguous(memory_format=torch.channels_last_3d))
        logits: list[torch.Tensor] = [x] * len(domains)
        for domain in dict.fromkeys(domains):
            own = [index for index, name in enumerate(domains) if name == domain]
            result = upsample(net.branches[domain]([feature[own] for feature in features]), net.stride, x)
            for index, one in zip(own, result, strict=True):
                logits[index] = one
        return logits


class DomainLoss(nn.Module):
    """Dice and cross-entropy of each sample over the classes of its own domain, averaged over the batch.

    Voxels labelled ``UNKNOWN`` count in neither. The sum is a project choice: the paper names no loss for the
    co-training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True)

    def forward(self, logits: Sequence[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Compute the loss.

        Args:
            logits: (C, X, Y, Z) of each sample, C classes of its domain.
            label: class index or ``UNKNOWN``, (B, 1, X, Y, Z).
        """
        return torch.stack([self._of_sample(*pair) for pair in zip(logits, label, strict=True)]).mean()

    def _of_sample(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits, label = logits.float(), label.long()
        known = label[0] != UNKNOWN
        if not known.any():
            return logits.sum() * 0.0
        return self.loss(logits[None, :, known], label[None, :, known])


class DomainInferer(WholeVolumeInferer):
    """WholeVolumeInferer that takes a volume through the branch of its domain. Arguments are those of that class."""

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, domains: Sequence[str] = ()
    ) -> torch.Tensor:
        """Segment one volume.

        Args:
            inputs: the volume, (1, 1, X, Y, Z).
            network: a MultiDomainNet, or with ``domains`` empty a network of one domain.
            domains: the volume's domain.
        """
        return super().__call__(inputs, network.branch(domains[0]) if domains else network)  # type: ignore[operator]


def _check_domains(domains: Mapping[str, int]) -> None:
    if not domains:
        raise ValueError("domains={}: at least one domain is needed.")
    for name, count in domains.items():
        if not name or "." in name:
            raise ValueError(f"domain {name!r}: a name must not be empty or hold a dot.")
        if int(count) < 2:
            raise ValueError(f"domain {name!r} has {count} classes: at least 2 (background and one more) are needed.")
