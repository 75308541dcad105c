"""Everything but the lungs of the synthetic CT: skin, fat, muscle, vessels, bones and the upper abdomen, in HU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.phantom_anatomy import LOW, Organs, Patient
from tools.phantom_shapes import Array, Slices, Space, cover, lookup, noise, paint, smooth_min

Images = tuple[Array, Array]  # HU, and the part of each voxel that is liver


@dataclass
class Tissue:
    """HU of the tissues of one scan, drawn at random."""

    fat: float
    muscle: float
    blood: float
    veins: float
    liver: float
    bone: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Tissue:
        """Draw them, with contrast medium in about half of the scans."""
        contrast = rng.choice([0.0, rng.uniform(60, 160), rng.uniform(160, 380)], p=[0.5, 0.25, 0.25])
        return cls(
            fat=rng.uniform(-115, -85),
            muscle=rng.uniform(40, 65),
            blood=rng.uniform(32, 50) + contrast,
            veins=rng.uniform(32, 50) + contrast * rng.uniform(0.3, 1.2),
            liver=rng.uniform(40, 65) + 0.25 * contrast,
            bone=rng.uniform(450, 900),
        )


def add_limbs(space: Space, p: Patient, body: Array, arms: str) -> Array:
    """Join shoulders and arms ("up", "down" or "none") to the body's distance."""
    rng = p.rng
    if arms == "none":
        return body
    wide = p.at("body_width", 0.0)
    thick = rng.uniform(36, 46) + 0.3 * p.fat
    for sign in (-1, 1):
        root, joint = (sign * 50, -20, p.apex + 2), (sign * (wide + 2), -14, p.apex - 4)
        low = (sign * (wide + thick + rng.uniform(8, 25)), rng.uniform(-30, 5), -280)
        high = (sign * (wide * rng.uniform(0.8, 1.1)), rng.uniform(-10, 30), p.apex + 200)
        end = low if arms == "down" else high
        body = smooth_min(body, space.tube([root, joint], [thick + 6, thick], 40), 30)
        body = smooth_min(body, space.tube([joint, end], [thick, thick * 0.85], 20), 12)
    return body


def add_breasts(space: Space, p: Patient, body: Array) -> Array:
    """Join breasts to the body's distance."""
    rng = p.rng
    size, low, apart = rng.uniform(32, 68), rng.uniform(-50, 10), rng.uniform(62, 85)
    body = body.copy()
    for sign in (-1, 1):
        centre = (sign * apart, p.at("body_front", low) - 0.45 * size + rng.normal(0, 3), low)
        patch = space.ellipsoid(centre, (size * 1.1, size * rng.uniform(0.7, 1.1), size * 1.1), reach=20)
        if patch is not None:
            body[patch.where] = smooth_min(body[patch.where], patch.sdf, 12)
    return body


def draw_body(image: Array, space: Space, p: Patient, t: Tissue, body: Array, cage: Array, skin: Array) -> None:
    """Skin, fat under the skin, muscle and the fat between the organs."""
    rng = p.rng
    hills = noise(rng, space.shape, space.spacing, 35)
    paint(image, cover(skin, space.edge), 20)
    paint(image, cover(skin + np.float32(2), space.edge), t.fat + 12 * noise(rng, space.shape, space.spacing, 6))
    gland = np.maximum(skin + 6, np.float32(2) - body) + 6 * hills - np.float32(rng.uniform(-8, 5))
    paint(image, cover(gland, 4), 20)
    thick = p.fat * (1 + np.float32(0.3) * hills) + 3
    layers = np.float32(rng.uniform(9, 13)) + 3 * hills
    strands = cover(np.float32(1.0) - np.abs(cage - layers), 1.5) * (cage > 4)
    muscle = t.muscle + 8 * noise(rng, space.shape, space.spacing, 9)
    paint(image, cover(body + thick, space.edge) * strands, muscle)
    paint(image, cover(cage + np.float32(rng.uniform(-1, 3)), space.edge), t.fat)
    above = np.clip((space.w - np.float32(p.apex - 50)) / 15, 0, 1)  # around the tops of the lungs: muscles in fat
    paint(image, cover(cage, space.edge) * above * cover(-6 * hills - 2, 4), muscle)


def draw_mediastinum(image: Array, space: Space, p: Patient, t: Tissue, organs: Organs) -> None:
    """Heart, vessels, gullet and airway."""
    rng, edge = p.rng, space.edge
    if organs.heart is not None:
        paint(image[organs.heart.where], cover(organs.heart.sdf, edge), 0.4 * t.blood + 0.6 * t.muscle)
        paint(image[organs.heart.where], cover(organs.heart.sdf + np.float32(9), edge), 0.7 * t.veins + 0.3 * t.muscle)
    if organs.ventricle is not None:
        paint(image[organs.ventricle.where], cover(organs.ventricle.sdf, edge), t.blood)
    for name, sdf in organs.tubes.items():
        part = cover(sdf, edge)
        if name == "gullet":
            paint(image, part, t.muscle)
            if rng.random() < 0.4:
                gas = sdf + np.float32(rng.uniform(2.5, 4.5)) + 2 * noise(rng, space.shape, space.spacing, 30)
                paint(image, cover(gas, edge), -950)
        elif name not in ("trachea", "right_bronchus", "left_bronchus"):
            paint(image, part, t.blood if name in ("aorta", "carotid", "brachiocephalic") else t.veins)


def draw_airway(image: Array, space: Space, t: Tissue, organs: Organs) -> None:
    """Trachea and main bronchi with their wall; drawn after the lungs, whose roots they enter."""
    sdf = np.minimum(organs.tubes["trachea"], np.minimum(organs.tubes["right_bronchus"], organs.tubes["left_bronchus"]))
    paint(image, cover(sdf - np.float32(1.4), space.edge), t.muscle)
    paint(image, cover(sdf, space.edge), -990)


def draw_abdomen(image: Array, space: Space, p: Patient, t: Tissue, cage: Array, under: Array) -> Array:
    """Liver, spleen, stomach with gas, kidneys and bowel; `under` is the distance above the diaphragm.

    Returns the part of each voxel (0..1) that is liver.
    """
    rng, edge = p.rng, space.edge
    if not (under > 10).any():
        return np.zeros_like(image)
    hills = noise(rng, space.shape, space.spacing, 50)
    inside = np.maximum(cage + np.float32(6), np.float32(3) - under)
    paint(image, cover(np.maximum(cage + np.float32(1), -under), edge), t.muscle)
    paint(image, cover(inside, edge), t.fat)
    left, right = p.dome
    end = right - rng.uniform(110, 190)
    slope = np.float32(rng.uniform(0.1, 0.5))
    liver = np.maximum(inside, np.float32(rng.uniform(-75, -20)) - space.u + 8 * hills - slope * (space.w - right))
    liver = np.maximum(liver, end - space.w + 10 * hills + np.float32(0.4) * (space.v + 40))
    liver = cover(liver, edge)
    paint(image, liver, t.liver + 6 * noise(rng, space.shape, space.spacing, 12))
    both = (image, liver)
    for side in (-1, 1):
        _organ(
            both, space, (side * 58, -0.5 * p.depth, right - rng.uniform(105, 150)), (26, 24, 55), t.liver + 20, inside
        )
    _organ(
        both,
        space,
        (-90, -0.45 * p.depth, left - rng.uniform(45, 70)),
        (30, 42, rng.uniform(42, 65)),
        t.liver + 5,
        inside,
    )
    centre = (rng.uniform(-62, -40), p.depth * rng.uniform(0.1, 0.4), left - rng.uniform(35, 60))
    _hollow(both, space, p, centre, rng.uniform([30, 30, 30], [48, 48, 58]), inside)
    for _ in range(int(rng.integers(20, 60))):
        low = (rng.uniform(-105, 105), p.depth * rng.uniform(-0.2, 0.8), rng.uniform(end - 230, end + 25))
        _hollow(both, space, p, low, rng.uniform(11, 34, 3), inside)
    if rng.random() < 0.7:  # the colon's left bend lies right under the diaphragm
        high = (rng.uniform(-105, -70), p.depth * rng.uniform(-0.1, 0.6), left - rng.uniform(30, 60))
        _hollow(both, space, p, high, rng.uniform(18, 30, 3), inside)
    return liver


def _organ(images: Images, space: Space, centre: tuple, radii: tuple, value: float, inside: Array) -> None:
    patch = space.ellipsoid(centre, radii)
    if patch is not None:
        part = cover(np.maximum(patch.sdf, inside[patch.where]), space.edge)
        for image, level in zip(images, (value, 0.0), strict=True):
            paint(image[patch.where], part, level)


def _hollow(images: Images, space: Space, p: Patient, centre: tuple, radii: NDArray[np.float64], inside: Array) -> None:
    """Stomach or a loop of bowel: wall, fluid or faeces, and gas on top."""
    patch = space.ellipsoid(centre, radii)
    if patch is None:
        return
    rng, view = p.rng, images[0][patch.where]
    folds = noise(rng, view.shape, space.spacing, rng.uniform(12, 40))
    sdf = np.maximum(patch.sdf + 3 * folds, inside[patch.where])
    paint(images[1][patch.where], cover(sdf, space.edge), 0.0)
    paint(view, cover(sdf, space.edge), rng.uniform(25, 60))
    filling = rng.uniform(0, 40) + (0 if rng.random() < 0.6 else 150 * noise(rng, view.shape, space.spacing, 6) - 100)
    paint(view, cover(sdf + np.float32(3), space.edge), np.clip(filling, -900, 150).astype(np.float32))
    if rng.random() < 0.75:
        level = np.float32(centre[1] + radii[1] * rng.uniform(-1, 0.8))
        gas = np.maximum(sdf + np.float32(rng.uniform(2, 3.5)), (level - space.v[patch.where]) * space.scale)
        paint(view, cover(gas, space.edge), -985)


def draw_bones(image: Array, space: Space, p: Patient, t: Tissue, cage: Array, arms: str) -> None:
    """Ribs, breastbone, collar bones, shoulder blades, arms' bones and the vertebral column."""
    rng = p.rng
    long = np.full(space.shape, 9, dtype=np.float32)
    first, pitch = p.apex - rng.uniform(2, 10), rng.uniform(21, 26)
    for k in range(12):
        for sign in (-1, 1):
            space.add_tube(long, _rib(p, k, first - k * pitch, sign), rng.uniform(4, 5.5), 4)
    for sign in (-1, 1):
        front = p.at("front", p.apex - 25)
        ends = [
            (sign * 18, front + 12, p.apex - 25),
            (sign * 70, front + 4, p.apex - 2),
            (sign * 135, -12, p.apex + 12),
        ]
        space.add_tube(long, ends, 6, 4)
        if arms != "none":
            wide = p.at("body_width", 0.0)
            space.add_tube(long, [(sign * wide, -14, p.apex - 4), (sign * (wide - 8), -14, p.apex - 8)], 22, 4)
            end = (sign * (wide + 50), -12, -280) if arms == "down" else (sign * wide * 0.95, 10, p.apex + 200)
            space.add_tube(long, [(sign * wide, -14, p.apex - 4), end], 10, 4)
    blade = np.abs(
        cage - np.float32(rng.uniform(13, 18)) - 2 * noise(rng, space.shape, space.spacing, 40)
    ) - np.float32(2.2)
    away = np.abs(space.u)
    limits = (np.float32(58) - away, space.w - np.float32(p.apex - 5), np.float32(rng.uniform(-25, 10)) - space.w)
    for limit in (*limits, space.v + np.float32(30), away - np.float32(p.width + 22)):
        blade = np.maximum(blade, limit)
    ahead = p.along("front", space)
    plate = np.maximum(np.abs(space.u) - np.float32(rng.uniform(14, 20)), np.abs(space.v - ahead - np.float32(7)) - 5)
    top = p.apex - rng.uniform(30, 45)
    plate = np.maximum(plate, np.maximum(space.w - np.float32(top), np.float32(top - rng.uniform(140, 170)) - space.w))
    for sdf in (long, np.minimum(blade, plate)):
        paint(image, cover(sdf, space.edge), t.bone)
        paint(image, cover(sdf + np.float32(1.6), space.edge), 0.35 * t.bone)
    _spine(image, space, p, t)


def _rib(p: Patient, k: int, start: float, sign: int) -> np.ndarray:
    """Centre line of rib `k` (0..11) that leaves the spine at height `start`."""
    ends = [50, 58, 62, 62, 62, 60, 55, 45, 35, 25, -10, -40]
    angle = np.deg2rad(np.linspace(-76, ends[k], 16))
    drop = min(22 + 9 * k, 85) * ((angle + np.pi / 2) / np.pi) ** 1.3
    w = (start - drop).astype(np.float32)
    outer, front, back = (lookup(p.curves[n], w, LOW) for n in ("outer", "front", "back"))
    c, s = np.cos(angle), np.sin(angle)
    far = 1 / np.sqrt(1 - p.square * c**2 * s**2)
    u = (outer + 5.5) * c * far
    v = (front + back) / 2 + ((front - back) / 2 + 5.5) * s * far
    return np.stack([sign * u, v, w], axis=1)


def _spine(image: Array, space: Space, p: Patient, t: Tissue) -> None:
    rng = p.rng
    reach = (60 + p.depth * 0.4) * p.scale
    where: Slices | None = space.box((-75 * p.scale, -1e4, -1e4), (75 * p.scale, reach, 1e4))
    if where is None:
        return
    u, v, w, view = space.u[where], space.v[where], space.w[where], image[where]
    centre, pitch = np.float32(-p.depth * 0.68), np.float32(rng.uniform(22, 29))
    q = np.mod(w / pitch + np.float32(rng.random()), 1)
    bone = t.bone * rng.uniform(0.22, 0.4) + 30 * noise(rng, view.shape, space.spacing, 5)
    body = np.hypot(u / 1.15, v - centre) - np.float32(rng.uniform(14, 18)) - 2 * np.abs(q - np.float32(0.6))
    disc = np.abs(q - np.float32(0.1)) < 0.1
    paint(view, cover(body, space.edge), np.where(disc, 90, 0.75 * t.bone))
    rim = cover(body + np.float32(1.8), space.edge) * (np.abs(q - np.float32(0.6)) < 0.33)
    paint(view, rim, bone.astype(np.float32))
    back = v - centre + np.float32(25)
    canal = np.hypot(u, back) - np.float32(8.5)
    spinous = np.maximum(np.abs(u) - 3, np.maximum(back + 10, -np.float32(30) - back))
    spinous = np.maximum(spinous, (np.abs(np.mod(q - back / 60, 1) - np.float32(0.5)) - np.float32(0.22)) * pitch)
    across = np.maximum(
        np.abs(back - 1 + np.abs(u) * np.float32(0.3)) - 3.5, (np.abs(q - np.float32(0.65)) - np.float32(0.18)) * pitch
    )
    across = np.maximum(across, np.abs(u) - np.float32(30))
    for part in (np.where(np.abs(q - 0.55) < 0.42, canal - 3.5, np.float32(5)), spinous, across):
        paint(view, cover(part, space.edge), 0.7 * t.bone)
        paint(view, cover(part + np.float32(2), space.edge), bone.astype(np.float32))
    paint(view, cover(canal, space.edge), 25)
