"""The patient of the synthetic CT: random proportions, lungs, mediastinum and the wall of the chest.

The numbers are those of adult CT (lungs 200 to 280 mm long, cage 240 to 280 mm wide, right dome of the diaphragm
above the left one, costophrenic recess 45 to 80 mm deep), varied at random; nothing here comes from a real scan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from tools.phantom_shapes import Array, Patch, Space, in_slabs, lookup, noise, smooth_curve, smooth_min

LOW, HIGH = -460.0, 260.0  # range (mm of the patient) of the curves along the body


@dataclass
class Patient:
    """Proportions of one patient, drawn at random; mm in the patient's coordinates."""

    rng: np.random.Generator
    scale: float = 1.0
    width: float = 128.0
    depth: float = 88.0
    apex: float = 95.0
    dome: tuple[float, float] = (-105.0, -95.0)
    recess: tuple[float, float] = (60.0, 60.0)
    shift: float = -4.0
    square: float = 0.4
    fat: float = 15.0
    curves: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        """Draw a patient."""
        right = rng.uniform(-138, -72)
        left = right - rng.uniform(-6, 22)
        if rng.random() < 0.08:  # one half of the diaphragm stands high
            left, right = (
                (left + rng.uniform(25, 55), right) if rng.random() < 0.5 else (left, right + rng.uniform(25, 55))
            )
        patient = cls(
            rng,
            scale=float(np.clip(rng.normal(1.0, 0.08), 0.75, 1.18)),
            width=rng.uniform(120, 146),
            depth=rng.uniform(80, 110),
            apex=rng.uniform(85, 114),
            dome=(left, right),
            recess=(rng.uniform(40, 85), rng.uniform(40, 85)),
            shift=rng.normal(-4, 4),
            square=rng.uniform(0.1, 0.7),
            fat=float(rng.choice([rng.uniform(3, 12), rng.uniform(8, 25), rng.uniform(20, 45)])),
        )
        patient.curves = _curves(patient)
        return patient

    def along(self, name: str, space: Space) -> Array:
        """A named measure at the height of each voxel."""
        if name not in space.memory:
            space.memory[name] = lookup(self.curves[name], space.w, LOW)
        return space.memory[name]

    def at(self, name: str, w: float) -> float:
        """A named measure at one height."""
        return float(lookup(self.curves[name], np.array([w], dtype=np.float32), LOW)[0])


def _curves(p: Patient) -> dict[str, Array]:
    rng, base = p.rng, min(p.dome) - 65.0

    def height(t: float) -> float:
        return base + t * (p.apex - base)

    def curve(ts: list[float], values: list[float], wobble: float = 0.02) -> Array:
        shaken = [v * (1 + wobble * rng.standard_normal()) for v in values]
        return smooth_curve([height(t) for t in ts], shaken, LOW, HIGH)

    outer = curve([-1, 0, 0.3, 0.55, 0.75, 0.9, 1.0, 1.15], [0.96, 0.98, 1, 0.97, 0.87, 0.7, 0.55, 0.45]) * p.width
    front = curve([-1, 0, 0.3, 0.55, 0.75, 0.9, 1.0, 1.15], [0.85, 0.95, 1, 0.93, 0.74, 0.47, 0.2, 0.15]) * p.depth
    back = curve([-1, 0, 0.3, 0.55, 0.75, 0.9, 1.0, 1.15], [0.85, 0.97, 1, 1, 0.95, 0.83, 0.65, 0.6]) * -p.depth
    heights = np.arange(LOW, HIGH, 0.5)
    t = (heights - base) / (p.apex - base)
    turn = rng.uniform(0.64, 0.74)
    dome = np.sqrt(np.clip(1 - (np.maximum(t - turn, 0) / (1 - turn)) ** 2, 0, 1)).astype(np.float32)
    inner = curve([0.45, 0.7, 0.85, 1.0], [0.0, 14, 32, rng.uniform(40, 50)])
    neck = np.clip((heights - p.apex - 5) / 45, 0, 1)
    neck = (neck * neck * (3 - 2 * neck)).astype(np.float32)
    wide = p.width + 16 + p.fat * rng.uniform(0.5, 1)
    belly = 1 + rng.uniform(-0.06, 0.12) * np.clip((-90 - heights) / 120, 0, 1).astype(np.float32)
    pectoral = rng.uniform(14, 26)
    ahead = np.maximum(front + pectoral, 38) + p.fat * rng.uniform(0.5, 0.9)
    behind = -p.depth - rng.uniform(22, 30) - 0.6 * p.fat
    return {
        "outer": outer,
        "front": front,
        "back": back,
        "inner": inner,
        "dome": dome,
        "body_width": wide * belly * (1 - neck) + 62 * neck,
        "body_front": ahead * (1 + 1.6 * (belly - 1)) * (1 - neck) + 38 * neck,
        "body_back": behind * (1 - neck) - 78 * neck,
    }


@in_slabs
def squircle(u: Array, v: Array, a: Array, b: Array, square: float) -> Array:
    """Distance (along the ray from the centre) to an ellipse with half axes a and b, squarer as `square` nears 0.8."""
    x, y = (u / np.maximum(a, 0.5)) ** 2, (v / np.maximum(b, 0.5)) ** 2
    s = np.sqrt(x + y - np.float32(square) * x * y / np.maximum(x + y, 1e-6))
    return np.sqrt(u * u + v * v) * (1 - 1 / np.maximum(s, 1e-3))


def cage(space: Space, p: Patient) -> Array:
    """Distance to the inside of the rib cage, in the section."""
    front, back = p.along("front", space), p.along("back", space)
    middle, half = (front + back) / 2, (front - back) / 2
    wall = squircle(space.u, space.v - middle, p.along("outer", space), half, p.square)
    return (wall + 3 * np.maximum(space.w - np.float32(p.apex + 4), 0)) * space.scale


def body(space: Space, p: Patient) -> Array:
    """Distance to the skin, shoulders and arms left out."""
    front, back = p.along("body_front", space), p.along("body_back", space)
    middle, half = (front + back) / 2, (front - back) / 2
    sdf = squircle(space.u, space.v - middle, p.along("body_width", space), half, p.square + 0.05)
    return (sdf + np.float32(2.5) * noise(p.rng, space.shape, space.spacing, 60)) * space.scale


def diaphragm(space: Space, p: Patient, side: int) -> Array:
    """Distance above (negative) or below the diaphragm; `side` 0 is left, 1 right."""
    rng, sign = p.rng, 2 * side - 1
    lateral = p.width - 58
    du = sign * space.u - rng.uniform(52, 64)
    dv = space.v - rng.uniform(0, 22)
    du = du / np.where(du > 0, np.float32(lateral * rng.uniform(1.02, 1.25)), np.float32(rng.uniform(75, 105)))
    dv = dv / np.where(
        dv > 0, np.float32(p.depth * rng.uniform(1.0, 1.25)), np.float32(p.depth * rng.uniform(1.0, 1.1))
    )
    rho = np.minimum(du * du + dv * dv, np.float32(1.7))
    flat = np.float32(rng.uniform(0.25, 0.5))
    drop = np.float32(p.recess[side]) * (flat * rho + (1 - flat) * rho**3)
    tilt = np.float32(rng.uniform(0.05, 0.35) * p.recess[side] / p.depth)
    drop -= tilt * np.clip(space.v, -p.depth, p.depth)
    drop += np.float32(rng.uniform(0.5, 2.5)) * noise(rng, space.shape, space.spacing, 35)
    return p.dome[side] - drop - space.w


def lung_cavity(space: Space, p: Patient, side: int) -> Array:
    """Distance to one pleural space, before the mediastinum and the diaphragm are taken away."""
    sign = 2 * side - 1
    front, back, dome = p.along("front", space), p.along("back", space), p.along("dome", space)
    inner, outer = p.along("inner", space), p.along("outer", space)
    middle, half = (front + back) / 2, (front - back) / 2
    sdf = squircle(sign * space.u - inner, space.v - middle, (outer - inner) * dome, half * dome, p.square)
    return sdf + (space.w > p.apex) * (space.w - p.apex)


def lungs(space: Space, p: Patient, middle: Array) -> tuple[Array, Array, Array]:
    """Distances to the left lung, the right lung and the diaphragm, given the distance to the mediastinum."""
    ripple = 0.8 * noise(p.rng, space.shape, space.spacing, 14) + 1.5 * noise(p.rng, space.shape, space.spacing, 40)
    both, floors = [], []
    for side in (0, 1):
        cavity = (lung_cavity(space, p, side) + ripple) * space.scale
        cavity = -smooth_min(-cavity, middle, 9)  # round where chest wall and mediastinum meet
        under = diaphragm(space, p, side) * space.scale
        sign = 2 * side - 1
        seam = np.float32(p.rng.uniform(0.8, 2.2)) - sign * (space.u - _midline(space, p))
        sdf = np.maximum(np.maximum(cavity, under), seam * space.scale)
        both.append(one_piece(_to_distance(sdf, space)))
        floors.append(under)
    return both[0], both[1], np.maximum(floors[0], floors[1])


def _septum(space: Space, p: Patient) -> Array:
    """Distance to the fat that parts the lungs in the middle: thin behind the breastbone, wide below the heart."""
    rng, floor = p.rng, min(max(p.dome), -56.0)  # the septum keeps its shape under a high dome
    knots = [floor - 60, floor - 10, floor + 30, -20, 15, 45, 75, 110]
    wide, thin = rng.uniform(8, 26), rng.uniform(0.5, 5)
    ahead = smooth_curve(knots, [75, 30, wide, 0.5 * wide, thin, thin + 2, rng.uniform(16, 26), 28], LOW, HIGH)
    behind = smooth_curve(knots, [26, 16, *rng.uniform(2, 10, 4), 16, 28], LOW, HIGH)
    part = np.clip((space.v + 8) / 30, 0, 1)
    half = part * lookup(ahead, space.w, LOW) + (1 - part) * lookup(behind, space.w, LOW)
    at_wall = np.maximum(space.v - p.along("front", space) + np.float32(rng.uniform(8, 25)), 0)
    half += at_wall * np.float32(rng.uniform(0.2, 0.8)) + 2 * noise(rng, space.shape, space.spacing, 30)
    return (np.abs(space.u - _midline(space, p)) - half) * space.scale


def _midline(space: Space, p: Patient) -> Array:
    """Where (u) the two lungs meet: behind the breastbone a little to the left, further down more so."""
    ahead = np.clip((space.v + 8) / 30, 0, 1)
    return np.float32(p.shift) + ahead * np.minimum(space.w + 20, 0) * np.float32(0.25)


def _to_distance(f: Array, space: Space) -> Array:
    """Divide a level function by its slope: a distance in mm near the surface."""
    near = np.clip(f, -25, 25)
    slope = np.sqrt(sum(g * g for g in np.gradient(near, *space.spacing.tolist())))
    return near / np.clip(slope, 0.5, 4).astype(np.float32)


def one_piece(sdf: Array) -> Array:
    """Take away crumbs: all but the largest connected part."""
    parts, count = ndimage.label(sdf < 0)
    if count > 1:
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        sdf[(parts > 0) & (parts != sizes.argmax())] = 5
    return sdf


@dataclass
class Organs:
    """Signed distances (mm) of what lies between the lungs."""

    heart: Patch | None
    ventricle: Patch | None
    tubes: dict[str, Array]
    mediastinum: Array


def mediastinum(space: Space, p: Patient) -> Organs:
    """Heart, great vessels, airway, gullet and spine, wrapped in fat."""
    rng = p.rng
    paths = great_vessels(p)
    tubes = {name: space.tube(points, radii, 30.0) for name, (points, radii) in paths.items()}
    floor = max(p.dome)
    centre = np.array([rng.uniform(-26, -12), p.depth * rng.uniform(0.28, 0.42), max(floor + rng.uniform(32, 46), -92)])
    size = np.array([rng.uniform(48, 66), rng.uniform(36, 49), rng.uniform(38, 50) + max(0.0, -105 - floor) * 0.4])
    tilt = _rotation(rng.uniform(-0.5, -0.2), rng.uniform(0.2, 0.7))
    heart = space.ellipsoid(centre, size, tilt, reach=30)
    ventricle = space.ellipsoid(centre + np.array([-14, 4, -6]), size * rng.uniform(0.45, 0.6), tilt, reach=4)
    fat = np.float32(rng.uniform(1.0, 5.0))
    around = np.full(space.shape, 30, dtype=np.float32)
    fillet = rng.uniform(10, 22)
    for name, sdf in tubes.items():
        if name not in ("trachea", "gullet"):
            around = smooth_min(around, sdf - fat, fillet)
    for name in ("trachea", "gullet"):
        around = smooth_min(around, tubes[name] - np.float32(rng.uniform(1.5, 3.5)), 8)
    around = smooth_min(around, spine_block(space, p), 8)
    around = smooth_min(around, _septum(space, p), 10)
    if heart is not None:
        around[heart.where] = smooth_min(around[heart.where], heart.sdf - np.float32(rng.uniform(1, 6)), fillet)
    return Organs(heart, ventricle, tubes, around)


def spine_block(space: Space, p: Patient) -> Array:
    """Distance to the vertebral column with the heads of the ribs and the muscle behind it."""
    spread = np.float32(17) + np.maximum(-(space.v + p.depth * 0.68), 0) * np.float32(0.55)
    block = np.maximum(np.abs(space.u) - spread, space.v + np.float32(p.depth * 0.68 - 18))
    rounder = np.hypot(space.u / 1.15, space.v + np.float32(p.depth * 0.68)) - 17
    return smooth_min(np.maximum(block, space.v + np.float32(p.depth * 0.7)), rounder, 5) * space.scale


Line = list[tuple[float, float, float]]
Path = tuple[Line, list[float] | float]


def great_vessels(p: Patient) -> dict[str, Path]:
    """Centre lines (mm) and radii (mm) of the great vessels, the airway and the gullet."""
    rng, back = p.rng, -p.depth
    arch = rng.uniform(24, 42)
    asc, desc = rng.uniform(12, 19), rng.uniform(9.5, 15)
    pa, air = rng.uniform(10, 15), rng.uniform(6.5, 10.5)
    bend = rng.uniform(-18, 8)
    low = min(p.dome) - 120
    down: Line = [
        (-25, back * 0.52, arch - 22),
        (-25, back * 0.55, -30),
        (-20, back * 0.52, -90),
        (bend, back * 0.45, low),
    ]
    aorta: Path = (
        [(-4, 18, -42), (14, 24, -15), (12, 18, arch - 14), (0, 2, arch), (-16, back * 0.3, arch - 2), *down],
        [asc, asc, asc * 0.95, (asc + desc) / 2, desc * 1.05, desc, desc, desc * 0.95, desc * 0.85],
    )
    return {
        "aorta": aorta,
        "cava": ([(26, 8, 75), (24, 12, 20), (23, 10, -30)], rng.uniform(7, 11)),
        "innominate": ([(-38, 14, 70), (0, 24, 48), (22, 14, 35)], rng.uniform(5, 8)),
        "carotid": ([(-8, 4, arch), (-22, -4, 75), (-28, -2, 140)], rng.uniform(3.5, 5)),
        "brachiocephalic": ([(2, 8, arch), (16, 2, 62), (30, -4, 140)], rng.uniform(4, 7)),
        "lower_cava": ([(22, 0, -62), (26, -8, -105), (20, back * 0.4, low)], rng.uniform(9, 14)),
        "trunk": ([(-20, 30, -42), (-18, 20, -16), (-16, 4, -8)], pa),
        "left_artery": ([(-16, 4, -8), (-36, -14, -6), (-46, -26, -18)], [pa * 0.9, pa * 0.75, pa * 0.6]),
        "right_artery": ([(-14, 4, -10), (14, -4, -16), (42, -12, -20)], [pa * 0.85, pa * 0.8, pa * 0.6]),
        "veins": ([(-46, -12, -38), (-10, -14, -44), (44, -10, -42)], [6, rng.uniform(14, 20), 6]),
        "trachea": ([(rng.uniform(-4, 4), 2, 170), (4, -8, 60), (2, -18, 8), (2, -20, 0)], air),
        "right_bronchus": ([(2, -20, 0), (18, -22, -14), (36, -20, -28)], [air * 0.85, air * 0.75, air * 0.55]),
        "left_bronchus": ([(2, -20, 0), (-18, -22, -16), (-42, -24, -34)], [air * 0.8, air * 0.7, air * 0.5]),
        "gullet": (
            [(-2, -18, 170), (-6, -32, 40), (-4, -36, -20), (-8, -34, -80), (-24, -12, max(p.dome) - 30)],
            rng.uniform(4.5, 8),
        ),
    }


def _rotation(yaw: float, pitch: float) -> Array:
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    about_w = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_v = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    return (about_w @ about_v).astype(np.float32)
