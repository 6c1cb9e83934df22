"""Gradient sums to shards that are slow, away, behind, or count a part already."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from shardlane import rpc
from shardlane.ids import Incarnation, SiteIndex, Version
from shardlane.lanes import Block, lane
from shardlane.partition import Layout
from shardlane.pb import ps_pb2, tensor_pb2
from shardlane.plan import Plan
from tests.numerics.toy import toy_config
from tests.worker_service.shard_double import ShardDouble, plan_of, wait_for
from worker_service.attempt import Abandoned, Attempt
from worker_service.core.events import Key, Refusal
from worker_service.pulls import SHARD
from worker_service.pushes import Contribution, Pusher
from worker_service.staging import HostTensor, Staging

LAYOUT = Layout.of(toy_config())
BLOCK = Block(lane(0).first, 2)
FIRST, SECOND = Incarnation("shard-0"), Incarnation("shard-1")
NOT_YET = {"outcome": ps_pb2.PUSH_OUTCOME_NOT_YET}


class Pushing:
    """A pusher to two shards, and what it told."""

    def __init__(self) -> None:
        self.shards = [ShardDouble(LAYOUT.chunks) for _ in range(2)]
        self.plan = plan_of([each.bind for each in self.shards], len(LAYOUT.chunks))
        self.channels = {shard: rpc.connect(self.plan.addresses[shard]) for shard in self.plan.shards}
        clients = {shard: rpc.Client(channel, SHARD) for shard, channel in self.channels.items()}
        self.offered: list[Plan] = []
        self.answers: list[tuple[Refusal, ...]] = []
        self.faults: list[str] = []
        self.pusher = Pusher(
            self.plan,
            Staging(torch.device("cpu")),
            clients.__getitem__,
            num_lanes=4,
            budget_bytes=3 * 2048,
            offer=self.offered.append,
            on_answers=self.answers.append,
            on_fault=self.faults.append,
            on_bytes=lambda size: None,
        )
        self.step = Version(4)

    def put(self, chunk: int, block: Block = BLOCK, attempt: Attempt | None = None) -> Key:
        """All of a chunk's values are its number."""
        key, size = Key(self.step, LAYOUT.chunks[chunk].id, SiteIndex(0), block), LAYOUT.chunks[chunk].num_elements
        host = HostTensor(torch.full((size + 3,), float(chunk)))
        self.pusher.put(Contribution(key, 64, 2.5, host, 3, size), attempt or Attempt())
        return key

    def pushed(self, shard: int) -> list[int]:
        """Chunks in the order in which they came."""
        return [key[1] for key, _ in self.shards[shard].pushed]


@pytest.fixture
def pushing() -> Iterator[Pushing]:
    made = Pushing()
    yield made
    made.pusher.close()
    for channel in made.channels.values():
        channel.close()
    for shard in made.shards:
        shard.stop()


def test_each_chunk_goes_to_its_owner_whole(pushing: Pushing) -> None:
    for chunk in range(5):
        pushing.put(chunk)
    wait_for(lambda: pushing.pushed(0) == [0, 2, 4] and pushing.pushed(1) == [1, 3])
    key, values = pushing.shards[1].pushed[1]
    assert key == (4, 3, 0, 0, 2, 64)  # step, chunk, site, first lane, lanes, tokens
    assert torch.equal(values, torch.full((LAYOUT.chunks[3].num_elements,), 3.0))
    assert pushing.shards[1].losses[3] == 2.5
    wait_for(lambda: pushing.pusher.num_bytes == 0)
    assert pushing.answers == []


def test_pushes_leave_before_the_last_one_is_ready(pushing: Pushing) -> None:
    pushing.put(0)
    wait_for(lambda: pushing.pushed(0) == [0])
    time.sleep(0.1)  # the stream has ended, and another one is opened
    pushing.put(2)
    wait_for(lambda: pushing.pushed(0) == [0, 2])


def test_a_full_queue_blocks_its_producer_until_it_is_abandoned_or_there_is_room(pushing: Pushing) -> None:
    pushing.shards[0].server.stop(0)
    for chunk in (0, 2, 4):
        pushing.put(chunk)
    attempt = Attempt()
    threading.Timer(0.2, attempt.abandon).start()
    with pytest.raises(Abandoned):
        pushing.put(6, attempt=attempt)
    assert pushing.pusher.num_bytes == 3 * 2048
    thread = threading.Thread(target=pushing.put, args=(6,))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    pushing.shards[0].start()
    wait_for(lambda: pushing.pushed(0) == [0, 2, 4, 6])
    thread.join(10)
    assert not thread.is_alive()


def test_everything_of_a_broken_stream_is_sent_again(pushing: Pushing) -> None:
    shard = pushing.shards[0]
    shard.hold_pushes.clear()
    pushing.put(0)
    pushing.put(2)
    time.sleep(0.2)
    shard.server.stop(0)
    shard.hold_pushes.set()
    time.sleep(0.1)
    shard.pushed.clear()  # whatever it had counted died with it
    shard.start()
    wait_for(lambda: pushing.pushed(0) == [0, 2])


def test_refusals_are_told_with_what_is_missing_and_the_plan_is_handed_on(pushing: Pushing) -> None:
    shard = pushing.shards[0]
    shard.plan = plan_of(["x:1", "y:1"], len(LAYOUT.chunks), epoch=2)
    missing = [tensor_pb2.Block(first=1, size=1)]
    shard.push_outcomes.append({"outcome": ps_pb2.PUSH_OUTCOME_OVERLAPS, "missing": missing})
    key = pushing.put(0)
    wait_for(lambda: bool(pushing.answers))
    assert pushing.answers == [(Refusal(key, "overlaps", (lane(1),)),)]
    assert pushing.offered == [shard.plan]


def test_what_came_too_early_is_sent_again_when_asked(pushing: Pushing) -> None:
    pushing.shards[0].push_outcomes.extend([NOT_YET, NOT_YET])
    key = pushing.put(0)
    for num_answers in (1, 2):
        wait_for(lambda n=num_answers: len(pushing.answers) == n)  # type: ignore[misc]
        pushing.pusher.again((key,))
    wait_for(lambda: pushing.pushed(0) == [0, 0, 0])
    assert [refusals[0].outcome for refusals in pushing.answers] == ["not_yet", "not_yet"]


def test_what_a_shard_may_have_forgotten_is_sent_again_to_it_alone(pushing: Pushing) -> None:
    for chunk in range(4):
        pushing.put(chunk)
    wait_for(lambda: len(pushing.pushed(0)) == len(pushing.pushed(1)) == 2)
    pushing.pusher.all_again(SECOND)
    wait_for(lambda: pushing.pushed(1) == [1, 3, 1, 3])
    assert pushing.pushed(0) == [0, 2]


def test_the_next_version_lets_go_of_the_step(pushing: Pushing) -> None:
    """And under SSP of no step that is open still."""
    key = pushing.put(0)
    pushing.step = Version(5)
    pushing.put(2)
    wait_for(lambda: pushing.pushed(0) == [0, 2])
    pushing.pusher.begin(Version(5))
    pushing.pusher.again((key,))
    pushing.pusher.all_again(FIRST)
    wait_for(lambda: pushing.pushed(0) == [0, 2, 2])
    assert [each[0][0] for each in pushing.shards[0].pushed] == [4, 5, 5]


def test_an_answer_that_is_none_is_a_fault(pushing: Pushing) -> None:
    pushing.shards[0].push_outcomes.append(
        {"outcome": ps_pb2.PUSH_OUTCOME_OVERLAPS, "missing": [tensor_pb2.Block(first=1, size=2)]}
    )
    pushing.put(0)
    wait_for(lambda: bool(pushing.faults))
    assert "no aligned block" in pushing.faults[0]
    wait_for(lambda: pushing.pushed(0) == [0, 0])
