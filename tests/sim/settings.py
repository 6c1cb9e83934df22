"""What is searched exhaustively, by name."""

from __future__ import annotations

from tests.sim.search import Setting

SETTINGS: dict[str, Setting] = {
    "a death": Setting(num_lanes=2, num_steps=3),
    "one chunk, a mistake, a death": Setting(num_chunks=1, num_suspicions=1, num_steps=3),
    "a refill": Setting(num_spares=1, num_states_max=45_000),
    "hand-overs": Setting(num_chunks=1, num_spares=1, num_moves=2, num_steps=1),
    "hand-overs, nothing forgotten": Setting(
        num_chunks=1, num_spares=1, num_moves=2, num_steps=1, forgets=False, num_states_max=150_000
    ),
    "a mistake": Setting(num_suspicions=1, num_deaths=0, num_states_max=45_000),
}
"""A spare becomes a learner in "a refill", whose copy the dead shard had; in "a mistake" the suspect itself does."""
