"""Where the evidence for a class lies: Grad-CAM on the scan's own grid, and a picture of it.

Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017, as MONAI
has it (``monai.visualize.GradCAM``). MONAI stretches the map to the image's size; here it is placed by its stride,
which puts it where the network looked.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.visualize import GradCAM
from numpy.typing import NDArray

from med3d_nets.classification import ClassificationNet
from med3d_nets.grids import map_between, onto_grid
from med3d_nets.preview import render_preview

LAYER = "backbone.layer4"


class HeatMapper:
    """Grad-CAM of a classifier at its last feature map.

    Args:
        network: the classifier in evaluation mode, on the device where it runs, with its own weights: not as
            ``accelerate`` changes it. It gets hooks, and the earlier stages get no gradient.
    """

    def __init__(self, network: ClassificationNet) -> None:
        network.requires_grad_(False)
        network.backbone.layer4.requires_grad_(True)
        self.stride = network.stride
        self.device = next(network.parameters()).device
        self._cam = GradCAM(nn_module=network, target_layers=LAYER)

    def __call__(self, image: MetaTensor, index: int, size: Sequence[int] | None = None) -> MetaTensor:
        """Compute the map of one class.

        Args:
            image: the network's input, (1, X, Y, Z), with its affine.
            index: of the class.
            size: voxels of the image along its axes without padding at its ends; None: it has none.

        Returns:
            The map, (1, x, y, z), float32, from 0 to 1, the highest value of each map that has any; with its own
            affine. What is padding alone is not in it.
        """
        size = [int(n) for n in (image.shape[1:] if size is None else size)]
        x = torch.as_tensor(image).as_subclass(torch.Tensor)[None].to(self.device)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook")  # of the stages that get no gradient
            heat = self._cam.compute_map(x, class_idx=index, size=torch.tensor([size], device=self.device))[0]
        # the map's voxel i is at the image's voxel stride * i
        nx, ny, nz = (-(-n // self.stride) for n in size)
        heat = heat.detach().float().cpu()[:, :nx, :ny, :nz]
        peak = float(heat.max())
        scale = np.diag([self.stride, self.stride, self.stride, 1.0])
        affine = torch.as_tensor(np.asarray(image.affine, dtype=np.float64) @ scale)
        return MetaTensor(heat / peak if peak > 0 else torch.zeros_like(heat), affine=affine)


def on_own_grid(heat: MetaTensor, image: MetaTensor, size: Sequence[int] | None = None) -> NDArray[np.float32]:
    """Bring a map of HeatMapper to the grid of the scan as it was read.

    Args:
        heat: the map, (1, x, y, z).
        image: the network's input that it was made of, whose ``meta`` has ``original_affine`` and ``spatial_shape``.
        size: voxels of the image without padding at its ends; None: it has none.

    Returns:
        (X', Y', Z') of the scan, 0 where the network has not looked.
    """
    affine = np.asarray(image.meta["original_affine"], dtype=np.float64)
    shape = [int(n) for n in image.meta["spatial_shape"]]
    source = torch.as_tensor(heat).as_subclass(torch.Tensor)
    moved = onto_grid(source, map_between(np.asarray(heat.affine), affine, shape), shape)[0].numpy()
    to_image = map_between(np.asarray(image.affine), affine, shape)
    moved[~_inside(to_image, shape, image.shape[1:] if size is None else size)] = 0
    return moved.clip(0, 1)


def on_image(heat: MetaTensor, image: MetaTensor, size: Sequence[int]) -> NDArray[np.float32]:
    """Bring a map of HeatMapper to the grid of the network's input without its padding.

    Args:
        heat: the map, (1, x, y, z).
        image: the network's input, (1, X, Y, Z).
        size: its voxels without padding.

    Returns:
        The map of that size.
    """
    matrix = map_between(np.asarray(heat.affine), np.asarray(image.affine, dtype=np.float64), size)
    moved = onto_grid(torch.as_tensor(heat).as_subclass(torch.Tensor), matrix, size)[0].numpy()
    return moved.clip(0, 1)


def heat_picture(
    voxels: NDArray[np.floating],
    heat: NDArray[np.floating],
    spacing: Sequence[float],
    title: str,
    notes: Sequence[str] = (),
) -> bytes:
    """Draw three slices through the peak of a heat map, in colour over the image, and a line around its hotter half.

    Args:
        voxels: image, (X, Y, Z), RAS.
        heat: from 0 to 1 on the same grid.
        spacing: voxel size in mm.
        title: headline.
        notes: lines below the picture.

    Returns:
        The content of a PNG file.
    """
    hot = (heat >= 0.5).astype(np.uint8)
    return render_preview(voxels, hot, spacing, {1: "half of the peak or more"}, title, notes, None, heat)


def _inside(matrix: NDArray[np.float64], shape: Sequence[int], size: Sequence[int]) -> NDArray[np.bool_]:
    """Which voxels of a grid, (X', Y', Z'), lie in the first ``size`` voxels of another; slice by slice, for memory."""
    i, j = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    inside = np.ones(tuple(shape), dtype=bool)
    for k in range(shape[2]):
        for axis, n in enumerate(size):
            place = matrix[axis, 0] * i + matrix[axis, 1] * j + (matrix[axis, 2] * k + matrix[axis, 3])
            inside[:, :, k] &= (place >= -0.5 - 1e-6) & (place <= int(n) - 0.5 + 1e-6)
    return inside
