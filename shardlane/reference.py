"""The oracle: the whole run in one process, with the same lanes. A cluster of any shape must end with its digest.

It is written to be read beside DESIGN.md, sections 3 and 8, and shares with the services only what is below them: the
micro-batch (`lane_compute`), the sums (`lane_sums`), the decision (`rates`) and the update (`optimizers`).
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardlane.cadence import checkpoints_at, validates_after
from shardlane.checkpoint import CheckpointReader, PartWriter
from shardlane.communication import codec_for, nonce_of, pull_dtype
from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.digest import state_digest
from shardlane.ids import ChunkId, Lane, RunId, Timeline, Version
from shardlane.initialise import initial_chunk
from shardlane.lane_compute import (
    count_targets,
    held_out_windows,
    inputs_of,
    micro_batches_of,
    run_stage,
    take_gradient,
    targets_of,
    training_windows,
)
from shardlane.lane_sums import LaneSums
from shardlane.lanes import Block, lane
from shardlane.local_steps import LocalSteps
from shardlane.look_ahead import look_ahead
from shardlane.manifest import PARAMETER, build_manifest, check_resume, checkpoint_folder, prune, tensor_names, write_manifest
from shardlane.model import Stage, whole_model
from shardlane.numerics import configure_torch, numerics_class, square_sum
from shardlane.optimizers import ChunkOptimizer
from shardlane.partition import Chunk, Layout, SiteChunk
from shardlane.rates import clip_scale, tree_sum, turn_rate, update_rate
from shardlane.storage import Location
from shardlane.top_k import Residuals
from shardlane.turn_table import Order, TurnTable

Row = dict[str, int | float]  # a line of metrics.jsonl

_log = logging.getLogger(__name__)


class Reference:
    """A run at `version`. The model computes on `device`; chunks and their optimizers are on the CPU, as in a shard.

    Raises `DataError` if the token folder has too few tokens for one window, `CheckpointError` for a bad `init_from`.
    """

    def __init__(
        self,
        config: Config,
        tokens: TokenFolder,
        *,
        run_id: RunId | None = None,
        device: torch.device | str = "cpu",
        order: Order | None = None,
    ) -> None:
        """`order`: under ASP, whose turn it was in the run that is to be repeated. None: the lanes go round."""
        configure_torch(config.numerics)
        self.config = config
        self.tokens = tokens
        self.run_id = run_id or RunId(config.run_name)
        self.device = torch.device(device)
        self.version = Version(0)
        self.layout = Layout.of(config)
        tokens.train.num_windows(config.train.seq_len)
        if config.validation.num_micro_batches:
            tokens.held_out.num_windows(config.train.seq_len)
        self._stage = Stage.empty(config.model, whole_model(config.model), self.device)
        self._weight_gradients = self._stage.put_off_weight_gradients()
        self._leaves = dict(self._stage.named_parameters())
        self._chunks = [self._initial(chunk) for chunk in self.layout.chunks]
        self._items: defaultdict[str, list[SiteChunk]] = defaultdict(list)
        for item in self.layout.stage_chunks(whole_model(config.model)):
            self._items[item.parameter].append(item)
        self._residuals = Residuals()
        self._local: LocalSteps | None = None
        if config.train.local_steps > 1:
            flat = {name: leaf.detach().view(-1) for name, leaf in self._leaves.items()}
            self._local = LocalSteps(config, flat, self.layout.decays(whole_model(config.model)))
        self._filled = Version(-1)  # the version that the leaves are of
        self._turns = TurnTable(config, order) if config.train.goes_by_turns else None
        self._begin_turns(Timeline(0, Version(0)))
        self._fill_leaves(self.version)

    @property
    def optimizer_step(self) -> int:
        """Updates applied: the version less the steps that were skipped."""
        return self._chunks[0].num_steps

    def run(self, checkpoints: Location | None = None) -> Iterator[Row]:
        """Trains up to `train.last_step`, a row a step, and validates between.

        A training row is of step t, from 0; a validation row is of version v, after v steps. Checkpoints go under the folder
        `checkpoints`; None writes none.
        """
        while not self.is_done:
            started = time.perf_counter()
            row = self._train_step(self.version) if self._turns is None else self._train_turn(self._turns)
            self.version = Version(self.version + 1)
            yield {**row, "tokens_per_second": row["tokens"] / (time.perf_counter() - started)}
            is_between = self._turns is not None and not self._turns.is_at_a_step
            if not is_between and validates_after(self.num_steps, self.config):
                yield {"step": self.version, "val_loss": self.validation_loss()}
            is_due = self.is_done if is_between else checkpoints_at(self.num_steps, self.config) or self.is_done
            if checkpoints is not None and is_due:
                self.save(checkpoints)

    @property
    def is_done(self) -> bool:
        """At `train.last_step`, or at the end of the order that is repeated."""
        return self.num_steps >= self.config.train.last_step or (self._turns is not None and self._turns.is_over(self.version))

    @property
    def num_steps(self) -> int:
        """Of the schedule; under ASP a version is one lane's part of one."""
        return self.version if self._turns is None else self._turns.num_steps

    def validation_loss(self) -> float:
        """Mean loss in nats a token over the held-out micro-batches, at the present version."""
        self._fill_leaves(self.version)
        losses, num_tokens = [], 0
        for index in range(self.config.validation.num_micro_batches):
            windows = held_out_windows(self.tokens.held_out, self.config, index=index)
            targets = targets_of(windows, self.device)
            with torch.no_grad():
                loss = run_stage(self._stage, inputs_of(windows, self.device), self.config.numerics.precision, targets)
            losses.append(loss.item())
            num_tokens += count_targets(targets)
        return math.fsum(losses) / num_tokens

    def digest(self) -> str:
        """The digest of the present version, equal to that of a checkpoint of it."""
        return state_digest(self.layout, self._names, lambda chunk, name: self._payload(chunk)[name], self.optimizer_step)

    def save(self, root: Location) -> Location:
        """Writes a checkpoint of the present version under `root`, prunes older ones, and returns its folder."""
        folder = checkpoint_folder(root, self.version)
        sizes = {chunk.id: chunk.num_elements for chunk in self.layout.chunks}
        with PartWriter(folder, f"reference-{secrets.token_hex(4)}", sizes, self._names) as writer:
            for chunk in self.layout.chunks:
                writer.add(chunk.id, self._payload(chunk.id))
            part = writer.finish()
        manifest = build_manifest(
            self.config,
            [part],
            run_id=self.run_id,
            version=self.version,
            optimizer_step=self.optimizer_step,
            timeline=0,
            numerics_class=numerics_class(self.config.numerics, self.device),
            data_hash=self.tokens.digest,
            tokenizer_hash=self.tokens.tokenizer_hash,
            clocks=() if self._turns is None else self._turns.learnt,
        )
        write_manifest(folder, manifest)
        prune(root, self.config.checkpoint.keep_last)
        return folder

    def resume(self, folder: Location, *, fork: bool = False) -> None:
        """Goes on from a checkpoint, whoever wrote it. Raises `CheckpointError` if the mathematics or the data differ."""
        with CheckpointReader(folder) as reader:
            manifest = reader.manifest
            check_resume(manifest, self.config, self.tokens.digest, self.tokens.tokenizer_hash, fork=fork)
            if (ours := numerics_class(self.config.numerics, self.device)) != manifest.numerics_class:
                _log.warning("the checkpoint is of numerics class %r, this process of %r", manifest.numerics_class, ours)
            for chunk, states in reader.read_chunks(ChunkId(index) for index in range(len(self._chunks))):
                optimizer = self._chunks[chunk]
                optimizer.parameter.copy_(states[PARAMETER])
                optimizer.load({name: states[name] for name in self._names[1:] if name in states}, manifest.optimizer_step)
        self.version, self._filled = manifest.version, Version(-1)
        self._begin_turns(Timeline(0, manifest.version, manifest.digest, manifest.clocks))

    def _initial(self, chunk: Chunk) -> ChunkOptimizer:
        values = initial_chunk(self.config, self.layout, chunk)
        decay, num_past = self.layout.tensors[chunk.tensor].decay, self.config.train.num_past
        return ChunkOptimizer(self.config.optimizer, values, decay=decay, num_past=num_past)

    @property
    def _names(self) -> tuple[str, ...]:
        """Of what is kept of each chunk."""
        return tensor_names(self.config.optimizer.name, self.config.train.num_past)

    def _train_step(self, step: int) -> Row:
        train, optimizer = self.config.train, self.config.optimizer
        self._fill_for(step)
        sums = {name: LaneSums(train.lanes) for name in self._leaves}
        losses, num_tokens = [], 0
        for index in range(train.lanes):
            loss, count, pushed = self._run_lane(step, index)
            losses.append(loss)
            num_tokens += count
            for name, values in pushed.items():
                sums[name].add(lane(index), self._as_it_arrives(name, values, step, index))
        totals = self._chunk_sums({name: each.take(Block(Lane(0), train.lanes)) for name, each in sums.items()})
        clip = clip_scale([square_sum(total) for total in totals], num_tokens, optimizer.max_grad_norm)
        rate = update_rate(step, self.config)
        for chunk, total in zip(self._chunks, totals, strict=True):
            chunk.begin_version()
            if clip.finite:
                chunk.apply(total, scale=clip.scale, learning_rate=rate)
        mean_loss = tree_sum(losses) / num_tokens if num_tokens else math.nan
        row: Row = {"step": step, "loss": mean_loss, "grad_norm": clip.grad_norm, "lr": rate, "tokens": num_tokens}
        return row if clip.finite else {**row, "skipped": True}

    def _begin_turns(self, timeline: Timeline) -> None:
        """All lanes go on from the present version."""
        if self._turns is not None:
            self._turns.begin(timeline)
            self._copies = [[chunk.parameter.clone() for chunk in self._chunks]] * self.config.train.lanes

    def _train_turn(self, turns: TurnTable) -> Row:
        if turns.restarts_at(self.version):
            self._begin_turns(Timeline(0, self.version, clocks=turns.learnt))
        index, batch, turn = turns.next(self.version)
        self._fill_leaves(self.version, self._copies[index])
        loss, num_tokens, pushed = self._run_lane(batch, index)
        arrived = {name: self._as_it_arrives(name, values, turn.number, index) for name, values in pushed.items()}
        totals = self._chunk_sums(arrived)
        clip = clip_scale([square_sum(total) for total in totals], num_tokens, self.config.optimizer.max_grad_norm)
        rate, refused = turn_rate(turn, self.config), turns.take(turn, self.version)
        for chunk, total in zip(self._chunks, totals, strict=True):
            if clip.finite and not refused:
                chunk.apply(total, scale=clip.scale, learning_rate=rate)
        self._copies[index] = [chunk.parameter.clone() for chunk in self._chunks]
        mean_loss = loss / num_tokens if num_tokens else math.nan
        row: Row = {"step": self.version, "loss": mean_loss, "grad_norm": clip.grad_norm, "lr": rate, "tokens": num_tokens}
        return {**row, **({} if clip.finite else {"skipped": True}), **({"refused": True} if refused else {})}

    def _run_lane(self, step: int, index: int) -> tuple[float, int, dict[str, Tensor]]:
        """The sum of the lane's token losses in its batch of `step`, its tokens, and what it pushes of each leaf."""
        total, num_tokens, num_local_tokens = 0.0, 0, 0
        micro_batches = micro_batches_of(index, self.config.train)
        for number, micro_batch in enumerate(micro_batches, start=1):
            windows = training_windows(self.tokens.train, self.config, step=step, micro_batch=micro_batch)
            targets = targets_of(windows, self.device)
            loss = run_stage(self._stage, inputs_of(windows, self.device), self.config.numerics.precision, targets)
            loss.backward()
            self._weight_gradients.add_all()
            total += loss.item()
            num_tokens += count_targets(targets)
            if self._local is not None and number % (len(micro_batches) // self.config.train.local_steps) == 0:
                self._local.step(step, self._take_gradients(), num_tokens - num_local_tokens)
                num_local_tokens = num_tokens
        return total, num_tokens, self._take_gradients() if self._local is None else self._local.take(num_tokens)

    def _take_gradients(self) -> dict[str, Tensor]:
        return {name: take_gradient(leaf) for name, leaf in self._leaves.items()}

    def _as_it_arrives(self, parameter: str, gradient: Tensor, step: int, index: int) -> Tensor:
        """A lane's gradient of one leaf after its way to the shards, chunk by chunk."""
        first = self._items[parameter][0]
        codec = codec_for(self.config.communication, self.layout.tensors[first.chunk.tensor], first.site)
        if codec is None or codec.is_lossless:
            return gradient
        flat = gradient.view(-1)
        for item in self._items[parameter]:
            part = flat.narrow(0, item.chunk.offset, item.chunk.num_elements)
            nonce = nonce_of(seed=self.config.train.seed, step=step, lane=index, site=item.site, chunk=item.chunk.id)
            codec.decode(self._residuals.encode(codec, (index, item.site, item.chunk.id), step, part, nonce).data, part)
        return gradient

    def _chunk_sums(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Each chunk's gradient over all its sites, added in order of the sites; views of `gradients`, which they consume."""
        totals = []
        flat = {name: gradient.view(-1).cpu() for name, gradient in gradients.items()}
        for chunk in self.layout.chunks:
            first, *rest = self.layout.tensors[chunk.tensor].site_names
            total = flat[first].narrow(0, chunk.offset, chunk.num_elements)
            for name in rest:
                total.add_(flat[name].narrow(0, chunk.offset, chunk.num_elements))
            totals.append(total)
        return totals

    def _fill_for(self, step: int) -> None:
        """What `step` is computed from."""
        version, ahead = Version(self.config.train.reads(step)), self.config.train.steps_ahead(step)
        if not ahead:
            self._fill_leaves(version)
            return
        self._fill_leaves(Version(version - 1))
        before = {name: leaf.detach().clone() for name, leaf in self._leaves.items()}
        self._fill_leaves(version)
        look_ahead({name: leaf.detach() for name, leaf in self._leaves.items()}, before, ahead)
        self._filled = Version(-1)

    def _fill_leaves(self, version: Version, copies: Sequence[Tensor] = ()) -> None:
        """Every site is a leaf of its own and holds a copy of its chunks as they were at `version`, or of `copies`."""
        if version == self._filled and not copies:
            return
        self._filled, back = Version(-1) if copies else version, self.version - version
        with torch.no_grad():
            for item in self.layout.stage_chunks(whole_model(self.config.model)):
                leaf = self._leaves[item.parameter].view(-1)
                dtype = pull_dtype(self.config.communication, self.layout.tensors[item.chunk.tensor])
                values = (copies[item.chunk.id] if copies else self._chunks[item.chunk.id].version_ago(back)).to(dtype)
                leaf.narrow(0, item.chunk.offset, item.chunk.num_elements).copy_(values)

    def _payload(self, chunk: ChunkId) -> dict[str, Tensor]:
        optimizer = self._chunks[chunk]
        return {PARAMETER: optimizer.parameter, **optimizer.states()}
