"""Shapes, paint and noise of the synthetic CT: what `tools.phantom_*` draw with.

Everything is drawn as a signed distance (mm, negative inside) on the part of the grid that it can touch, and is
painted with an edge one voxel wide, which is the partial volume effect. Anatomy is written down in the patient's
own coordinates (u to the right, v to the front, w to the head, in mm, 0 at the carina of an average patient);
`Space` bends them by a smooth random displacement, so that no two patients are alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

Array = NDArray[np.float32]
Numbers = Sequence[float] | NDArray[Any]
Slices = tuple[slice, slice, slice]


class Patch(NamedTuple):
    """A signed distance on a part of the grid."""

    where: Slices
    sdf: Array


class Space:
    """The voxel grid and the patient's coordinates at each voxel.

    Args:
        rng: source of the random displacement.
        shape: voxels per axis.
        spacing: mm per axis.
        origin: scanner coordinates (mm) of voxel 0, 0, 0.
        scale: size of the patient, 1 is average.
        bend: displacement's standard deviation in mm.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        shape: Numbers,
        spacing: Numbers,
        origin: Numbers,
        scale: float = 1.0,
        bend: float = 5.0,
    ) -> None:
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.spacing = np.asarray(spacing, dtype=float)
        self.origin = np.asarray(origin, dtype=float)
        self.scale = scale
        self.edge = float(np.cbrt(np.prod(self.spacing)))
        axes = [o + d * np.arange(n) for o, d, n in zip(self.origin, self.spacing, self.shape, strict=True)]
        self.axes = [a.astype(np.float32) for a in axes]
        self._bends = [
            bend * noise(rng, self.shape, spacing, s) for s in (rng.uniform(70, 130), rng.uniform(60, 120), 110)
        ]
        self.memory: dict[str, Array] = {}  # fields that several drawers need
        grid = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        self.u, self.v, self.w = ((g + b) / np.float32(scale) for g, b in zip(grid, self._bends, strict=True))

    def to_scanner(self, points: ArrayLike) -> NDArray[np.float64]:
        """Where points (N, 3) of the patient lie in scanner coordinates (mm)."""
        goal = np.asarray(points, dtype=float) * self.scale
        there = goal.copy()
        for _ in range(3):  # the displacement is smooth and small: the fixed point is near at once
            index = ((there - self.origin) / self.spacing).T
            shift = [ndimage.map_coordinates(b, index, order=1, mode="nearest") for b in self._bends]
            there = goal - np.stack(shift, axis=1)
        return there

    def box(self, low: ArrayLike, high: ArrayLike) -> Slices | None:
        """Voxels between two corners in scanner coordinates, None where the grid has none."""
        first = np.floor((np.asarray(low) - self.origin) / self.spacing).astype(int)
        last = np.ceil((np.asarray(high) - self.origin) / self.spacing).astype(int) + 1
        first, last = np.maximum(first, 0), np.minimum(last, self.shape)
        if np.any(first >= last):
            return None
        return slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2])

    def ellipsoid(
        self, centre: ArrayLike, radii: ArrayLike, turn: Array | None = None, reach: float = 4.0
    ) -> Patch | None:
        """Ellipsoid about `centre` with half axes `radii` (mm of the patient), turned by a 3x3 matrix."""
        half = (float(np.max(radii)) + reach + 4.0) * self.scale
        mid = self.to_scanner(np.reshape(np.asarray(centre, dtype=float), (1, 3)))[0]
        where = self.box(mid - half, mid + half)
        if where is None:
            return None
        c = np.asarray(centre, dtype=np.float32)
        p = [self.u[where] - c[0], self.v[where] - c[1], self.w[where] - c[2]]
        if turn is not None:
            p = [np.float32(row[0]) * p[0] + np.float32(row[1]) * p[1] + np.float32(row[2]) * p[2] for row in turn]
        q = [x / np.float32(r) for x, r in zip(p, np.asarray(radii), strict=True)]
        k0 = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2)
        k1 = np.sqrt(sum((x / np.float32(r)) ** 2 for x, r in zip(q, np.asarray(radii), strict=True)))
        return Patch(where, (k0 * (k0 - 1) / np.maximum(k1, 1e-6) * self.scale).astype(np.float32))

    def capsule(self, a: ArrayLike, b: ArrayLike, ra: float, rb: float, reach: float) -> Patch | None:
        """Cone with round ends between two points in scanner coordinates (mm)."""
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        half = max(ra, rb) + reach
        where = self.box(np.minimum(a, b) - half, np.maximum(a, b) + half)
        if where is None:
            return None
        x, y, z = (axis[s] - np.float32(o) for axis, s, o in zip(self.axes, where, a, strict=True))
        d = (b - a).astype(np.float32)
        norm = np.float32(max(float(d @ d), 1e-6))
        along = (x * d[0] / norm)[:, None, None] + (y * d[1] / norm)[:, None] + z * d[2] / norm
        along = np.clip(along, 0, 1)
        square = (x[:, None, None] - along * d[0]) ** 2
        square += (y[:, None] - along * d[1]) ** 2
        square += (z - along * d[2]) ** 2
        return Patch(where, np.sqrt(square) - (np.float32(ra) + along * np.float32(rb - ra)))

    def tube(self, points: ArrayLike, radii: ArrayLike, reach: float = 25.0) -> Array:
        """Distance to a chain of capsules through the patient's points (N, 3), at most `reach`."""
        sdf = np.full(self.shape, reach, dtype=np.float32)
        self.add_tube(sdf, points, radii, reach)
        return sdf

    def add_tube(self, sdf: Array, points: ArrayLike, radii: ArrayLike, reach: float) -> None:
        """Join a tube to a distance, in place."""
        there = self.to_scanner(points)
        r = np.broadcast_to(np.asarray(radii, dtype=float), len(there)) * self.scale
        for i in range(len(there) - 1):
            patch = self.capsule(there[i], there[i + 1], r[i], r[i + 1], reach)
            if patch is not None:
                np.minimum(sdf[patch.where], patch.sdf, out=sdf[patch.where])


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Parts of the first axis, of about 65,000 voxels each."""
    step = max(1, 2**16 // max(1, math.prod(shape[1:])))
    return (slice(i, i + step) for i in range(0, shape[0], step))


def in_slabs(function: Callable[..., Array]) -> Callable[..., Array]:
    """Let an elementwise function take volumes a few slabs at a time: the intermediate results stay in the cache."""

    @functools.wraps(function)
    def run(*args: Any) -> Array:
        whole = next((a.shape for a in args if isinstance(a, np.ndarray) and a.ndim == 3), None)
        if whole is None:
            return function(*args)
        out = np.empty(whole, dtype=np.float32)
        for slab in _slabs(whole):
            out[slab] = function(*(a[slab] if isinstance(a, np.ndarray) and a.ndim == 3 else a for a in args))
        return out

    return run


@in_slabs
def cover(sdf: Array, edge: float | Array) -> Array:
    """The part of each voxel (0..1) that a shape fills, its edge blurred over `edge` mm."""
    return np.clip(np.float32(0.5) - sdf / np.asarray(edge, dtype=np.float32), 0, 1)


def paint(image: Array, part: Array, value: float | Array) -> None:
    """Lay `value` (HU) over the image, in place, where `part` (0..1) says."""
    for slab in _slabs(image.shape):
        view = image[slab]
        view += part[slab] * ((value[slab] if isinstance(value, np.ndarray) else np.float32(value)) - view)


@in_slabs
def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Union of two shapes with a fillet of about `k` mm."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / np.float32(4 * k)


def smooth_curve(xs: Sequence[float], ys: Sequence[float], low: float, high: float) -> Array:
    """A curve through knots, tabled every 0.5 from `low` to `high` for `lookup`; flat beyond the knots."""
    at = np.clip(np.arange(low, high, 0.5), xs[0], xs[-1])
    return np.asarray(PchipInterpolator(xs, ys)(at), dtype=np.float32)


@in_slabs
def lookup(table: Array, at: Array, low: float) -> Array:
    """Values of a table made by `smooth_curve`, linear between its entries."""
    place = np.clip((at - np.float32(low)) * 2, 0, len(table) - 1.001)
    index = place.astype(np.int32)
    part = place - index
    return table[index] * (1 - part) + table[index + 1] * part


def noise(rng: np.random.Generator, shape: tuple[int, ...], spacing: Numbers, scale_mm: float) -> Array:
    """Smooth random field of mean about 0 and standard deviation about 1, `scale_mm` between its hills."""
    knots = [int(np.ceil(n * d / scale_mm)) + 4 for n, d in zip(shape, spacing, strict=True)]
    field = rng.standard_normal(knots).astype(np.float32)
    for n, d, k in zip(shape, spacing, knots, strict=True):  # each turn takes the first axis and puts it last
        field = np.tensordot(field, _spline_weights(n, d / scale_mm, k, rng.uniform()), axes=(0, 1))
    return np.ascontiguousarray(field) * np.float32(3.2)  # 3.2: what the three spline averages take away


def _spline_weights(count: int, step: float, knots: int, phase: float) -> Array:
    """Cubic B-spline weights (count, knots) at positions `step` apart."""
    at = np.minimum(phase + 1 + step * np.arange(count), knots - 2.001)
    t = np.abs(at[:, None] - np.arange(knots)[None])
    near = 2 / 3 - t**2 + t**3 / 2
    far = np.maximum(2 - t, 0) ** 3 / 6
    return np.where(t < 1, near, far).astype(np.float32)
