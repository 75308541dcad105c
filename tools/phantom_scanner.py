"""The scanner of the synthetic CT: table and clothes, then slice thickness, kernel, noise and padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tools.phantom_shapes import Array, Space, cover, noise, paint


def draw_table(image: Array, space: Space, rng: np.random.Generator, body: Array, prone: bool) -> None:
    """Table, mattress and clothes, in the air around the body."""
    x, y, _ = space.axes
    rows = np.flatnonzero((body < 0).any(axis=(0, 2)))
    if len(rows) == 0:
        return
    sign = -1 if prone else 1
    rest = y[rows[-1]] if prone else y[rows[0]]
    radius = rng.choice([rng.uniform(250, 500), rng.uniform(500, 3000)])
    middle = rng.normal(0, 8)
    surface = sign * (y[None] - rest) - (x[:, None] - middle) ** 2 / (2 * radius) + rng.uniform(2, 22)
    wide = np.abs(x[:, None] - middle) - rng.uniform(180, 260)
    thick, shell = rng.uniform(15, 70), rng.uniform(1, 3)
    plate = np.full(surface.shape, -1000, dtype=np.float32)
    mattress = np.maximum(np.maximum(surface, -surface - rng.uniform(4, 25)), wide)
    core = np.maximum(np.maximum(surface + 25, -surface - 25 - thick), wide)
    paint(plate, cover(mattress.astype(np.float32), space.edge), rng.uniform(-960, -850))
    skin = np.maximum(core, -core - shell).astype(np.float32)
    paint(plate, cover(core.astype(np.float32), space.edge), rng.uniform(-990, -860))
    paint(plate, cover(skin, space.edge), rng.uniform(-500, 250))
    folds = noise(rng, space.shape, space.spacing, 45)
    cloth = np.abs(body - np.float32(rng.uniform(3, 14)) - 4 * folds) - np.float32(rng.uniform(0.1, 0.7))
    outside = 1 - cover(body, space.edge)
    air = np.broadcast_to(plate[:, :, None], image.shape).copy()
    if rng.random() < 0.8:
        paint(air, cover(cloth, space.edge) * (folds > rng.normal(0, 0.7)), rng.uniform(-850, -300))
    image += outside * (air - image)


def acquire(image: Array, space: Space, rng: np.random.Generator, body: Array, level: float | None = None) -> Array:
    """Blur, sharpen and add noise as a scanner does; `level` is the noise's standard deviation in HU."""
    thick = rng.choice([0.0, rng.uniform(1, 3), rng.uniform(3, 6)]) / 2.6
    kernel = rng.uniform(0.3, 1.1)
    sigma = np.array([kernel, kernel, max(thick, 0.4)]) / space.spacing
    image = _blur(image, sigma)
    if rng.random() < 0.4:
        image = image + np.float32(rng.uniform(0.3, 1.2)) * (image - _blur(image, [1.5 / space.spacing[0]] * 2 + [0]))
    if level is None:
        level = float(np.exp(rng.uniform(np.log(4), np.log(60))))
    if level > 0:
        image = image + np.float32(level) * _grain(space, rng, body)
    return image * np.float32(rng.normal(1, 0.008)) + np.float32(rng.normal(0, 5))


def cut(image: Array, label: NDArray[np.uint8], space: Space, rng: np.random.Generator) -> Array:
    """Clip to what scanners store; sometimes only a circle is reconstructed and all outside it is padded."""
    image = np.clip(image, rng.choice([-1024, -1024, -1100]), 3071)
    if rng.random() < 0.35:
        x, y, _ = space.axes
        reach = max(x[-1] - x[0], y[-1] - y[0]) / 2 * rng.uniform(0.94, 1.06)
        away = np.hypot(x[:, None] - (x[0] + x[-1]) / 2, y - (y[0] + y[-1]) / 2)
        label[away > reach] = 0
        image[away > reach] = rng.choice([-1024, -2000, -2048, -3024])
    return image


def _grain(space: Space, rng: np.random.Generator, body: Array) -> Array:
    """Noise of standard deviation about 1: correlated by the kernel, worse in thick sections, streaked across them."""
    white = rng.standard_normal(space.shape, dtype=np.float32)
    fine = rng.uniform(0.2, 0.9) * 1.6 / space.spacing[:2]
    grain = _blur(white, [*np.minimum(fine, 1.6), rng.uniform(0, 0.5)])
    grain /= max(float(grain[::3, ::3, ::3].std()), 1e-6)
    chord = (body[:, :, :] < 0).sum(axis=0).max(axis=0) * space.spacing[0]  # widest row of each section, mm
    worse = np.clip(chord / 330, 0.6, 1.8).astype(np.float32) ** 2
    streaks = _blur(rng.standard_normal(space.shape, dtype=np.float32), [25 / space.spacing[0], 0.5, 0])
    streaks /= max(float(streaks.std()), 1e-6)
    grain = grain * worse + streaks * np.float32(rng.uniform(0, 0.5)) * worse**2
    return grain * (np.float32(0.6) + np.float32(0.4) * cover(body + 20, 40))


def _blur(image: Array, sigma: np.ndarray | list[float]) -> Array:
    for axis, s in enumerate(sigma):
        if s > 0.2:
            image = ndimage.gaussian_filter1d(image, s, axis=axis, mode="nearest", truncate=3)
    return image
