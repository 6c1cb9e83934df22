"""Parameters from shards that are slow, past the version, of another plan, broken, or wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shardlane import rpc
from shardlane.ids import Incarnation, Version
from shardlane.model import whole_model
from shardlane.partition import Layout
from shardlane.pb import ps_pb2
from shardlane.plan import Plan
from tests.numerics.toy import toy_config
from tests.worker_service.shard_double import ShardDouble, plan_of, values, wait_for
from worker_service.attempt import Abandoned, Attempt
from worker_service.pulls import SHARD, Puller, Superseded
from worker_service.staging import Staging

CONFIG = toy_config(**{"model.tie_word_embeddings": True})
LAYOUT = Layout.of(CONFIG)


class Pulling:
    """A puller of the whole model from two shards, and what it told."""

    def __init__(self) -> None:
        self.shards = [ShardDouble(LAYOUT.chunks) for _ in range(2)]
        self.plan = plan_of([each.bind for each in self.shards], len(LAYOUT.chunks))
        items = LAYOUT.stage_chunks(whole_model(CONFIG.model))
        names = {item.parameter: LAYOUT.tensors[item.chunk.tensor].num_elements for item in items}
        self.parameters = {name: torch.zeros(size) for name, size in names.items()}
        self.offered: list[Plan] = []
        self.ended: list[Incarnation] = []
        self.faults: list[str] = []
        self.channels = {shard: rpc.connect(self.plan.addresses[shard]) for shard in self.plan.shards}
        clients = {shard: rpc.Client(channel, SHARD) for shard, channel in self.channels.items()}
        self.puller = Puller(
            self.plan,
            items,
            self.parameters,
            Staging(torch.device("cpu")),
            clients.__getitem__,
            offer=self.offered.append,
            on_ended=self.ended.append,
            on_published=lambda: None,
            on_fault=self.faults.append,
            on_bytes=lambda size: None,
        )

    def publish(self, version: int) -> None:
        for shard in self.shards:
            shard.publish(version)

    def take(self, version: int, attempt: Attempt | None = None) -> None:
        self.puller.take(Version(version), attempt or Attempt())

    def holds(self, version: int) -> bool:
        """Every site of every chunk has the values of `version`."""
        for item in LAYOUT.stage_chunks(whole_model(CONFIG.model)):
            held = self.parameters[item.parameter].narrow(0, item.chunk.offset, item.chunk.num_elements)
            if not torch.equal(held, values(item.chunk, version)):
                return False
        return True


@pytest.fixture
def pulling() -> Iterator[Pulling]:
    made = Pulling()
    yield made
    made.puller.cancel()
    for channel in made.channels.values():
        channel.close()
    for shard in made.shards:
        shard.stop()


def test_a_version_comes_from_every_shard_and_both_sites_of_a_tied_tensor_get_it(pulling: Pulling) -> None:
    pulling.take(0)
    assert pulling.holds(0)
    asked = sorted(chunk for shard in pulling.shards for call in shard.pulls for chunk in call)
    assert asked == list(range(len(LAYOUT.chunks))), "a tied chunk is asked for once"


def test_what_was_asked_for_early_waits_for_the_parameters_to_be_free(pulling: Pulling) -> None:
    pulling.take(0)
    pulling.puller.ask(Version(1))
    wait_for(lambda: all(len(shard.pulls) == 2 for shard in pulling.shards))
    pulling.publish(1)
    time.sleep(0.2)
    assert pulling.holds(0), "a backward pass may still read them"
    pulling.take(1)
    assert pulling.holds(1)
    assert all(len(shard.pulls) == 2 for shard in pulling.shards)


def test_a_superseded_version_is_given_up(pulling: Pulling) -> None:
    pulling.publish(5)
    with pytest.raises(Superseded) as past:
        pulling.take(2)
    assert past.value.now == 5
    pulling.take(5)
    assert pulling.holds(5)


def test_a_version_superseded_in_the_midst_of_a_chunk_is_given_up(pulling: Pulling) -> None:
    def torn(request: ps_pb2.PullRequest) -> Iterator[Any]:
        first = request.chunks[0]
        yield next(pulling.shards[0].data(first, 0, size=64))
        yield pulling.shards[0].refusal(first, ps_pb2.PULL_OUTCOME_SUPERSEDED, 1)

    pulling.shards[0].pull_answers.append(torn)
    with pytest.raises(Superseded):
        pulling.take(0)
    pulling.publish(1)
    pulling.take(1)
    assert pulling.holds(1)


def test_the_rest_is_asked_for_when_a_call_ends_early(pulling: Pulling) -> None:
    shard = pulling.shards[0]
    shard.pull_answers.append(lambda request: shard.data(request.chunks[0], 0))
    shard.pull_answers.append(lambda request: iter(()))
    pulling.take(0)
    assert pulling.holds(0)
    assert [len(call) for call in shard.pulls] == [len(shard.pulls[0]), len(shard.pulls[0]) - 1, len(shard.pulls[0]) - 1]
    assert pulling.ended == ["shard-0", "shard-0"], "so that what it may have forgotten is pushed again"


def test_a_half_chunk_of_a_call_that_ended_is_forgotten(pulling: Pulling) -> None:
    shard = pulling.shards[0]
    shard.pull_answers.append(lambda request: iter([next(shard.data(request.chunks[0], 0, size=64))]))
    pulling.take(0)
    assert pulling.holds(0)


@pytest.mark.parametrize("outcome", [ps_pb2.PULL_OUTCOME_NOT_OWNER, ps_pb2.PULL_OUTCOME_STALE])
def test_a_refusal_hands_on_the_plan_and_is_asked_about_again(pulling: Pulling, outcome: Any) -> None:
    shard = pulling.shards[1]
    shard.plan = plan_of(["x:1", "y:1"], len(LAYOUT.chunks), epoch=2)
    shard.pull_answers.append(lambda request: iter([shard.refusal(chunk, outcome) for chunk in request.chunks]))
    pulling.take(0)
    assert pulling.holds(0)
    assert pulling.offered[0] == shard.plan
    assert pulling.ended == []


def test_a_shard_that_is_away_is_asked_until_it_is_back(pulling: Pulling) -> None:
    shard = pulling.shards[0]
    shard.server.stop(0)
    attempt = Attempt()
    thread = threading.Thread(target=pulling.take, args=(0, attempt))
    thread.start()
    wait_for(lambda: bool(pulling.ended))
    shard.start()
    thread.join(10)
    assert not thread.is_alive()
    assert pulling.holds(0)


def test_a_wait_for_a_version_can_be_abandoned(pulling: Pulling) -> None:
    attempt = Attempt()
    threading.Timer(0.2, attempt.abandon).start()
    with pytest.raises(Abandoned):
        pulling.take(1, attempt)
    pulling.take(0)
    assert pulling.holds(0)


def test_nothing_is_written_once_cancelled(pulling: Pulling) -> None:
    pulling.take(0)
    pulling.puller.ask(Version(1))
    with pulling.puller._changed:
        pulling.puller._asked[Version(1)].open = True
    pulling.puller.cancel()
    pulling.publish(1)
    time.sleep(0.2)
    assert pulling.holds(0)


def _another_chunk(shard: ShardDouble, request: ps_pb2.PullRequest) -> Iterator[Any]:
    return shard.data(request.chunks[0] + 1, 0)


def _another_version(shard: ShardDouble, request: ps_pb2.PullRequest) -> Iterator[Any]:
    return shard.data(request.chunks[0], 7)


def _a_gap(shard: ShardDouble, request: ps_pb2.PullRequest) -> Iterator[Any]:
    pieces = shard.data(request.chunks[0], 0, size=64)
    next(pieces)
    return pieces


def _twice(shard: ShardDouble, request: ps_pb2.PullRequest) -> Iterator[Any]:
    return (piece for _ in range(2) for piece in shard.data(request.chunks[0], 0))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (_another_chunk, "chunk 1 came from shard-0, of which it was not asked"),
        (_another_version, "version 7 came; 0 was asked for"),
        (_a_gap, "must begin at 0"),
        (_twice, "chunk 0 came"),
    ],
)
def test_what_was_not_asked_for_is_refused_and_asked_for_again(
    pulling: Pulling, answer: Callable[[ShardDouble, ps_pb2.PullRequest], Iterator[Any]], fault: str
) -> None:
    shard = pulling.shards[0]
    shard.pull_answers.append(lambda request: answer(shard, request))
    pulling.take(0)
    assert pulling.holds(0)
    assert fault in pulling.faults[0]


def test_under_asp_turns_of_several_lanes_are_asked_for_at_a_time_and_tell_how_many_were_refused(pulling: Pulling) -> None:
    """Three places: two lanes and the parameters themselves."""
    pulling.puller._num_places = 3

    def with_refused(request: ps_pb2.PullRequest) -> Iterator[Any]:
        for chunk in request.chunks:
            for piece in pulling.shards[0].data(chunk, request.version):
                piece.header.refused = 2
                yield piece

    for shard in pulling.shards:
        shard.publish(9)
        shard.pull_answers.extend([with_refused, with_refused])
    assert pulling.puller.wait_any([Version(3), Version(4)], Attempt()) in (3, 4)
    assert pulling.puller.take(Version(3), Attempt()) == 2 and pulling.holds(3)
    assert not pulling.puller.is_past(Version(3)), "what comes of the other lane says nothing of this one"
    assert pulling.puller.take(Version(4), Attempt()) == 2 and pulling.holds(4)
