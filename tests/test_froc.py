"""FROC as LUNA16 defines it, against an example computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from med3d_nets.froc import MISSED, RATES, ScanHits, froc, intervals, match


def scans() -> list[ScanHits]:
    """Four scans: two nodules in the first, one in each of two others, none in the last."""
    return [
        ScanHits(np.array([0.9, 0.4]), np.array([0.8])),
        ScanHits(np.array([0.7]), np.array([0.6, 0.3])),
        ScanHits(np.array([MISSED]), np.array([])),
        ScanHits(np.array([]), np.array([0.5])),
    ]


class TestMatch:
    def test_a_hit_is_nearer_than_the_radius(self) -> None:
        nodule = [[0, 0, 0, 10]]
        for distance, found in ((4.99, True), (5.0, False)):
            hits = match([[distance, 0, 0]], [0.5], nodule)
            assert bool(hits.true[0] == 0.5) is found
            assert len(hits.false) == (0 if found else 1)

    def test_further_findings_of_a_nodule_count_nothing(self) -> None:
        hits = match([[0, 0, 0], [1, 0, 0]], [0.3, 0.6], [[0, 0, 0, 10]])
        assert hits.true.tolist() == [0.6]
        assert len(hits.false) == 0

    def test_excluded_findings_count_nothing(self) -> None:
        hits = match([[50, 0, 0], [90, 0, 0]], [0.3, 0.6], [[0, 0, 0, 10]], [[50, 0, 0, 8]])
        assert hits.true.tolist() == [MISSED]
        assert hits.false.tolist() == [0.6]

    def test_no_findings_and_no_nodules(self) -> None:
        assert match([], [], [[0, 0, 0, 4]]).true.tolist() == [MISSED]
        assert match([[0, 0, 0]], [0.2], []).false.tolist() == [0.2]


class TestFroc:
    def test_by_hand(self) -> None:
        # Four nodules, four scans. Thresholds from the top: 0.9 finds 1 with 0 false, 0.8: 1 with 1, 0.7: 2 with 1,
        # 0.6: 2 with 2, 0.5: 2 with 3, 0.4: 3 with 3, 0.3: 3 with 4.
        curve = froc(scans())
        np.testing.assert_allclose(curve.thresholds, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
        np.testing.assert_allclose(curve.rates, [0, 0.25, 0.25, 0.5, 0.75, 0.75, 1.0])
        np.testing.assert_allclose(curve.sensitivity, [0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75])
        # At 1/8 before the rise at 1/4, at 1/4 its upper end, at 1/2 on the curve; beyond its end the last value.
        np.testing.assert_allclose(curve.at_rates, [0.25, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75])
        assert curve.cpm == pytest.approx(4.25 / 7)
        assert (curve.scans, curve.nodules) == (4, 4)

    def test_between_two_rates_the_curve_is_straight(self) -> None:
        # 0.9 finds the first with 0 false, 0.5 the second with 1 false per scan: at 1/2 between 1/2 and 1.
        curve = froc([ScanHits(np.array([0.9, 0.5]), np.array([0.5]))])
        assert curve.at_rates[2] == pytest.approx(0.75)

    def test_a_perfect_and_a_blind_detector(self) -> None:
        assert froc([ScanHits(np.array([0.5, 0.2]), np.array([]))]).cpm == 1.0
        assert froc([ScanHits(np.array([MISSED]), np.array([]))]).cpm == 0.0

    def test_false_alarms_above_every_nodule(self) -> None:
        curve = froc([ScanHits(np.array([0.1]), np.array([0.9]))])
        np.testing.assert_allclose(curve.at_rates[:3], np.array(RATES[:3]) * 0)  # until one per scan nothing is found

    def test_without_nodules_there_is_no_sensitivity(self) -> None:
        assert np.isnan(froc([ScanHits(np.array([]), np.array([0.5]))]).cpm)


class TestIntervals:
    def test_they_hold_the_score_and_repeat(self) -> None:
        one, two = intervals(scans(), 200), intervals(scans(), 200)
        np.testing.assert_array_equal(one, two)
        assert one[0, -1] <= froc(scans()).cpm <= one[1, -1]

    def test_one_scan_has_none(self) -> None:
        assert np.isnan(intervals(scans()[:1])).all()
