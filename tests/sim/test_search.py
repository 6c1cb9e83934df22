"""Everything that can happen in a few small clusters: the real cores of the shards, all orders of all messages."""

from __future__ import annotations

import pytest

from ps_service.core.barrier import Barrier, SiteTable
from ps_service.core.holdings import Filling, HeldChunk
from ps_service.core.record_book import RecordBook
from shardlane.ids import Incarnation
from tests.sim.frozen import FIELDS, Bench, decide_by_digests
from tests.sim.search import Search
from tests.sim.settings import SETTINGS

NUM_STATES = {  # of each setting, at least
    "a death": 1_000,
    "one chunk, a mistake, a death": 100_000,
    "a refill": 45_000,
    "hand-overs": 60_000,
    "a mistake": 45_000,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NUM_STATES)
def test_every_state_is_sound_and_comes_to_the_end(name: str) -> None:
    found = Search(SETTINGS[name]).run()
    assert found.num_states >= NUM_STATES[name]
    assert found.is_whole or found.num_states >= SETTINGS[name].num_states_max
    assert found.num_ended > found.num_states // 100, "all of them were taken for ended"


def test_they_are_more_than_a_hundred_thousand() -> None:
    assert sum(NUM_STATES.values()) > 100_000


def test_every_field_of_a_core_is_thought_of() -> None:
    """A new one must be in the frozen value, or be of no matter; see `tests/sim/frozen.py`."""
    core = Bench(Incarnation("shard-0"), 1, 2, 3, None).core
    assert vars(core).keys() == FIELDS["ShardCore"]
    assert vars(RecordBook(1, decide_by_digests)).keys() == FIELDS["RecordBook"]
    assert vars(Filling()).keys() == FIELDS["Filling"]
    for kind in (HeldChunk, Barrier, SiteTable):
        assert set(kind.__slots__) == FIELDS[kind.__name__]  # type: ignore[attr-defined]


def test_a_value_thaws_to_what_it_was() -> None:
    search = Search(SETTINGS["a death"])
    search.run()
    for frozen in search.values:
        bench = Bench(Incarnation("shard-0"), 2, 2, 3, frozen)
        assert bench.freeze() == frozen
    assert len(search.values) > 100
