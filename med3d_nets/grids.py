"""Linear interpolation from one voxel grid onto another, slab by slab, without a full-size copy in between.

Grids whose axes are parallel, in any order and direction, are interpolated axis by axis; that is every pair that
Orientationd and Spacingd make of each other, for oblique scans too. Other pairs take torch's grid_sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

_SLAB = 1 << 20  # values of a slab: 4 MB, which stay in the cache from one step to the next
_BLOCK = 64  # voxels of a matrix: small enough for little to be multiplied by zero, large enough for BLAS
_PARALLEL = 1e-3  # voxels by which an axis may drift over its whole length and still be parallel


@dataclass(frozen=True)
class AxisMap:
    """Where the voxels of a target grid lie in a source grid whose axes are parallel to its own.

    Attributes:
        order: the source axis along each target axis.
        scale: source voxels per target voxel, negative where the axes run against each other.
        offset: source coordinate of target voxel 0, per target axis.
    """

    order: tuple[int, int, int]
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]


def map_between(
    source_affine: NDArray[np.float64], target_affine: NDArray[np.float64], target_shape: Sequence[int]
) -> NDArray[np.float64]:
    """Matrix, 4 × 4, from voxel indices of the target grid to those of the source grid.

    Args:
        source_affine: voxel index to mm, 4 × 4.
        target_affine: the same of the target grid.
        target_shape: voxels along its axes; drifts that are too small to matter over this size become zero.
    """
    matrix: NDArray[np.float64] = np.linalg.solve(
        np.asarray(source_affine, dtype=np.float64), np.asarray(target_affine, dtype=np.float64)
    )
    drift = np.abs(matrix[:3, :3]) * np.asarray(target_shape)
    matrix[:3, :3][drift < _PARALLEL] = 0.0
    return matrix


def axis_map(matrix: NDArray[np.float64]) -> AxisMap | None:
    """Read a matrix of ``map_between`` as an AxisMap; None where axes are not parallel."""
    linear = matrix[:3, :3]
    if (np.count_nonzero(linear, axis=0) != 1).any() or (np.count_nonzero(linear, axis=1) != 1).any():
        return None
    a, b, c = (int(axis) for axis in np.abs(linear).argmax(axis=0))
    scales = [float(linear[axis, i]) for i, axis in enumerate((a, b, c))]
    offsets = [float(matrix[axis, 3]) for axis in (a, b, c)]
    return AxisMap((a, b, c), (scales[0], scales[1], scales[2]), (offsets[0], offsets[1], offsets[2]))


def slabs(
    source: torch.Tensor, matrix: NDArray[np.float64], shape: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Interpolate linearly onto another grid; beyond the source's border its outermost values go on.

    Args:
        source: values, (C, X, Y, Z), floating point, with the axes in any order in memory.
        matrix: of ``map_between``.
        shape: voxels of the target grid along its axes, (X', Y', Z').

    Yields:
        Where a slab lies in the target grid, (channels, X', Y', Z') as slices, and its values, (C, x, y, z).
    """
    shape = [int(n) for n in shape]
    axes = axis_map(matrix)
    # the target's axes by the source's order in memory, so that a slab reads one stretch of it
    order = sorted(range(3), key=lambda axis: -source.stride(1 + axes.order[axis])) if axes else [0, 1, 2]
    step = max(1, _SLAB // (source.shape[0] * shape[order[1]] * shape[order[2]]))
    back = (0, *(1 + order.index(axis) for axis in range(3)))
    moved = source.permute(0, *(1 + axes.order[axis] for axis in order)) if axes else source
    lines = [_Line(moved.shape[1 + i], axes, axis, shape[axis], source) for i, axis in enumerate(order)] if axes else []
    last = lines[2].matrices() if lines else None
    for start in range(0, shape[order[0]], step):
        part = slice(start, min(start + step, shape[order[0]]))
        where = (slice(None), *(part if axis == order[0] else slice(0, shape[axis]) for axis in range(3)))
        if last is None:
            yield where, _sampled(source, matrix, where[1:])
        else:
            slab = lines[1].between(lines[0].of_rows(moved, part), 2)
            yield where, _product(slab, last).permute(back)


def onto_grid(source: torch.Tensor, matrix: NDArray[np.float64], shape: Sequence[int]) -> torch.Tensor:
    """Interpolate as ``slabs`` does, into one tensor, (C, X', Y', Z')."""
    out = source.new_empty((source.shape[0], *(int(n) for n in shape)))
    for where, values in slabs(source, matrix, shape):
        out[where] = values
    return out


class _Line:
    """Interpolation along one axis: for each target voxel its two neighbours and the weight of the second.

    Args:
        size: voxels of the source along it.
        axes: the map between the grids.
        axis: the target's axis.
        length: voxels of the target along it.
        like: tensor whose type and device the weights have.
    """

    def __init__(self, size: int, axes: AxisMap, axis: int, length: int, like: torch.Tensor) -> None:
        place = torch.arange(length, dtype=torch.float64) * axes.scale[axis] + axes.offset[axis]
        place = place.clamp(0, size - 1)
        low = place.floor().clamp(max=max(0, size - 2))
        self.size = size
        self.low = low.long().to(like.device)
        self.high = (self.low + 1).clamp(max=size - 1)
        self.weight = (place - low).to(like)

    def between(self, x: torch.Tensor, axis: int, part: slice = slice(None), start: int = 0) -> torch.Tensor:
        """Interpolate ``x``, whose voxels begin at ``start``, along ``axis``, at the target voxels of ``part``."""
        weight = self.weight[part].reshape(-1, *[1] * (x.dim() - 1 - axis))
        low = x.index_select(axis, self.low[part] - start)
        return low.lerp_(x.index_select(axis, self.high[part] - start), weight)

    def of_rows(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        """Interpolate along axis 1, reading no more than the rows that ``part`` lies between.

        Of a tensor that is not contiguous, ``index_select`` would copy the whole each time.
        """
        ends = self.low[part.start], self.low[part.stop - 1]
        start, stop = int(min(ends)), int(max(ends)) + 2
        return self.between(x[:, start:stop].contiguous(), 1, part, start)

    def matrices(self) -> list[tuple[slice, torch.Tensor]]:
        """The same as products with matrices, along the last axis: that is fastest.

        For each block of target voxels the source voxels that it lies between and its matrix, (source, target); one
        matrix for all would be mostly zeros.
        """
        found = []
        for part in torch.arange(len(self.low), device=self.low.device).split(_BLOCK):
            start, stop = int(self.low[part].min()), int(self.high[part].max()) + 1
            matrix = self.weight.new_zeros((stop - start, len(part)))
            column = part - part[0]
            matrix[self.high[part] - start, column] = self.weight[part]
            matrix[self.low[part] - start, column] += 1 - self.weight[part]
            found.append((slice(start, stop), matrix))
        return found


def _product(x: torch.Tensor, matrices: Sequence[tuple[slice, torch.Tensor]]) -> torch.Tensor:
    """Interpolate along the last axis by the ``matrices`` of its line."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty((len(rows), sum(matrix.shape[1] for _, matrix in matrices)))
    for (source, matrix), block in zip(matrices, out.split(_BLOCK, dim=1), strict=True):
        torch.mm(rows[:, source], matrix, out=block)
    return out.reshape(*x.shape[:-1], -1)


def _sampled(source: torch.Tensor, matrix: NDArray[np.float64], where: Sequence[slice]) -> torch.Tensor:
    rows = [torch.arange(part.start, part.stop, dtype=torch.float64) for part in where]
    index = torch.stack(torch.meshgrid(*rows, indexing="ij"), dim=-1)
    place = index @ torch.from_numpy(matrix[:3, :3].T.copy()) + torch.from_numpy(matrix[:3, 3].copy())
    size = torch.tensor(source.shape[1:], dtype=torch.float64)
    place = 2 * place / (size - 1).clamp(min=1) - 1
    place[..., size == 1] = 0.0
    grid = place.flip(-1)[None].to(source)
    return F.grid_sample(source[None], grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
