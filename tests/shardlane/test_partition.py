"""Tensors, chunks and stages of a config; and the memory that each role needs, against figures computed by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlane.config import Config, ModelConfig, build
from shardlane.errors import ConfigError
from shardlane.partition import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Layout,
    StageLayers,
    layer_costs,
    memory_plan,
    split_layers,
    tensor_specs,
)

TINY = ModelConfig(preset="tiny")
TIED = ModelConfig(preset="tiny", tie_word_embeddings=True)


@pytest.mark.parametrize("model", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 14, 4 << 20])
def test_chunks_cover_every_tensor_once_and_in_order(model: ModelConfig, chunk_bytes: int) -> None:
    layout = Layout(model, chunk_bytes)
    assert [chunk.id for chunk in layout.chunks] == list(range(len(layout.chunks)))
    assert all(0 < chunk.num_bytes <= chunk_bytes for chunk in layout.chunks)
    covered = []
    for tensor, chunks in itertools.groupby(layout.chunks, key=lambda chunk: chunk.tensor):
        end = 0
        for chunk in chunks:
            assert chunk.offset == end
            end += chunk.num_elements
        assert end == layout.tensors[tensor].num_elements
        covered.append(tensor)
    assert covered == list(range(len(layout.tensors)))
    assert sum(chunk.num_elements for chunk in layout.chunks) == layout.num_parameters


def test_every_interior_border_keeps_the_vector_width() -> None:
    """Fused AdamW changes bits over slices that are not (DESIGN.md, section 8)."""
    for chunk_bytes in (1 << 10, (1 << 10) + 64, 4 << 20):
        assert all(chunk.offset % 16 == 0 for chunk in Layout(TINY, chunk_bytes).chunks)


def test_sites_of_a_tied_tensor() -> None:
    embedding, *others = tensor_specs(TIED)
    assert (embedding.site_layers, embedding.site_names) == ((0, 3), (EMBEDDING, HEAD))
    assert all(len(spec.site_layers) == 1 and spec.site_names == (spec.name,) for spec in others)
    assert HEAD not in {spec.name for spec in others}
    layout = Layout(TIED, 4 << 20)
    whole = layout.stage_chunks(StageLayers(0, 4, 4))
    assert [(item.parameter, item.site) for item in whole if item.chunk.id == 0] == [(EMBEDDING, 0), (HEAD, 1)]
    assert [item.parameter for item in layout.stage_chunks(StageLayers(2, 4, 4)) if item.chunk.id == 0] == [HEAD]
    assert [item.parameter for item in layout.stage_chunks(StageLayers(1, 3, 4)) if item.chunk.id == 0] == []
    assert layout.num_sites(layout.chunks[0].id) == 2
    assert layout.num_sites(layout.chunks[1].id) == 1


@pytest.mark.parametrize("model", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_stages_use_every_site_of_every_chunk_exactly_once(model: ModelConfig, num_stages: int) -> None:
    layout = Layout(model, 1 << 12)
    stages = split_layers(layer_costs(model, 256), num_stages)
    used = [(item.chunk.id, item.site) for stage in stages for item in layout.stage_chunks(stage)]
    assert sorted(used) == [(chunk.id, site) for chunk in layout.chunks for site in range(layout.num_sites(chunk.id))]


def test_norms_do_not_decay_and_the_loss_travels_with_the_last_one() -> None:
    for model in (TINY, TIED):
        layout = Layout(model, 1 << 10)
        assert all(spec.decay == (not spec.name.endswith("norm.weight")) for spec in layout.tensors)
        tensor = layout.tensors[layout.chunks[layout.loss_chunk].tensor]
        assert (tensor.name, layout.num_sites(layout.loss_chunk)) == (FINAL_NORM, 1)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.data())
def test_the_dearest_stage_is_as_cheap_as_any_cut_allows(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = split_layers(costs, num_stages)
    assert [stage.first for stage in stages[1:]] == [stage.end for stage in stages[:-1]]
    assert (stages[0].first, stages[-1].end, len(stages)) == (0, len(costs), num_stages)
    assert all(stage.first < stage.end and stage.num_layers == len(costs) for stage in stages)
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    dearest = [max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *each, len(costs)))) for each in cuts]
    assert max(sum(costs[stage.first : stage.end]) for stage in stages) == min(dearest)


def test_the_cut_is_unique_and_knows_its_ends() -> None:
    stages = split_layers([1.0] * 5, 2)
    assert stages == [StageLayers(0, 2, 5), StageLayers(2, 5, 5)], "among equals the earlier cut"
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, True)]
    for num_stages in (0, 6):
        with pytest.raises(ConfigError, match="cannot cut 5 layers"):
            split_layers([1.0] * 5, num_stages)


def test_the_head_counts_as_compute_of_the_last_layer() -> None:
    *layers, last = layer_costs(TINY, seq_len=256)
    # q and o 2·64², k and v 2·64·32, three of 64·160, attention 256·64; the head 64·512
    assert layers == [8_192 + 4_096 + 30_720 + 16_384] * 3
    assert last == layers[0] + 32_768


def test_memory_of_llama_3_8b_on_four_stages_and_four_shards() -> None:
    config = build({"model": {"preset": "llama-3-8b"}, "cluster": {"stages": 4, "shards": 4}})
    layout = Layout.of(config)
    embedding = 128_256 * 4096  # 501 · 2^20, and the head is as large
    layer = (2 * 4096 + 2 * 1024) * 4096 + 3 * 4096 * 14_336 + 2 * 4096
    assert (embedding, layer) == (525_336_576, 218_112_000)
    assert layout.num_parameters == 2 * embedding + 32 * layer + 4096 == 8_030_261_248

    stages = split_layers(layer_costs(config.model, config.train.seq_len), 4)
    assert [(stage.first, stage.end) for stage in stages] == [(0, 8), (8, 17), (17, 26), (26, 32)]
    held = [sum(item.chunk.num_elements for item in layout.stage_chunks(stage)) for stage in stages]
    assert held == [8 * layer + embedding, 9 * layer, 9 * layer, 6 * layer + 4096 + embedding]

    # Every matrix is a multiple of a 4 MiB chunk: 2 · 501 + 32 · 208 full ones, and 65 norms of 4096 elements.
    full = [chunk.id for chunk in layout.chunks if chunk.num_bytes == 4 << 20]
    norms = [chunk.id for chunk in layout.chunks if chunk.num_bytes == 16 << 10]
    assert (len(full), len(norms), len(layout.chunks)) == (7658, 65, 7723)
    shards = [full[index::4] + norms[index::4] for index in range(4)]

    plan = memory_plan(config, shards, num_shard_copies=2)
    assert plan.model == 32_121_044_992
    # The fullest shard is primary for 1915 full chunks and 17 norms: weights, two moments and a sum of each; and as many backups.
    assert plan.shard == (1915 * (4 << 20) + 17 * (16 << 10)) * 4 * 2 == 64_258_965_504
    # The fullest stage is the first: weights and a gradient, and the partial sums of four lanes: one, two and four lanes.
    assert plan.stage == 2_270_232_576 * 4 * (2 + 3) == 45_404_651_520


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 2), ("momentum", 3), ("adam", 4), ("adamw", 4)])
def test_memory_follows_the_optimizer(optimizer: str, states: int) -> None:
    config = Config().with_changes({"optimizer.name": optimizer})
    layout = Layout.of(config)
    plan = memory_plan(config, [[chunk.id for chunk in layout.chunks]])
    assert plan.shard == states * plan.model == states * 4 * layout.num_parameters


def test_a_replica_of_one_lane_holds_no_partial_sums() -> None:
    config = Config().with_changes({"train.lanes": 4, "cluster.replicas": 4})
    layout = Layout.of(config)
    plan = memory_plan(config, [[chunk.id for chunk in layout.chunks]])
    assert plan.stage == 2 * plan.model
