"""What the synthetic CT has within the liver: veins, tumours and cysts, and the labels of both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tools.phantom_shapes import Array, Space, cover, noise

PHASES = ("native", "arterial", "portal venous")
LIVER, TUMOUR = 1, 2


def finish(
    image: Array, liver: Array, space: Space, phase: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], int]:
    """Draw veins and lesions into a liver.

    Args:
        image: HU, changed in place.
        liver: the part of each voxel (0..1) that is liver.
        space: their grid.
        phase: index into `PHASES`.
        rng: of what is drawn.

    Returns:
        Labels 0 to 2 (background, liver, tumour), and the number of lesions.
    """
    _draw_vessels(image, liver, space, phase, rng)
    tumour, count = _draw_lesions(image, liver, space, phase, rng)
    label = np.where(liver >= 0.5, LIVER, 0).astype(np.uint8)
    label[(liver >= 0.5) & (tumour >= 0.5)] = TUMOUR
    return label, count


def _draw_vessels(image: Array, liver: Array, space: Space, phase: int, rng: np.random.Generator) -> None:
    """Curves where two smooth random fields are zero: veins of the liver, brighter than it after contrast."""
    difference = rng.normal((-6, 15, 45)[phase], (4, 15, 15)[phase])
    scale = rng.uniform(35, 60)
    across = noise(rng, space.shape, space.spacing, scale) ** 2 + noise(rng, space.shape, space.spacing, scale) ** 2
    image += np.float32(difference) * liver**2 * np.exp(-across / np.float32(rng.uniform(0.01, 0.03)))


def _draw_lesions(image: Array, liver: Array, space: Space, phase: int, rng: np.random.Generator) -> tuple[Array, int]:
    """Tumours and cysts in the liver; returns how much of each voxel is tumour, and the number of lesions."""
    tumour = np.zeros_like(liver)
    inside = np.argwhere(liver > 0.9)
    count = int(rng.poisson(2.5)) if len(inside) and rng.random() < 0.7 else 0
    grid = np.meshgrid(*space.axes, indexing="ij", sparse=True)
    for _ in range(count):
        centre = space.origin + inside[rng.integers(len(inside))] * space.spacing
        radius = float(np.exp(rng.uniform(np.log(4), np.log(45))))
        radii = radius * rng.uniform(0.7, 1.3, 3)
        square = sum(((g - np.float32(c)) / np.float32(r)) ** 2 for g, c, r in zip(grid, centre, radii, strict=True))
        bumps = np.float32(rng.uniform(0, 0.2)) * noise(rng, space.shape, space.spacing, max(8.0, radius))
        part = cover((np.sqrt(square) - 1 + bumps) * np.float32(radius), space.edge) * liver
        if rng.random() < 0.25:  # a cyst, which is liver
            image += part * (np.float32(rng.normal(8, 6)) - image)
        else:
            image += part * np.float32(rng.normal(*((-18, 10), (-5, 35), (-40, 18))[phase]))
            np.maximum(tumour, part, out=tumour)
    return tumour, count
