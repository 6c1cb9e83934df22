"""A worker's seat in one replica: its stage, with links to its neighbours, pulls and pushes; gone with the replica."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from torch import Tensor

from shardlane import rpc
from shardlane.codecs import Codec
from shardlane.communication import codec_for, nonce_of, pull_dtype
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.ids import Incarnation, Lane, MicroBatch, RunId, Version
from shardlane.lane_compute import held_out_windows, inputs_of, micro_batches_of, targets_of, training_windows
from shardlane.lanes import Block, lane
from shardlane.partition import Layout, SiteChunk
from shardlane.plan import Plan
from shardlane.top_k import Residuals
from shardlane.turns import batch_of, place_of, version_told
from worker_service import inbox as inboxes
from worker_service.attempt import Attempt
from worker_service.core.events import Await, Key, Pull, Refusal
from worker_service.core.schedule import Backward, Forward, Weights, schedule
from worker_service.inbox import ACTIVATION, GRADIENT, STANDING, VALIDATION, Inbox, StepClosed
from worker_service.instruments import WorkerInstruments
from worker_service.links import Link, Route
from worker_service.pulls import SHARD, Puller, Superseded
from worker_service.pushes import Contribution, Pusher
from worker_service.stage import StageCompute
from worker_service.staging import Staging


@dataclass(frozen=True)
class Surroundings:
    """What stays the same whatever the plan."""

    me: Incarnation
    run_id: RunId
    config: Config
    layout: Layout
    staging: Staging
    inbox: Inbox
    network: rpc.Network
    residuals: Residuals
    instruments: WorkerInstruments
    tokens: Callable[[], TokenFolder]  # opened by the first and the last stage only
    report_validation: Callable[[Version, int, float, int], None]
    offer: Callable[[Plan], None]
    on_answers: Callable[[tuple[Refusal, ...]], None]
    on_pull_ended: Callable[[Incarnation], None]
    on_broken: Callable[[Incarnation, str], None]
    on_fault: Callable[[str], None]


class Seat:
    """One thread computes with it; `close` may be called by another once that thread has abandoned its work."""

    def __init__(self, around: Surroundings, plan: Plan, replica: int, stage: int, compute: StageCompute | None = None) -> None:
        """`compute`: of the seat before, used again if the stage has the same layers."""
        self._plan = plan  # whose shards are pushed to and pulled from
        self._around = around
        self._chain = plan.replicas[replica].workers
        self._stage = stage
        layers, config = plan.stages[stage], around.config
        items = around.layout.stage_chunks(layers)
        self._items: defaultdict[str, list[SiteChunk]] = defaultdict(list)
        for item in items:
            self._items[item.parameter].append(item)
        if compute is None or compute.layers != layers:
            compute = StageCompute(config, layers, around.staging.device, self._push)
        compute.on_sum = self._push
        self.compute = compute
        self._tokens = around.tokens() if layers.is_first or layers.is_last else None
        self._attempt = Attempt()
        self._step = Version(0)  # that is computed
        self._published = Version(0)  # the newest version that is known to be
        self._loaded: Version | None = None  # that the parameters are of; None: not one
        self._refused = 0  # ASP: turns of the lane that were refused before the one loaded
        self._channels: dict[Incarnation, grpc.Channel] = {}
        self._clients: dict[Incarnation, rpc.Client] = {}
        self._connect_shards()
        self._puller = self._make_puller(items)
        self._pusher = self._make_pusher()
        shape = (config.train.micro_batch_size, config.train.seq_len, config.model.hidden_size)
        lanes = [each for block in plan.replicas[replica].blocks for each in block.lanes]
        places = {(each, item.site, item.chunk.id) for each in lanes for item in items}
        around.residuals.begin(plan.timeline.id, places)
        self._formed = plan.replicas[replica].formed
        self._above, self._below = self._link(stage - 1, shape), self._link(stage + 1, shape)
        counts = (config.train.num_micro_batches, config.validation.num_micro_batches)
        above, below = (self._worker(each) for each in (stage - 1, stage + 1))
        around.inbox.open(self._formed, inboxes.Seat(self._formed, above, below, shape, *counts))

    def _make_puller(self, items: list[SiteChunk]) -> Puller:
        around = self._around
        return Puller(
            self._plan,
            items,
            self.compute.flat_parameters,
            around.staging,
            self._client_of,
            offer=around.offer,
            on_ended=around.on_pull_ended,
            on_published=around.inbox.wake,
            on_fault=around.on_fault,
            on_bytes=around.instruments.pulled_bytes.inc,
            dtype_of=lambda chunk: pull_dtype(around.config.communication, around.layout.tensors[chunk.tensor]),
            num_places=around.config.train.num_places,
        )

    def _make_pusher(self) -> Pusher:
        around = self._around
        return Pusher(
            self._plan,
            around.staging,
            self._client_of,
            num_lanes=around.config.train.lanes,
            num_places=around.config.train.num_places,
            budget_bytes=around.config.transport.push_queue_bytes,
            offer=around.offer,
            on_answers=around.on_answers,
            on_fault=around.on_fault,
            on_bytes=around.instruments.pushed_bytes.inc,
        )

    def _connect_shards(self) -> None:
        for shard in self._plan.shards:
            if shard not in self._channels:
                self._channels[shard] = self._around.network.connect(self._plan.addresses[shard], to="shard")
                self._clients[shard] = rpc.Client(self._channels[shard], SHARD)

    def _client_of(self, shard: Incarnation) -> Any:
        client = self._clients.get(shard)
        if client is None:
            raise ValueError(f"{shard} is gone")  # as a closed channel says it
        return client

    def reroute(self, plan: Plan) -> None:
        """The shards have changed, or what they hold; what is under way here goes on. Any thread may call it."""
        if plan.number <= self._plan.number:
            return
        self._plan = plan
        self._connect_shards()
        self._pusher.reroute(plan)
        self._puller.reroute(plan)
        for shard in [each for each in self._channels if each not in plan.shards]:
            del self._clients[shard]
            self._channels.pop(shard).close()

    @property
    def place(self) -> tuple[int, int] | None:
        """(replica, stage), as the newest plan numbers them."""
        return self._plan.seat(self._around.me)

    def _worker(self, stage: int) -> Incarnation | None:
        return self._chain[stage] if 0 <= stage < len(self._chain) else None

    def _link(self, stage: int, shape: tuple[int, int, int]) -> Link | None:
        worker, around = self._worker(stage), self._around
        if worker is None:
            return None
        route = Route(around.run_id, around.me, worker, self._plan.addresses[worker], self._formed, shape)
        return Link(
            route, around.staging, around.on_broken, lambda: self.published, around.network, around.config.train.num_places
        )

    @property
    def push_queue_bytes(self) -> int:
        return self._pusher.num_bytes

    def close(self) -> None:
        self._puller.cancel()
        self._pusher.close()
        for link in (self._above, self._below):
            if link is not None:
                link.close()
        for channel in list(self._channels.values()):  # another thread may be rerouting
            channel.close()

    # ---- versions ------------------------------------------------------------------------------------------------------

    def ask(self, version: Version) -> None:
        self._puller.ask(version)

    def pull(self, pull: Pull, attempt: Attempt) -> None:
        """Raises `Superseded`, `Abandoned`."""
        if self._around.config.train.looks_ahead:
            self.compute.keep_before(is_of_the_version_before=self._loaded == pull.version - 1)
        self._loaded = None
        with self._around.instruments.waiting("pull_wait"):
            refused = self._take_version(pull.version, attempt)
        self._loaded, self._refused = pull.version, refused
        if not self._around.config.train.goes_by_turns:  # of other lanes than this one's it is not true
            self._published = pull.published
        self._pusher.begin(pull.published)
        self._around.inbox.begin(pull.step, pull.version, pull.published)
        is_ahead = self._around.config.train.staleness and pull.published >= pull.step
        for link in (self._above, self._below):
            if link is not None:
                link.begin(pull.published)
                if is_ahead:  # a neighbour may be at work on a step that is closed, and wait for what will never be sent
                    link.send(STANDING, pull.version, 0)

    def _take_version(self, version: Version, attempt: Attempt) -> int:
        try:
            return self._puller.take(version, attempt)
        except Superseded:
            if self._around.config.train.goes_by_turns:
                self._around.inbox.skip(version)
            raise

    def wait_turn(self, wait: Await, attempt: Attempt) -> Version:
        """The turn that may be taken next. Raises `Abandoned`."""
        if wait.numbers:
            with self._around.instruments.waiting("pull_wait"):
                return self._puller.wait_any(wait.numbers, attempt)
        num_lanes = self._around.config.train.lanes
        with self._around.instruments.waiting("bubble"):
            return self._around.inbox.wait_offer(
                attempt, lambda number: not wait.only_last or place_of(number, num_lanes)[0] == num_lanes
            )

    @property
    def published(self) -> Version:
        """The newest version that is known here."""
        return max(self._published, self._puller.published)

    # ---- computing -----------------------------------------------------------------------------------------------------

    def run(self, step: Version, blocks: Sequence[Block], attempt: Attempt) -> float | None:
        """Computes and pushes the lanes of `blocks`. In a last stage the mean loss a token. Raises `Abandoned`.

        Ends early if the next version is published before neighbours have sent all: the lanes were counted already, and who has
        seen that is gone on without sending the rest.
        """
        self._attempt, self._step, config = attempt, step, self._around.config
        if not config.train.goes_by_turns:  # the shards know it only when a turn is over
            self._around.instruments.staleness.observe(step - config.train.reads(step))
        with self._around.instruments.computing(), suppress(StepClosed):
            if config.goes_by_lanes:
                blocks = [lane(each) for block in blocks for each in block.lanes]
            try:
                if ahead := config.train.steps_ahead(step):
                    self.compute.look_ahead(ahead)
                for micro_batches in self.compute.begin(blocks):
                    self._flush(step, micro_batches)
                    self.compute.end_flush(step)
            finally:
                self.compute.end()
            num_tokens = sum(self._tokens_of(block) for block in blocks)
            self._around.instruments.tokens.inc(num_tokens)
            if self.compute.layers.is_last:
                return sum(self.compute.loss(block) for block in blocks) / num_tokens
        return None

    def _flush(self, version: Version, micro_batches: Sequence[MicroBatch]) -> None:
        """Fills the pipeline with `micro_batches` and empties it."""
        received: defaultdict[MicroBatch, list[Tensor]] = defaultdict(list)
        name = self._around.config.pipeline.schedule
        for action in schedule(name, self._stage, len(self._chain), micro_batches):
            self._attempt.check()
            match action:
                case Forward(micro_batch):
                    self._forward(version, micro_batch, received)
                case Backward(micro_batch):
                    self._backward(version, micro_batch, received)
                case Weights(micro_batch):
                    self.compute.add_weight_gradients(micro_batch)
                    for item in received.pop(micro_batch, ()):  # not before: on a CPU the gradients were made from it
                        self._around.inbox.give(item)

    def _forward(self, version: Version, micro_batch: MicroBatch, received: defaultdict[MicroBatch, list[Tensor]]) -> None:
        config, device = self._around.config, self._around.staging.device
        windows = None
        if self._tokens is not None:
            batch = batch_of(version, self._refused, config.train.lanes) if config.train.goes_by_turns else version
            windows = training_windows(self._tokens.train, config, step=batch, micro_batch=micro_batch)
        targets = targets_of(windows, device) if windows is not None and self.compute.layers.is_last else None
        if self.compute.layers.is_first:
            assert windows is not None
            x = inputs_of(windows, device)
        else:
            item = self._take(ACTIVATION, version, micro_batch)
            received[micro_batch].append(item)
            x = self._around.staging.to_device(item)
        out = self.compute.forward(micro_batch, x, targets)
        if self._below is not None:
            self._below.send(ACTIVATION, version, micro_batch, self._around.staging.to_host(out))

    def _backward(self, version: Version, micro_batch: MicroBatch, received: defaultdict[MicroBatch, list[Tensor]]) -> None:
        staging, gradient = self._around.staging, None
        if self._below is not None:
            item = self._take(GRADIENT, version, micro_batch)
            received[micro_batch].append(item)
            gradient = staging.to_device(item)
        x_gradient = self.compute.backward(micro_batch, gradient)
        if self._above is not None:
            assert x_gradient is not None
            self._above.send(GRADIENT, version, micro_batch, staging.to_host(x_gradient))

    def _take(self, kind: int, version: Version, index: int) -> Tensor:
        with self._around.instruments.waiting("bubble"):
            can_close = kind != VALIDATION or self._around.config.train.goes_by_turns
            is_closed = (lambda: self._puller.is_past(version)) if can_close else (lambda: False)
            return self._around.inbox.take(kind, version, index, self._attempt, is_closed)

    def validate(self, version: Version, indices: Sequence[int], attempt: Attempt) -> None:
        """Forwards only; the last stage reports each loss. Raises `Abandoned`."""
        with suppress(StepClosed):
            self._validate(version, indices, attempt)

    def _validate(self, version: Version, indices: Sequence[int], attempt: Attempt) -> None:
        self._attempt, around, layers = attempt, self._around, self.compute.layers
        for index in indices:
            attempt.check()
            windows = held_out_windows(self._tokens.held_out, around.config, index=index) if self._tokens else None
            targets = targets_of(windows, around.staging.device) if windows is not None and layers.is_last else None
            item = None if layers.is_first else self._take(VALIDATION, version, index)
            x = inputs_of(windows, around.staging.device) if windows is not None and item is None else None
            if item is not None:
                x = around.staging.to_device(item)
            assert x is not None
            out, num_tokens = self.compute.validate(x, targets)
            if self._below is not None:
                self._below.send(VALIDATION, version, index, around.staging.to_host(out))
            else:
                train = around.config.train
                told = version_told(version, train.lanes) if train.goes_by_turns else version
                around.report_validation(told, index, out.item(), num_tokens)
            if item is not None:
                around.inbox.give(item)

    # ---- gradients -----------------------------------------------------------------------------------------------------

    def _tokens_of(self, block: Block) -> int:
        """Targets that the block's losses are summed over: every one counts, none is masked."""
        train = self._around.config.train
        return sum(len(micro_batches_of(each, train)) for each in block.lanes) * train.micro_batch_size * train.seq_len

    def _push(self, parameter: str, block: Block, total: Tensor) -> None:
        """A block's sum of one parameter is complete, in the midst of the backward pass."""
        first = self._items[parameter][0]
        codec = codec_for(self._around.config.communication, self._around.layout.tensors[first.chunk.tensor], first.site)
        host = self._around.staging.to_host(total) if codec is None else None
        tokens = self._tokens_of(block)
        for item in self._items[parameter]:
            chunk, key = item.chunk, Key(self._step, item.chunk.id, item.site, block)
            loss = self.compute.loss(block) if chunk.id == self._around.layout.loss_chunk else 0.0
            self._around.instruments.gradient_bytes.inc(chunk.num_bytes)
            if codec is None:
                assert host is not None
                contribution = Contribution(key, tokens, loss, host, chunk.offset, chunk.num_elements)
            else:
                values = total.view(-1).narrow(0, chunk.offset, chunk.num_elements)
                contribution = self._encoded(codec, key, tokens, loss, values)
            with self._around.instruments.waiting("push_wait"):
                self._pusher.put(contribution, self._attempt)

    def _encoded(self, codec: Codec, key: Key, tokens: int, loss: float, values: Tensor) -> Contribution:
        seed, index = self._around.config.train.seed, key.block.lanes[0]
        nonce = nonce_of(seed=seed, step=self._step, lane=index, site=key.site, chunk=key.chunk)
        encoded = self._around.residuals.encode(codec, (index, key.site, key.chunk), self._step, values, nonce)
        if encoded.overflowed:
            self._around.instruments.rescaled_chunks.inc()
        host = self._around.staging.to_host(encoded.data)
        return Contribution(key, tokens, loss, host, 0, encoded.data.numel(), codec.number)

    def push_again(self, keys: tuple[Key, ...]) -> None:
        self._pusher.again(keys)

    def push_all_again(self, shard: Incarnation) -> None:
        self._pusher.all_again(shard)

    # ---- lanes that run again ------------------------------------------------------------------------------------------

    def ask_above(self, version: Version, lane: Lane) -> None:
        if self._above is not None:
            self._above.send(GRADIENT, version, micro_batches_of(lane, self._around.config.train)[0])

    def tell_below(self, version: Version, lane: Lane) -> None:
        if self._below is not None:
            self._below.send(ACTIVATION, version, micro_batches_of(lane, self._around.config.train)[0])

    def reopen(self, version: Version, lane: Lane) -> None:
        self._around.inbox.run_again(version, micro_batches_of(lane, self._around.config.train))
