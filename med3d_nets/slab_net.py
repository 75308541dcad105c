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

_SLAB = 1 << 18  # voxels of a slab at stride 2, about
_LEAST = 16  # rows of a slab: oneDNN's convolutions of 8 rows or less are ten times slower


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
        self.stem = _SlabStem(backbone, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image, (B, in_channels, X, Y, Z), to logits in float32, (B, out_channels, X, Y, Z)."""
        fine, pooled = self.stem(x)
        layer1 = self.backbone.layer1(pooled)
        del pooled
        coarse = self._pyramid(layer1)
        del layer1
        return self._logits(fine, coarse, x)

    def _pyramid(self, layer1: torch.Tensor) -> torch.Tensor:
        """The head's maps at stride 4."""
        net, head = self.backbone, self.head
        layer2 = net.layer2(layer1)
        x = upsample(head.top(net.layer4(net.layer3(layer2))), head.factors[0], layer2)
        x += head.lateral2(layer2)
        x = upsample(x, head.factors[1], layer1)
        x += head.lateral1(layer1)
        return head.smooth1(x)

    def _logits(self, fine: torch.Tensor, coarse: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Logits at the scale of ``x``."""
        out = x.new_empty((x.shape[0], self.head.classify.out_channels, *x.shape[2:]), dtype=torch.float32)
        for start, stop in _slabs(fine.shape[2], fine[0, 0, 0].numel(), _LEAST):
            here = out[:, :, 2 * start : 2 * stop]
            here.copy_(self._rows(fine, coarse, start, stop)[:, :, : here.shape[2], : here.shape[3], : here.shape[4]])
        return out

    def _rows(self, fine: torch.Tensor, coarse: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of some rows of ``fine``, two for each."""
        head, factor = self.head, self.head.factors[2]
        before, after = max(0, start - 1), min(fine.shape[2], stop + 1)  # rows that the 3³ convolution sees
        first = max(0, before // factor - 1)  # and those between which it is interpolated
        x = coarse[:, :, first : (after - 1) // factor + 2]
        x = F.interpolate(x, scale_factor=float(factor), mode="trilinear", align_corners=False)
        x = x[:, :, before - factor * first : after - factor * first, : fine.shape[3], : fine.shape[4]]
        x += fine[:, :, before:after]
        x = head.smooth0(x)[:, :, start - before : stop - before]
        return head.classify(head.dropout(x))


class _SlabStem(nn.Module):
    def __init__(self, backbone: Med3DResNet, head: FPNHead) -> None:
        super().__init__()
        self.parts = (backbone, head)  # a tuple, because they are SlabNet's children

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map an image to what the head needs of the stem, at stride 2, and to the input of layer1, at stride 4."""
        net, head = self.parts
        fine = pooled = edge = torch.empty(0)
        rows = -(-x.shape[2] // 4)
        for start, stop in _slabs(rows, x[0, 0, 0].numel() // 2, _LEAST // 2):
            # Of the stem's rows 2 before the slab and 1 after it see the convolution's padding.
            first = max(0, 2 * start - 2)
            stem = net.relu(net.bn1(net.conv1(x[:, :, 2 * first : 4 * stop + 2])))
            stem = stem[:, :, 2 * start - first : 2 * stop - first]
            lateral, small = head.lateral0(stem), net.maxpool(stem)
            if start == 0:
                fine, pooled = _whole(lateral, -(-x.shape[2] // 2)), _whole(small, rows)
            else:
                small[:, :, :1] = torch.maximum(small[:, :, :1], edge)
            edge = net.maxpool(stem[:, :, -1:])  # the next slab's first row is pooled with this one's last
            fine[:, :, 2 * start : 2 * stop] = lateral
            pooled[:, :, start:stop] = small
            del stem, lateral, small  # or they would be there beside the next ones
        return [fine, pooled]


def _slabs(rows: int, size: int, least: int) -> Iterator[tuple[int, int]]:
    """Where slabs of about equal height start and stop.

    Args:
        rows: of all slabs.
        size: voxels at stride 2 of a row.
        least: rows of a slab.
    """
    count = max(1, min(rows * size // _SLAB, rows // least))
    for i in range(count):
        yield rows * i // count, rows * (i + 1) // count


def _whole(slab: torch.Tensor, rows: int) -> torch.Tensor:
    """Room for all rows of a map of which a slab is given."""
    size = (*slab.shape[:2], rows, *slab.shape[3:])
    return torch.empty(size, dtype=slab.dtype, device=slab.device, memory_format=torch.channels_last_3d)
