"""Processes die, fall silent, are cut off: no schedule may change a bit. The other half is in `test_changes.py`."""

from __future__ import annotations

import pytest

from tests.sim.schedules import BLOCKS, check

SHAPES = [
    "deaths",
    "deaths, sums that differ in bits",
    "deaths in a bad network",
    "deaths of pipelines",
    "silences",
    "silences, sums that differ in bits",
    "silences of pipelines",
    "three copies, one lane",
    "one-step delay, deaths",
    "SSP, everything",
    "ASP, sums that differ in bits, a bad network",
    "ASP, everything",
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_ends_as_if_nothing_had_happened(name: str, block: int) -> None:
    check(name, block)
