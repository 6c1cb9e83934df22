"""A loss over a whole run, in bounded memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.curve import Curve


def test_a_short_run_is_drawn_step_by_step() -> None:
    curve = Curve(4)
    for step in range(3):
        curve.add(step, float(step))
    assert curve.points() == [(0, 0.0), (1, 1.0), (2, 2.0)]
    curve.add(3, math.nan)
    curve.add(4, math.inf)
    assert curve.points() == [(0, 0.0), (1, 1.0), (2, 2.0)], "what is not finite cannot be drawn"
    assert Curve().points() == []


def test_neighbours_are_joined_to_their_mean() -> None:
    curve = Curve(4)
    for step in range(6):
        curve.add(step, float(step))
    assert curve.points() == [(1, 0.5), (3, 2.5), (5, 4.5)]
    assert curve.points(2) == [(3, 1.5), (5, 4.5)]
    curve.clear()
    curve.add(7, 1.0)
    assert curve.points() == [(7, 1.0)]


@given(values=st.lists(st.floats(-100, 100), max_size=300), first=st.integers(0, 5000), most=st.integers(1, 40))
def test_however_long_the_run_it_is_bounded_and_its_mean_is_kept(values: list[float], first: int, most: int) -> None:
    curve = Curve(16)
    for step, value in enumerate(values, first):
        curve.add(step, value)
    assert len(curve.points()) <= 16 and len(curve.points(most)) <= most
    steps = [step for step, _ in curve.points(most)]
    assert steps == sorted(set(steps)) and (not values or steps[-1] == first + len(values) - 1)
    if values:
        assert curve.points(1)[0][1] == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
