"""From annotated points to what a detector trains on: boxes in a scan, and patches of it with their boxes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, Transform
from numpy.typing import NDArray

from med3d_nets.grids import onto_grid

NOTHING, IGNORED = -1.0, -2.0  # in place of a class
_INSIDE = 4.0  # voxels between a box and its patch's border, where there is room


class PointsToBoxesd(Transform):
    """Turn the points of a case of ``read_luna`` into cubes on the image's grid.

    Adds ``boxes``, float32 (n, 7): x0, y0, z0, x1, y1, z1 in voxel indices (a voxel's middle is its index), then the
    class: 0 for ``points``, ``IGNORED`` for ``excluded``. These two become tensors, (n, 4); ``rows`` goes.

    Args:
        image_key: the image, a MetaTensor (1, X, Y, Z).
    """

    def __init__(self, image_key: str = "image") -> None:
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with ``boxes``."""
        d: dict[Any, Any] = dict(data)
        affine = np.asarray(d[self.image_key].affine, dtype=np.float64)
        for key in ("points", "excluded"):
            d[key] = torch.tensor(d[key], dtype=torch.float64).reshape(-1, 4)
        d.pop("rows", None)
        points = torch.cat((d["points"], d["excluded"])).numpy()
        middle = nib.affines.apply_affine(np.linalg.inv(affine), points[:, :3])
        half = points[:, 3:] / 2 / nib.affines.voxel_sizes(affine)
        kinds = np.repeat([0.0, IGNORED], [len(d["points"]), len(d["excluded"])])[:, None]
        boxes = np.concatenate([middle - half, middle + half, kinds], axis=1)
        d["boxes"] = torch.as_tensor(boxes, dtype=torch.float32)
        return d


class RandBoxPatchd(Randomizable, MapTransform):
    """Cut a patch, mirrored, turned by 90° in the axial plane and scaled by chance, with its boxes as ``label``.

    The patch holds a box of class 0 with ``positive_fraction``, else its middle is anywhere in the field. ``label`` is
    float32, (max_boxes, 7): boxes in the patch's voxel indices and class; rows of class ``NOTHING`` are empty, those of
    class ``IGNORED`` are excluded findings and boxes whose middle is beyond the border.

    Args:
        keys: the image, (1, X, Y, Z), with ``boxes`` and the field in the data.
        patch_size: voxels along each axis.
        field_key: where nodules are looked for, (1, X, Y, Z); where it is empty, anywhere.
        positive_fraction: of the patches.
        scaling: largest relative change of size.
        max_boxes: rows of the label.
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: Sequence[int],
        field_key: str = "field",
        positive_fraction: float = 0.7,
        scaling: float = 0.2,
        max_boxes: int = 24,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.patch_size = np.array(patch_size, dtype=int)
        self.field_key = field_key
        self.positive_fraction = positive_fraction
        self.scaling = scaling
        self.max_boxes = max_boxes
        self._matrix = np.eye(4)

    def randomize(self, boxes: NDArray[np.float64], field: torch.Tensor) -> None:  # type: ignore[override]
        """Draw a patch: the matrix from its voxel indices to the image's."""
        scale = 1 + self.R.uniform(-self.scaling, self.scaling)
        linear = np.diag(scale * self.R.choice([-1.0, 1.0], 3))
        if self.R.uniform() < 0.5:
            linear = linear[:, [1, 0, 2]]
        nodules = boxes[boxes[:, 6] >= 0]
        if len(nodules) and self.R.uniform() < self.positive_fraction:
            box = nodules[self.R.randint(len(nodules))]
            room = self.patch_size * scale / 2 - (box[3:6] - box[:3]) / 2 - _INSIDE
            middle = (box[:3] + box[3:6]) / 2 + self.R.uniform(-1, 1, 3) * np.maximum(room, 0)
        else:
            middle = self._anywhere(field)
        self._matrix = np.eye(4)
        self._matrix[:3, :3] = linear
        self._matrix[:3, 3] = middle - linear @ ((self.patch_size - 1) / 2)

    def _anywhere(self, field: torch.Tensor) -> NDArray[np.float64]:
        shape = np.array(field.shape[1:])
        for _ in range(100):
            x, y, z = (self.R.uniform(size=3) * shape).astype(int).tolist()
            if field[0, x, y, z]:
                return np.array([x, y, z], dtype=float)
        return self.R.uniform(size=3) * (shape - 1)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return image and label of a patch."""
        d: dict[Any, Any] = dict(data)
        boxes = np.asarray(d["boxes"], dtype=np.float64)
        self.randomize(boxes, d[self.field_key])
        patch: dict[Hashable, Any] = {"label": torch.from_numpy(self._label(boxes))}
        for key in self.key_iterator(d):
            image = torch.as_tensor(d[key]).as_subclass(torch.Tensor)
            patch[key] = onto_grid(image, self._matrix, self.patch_size.tolist())
        return patch

    def _label(self, boxes: NDArray[np.float64]) -> NDArray[np.float32]:
        label = np.zeros((self.max_boxes, 7), dtype=np.float32)
        label[:, 6] = NOTHING
        inverse = np.linalg.inv(self._matrix)
        ends = [nib.affines.apply_affine(inverse, boxes[:, part]) for part in (slice(0, 3), slice(3, 6))]
        low, high, last = np.minimum(*ends), np.maximum(*ends), self.patch_size - 1
        middle = (low + high) / 2
        inside = ((middle >= 0) & (middle <= last)).all(axis=1)
        seen = np.flatnonzero(((high > 0) & (low < last)).all(axis=1))[: self.max_boxes]
        kinds = np.where(inside & (boxes[:, 6] >= 0), boxes[:, 6], IGNORED)
        label[: len(seen), :3], label[: len(seen), 3:6] = (
            np.maximum(low, -0.5)[seen],
            np.minimum(high, last + 0.5)[seen],
        )
        label[: len(seen), 6] = kinds[seen]
        return label
