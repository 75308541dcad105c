"""A network with a feature pyramid that computes its finest maps slab by slab, for inference.

At stride 2 the stem has 64 maps, 8 values for each voxel of the image, and the pyramid another 32: together several
times what all other layers take. Of the stem, layer1 needs the pooled maps and the head one 1³ convolution; of the
pyramid nothing is needed but the logits. So neither exists whole here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from med3d_nets.heads import FPNHead, upsample
from med3d_nets.resnet import Med3DResNet

_SLAB = 1 << 18  # voxels of a slab at stride 2


class SlabNet(nn.Module):
    """``SegmentationNet`` or ``DomainNet`` with an ``FPNHead``, the same function with a fraction of the memory.

    Slabs lie along X. Each is computed with some rows of its neighbours, so that no padding is seen within the image.

    Args:
        backbone: the encoder.
        head: of the encoder's maps.
    """

    def __init__(self, backbone: Med3DResNet, head: FPNHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image, (B, in_channels, X, Y, Z), to logits in float32, (B, out_channels, X, Y, Z)."""
        fine, pooled = self._stem(x)
        layer1 = self.backbone.layer1(pooled)
        del pooled
        coarse = self._pyramid(layer1)
        del layer1
        return self._logits(fine, coarse, x)

    def _stem(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head needs of the stem, at stride 2, and the input of layer1, at stride 4."""
        net = self.backbone
        fine = pooled = edge = torch.empty(0)
        rows = -(-x.shape[2] // 4)
        for start, stop in _slabs(rows, x[0, 0, 0].numel() // 2):
            # Of the stem's rows 2 before the slab and 1 after it see the convolution's padding.
            first = max(0, 2 * start - 2)
            stem = net.relu(net.bn1(net.conv1(x[:, :, 2 * first : 4 * stop + 2])))
            stem = stem[:, :, 2 * start - first : 2 * stop - first]
            lateral, small = self.head.lateral0(stem), net.maxpool(stem)
            if start == 0:
                fine, pooled = _whole(lateral, -(-x.shape[2] // 2)), _whole(small, rows)
            else:
                small[:, :, :1] = torch.maximum(small[:, :, :1], edge)
            edge = net.maxpool(stem[:, :, -1:])  # the next slab's first row is pooled with this one's last
            fine[:, :, 2 * start : 2 * stop] = lateral
            pooled[:, :, start:stop] = small
        return fine, pooled

    def _pyramid(self, layer1: torch.Tensor) -> torch.Tensor:
        """The head's maps at stride 4."""
        net, head = self.backbone, self.head
        layer2 = net.layer2(layer1)
        x = upsample(head.top(net.layer4(net.layer3(layer2))), head.factors[0], layer2) + head.lateral2(layer2)
        return head.smooth1(upsample(x, head.factors[1], layer1) + head.lateral1(layer1))

    def _logits(self, fine: torch.Tensor, coarse: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        head, factor, rows = self.head, self.head.factors[2], fine.shape[2]
        out = x.new_empty((x.shape[0], head.classify.out_channels, *x.shape[2:]), dtype=torch.float32)
        for start, stop in _slabs(rows, fine[0, 0, 0].numel()):
            before, after = max(0, start - 1), min(rows, stop + 1)  # rows that the 3³ convolution sees
            first = max(0, before // factor - 1)  # and those between which it is interpolated
            part = coarse[:, :, first : (after - 1) // factor + 2]
            part = F.interpolate(part, scale_factor=float(factor), mode="trilinear", align_corners=False)
            part = part[:, :, before - factor * first :, : fine.shape[3], : fine.shape[4]][:, :, : after - before]
            part += fine[:, :, before:after]
            part = head.smooth0(part)[:, :, start - before :][:, :, : stop - start]
            logits = head.classify(head.dropout(part))
            here = out[:, :, 2 * start : 2 * stop]
            here.copy_(logits[:, :, : here.shape[2], : here.shape[3], : here.shape[4]])
        return out


def _slabs(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Where slabs start and stop, of rows that have ``size`` voxels at stride 2 each."""
    step = max(1, _SLAB // size)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _whole(slab: torch.Tensor, rows: int) -> torch.Tensor:
    """Room for all rows of a map of which a slab is given."""
    size = (*slab.shape[:2], rows, *slab.shape[3:])
    return torch.empty(size, dtype=slab.dtype, device=slab.device, memory_format=torch.channels_last_3d)
