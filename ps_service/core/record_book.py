"""The records that a shard knows, what they decide, and which of them others are known to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ps_service.core.messages import Decision, Record
from shardlane.ids import ChunkId, Incarnation, Step, Version
from shardlane.turns import Turn

DECIDES = ChunkId(0)
"""ASP: the chunk whose primary decides the order of the log. Its gradient is the last one of a backward pass."""

Decide = Callable[[Step, Sequence[Record]], Decision]


class RecordBook:
    """Of the open step and the one before (9)."""

    def __init__(self, num_chunks: int, decide: Decide) -> None:
        """`decide` gets a step and its records in chunk order."""
        self.records: dict[Step, dict[ChunkId, Record]] = {}
        self.decided: dict[Step, Decision] = {}
        self.news: set[Step] = set()  # steps that a record was learnt of since the core last looked
        self.begun: set[Step] = set()  # ASP: steps of which it was learnt whose turn they are, since then
        self._num_chunks = num_chunks
        self._decide = decide
        self._delivered: set[tuple[Incarnation, Step, ChunkId]] = set()

    def clear(self) -> None:
        """14. Another timeline."""
        self.records.clear()
        self.decided.clear()
        self.news.clear()
        self.begun.clear()
        self._delivered.clear()

    def of(self, step: Step) -> dict[ChunkId, Record]:
        return self.records.get(step, {})

    def before(self, version: Version) -> tuple[Record, ...]:
        """Those of the step that led to `version`."""
        return tuple(self.of(Step(version - 1)).values())

    def learn(self, record: Record) -> bool:
        """Whether it is news; the first record of a chunk's step stands, for all are the same.

        Who tells of a step has seen the one before decided, so nobody in sync needs what is older. This bounds the book of a
        shard that holds no chunk, and so applies nothing.
        """
        if record.step not in self.records:
            newest = max(self.records, default=record.step)
            if record.step < newest - 1:
                return False
            self.forget_before(record.step - 1)
        known = self.records.setdefault(record.step, {})
        is_news = record.chunk not in known
        if is_news:
            known[record.chunk] = record
            self.news.add(record.step)
            if record.turn is not None and record.chunk == DECIDES:
                self.begun.add(record.step)
        return is_news

    def turn(self, step: Step) -> Turn | None:
        """ASP: whose turn the step is, if that is decided."""
        record = self.of(step).get(DECIDES)
        return None if record is None else record.turn

    def decision(self, step: Step) -> Decision | None:
        """7. Who holds one record of every chunk of the model decides."""
        if step not in self.decided:
            known = self.of(step)
            if len(known) < self._num_chunks:
                return None
            self.decided[step] = self._decide(step, [known[ChunkId(chunk)] for chunk in range(self._num_chunks)])
        return self.decided[step]

    def checkpoints_due(self, versions: Mapping[ChunkId, Version]) -> dict[Version, list[ChunkId]]:
        """Of chunks and the versions where they stand, those that are to be written now."""
        due: dict[Version, list[ChunkId]] = {}
        for chunk, version in versions.items():
            decision = self.decision(Step(version - 1))
            if decision is not None and decision.checkpoint:
                due.setdefault(version, []).append(chunk)
        return due

    def delivered(self, to: Incarnation, records: Iterable[Record]) -> None:
        self._delivered |= {(to, record.step, record.chunk) for record in records}

    def unknown_to(self, shard: Incarnation, records: Iterable[Record] | None = None) -> tuple[Record, ...]:
        """Those of `records`, or of all that are kept, that are not known to be there (9)."""
        if records is None:
            records = [record for step in sorted(self.records) for record in self.records[step].values()]
        return tuple(record for record in records if (shard, record.step, record.chunk) not in self._delivered)

    def forget_before(self, oldest: int) -> None:
        for kept in (self.records, self.decided):
            for step in [each for each in kept if each < oldest]:
                del kept[step]
        self._delivered = {key for key in self._delivered if key[1] >= oldest}
