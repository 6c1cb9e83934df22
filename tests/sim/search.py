"""An exhaustive search over the real cores of the shards, breadth first.

A message that was ever sent stays deliverable for ever, any number of times, in any order; not delivering it is its loss. So
sending is done at once, and the adversary chooses among deliveries, contributions, deaths, suspicions, and what the coordinator
does about them. A contribution is a pure function of the step, so it may arrive as soon as the step's version is published.

From every state that is found the run must also come to its end once the adversary gives up: with all messages lost, and every
process sending only what its own state asks for (`Search.finish`).

An event of a shard depends on that shard alone, so what it comes to is computed once and looked up ever after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.core.placement import listed, surviving, with_learners
from ps_service.core.messages import Ack, AskInSync, Contribution, Records
from shardlane.errors import StaleError
from shardlane.ids import ChunkId, Incarnation, PlanNumber, RunId, SiteIndex, Step, Timeline, Version
from shardlane.lanes import lane
from shardlane.plan import Member, Placement, Plan
from tests.sim.frozen import Bench, Frozen, Letter, Outcome
from tests.sim.oracle import BrokenInvariant

CHUNK_BYTES = 64
ROUNDS_MAX = 60  # until the end, once all are well; a few are enough
WAVES = 4  # of messages in a round: a sum, its ack, the records, and what follows from them


@dataclass(frozen=True)
class Setting:
    """A small cluster, and what the adversary may do. `num_spares`: shards that the first plan gives nothing to hold."""

    num_shards: int = 2
    num_spares: int = 0
    num_chunks: int = 2
    num_lanes: int = 1
    num_steps: int = 2
    replication: int = 2
    num_deaths: int = 1
    num_suspicions: int = 0
    num_moves: int = 0  # that nobody's death asks for: another primary, or a learner more
    forgets: bool = True  # letters that can do nothing any more, by rules that a planted bug may break
    num_states_max: int = 1_000_000


class State(NamedTuple):
    """Shards and letters are numbers of interned values. A dead shard is -1."""

    plan: Plan  # the newest
    shards: tuple[int, ...]
    letters: frozenset[int]
    asks: frozenset[AskInSync]  # of the newest plan
    facts: frozenset[tuple[int, int, int]]  # step, chunk and digest of every record that was ever told
    published: tuple[int, ...]  # version of each chunk
    deaths_left: int
    suspicions_left: int
    moves_left: int


class Found(NamedTuple):
    num_states: int
    num_ended: int  # distinct states from which the end was reached, without messages
    is_whole: bool  # everything that there is was searched


class Search:
    """Raises `BrokenInvariant` with the way to the first state that breaks one."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._names = [Incarnation(f"shard-{index:x}") for index in range(setting.num_shards + setting.num_spares)]
        self._index = {name: index for index, name in enumerate(self._names)}
        self._frozen: list[Frozen] = []
        self._number_of: dict[Frozen, int] = {}
        self._letters: list[Letter] = []
        self._letter_numbers: dict[Letter, int] = {}
        self._known: dict[tuple[object, ...], tuple[int, Outcome, frozenset[int]] | None] = {}
        self._ends: set[tuple[object, ...]] = set()  # states without letters from which the end is reached
        self._plans: dict[tuple[object, ...], Plan] = {}

    @property
    def values(self) -> Sequence[Frozen]:
        """Every state of a shard that was met."""
        return self._frozen

    # ---- the search ----------------------------------------------------------------------------------------------------

    def run(self) -> Found:
        first = self._first()
        came_from: dict[State, tuple[State, str] | None] = {first: None}
        queue = deque([first])
        state = first
        try:
            while queue and len(came_from) < self.setting.num_states_max:
                state = queue.popleft()
                self.finish(state)
                for what, then in self._successors(state):
                    if then not in came_from:
                        came_from[then] = state, what
                        queue.append(then)
        except BrokenInvariant as broken:
            raise BrokenInvariant(f"{broken}\n{self._way(came_from, state)}") from broken
        return Found(len(came_from), len(self._ends), not queue)

    def _way(self, came_from: dict[State, tuple[State, str] | None], state: State) -> str:
        lines: list[str] = []
        step = came_from[state]
        while step is not None:
            lines.append(step[1])
            step = came_from[step[0]]
        return "\n".join(f"{index + 1:4}. {line}" for index, line in enumerate(reversed(lines)))

    def _first(self) -> State:
        setting = self.setting
        placements = tuple(
            Placement(tuple(self._names[(chunk + copy) % setting.num_shards] for copy in range(setting.replication)))
            for chunk in range(setting.num_chunks)
        )
        plan = self._plan(1, placements, self._names)
        blank = self._intern(Frozen(None, (), (), (), ()))
        state = State(
            plan,
            tuple(blank for _ in self._names),
            frozenset(),
            frozenset(),
            frozenset(),
            (-1,) * setting.num_chunks,
            setting.num_deaths,
            setting.num_suspicions,
            setting.num_moves,
        )
        for name in self._names:
            state = self._after(state, name, ("plan", plan)) or state
        return state

    def _successors(self, state: State) -> Iterator[tuple[str, State]]:
        for name in self._alive(state):
            number = state.shards[self._index[name]]
            known = self._frozen[number].plan
            if known is not state.plan and (then := self._after(state, name, ("plan", state.plan))):
                yield f"{name} adopts plan {state.plan.number}", then
            if then := self._after(state, name, ("tick",)):
                yield f"{name} sends again", then
            for event in self._pushes(state):
                if then := self._after(state, name, event):
                    yield f"{name} gets lane {event[3]} of chunk {event[1]} for step {event[2]}", then
        for each in state.letters:
            letter = self._letters[each]
            if then := self._after(state, letter.to, ("letter", each)):
                yield f"{letter.to} gets {letter.envelope}", then
        yield from self._coordinator(state)
        if state.deaths_left:
            for name in self._alive(state):
                index = self._index[name]
                shards = (*state.shards[:index], -1, *state.shards[index + 1 :])
                yield f"{name} DIES", self._pruned(state._replace(shards=shards, deaths_left=state.deaths_left - 1))

    def _alive(self, state: State) -> list[Incarnation]:
        return [name for name, number in zip(self._names, state.shards, strict=True) if number >= 0]

    def _pushes(self, state: State) -> Iterator[tuple[str, ChunkId, Step, int]]:
        """Whoever can read a version of every chunk may compute its step."""
        step = Step(min(state.published))
        if 0 <= step < self.setting.num_steps:
            for chunk in range(self.setting.num_chunks):
                for index in range(self.setting.num_lanes):
                    yield "push", ChunkId(chunk), step, index

    # ---- the coordinator -----------------------------------------------------------------------------------------------

    def _coordinator(self, state: State) -> Iterator[tuple[str, State]]:
        """It drops a shard, dead or merely suspected; lists learners that have caught up; gives chunks learners."""
        alive, members = self._alive(state), state.plan.shards
        for name in members:
            if name not in alive:
                if then := self._replan(state, [each for each in members if each != name]):
                    yield f"the coordinator drops {name}", then
            elif state.suspicions_left and len(members) > 1:
                then = self._replan(state, [each for each in members if each != name])
                if then is not None:
                    yield f"the coordinator drops {name} BY MISTAKE", then._replace(suspicions_left=state.suspicions_left - 1)
        for name in alive:
            if name not in members and (then := self._replan(state, [*members, name])):
                yield f"{name} registers again", then
        if state.asks and (then := self._replan(state, list(members))):
            yield "the coordinator lists who has caught up", then
        if state.moves_left:
            for chunk, placement in enumerate(state.plan.placements):
                for what, moved in self._moves(placement, members):
                    placements = (*state.plan.placements[:chunk], moved, *state.plan.placements[chunk + 1 :])
                    plan = self._plan(state.plan.number.epoch + 1, placements, list(members))
                    then = state._replace(plan=plan, asks=frozenset(), moves_left=state.moves_left - 1)
                    yield f"the coordinator makes {what} of chunk {chunk}", self._pruned(then)

    def _moves(self, placement: Placement, members: Sequence[Incarnation]) -> Iterator[tuple[str, Placement]]:
        for name in placement.in_sync[1:]:
            rest = tuple(each for each in placement.in_sync if each != name)
            yield f"{name} the primary", Placement((name, *rest), placement.learner)
        for name in members:
            if placement.learner is None and name not in placement.in_sync:
                yield f"{name} a learner", Placement(placement.in_sync, name)

    def _replan(self, state: State, members: list[Incarnation]) -> State | None:
        """None: no copy of a chunk would be left, or nothing is new."""
        kept = surviving(state.plan.placements, members)
        if kept is None:
            return None
        kept = listed(kept, {ask.chunk: ask.learner for ask in state.asks})
        setting = self.setting
        kept = with_learners(
            kept, [CHUNK_BYTES] * setting.num_chunks, members, replication=min(setting.replication, len(members))
        )
        plan = self._plan(state.plan.number.epoch + 1, kept, members)
        if plan.placements == state.plan.placements and plan.members == state.plan.members:
            return None
        return self._pruned(state._replace(plan=plan, asks=frozenset()))

    def _plan(self, epoch: int, placements: tuple[Placement, ...], members: list[Incarnation]) -> Plan:
        key = (epoch, placements, tuple(members))
        if key not in self._plans:
            named = tuple(Member(name, "shard", f"{name}:1") for name in members)
            number = PlanNumber(1, epoch)
            self._plans[key] = Plan(number, RunId("search"), Timeline(0, Version(0)), named, (), (), placements)
        return self._plans[key]

    # ---- an event of a shard -------------------------------------------------------------------------------------------

    def _intern(self, frozen: Frozen) -> int:
        if frozen not in self._number_of:
            self._number_of[frozen] = len(self._frozen)
            self._frozen.append(frozen)
        return self._number_of[frozen]

    def _after(self, state: State, name: Incarnation, event: tuple[object, ...]) -> State | None:
        """None: nothing changes by it."""
        index = self._index[name]
        before = state.shards[index]
        if before < 0:
            return None
        key = (name, before, *event)
        if key not in self._known:
            self._known[key] = self._compute(name, before, event)
        known = self._known[key]
        if known is None:
            return None
        after, outcome, letters = known
        if after == before and letters <= state.letters:
            return None
        shards = (*state.shards[:index], after, *state.shards[index + 1 :])
        asks = frozenset(ask for ask in outcome.asks if ask.plan == state.plan.number)
        then = state._replace(shards=shards, letters=state.letters | letters, asks=state.asks | asks)
        return self._pruned(self._judged(then, after, outcome))

    def _compute(self, name: Incarnation, before: int, event: tuple[object, ...]) -> tuple[int, Outcome, frozenset[int]] | None:
        setting = self.setting
        bench = Bench(name, setting.num_chunks, setting.num_lanes, setting.num_steps, self._frozen[before])
        core, letter = bench.core, None
        try:
            match event:
                case ("plan", Plan() as plan):
                    effects = core.on_plan(plan)
                case ("push", int(chunk), int(step), int(index)):
                    effects = core.on_push(Contribution(0, Step(step), lane(index), SiteIndex(0), ChunkId(chunk), 1, 0.0))[1]
                    if not effects:
                        return None
                case ("letter", int(number)):
                    letter = self._letters[number]
                    effects = core.on_message(letter.envelope)
                case _:
                    effects = core.on_tick()
        except StaleError:
            return None
        outcome = bench.outcome(effects, letter)
        numbers = []
        for each in outcome.letters:
            if each.to in self._index:
                if each not in self._letter_numbers:
                    self._letter_numbers[each] = len(self._letters)
                    self._letters.append(each)
                numbers.append(self._letter_numbers[each])
        return self._intern(outcome.after), outcome, frozenset(numbers)

    def _pruned(self, state: State) -> State:
        """Without letters that can never do anything any more."""
        if not self.setting.forgets:
            return state
        kept = frozenset(each for each in state.letters if self._may_matter(self._letters[each], state))
        return state if len(kept) == len(state.letters) else state._replace(letters=kept)

    def _may_matter(self, letter: Letter, state: State) -> bool:
        number = state.shards[self._index[letter.to]]
        if number < 0:
            return False
        envelope, shard = letter.envelope, self._frozen[number]
        if shard.plan is None:
            return True
        message = envelope.message
        if isinstance(message, Records):
            return not set(message.records).issubset(shard.records)
        if envelope.plan < shard.plan.number:
            return False
        if envelope.plan == shard.plan.number and isinstance(message, Ack):
            return any(
                each.chunk in message.chunks and each.version <= message.step and envelope.sender not in each.acks
                for each in shard.chunks
            )
        return True

    # ---- invariants ----------------------------------------------------------------------------------------------------

    def _judged(self, state: State, after: int, outcome: Outcome) -> State:
        facts, published = state.facts, list(state.published)
        told = {(record.step, record.chunk): record.digest for record in self._frozen[after].records}
        known = {(step, chunk): digest for step, chunk, digest in facts}
        for (step, chunk), digest in told.items():
            if known.setdefault((step, chunk), digest) != digest:
                raise BrokenInvariant(f"4: two records of step {step} of chunk {chunk} are told")
            if (step, chunk, digest) not in facts:
                self._check_copies(state, step, chunk, digest)
        facts |= {(step, chunk, digest) for (step, chunk), digest in told.items()}
        for step, chunk, digest in outcome.applied:
            if known.get((step, chunk)) != digest:
                raise BrokenInvariant(f"4: step {step} of chunk {chunk} is applied with another sum than the one decided on")
        for chunk, version, history in outcome.published:
            if len(history) != version or any(known.get((step, chunk)) != each for step, each in enumerate(history)):
                raise BrokenInvariant(f"8: version {version} of chunk {chunk} is published as {history}")
            published[chunk] = max(published[chunk], version)
        for step, decision in outcome.decisions:
            if decision.requests != sum(known.get((step, ChunkId(chunk)), 0) for chunk in range(self.setting.num_chunks)):
                raise BrokenInvariant(f"4: another decision of step {step}")
        return state._replace(facts=facts, published=tuple(published))

    def _check_copies(self, state: State, step: int, chunk: int, digest: int) -> None:
        for name in state.plan.placements[chunk].in_sync:
            number = state.shards[self._index[name]]
            if number >= 0:
                held = next((each for each in self._frozen[number].chunks if each.chunk == chunk), None)
                if held is None or held.version < step or (held.version == step and held.total != digest):
                    raise BrokenInvariant(
                        f"6: a record of step {step} of chunk {chunk} is told, and {name} does not hold the sum"
                    )

    # ---- the adversary gives up ----------------------------------------------------------------------------------------

    def finish(self, state: State) -> None:
        """From here the last version is reached, with all letters lost and no fault any more. Raises `BrokenInvariant`."""
        now = state._replace(letters=frozenset(), deaths_left=0, suspicions_left=0, moves_left=0)
        way: list[tuple[object, ...]] = []
        while not self._is_done(now):
            key = (now.plan, now.shards, now.asks, now.published)
            if key in self._ends or surviving(now.plan.placements, self._alive(now)) is None:
                break  # known; or the last copy of a chunk is gone, and a roll-back is for the walks
            way.append(key)
            then = self._round(now)
            if then == now or len(way) > ROUNDS_MAX:
                shards = {name: self._frozen[now.shards[self._index[name]]] for name in self._alive(now)}
                raise BrokenInvariant(f"4: STUCK for ever, though all are well: {shards}")
            now = then
        self._ends.update(way)

    def _is_done(self, state: State) -> bool:
        plans = [self._frozen[state.shards[self._index[name]]].plan for name in self._alive(state)]
        return min(state.published) >= self.setting.num_steps and all(plan is state.plan for plan in plans)

    def _round(self, state: State) -> State:
        """Everybody does what is due, and what they send arrives, for a few times."""
        state = next((then for _, then in self._coordinator(state)), state)
        for name in self._alive(state):
            state = self._after(state, name, ("plan", state.plan)) or state
            for event in self._pushes(state):
                state = self._after(state, name, event) or state
            state = self._after(state, name, ("tick",)) or state
        for _ in range(WAVES):
            letters, state = sorted(state.letters), state._replace(letters=frozenset())
            for each in letters:
                state = self._after(state, self._letters[each].to, ("letter", each)) or state
        return state._replace(letters=frozenset())
