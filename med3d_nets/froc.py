"""FROC as LUNA16 defines it: sensitivity over false positives per scan, and its mean at seven of these.

Setio et al., Medical Image Analysis 2017, section 4.3 (evaluation): a nodule is found by a finding whose centre is
nearer to its own than its radius; further findings of it count neither as true nor as false, like those of excluded
ones; the score (CPM) is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false positives per scan, with linear
interpolation between thresholds; intervals come from resampling scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives per scan
MISSED = -np.inf

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScanHits:
    """One scan's findings, matched.

    Attributes:
        true: probability of the best finding of each nodule, ``MISSED`` where it has none; (nodules,).
        false: probabilities of the findings that are of no nodule; (n,).
    """

    true: Floats
    false: Floats


@dataclass(frozen=True)
class Froc:
    """A FROC curve.

    Attributes:
        thresholds: probabilities, descending; (n,).
        rates: false positives per scan at or above each threshold; (n,).
        sensitivity: share of the nodules found at or above each threshold; (n,), NaN without nodules.
        at_rates: sensitivity at ``RATES``; (7,).
        cpm: their mean.
        scans: number of scans.
        nodules: number of nodules.
    """

    thresholds: Floats
    rates: Floats
    sensitivity: Floats
    at_rates: Floats
    cpm: float
    scans: int
    nodules: int


def match(centres: ArrayLike, probabilities: ArrayLike, nodules: ArrayLike, excluded: ArrayLike = ()) -> ScanHits:
    """Match one scan's findings with its nodules.

    Args:
        centres: mm, (n, 3).
        probabilities: (n,).
        nodules: x, y, z and diameter in mm, of the same space, (m, 4).
        excluded: the same of findings that are neither right nor wrong, (k, 4).
    """
    places = np.asarray(centres, dtype=np.float64).reshape(-1, 3)
    scores = np.asarray(probabilities, dtype=np.float64).reshape(-1)
    hits = _within(places, np.asarray(nodules, dtype=np.float64).reshape(-1, 4))
    others = _within(places, np.asarray(excluded, dtype=np.float64).reshape(-1, 4))
    true = np.where(hits, scores[:, None], MISSED).max(axis=0, initial=MISSED)
    return ScanHits(true, scores[~hits.any(axis=1) & ~others.any(axis=1)])


def froc(scans: Sequence[ScanHits]) -> Froc:
    """Make the curve of several scans."""
    true = np.concatenate([scan.true for scan in scans]) if scans else np.empty(0)
    false = np.concatenate([scan.false for scan in scans]) if scans else np.empty(0)
    thresholds = np.unique(np.concatenate([true[true > MISSED], false]))[::-1]
    rates = _at_or_above(false, thresholds) / max(1, len(scans))
    sensitivity = _at_or_above(true, thresholds) / len(true) if len(true) else np.full(len(thresholds), np.nan)
    start = 0.0 if len(true) else np.nan
    # Where the curve rises straight up, numpy takes the upper end at that rate and the lower end before it.
    at_rates = np.interp(RATES, np.r_[0.0, rates], np.r_[start, sensitivity])
    return Froc(thresholds, rates, sensitivity, at_rates, float(at_rates.mean()), len(scans), len(true))


def intervals(scans: Sequence[ScanHits], samples: int = 1000, seed: int = 0) -> Floats:
    """95 % intervals of the sensitivities at ``RATES`` and of the CPM, by resampling scans.

    Args:
        scans: the matched scans.
        samples: number of resamples.
        seed: of the resampling.

    Returns:
        Lower and upper ends, (2, 8); NaN where fewer than two scans or no nodules are there.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(samples if len(scans) > 1 else 0):
        curve = froc([scans[index] for index in rng.integers(len(scans), size=len(scans))])
        if curve.nodules:
            values.append([*curve.at_rates, curve.cpm])
    return np.percentile(values, [2.5, 97.5], axis=0) if values else np.full((2, len(RATES) + 1), np.nan)


def _within(centres: Floats, spheres: Floats) -> NDArray[np.bool_]:
    """Whether each centre is in each sphere, (n, m)."""
    distance = np.linalg.norm(centres[:, None] - spheres[None, :, :3], axis=2)
    return distance < spheres[None, :, 3] / 2


def _at_or_above(values: Floats, thresholds: Floats) -> Floats:
    return (np.sort(values)[None] >= thresholds[:, None]).sum(axis=1).astype(np.float64)
