"""A worker's own measure of itself."""

from __future__ import annotations

import pytest

from worker_service.pace import Pace


def test_it_is_not_known_before_a_seat_is_warm() -> None:
    pace = Pace()
    pace.add(40.0, 2), pace.add(30.0, 2)
    assert pace.lane_seconds == 0.0
    pace.add(4.0, 2)
    assert pace.lane_seconds == 2.0, "and the first runs do not count"


def test_it_follows_a_machine_that_becomes_slow_within_a_few_steps() -> None:
    pace = Pace()
    for _ in range(5):
        pace.add(2.0, 2)
    assert pace.lane_seconds == pytest.approx(1.0)
    for _ in range(10):
        pace.add(8.0, 2)
    assert 3.5 < pace.lane_seconds < 4.0
