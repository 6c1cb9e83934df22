"""What a run takes of memory, links and disk, by its config alone: before a machine is bought."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from shardlane.communication import codec_for, pull_dtype
from shardlane.config import Config
from shardlane.ids import ChunkId
from shardlane.partition import (
    BYTES_PER_ELEMENT,
    Layout,
    MemoryPlan,
    SiteChunk,
    layer_costs,
    memory_plan,
    split_layers,
    state_names,
)

DIRECTIONS = 2  # activations go forward, their gradients back


@dataclass(frozen=True, slots=True)
class Traffic:
    """Payload bytes of a step, over all links together; what is sent again after a fault, or to be filled, comes on top."""

    activations: int  # between stages
    pushes: int  # gradients, workers to shards; at most, for of an embedding only the touched rows go
    pulls: int  # parameters, shards to workers
    copies: int  # sums of gradients, shards to shards


def memory(config: Config) -> MemoryPlan:
    """With chunks shared among the shards as evenly as they can be, each with all its copies."""
    fullest = [(0, index) for index in range(config.cluster.shards)]
    shards: list[list[ChunkId]] = [[] for _ in fullest]
    for chunk in sorted(Layout.of(config).chunks, key=lambda chunk: -chunk.num_bytes):
        held, index = heapq.heappop(fullest)
        shards[index].append(chunk.id)
        heapq.heappush(fullest, (held + chunk.num_bytes, index))
    return memory_plan(config, shards, config.cluster.num_copies(config.cluster.shards))


def traffic(config: Config) -> Traffic:
    """While nobody comes or goes, and each replica has as many lanes as the others, or one more."""
    layout, train, cluster = Layout.of(config), config.train, config.cluster
    stages = split_layers(layer_costs(config.model, train.seq_len), cluster.stages)
    sites = [layout.stage_chunks(stage) for stage in stages]
    tokens = train.global_batch_size * train.seq_len
    # A replica's lanes are summed before they are pushed, where nothing rounds; an uneven share is pushed in a few sums more.
    contributions = train.lanes if config.goes_by_lanes else min(cluster.replicas, train.lanes)
    rounds = train.lanes if train.goes_by_turns else 1  # of pulling and committing, a step
    readers = train.lanes if train.goes_by_turns else min(cluster.replicas, train.lanes)
    return Traffic(
        activations=DIRECTIONS * (cluster.stages - 1) * tokens * config.model.hidden_size * BYTES_PER_ELEMENT,
        pushes=contributions * sum(_pushed(config, layout, each) for stage in sites for each in stage),
        pulls=readers * sum(_pulled(config, layout, stage) for stage in sites),
        copies=rounds * (cluster.num_copies(cluster.shards) - 1) * layout.num_parameters * BYTES_PER_ELEMENT,
    )


def checkpoint_bytes(config: Config) -> int:
    """Weights and the optimizer's state, in fp32."""
    tensors = 1 + len(state_names(config.optimizer.name, config.train.num_past))
    return tensors * Layout.of(config).num_parameters * BYTES_PER_ELEMENT


def _pushed(config: Config, layout: Layout, item: SiteChunk) -> int:
    codec = codec_for(config.communication, layout.tensors[item.chunk.tensor], item.site)
    if codec is None or codec.is_lossless:  # which sends no more than it is given, but for a bit a row
        return item.chunk.num_bytes
    return codec.num_bytes(item.chunk.num_elements)


def _pulled(config: Config, layout: Layout, stage: list[SiteChunk]) -> int:
    """A tied tensor that a stage uses twice comes once."""
    chunks = {item.chunk.id: item.chunk for item in stage}.values()
    return sum(chunk.num_elements * pull_dtype(config.communication, layout.tensors[chunk.tensor]).itemsize for chunk in chunks)
