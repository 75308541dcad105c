"""A detector over a whole scan, window by window, and its boxes in world millimetres."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.box_utils import non_max_suppression
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from med3d_nets.detection import DIVISOR, BoxDetector
from med3d_nets.errors import InputError

_SLACK = 2.0  # voxels by which windows' own parts overlap, so that no box falls between two of them
_LEAST_IN_FIELD = 0.1  # of a box


class DetectionInferer(Inferer):
    """Find boxes in a volume, in windows that overlap; those without any lung are not computed.

    A window's boxes count where their middle is in its own part, up to the middle of the overlap: a box that a window
    cuts is seen whole by its neighbour.

    Args:
        detector: turns the network's output into boxes.
        window: voxels along each axis, multiples of 32. The heads' group norms look at a whole window, so it should be
            about as large as the patches of the training.
        overlap: share of a window's edge that it has in common with its neighbour.
        progress: show a bar.
        spacing: voxel size in mm.
        largest_mm: boxes with a larger diameter, the mean of their edges, are dropped; 0: none.
        max_boxes: most boxes of a volume.

    Raises:
        InputError: the window or the overlap is none of these.
    """

    def __init__(
        self,
        detector: BoxDetector,
        window: Sequence[int] = (96, 96, 96),
        overlap: float = 0.33,
        progress: bool = False,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        largest_mm: float = 0.0,
        max_boxes: int = 100,
    ) -> None:
        self.detector = detector
        self.window = [int(edge) for edge in window] if not isinstance(window, str) else []
        if len(self.window) != 3 or any(edge < DIVISOR or edge % DIVISOR for edge in self.window):
            raise InputError(f"window={window!r}: allowed are three multiples of {DIVISOR}, such as [96, 96, 96].")
        if not 0 <= overlap < 0.9:
            raise InputError(f"overlap={overlap}: allowed is 0 to below 0.9.")
        self.overlap = overlap
        self.progress = progress
        self.spacing = [float(edge) for edge in spacing]
        self.largest_mm = float(largest_mm) or math.inf
        self.max_boxes = max_boxes

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, field: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Find the boxes of one volume.

        Args:
            inputs: the volume, (1, C, X, Y, Z).
            network: a DetectionNet, or what stands for it.
            field: where to look, (1, 1, X, Y, Z); boxes with less than a tenth there are dropped.
            args: unused.
            kwargs: unused.

        Returns:
            (1, n, 7): x0, y0, z0, x1, y1, z1 in voxel indices and probability, the most probable first.
        """
        image = inputs.as_subclass(torch.Tensor)
        mask = field.as_subclass(torch.Tensor)[0, 0] > 0
        boxes, scores = [image.new_zeros((0, 6), dtype=torch.float32)], [image.new_zeros(0, dtype=torch.float32)]
        places = [place for place in self._places(image.shape[2:]) if mask[tuple(slice(a, b) for a, b in place)].any()]
        for place in tqdm(places, disable=not self.progress):
            found, score = self._in_window(image, network, place)
            boxes.append(found)
            scores.append(score)
        box, score = torch.cat(boxes), torch.cat(scores)
        diameter = ((box[:, 3:] - box[:, :3]) * box.new_tensor(self.spacing)).mean(dim=1)
        kept = _in_field(box, mask) & (diameter <= self.largest_mm)
        box, score = box[kept], score[kept]
        best = non_max_suppression(box, score, self.detector.box_selector.nms_thresh, self.max_boxes)
        return torch.cat((box[best], score[best, None]), dim=1)[None]

    def _places(self, size: Sequence[int]) -> Iterator[tuple[tuple[int, int], ...]]:
        """First and last-but-one voxel of each window along the axes, within the volume."""
        starts = []
        for edge, n in zip(self.window, size, strict=True):
            count = max(1, math.ceil((n - edge) / (edge * (1 - self.overlap))) + 1)
            starts.append(sorted({round(i * max(0, n - edge) / max(1, count - 1)) for i in range(count)}))
        for corner in itertools.product(*starts):
            yield tuple((a, min(a + edge, n)) for a, edge, n in zip(corner, self.window, size, strict=True))

    def _in_window(
        self, image: torch.Tensor, network: nn.Module, place: tuple[tuple[int, int], ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes of the window's own part, in the volume's voxels, and their probabilities."""
        x, y, z = (slice(a, b) for a, b in place)
        patch = image[:, :, x, y, z]
        sizes = [DIVISOR * math.ceil((b - a) / DIVISOR) for a, b in place]
        ends = [pad for (a, b), n in zip(reversed(place), reversed(sizes), strict=True) for pad in (0, n - (b - a))]
        output = network(F.pad(patch, ends))[0].float()
        boxes, scores = self.detector.select(output, sizes)
        boxes = boxes + boxes.new_tensor([a for a, _ in place] * 2)
        middle = (boxes[:, :3] + boxes[:, 3:]) / 2
        low, high = [], []
        for (a, b), edge, n in zip(place, self.window, image.shape[2:], strict=True):
            margin = edge * self.overlap / 2 - _SLACK
            low.append(a + margin if a > 0 else -math.inf)
            high.append(b - margin if b < n else math.inf)
        own = ((middle >= middle.new_tensor(low)) & (middle <= middle.new_tensor(high))).all(dim=1)
        return boxes[own], scores[own]


class WorldBoxesd(MapTransform):
    """Turn boxes of DetectionInferer into findings in world millimetres.

    Args:
        keys: boxes, (n, 7), in voxel indices of the image, with a probability.
        image_key: the network's input, a MetaTensor, whose affine tells where it is.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with findings.

        They are float64, (n, 7): middle x, y, z in RAS mm; size in mm along the grid's axes, that is right-left,
        back-front and feet-head, of an oblique scan nearly; probability.
        """
        d: dict[Any, Any] = dict(data)
        affine = np.asarray(d[self.image_key].affine, dtype=np.float64)
        for key in self.key_iterator(d):
            boxes = np.asarray(d[key].cpu(), dtype=np.float64).reshape(-1, 7)
            middle = nib.affines.apply_affine(affine, (boxes[:, :3] + boxes[:, 3:6]) / 2)
            size = (boxes[:, 3:6] - boxes[:, :3]) * nib.affines.voxel_sizes(affine)
            d[key] = torch.from_numpy(np.concatenate([middle, size, boxes[:, 6:]], axis=1))
        return d


def _in_field(boxes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whether a share of each box is in the mask: the middle of a mass at the wall of the chest is not."""
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for index, box in enumerate(boxes.round().long().clamp(min=0).tolist()):
        part = tuple(slice(min(a, n - 1), b + 1) for a, b, n in zip(box[:3], box[3:], mask.shape, strict=True))
        kept[index] = mask[part].float().mean() >= _LEAST_IN_FIELD
    return kept
