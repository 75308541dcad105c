"""The inside of the lungs of the synthetic CT: parenchyma, vessels, bronchi, fissures and disease."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tools.phantom_anatomy import Patient, one_piece
from tools.phantom_shapes import Array, Space, cover, noise, paint


@dataclass
class Lungs:
    """Both lungs while they are drawn: distances (mm) and HU."""

    space: Space
    patient: Patient
    sides: list[Array]  # left, right: distance, negative inside
    hu: Array
    fluid: Array | None = None  # distance to pleural fluid

    @property
    def both(self) -> Array:
        """Distance to the nearer lung."""
        return np.minimum(self.sides[0], self.sides[1])

    def some_voxel(self, deep: float = 0.0, side: int | None = None) -> tuple[int, int, int] | None:
        """Index of a random voxel of the lungs, at least `deep` mm inside."""
        sdf = self.both if side is None else self.sides[side]
        found = np.flatnonzero(sdf < -deep)
        if len(found) == 0:
            return None
        i, j, k = np.unravel_index(self.patient.rng.choice(found), sdf.shape)
        return int(i), int(j), int(k)


def parenchyma(space: Space, p: Patient, left: Array, right: Array, prone: bool) -> Lungs:
    """Lung tissue with its gradient of gravity and its texture, vessels not yet drawn."""
    rng = p.rng
    usual, airy, dense = rng.uniform(-930, -790), rng.uniform(-975, -920), rng.uniform(-820, -680)
    base = rng.choice([usual, airy, dense], p=[0.6, 0.25, 0.15])
    gradient = rng.uniform(0.1, 0.9) * (-1 if prone else 1)
    hu = base - np.float32(gradient) * space.v - np.float32(rng.uniform(-0.1, 0.15)) * space.w
    for scale, least, most in ((60, 3, 20), (18, 3, 14), (6, 4, 22)):
        hu += np.float32(rng.uniform(least, most)) * noise(rng, space.shape, space.spacing, scale)
    return Lungs(space, p, [left, right], np.clip(hu, -995, -500).astype(np.float32))


def draw_vessels(lungs: Lungs, blood: float) -> None:
    """Trees of arteries and veins from the hilum to near the pleura; bronchi go with the arteries."""
    space, p = lungs.space, lungs.patient
    rng = p.rng
    for side in (0, 1):
        sdf = lungs.sides[side]
        for root, count in (((44, -18, -14), rng.integers(300, 900)), ((42, -10, -40), rng.integers(200, 600))):
            found = np.flatnonzero(sdf < -3)
            if len(found) < 500:
                continue
            chosen = np.stack(np.unravel_index(rng.choice(found, count), sdf.shape), axis=1)
            targets = space.origin + chosen * space.spacing
            start = space.to_scanner([((2 * side - 1) * root[0], root[1], root[2])])[0]
            edges: list[tuple] = []
            _grow(edges, start, targets, rng.uniform(0.45, 0.7), rng)
            _draw_tree(lungs, edges, blood, airway=root[2] > -30)


def _grow(edges: list[tuple], start: np.ndarray, targets: np.ndarray, thick: float, rng: np.random.Generator) -> None:
    """Branch from `start` towards the targets: halve them across their longest direction until one is left."""
    count = len(targets)
    radius = thick * count**0.4
    middle = targets.mean(axis=0)
    if count == 1:
        edges.append((start, targets[0], radius, 0.6 * radius))
        return
    part = rng.uniform(0.25, 0.5) if count > 3 else 0.5
    bend = start + part * (middle - start)
    bend = bend + rng.normal(0, 0.06 * np.linalg.norm(bend - start), 3)
    edges.append((start, bend, radius, radius * 0.9))
    along = np.linalg.svd(targets - middle, full_matrices=False)[2][0]
    order = np.argsort((targets - middle) @ along)
    split = int(np.clip(round(count * rng.uniform(0.3, 0.7)), 1, count - 1))
    _grow(edges, bend, targets[order[:split]], thick, rng)
    _grow(edges, bend, targets[order[split:]], thick, rng)


def _draw_tree(lungs: Lungs, edges: list[tuple], blood: float, airway: bool) -> None:
    space, rng = lungs.space, lungs.patient.rng
    half = space.edge / 2
    beside = rng.normal(0, 1, 3)
    beside /= np.linalg.norm(beside)
    for a, b, ra, rb in edges:
        patch = space.capsule(a, b, ra, rb, reach=half)
        if patch is not None:
            fill = min(1.0, (ra + rb) / space.edge) ** 1.3  # thinner than a voxel: dimmer
            paint(lungs.hu[patch.where], cover(patch.sdf, space.edge) * np.float32(fill), blood)
        if airway and ra > 1.0:
            shift = beside * ra * 2.4
            wall = space.capsule(a + shift, b + shift, ra * 1.1, rb * 1.1, reach=half)
            lumen = space.capsule(a + shift, b + shift, ra * 0.75, rb * 0.75, reach=half)
            if wall is not None and lumen is not None:
                paint(lungs.hu[wall.where], cover(wall.sdf, space.edge) * np.float32(min(1, ra / space.edge)), -150)
                paint(lungs.hu[lumen.where], cover(lumen.sdf, space.edge), -985)


def draw_fissures(lungs: Lungs) -> None:
    """Thin oblique sheets, and the level one of the right lung."""
    space, rng = lungs.space, lungs.patient.rng
    wave = 5 * noise(rng, space.shape, space.spacing, 70)
    oblique = space.w + 25 + np.float32(rng.uniform(0.9, 1.5)) * (space.v - 5) + wave
    level = np.abs(space.w + np.float32(rng.uniform(15, 35)) - wave)
    level = np.where((space.u > 0) & (oblique > 0), level, 9)
    sheet = np.minimum(np.abs(oblique) * np.float32(0.65), level) - np.float32(0.3)
    paint(lungs.hu, cover(sheet, space.edge) * np.float32(rng.uniform(0.05, 0.35)), -300)


def effusion(lungs: Lungs) -> None:
    """Fluid at the back of one or both pleural spaces: a crescent that is no lung, with pressed lung beside it."""
    space, p = lungs.space, lungs.patient
    rng = p.rng
    lungs.fluid = np.full(space.shape, 9, dtype=np.float32)
    sides = [(0,), (1,), (0, 1)][rng.integers(3)]
    for side in sides:
        base, tall = p.dome[side] - p.recess[side], rng.uniform(80, 260)
        high = rng.uniform(25, 95) * np.clip(1 - (space.w - base) / tall, 0, 1) ** 0.7
        level = p.along("back", space) + high + (np.abs(space.u) - 60) ** 2 * np.float32(rng.uniform(0, 0.008))
        level += 3 * noise(rng, space.shape, space.spacing, 40)
        above = (level - space.v) * np.float32(space.scale * 0.9)  # positive in the fluid
        above = np.where(high > 0, above, -25)
        pleura = lungs.sides[side]
        lungs.fluid = np.minimum(lungs.fluid, np.maximum(pleura, -above))
        pressed = np.exp(-np.maximum(-above, 0) / np.float32(rng.uniform(2, 14)))
        lungs.hu += pressed * np.float32(rng.uniform(0.3, 1.0)) * (20 - lungs.hu)
        lungs.sides[side] = one_piece(np.maximum(pleura, above))


def consolidation(lungs: Lungs) -> None:
    """Airless patches with a border of ground glass; bronchi stay open in some."""
    space, rng = lungs.space, lungs.patient.rng
    for _ in range(int(rng.integers(1, 4))):
        patch = _blob(lungs, rng.uniform(12, 55))
        if patch is None:
            continue
        where, sdf = patch
        view = lungs.hu[where]
        soft = np.clip(np.float32(0.5) - sdf / np.float32(rng.uniform(3, 16)), 0, 1)
        bronchi = (view < -960) if rng.random() < 0.5 else np.zeros(view.shape, bool)
        solid = rng.uniform(-60, 60) + 20 * noise(rng, view.shape, space.spacing, 8)
        paint(view, soft * ~bronchi, np.maximum(view, solid))


def ground_glass(lungs: Lungs) -> None:
    """Hazy patches through which the vessels show."""
    space, rng = lungs.space, lungs.patient.rng
    field = noise(rng, space.shape, space.spacing, rng.uniform(20, 60))
    part = np.clip((field - np.float32(rng.uniform(0.2, 1.3))) * np.float32(rng.uniform(0.6, 3)), 0, 1)
    lungs.hu += part * np.float32(rng.uniform(0.15, 0.6)) * (0 - lungs.hu)


def nodules(lungs: Lungs) -> None:
    """Round nodules and masses, many of them at the wall."""
    rng = lungs.patient.rng
    for _ in range(int(rng.integers(1, 12))):
        radius = rng.choice([rng.uniform(2, 8), rng.uniform(8, 35)], p=[0.75, 0.25])
        patch = _blob(lungs, radius, wobble=0.12)
        if patch is not None:
            paint(lungs.hu[patch[0]], cover(patch[1], lungs.space.edge * 1.3), rng.uniform(-50, 80))


def emphysema(lungs: Lungs) -> None:
    """Holes in the tissue, and bullae."""
    space, rng = lungs.space, lungs.patient.rng
    field = noise(rng, space.shape, space.spacing, rng.uniform(6, 16))
    holes = np.clip((field - np.float32(rng.uniform(0.5, 1.5))) * 2, 0, 1)
    paint(lungs.hu, holes, np.minimum(lungs.hu, -985))
    for _ in range(int(rng.integers(0, 7))):
        patch = _blob(lungs, float(np.exp(rng.uniform(1.6, 3.3))), wobble=0.1)
        if patch is not None:
            view = lungs.hu[patch[0]]
            paint(view, cover(patch[1] - np.float32(0.7), space.edge) * np.float32(0.5), -400)
            paint(view, cover(patch[1], space.edge), -992)


def fibrosis(lungs: Lungs) -> None:
    """Reticular and honeycomb pattern under the pleura, most at the bases."""
    space, p = lungs.space, lungs.patient
    rng = p.rng
    deep = np.exp(np.minimum(lungs.both, 0) / np.float32(rng.uniform(5, 20)))
    low = np.clip((np.float32(rng.uniform(-40, 60)) - space.w) / 80, 0.1, 1)
    net = 1 - np.clip(np.abs(noise(rng, space.shape, space.spacing, rng.uniform(5, 10))) * 2, 0, 1)
    patchy = np.clip(noise(rng, space.shape, space.spacing, 40) + 0.8, 0, 1)
    part = deep * low * patchy * np.float32(rng.uniform(0.5, 1))
    paint(lungs.hu, part * (np.float32(0.25) + np.float32(0.75) * net), rng.uniform(-100, 30))


def atelectasis(lungs: Lungs) -> None:
    """Bands of airless lung above the diaphragm and at the back."""
    space, rng = lungs.space, lungs.patient.rng
    for _ in range(int(rng.integers(1, 5))):
        patch = _blob(lungs, rng.uniform(15, 45), deep=0, squash=rng.uniform(0.06, 0.2))
        if patch is not None:
            paint(lungs.hu[patch[0]], cover(patch[1], space.edge * 2), rng.uniform(-200, 40))


def _blob(
    lungs: Lungs, radius: float, wobble: float = 0.3, deep: float = 1.0, squash: float = 1.0
) -> tuple[tuple[slice, slice, slice], Array] | None:
    """A lumpy ellipsoid about a random place in the lungs."""
    space, rng = lungs.space, lungs.patient.rng
    index = lungs.some_voxel(deep)
    if index is None:
        return None
    at = [float(c[index]) for c in (space.u, space.v, space.w)]
    patch = space.ellipsoid(at, radius * rng.uniform(0.7, 1.3, 3) * [1, 1, squash], reach=10)
    if patch is None:
        return None
    lumps = noise(rng, patch.sdf.shape, space.spacing, max(radius * 0.7, 6))
    return patch.where, patch.sdf + np.float32(wobble * radius * min(1.0, 2 * squash)) * lumps


DISEASES: dict[str, Callable[[Lungs], None]] = {
    "effusion": effusion,
    "consolidation": consolidation,
    "ground_glass": ground_glass,
    "nodules": nodules,
    "emphysema": emphysema,
    "fibrosis": fibrosis,
    "atelectasis": atelectasis,
}
