"""Classical lung labels: left and right lung from a CT in HU, without a network.

The method is the textbook one: air inside the body below -400 HU, trachea and main bronchi grown from the
tracheal lumen and removed, gas of stomach and bowel removed by its HU and place, left and right parted by a
watershed that meets at the dense junction line, vessels and small airways filled by a closing (Hu, Hoffman,
Reinhardt 2001, IEEE TMI 20(6):490-498). It makes training labels for scans that have none, and a person looks
at every result. Known limits: consolidated lung and masses at the wall are left out, and foam of a table whose
HU are those of lung is taken for lung where it touches the border of the view.

Convention: vessels and airways inside the lung belong to the lung; large hilar vessels, trachea, main bronchi
and pleural fluid do not.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.measure import regionprops
from skimage.segmentation import watershed

LEFT, RIGHT = 1, 2
LUNG_BELOW_HU = -400.0
LUNG_ABOVE_AIR_HU = 40.0  # the median of emphysematous lung is that far above the same scanner's air, or farther
BONE_ABOVE_HU = 220.0
MIN_LUNG_ML = 15.0
SURE_LUNG_ML = 100.0  # smaller pieces with a core of pure air are bowel
MIN_PIECE_ML = 0.3
CORE_STEPS = (  # (lung below this HU, then eroded by this many mm)
    (-400.0, 0.0), (-500.0, 0.0), (-600.0, 0.0), (-600.0, 1.0), (-700.0, 0.0), (-700.0, 1.0), (-750.0, 1.0),
    (-600.0, 2.0), (-700.0, 2.0), (-750.0, 2.0), (-500.0, 3.0),
)  # fmt: skip


def label_lungs(image: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Label the lungs of one CT.

    Args:
        image: HU, shape (X, Y, Z), axes towards right, anterior and superior (nibabel's canonical order).
        spacing: voxel size in mm along X, Y, Z.

    Returns:
        uint8 of the same shape: 0 background, 1 left lung, 2 right lung. All 0 where no lung is in view.
    """
    hu = np.asarray(image, dtype=np.float32)
    outside, air_hu = outside_air(hu, spacing)
    hu = ndimage.gaussian_filter(hu, [0.8 / spacing[0], 0.8 / spacing[1], 0.0])  # fine, noisy pixels
    gas = (hu < LUNG_BELOW_HU) & ~outside
    airway = central_airway(hu, gas, spacing, air_hu)
    lungs = _lung_pieces(hu, gas & ~dilate(airway, spacing, 1.5), spacing, air_hu)
    if not lungs.any():
        return np.zeros(hu.shape, np.uint8)
    sides = part_sides(lungs, hu, airway, spacing)
    return _fill(sides, airway, spacing)


def outside_air(hu: np.ndarray, spacing: tuple[float, float, float]) -> tuple[np.ndarray, float]:
    """Air around the body, and its HU: pieces that touch an in-plane border and are pure air.

    Lung that the field of view cuts touches the border too, but its median is far above that of air. A constant
    minimum is padding outside the scanned field; it parts lung from outside air and says nothing of air's HU.

    Returns:
        Mask of outside air and padding, and the median HU of outside air (-1000 where none is in view).
    """
    constant = ndimage.maximum_filter(hu, 3) == hu.min()
    padding = ndimage.binary_dilation(constant, np.ones((3, 3, 3)))
    pieces, _ = ndimage.label((hu < LUNG_BELOW_HU) & ~padding)
    border = np.concatenate([face.ravel() for ax in (0, 1) for face in (pieces.take(0, ax), pieces.take(-1, ax))])
    beside_padding = pieces[ndimage.binary_dilation(padding) & ~padding]
    outer = np.setdiff1d(np.concatenate([border, beside_padding]), [0]).tolist()
    if not outer:
        return padding, -1000.0
    medians = dict(zip(outer, ndimage.median(hu, pieces, outer), strict=True))
    sizes = np.bincount(pieces.ravel())
    pure = [medians[n] for n in outer if medians[n] < -940.0 and sizes[n] * np.prod(spacing) > 5000.0]
    air_hu = float(min(pure, default=-1000.0))
    gone = [n for n in outer if medians[n] < air_hu + LUNG_ABOVE_AIR_HU]
    return padding | np.isin(pieces, gone), air_hu


def central_airway(hu: np.ndarray, gas: np.ndarray, spacing: tuple[float, float, float], air_hu: float) -> np.ndarray:
    """Lumen of trachea and large bronchi: grown from round lumina in axial slices, stopped before it leaks."""
    seeds = _tube_seeds(hu, gas, spacing, air_hu)
    if not seeds.any():
        return seeds
    grown = seeds
    for limit in np.arange(air_hu + 20.0, -680.0, 20.0):
        pieces, _ = ndimage.label(gas & ((hu < limit) | seeds))
        inside = np.unique(pieces[seeds])
        bigger = np.isin(pieces, inside[inside > 0])
        if _ml(bigger, spacing) > 1.4 * _ml(grown, spacing) + 6.0:
            break
        grown = bigger
    return dilate(_erode(grown, spacing, 2.5), spacing, 3.0) & grown  # without the branches inside the lung


def part_sides(
    lungs: np.ndarray, hu: np.ndarray, airway: np.ndarray, spacing: tuple[float, float, float]
) -> np.ndarray:
    """Left (1) and right (2) lung of a mask in which both may touch; a single lung gets one label.

    Flooding by HU from two cores meets on the junction line, which is denser than the lung on both sides.
    """
    markers = _two_cores(lungs, hu, spacing)
    if markers is None:
        side = _side_of_single(lungs, airway)
        return np.where(lungs, side, 0).astype(np.uint8)
    sides = watershed(hu, markers, mask=lungs).astype(np.uint8)
    return _assign_rest(lungs, sides, spacing)


def dilate(mask: np.ndarray, spacing: tuple[float, ...], radius: float) -> np.ndarray:
    """Dilation with a ball of `radius` mm."""
    if not mask.any():
        return mask.copy()
    return ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius


def close(mask: np.ndarray, spacing: tuple[float, ...], radius: float) -> np.ndarray:
    """Closing with a ball of `radius` mm that does not lose voxels at the border of the field of view."""
    margin = [int(np.ceil(radius / s)) + 1 for s in spacing]
    where = tuple(
        slice(max(0, s.start - m), s.stop + m)
        for s, m in zip(ndimage.find_objects(mask.astype(np.uint8))[0], margin, strict=True)
    )
    padded = np.pad(mask[where], [(m, m) for m in margin], mode="edge")
    closed = _erode(dilate(padded, spacing, radius), spacing, radius)
    result = mask.copy()
    result[where] |= closed[tuple(slice(m, -m) for m in margin)]
    return result


def _erode(mask: np.ndarray, spacing: tuple[float, ...], radius: float) -> np.ndarray:
    return ndimage.distance_transform_edt(mask, sampling=spacing) > radius


def _ml(mask: np.ndarray, spacing: tuple[float, float, float]) -> float:
    return float(mask.sum()) * float(np.prod(spacing)) / 1000.0


def _tube_seeds(hu: np.ndarray, gas: np.ndarray, spacing: tuple[float, float, float], air_hu: float) -> np.ndarray:
    """Round, wholly enclosed lumina of an airway's size that continue over at least 15 mm of slices."""
    area_mm2 = spacing[0] * spacing[1]
    round_ones = np.zeros(gas.shape, bool)
    for z in range(gas.shape[2]):
        pieces, _ = ndimage.label(gas[:, :, z] & (hu[:, :, z] < air_hu + 150.0))
        for piece in regionprops(pieces):
            size = piece.area * area_mm2
            if not 25.0 < size < 700.0 or piece.solidity < 0.8:
                continue
            rows, columns = piece.coords.T
            if np.percentile(hu[rows, columns, z], 25) < air_hu + 60.0:
                round_ones[rows, columns, z] = True
    return _long_chains(round_ones, spacing)


def _long_chains(mask: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    chains, _ = ndimage.label(mask)
    seeds = np.zeros(mask.shape, bool)
    for number, where in enumerate(ndimage.find_objects(chains), start=1):
        if (where[2].stop - where[2].start) * spacing[2] >= 15.0:
            seeds[where] |= chains[where] == number
    return seeds


def _lung_pieces(hu: np.ndarray, gas: np.ndarray, spacing: tuple[float, float, float], air_hu: float) -> np.ndarray:
    """Pieces of gas that are lung: large ones with lung's HU, and small ones near to those and to a rib."""
    pieces, _ = ndimage.label(gas)
    sizes = np.bincount(pieces.ravel()) * float(np.prod(spacing)) / 1000.0
    large, small = np.zeros(gas.shape, bool), np.zeros(gas.shape, bool)
    for number, where in enumerate(ndimage.find_objects(pieces), start=1):
        if sizes[number] < MIN_PIECE_ML:
            continue
        piece = pieces[where] == number
        values = hu[where][piece]
        if np.median(values) < air_hu + LUNG_ABOVE_AIR_HU:
            continue  # bowel, stomach or airway
        if sizes[number] < SURE_LUNG_ML and np.percentile(values, 5) < air_hu + 50.0:
            continue
        (large if sizes[number] >= MIN_LUNG_ML else small)[where] |= piece
    if not large.any() or not small.any():
        return large
    near, count = ndimage.label(small)
    numbers = np.arange(1, count + 1)
    to_lung = ndimage.distance_transform_edt(~large, sampling=spacing)
    to_rib = ndimage.distance_transform_edt(hu < BONE_ABOVE_HU, sampling=spacing)
    is_lung = (ndimage.minimum(to_lung, near, numbers) < 15.0) & (ndimage.median(to_rib, near, numbers) < 15.0)
    return large | np.isin(near, numbers[is_lung])


def _two_cores(lungs: np.ndarray, hu: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray | None:
    """Cores of the left and right lung: keep ever less dense lung until two large pieces lie side by side."""
    for below, radius in CORE_STEPS:
        core = lungs & (hu < below)
        if radius:
            core = _erode(np.pad(core, 1, mode="edge"), spacing, radius)[1:-1, 1:-1, 1:-1]
        cores = _side_by_side(core, spacing)
        if cores is not None:
            return cores
    apart = _parted_slices(lungs & (hu < -600.0), spacing)
    return apart if (apart > 0).sum() > 0.25 * lungs.sum() else None


def _side_by_side(core: np.ndarray, spacing: tuple[float, float, float], least: float = 0.1) -> np.ndarray | None:
    """The two largest pieces as LEFT and RIGHT, if both are large and lie beside each other."""
    pieces, count = ndimage.label(core)
    if count < 2:
        return None
    sizes = np.bincount(pieces.ravel())[1:]
    first, second = np.argsort(sizes)[::-1][:2] + 1
    if sizes[second - 1] < least * sizes.sum():
        return None
    a, b = (np.array(c) for c in ndimage.center_of_mass(core, pieces, [first, second]))
    gap = (b - a) * spacing[: core.ndim]
    if abs(gap[0]) < 50.0 or abs(gap[0]) < np.abs(gap[2:]).max(initial=0.0):
        return None
    left, right = (first, second) if gap[0] > 0 else (second, first)
    return np.where(pieces == left, LEFT, np.where(pieces == right, RIGHT, 0))


def _parted_slices(lungs: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """LEFT and RIGHT in only those axial slices in which the lungs do not touch."""
    apart = np.zeros(lungs.shape, np.uint8)
    for z in range(lungs.shape[2]):
        cores = _side_by_side(lungs[:, :, z], spacing, least=0.18)
        if cores is not None:
            apart[:, :, z] = cores
    return apart


def _side_of_single(lungs: np.ndarray, airway: np.ndarray) -> int:
    """Side of an only lung: it lies lateral to the airway, else lateral to the middle of the view."""
    middle = np.argwhere(airway)[:, 0].mean() if airway.any() else lungs.shape[0] / 2
    return LEFT if np.argwhere(lungs)[:, 0].mean() < middle else RIGHT


def _assign_rest(lungs: np.ndarray, sides: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Give each piece that no core reached to the nearer lung."""
    pieces, count = ndimage.label(lungs & (sides == 0))
    if count:
        nearest = ndimage.distance_transform_edt(
            sides == 0, sampling=spacing, return_distances=False, return_indices=True
        )
        to_left = ndimage.mean(sides[tuple(nearest)] == LEFT, pieces, np.arange(1, count + 1))
        lookup = np.concatenate([[0], np.where(to_left > 0.5, LEFT, RIGHT)]).astype(np.uint8)
        sides = np.where(pieces > 0, lookup[pieces], sides)
    return sides


def _fill(sides: np.ndarray, airway: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Give vessels, small airways and holes to the lung that surrounds them."""
    filled = np.zeros(sides.shape, np.uint8)
    forbidden = dilate(airway, spacing, 2.0)
    for side in (LEFT, RIGHT):
        if not (sides == side).any():
            continue
        lung = close(sides == side, spacing, 5.0)
        for z in range(lung.shape[2]):
            lung[:, :, z] = ndimage.binary_fill_holes(lung[:, :, z])
        lung = ndimage.binary_fill_holes(lung)
        filled[lung & ~forbidden & (filled == 0) & ((sides == 0) | (sides == side))] = side
    return filled
