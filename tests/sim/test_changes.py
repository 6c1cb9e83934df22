"""Members come and go, the coordinator dies, copies are lost: no schedule may change a bit. See `test_deaths.py`."""

from __future__ import annotations

import pytest

from tests.sim.schedules import BLOCKS, HAPPENS, check
from tests.sim.shape import SHAPES as EVERY_SHAPE
from tests.sim.test_deaths import SHAPES as ELSEWHERE

SHAPES = [name for name in EVERY_SHAPE if name not in ELSEWHERE]


def test_every_shape_says_what_must_happen() -> None:
    assert HAPPENS.keys() == EVERY_SHAPE.keys()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_ends_as_if_nothing_had_happened(name: str, block: int) -> None:
    check(name, block)
