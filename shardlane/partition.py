"""What the model is made of, without torch: tensors and their sites, chunks, stages, and what each role must hold.

Names are Hugging Face's (`LlamaForCausalLM.state_dict()`). The order of tensors, and so of chunks, is fixed by the config
alone: it is the order of reductions over chunks, and of everything that is hashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from shardlane.config import Config, ModelConfig
from shardlane.errors import ConfigError
from shardlane.ids import ChunkId, SiteIndex

BYTES_PER_ELEMENT = 4  # weights, gradients, sums and moments are fp32 everywhere
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter. `site_layers[s]` is the layer whose stage uses it at site s."""

    index: int
    name: str
    shape: tuple[int, ...]
    site_layers: tuple[int, ...]
    site_names: tuple[str, ...]  # the module parameter that each site is: a tied head is still `lm_head.weight` there
    decay: bool

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def is_look_up(self, site: int) -> bool:
        """Whether it is only read there by rows, those of the tokens that occur."""
        return self.site_names[site] == EMBEDDING


@dataclass(frozen=True, slots=True)
class Chunk:
    """`num_elements` values of a tensor's flattened values, from `offset`."""

    id: ChunkId
    tensor: int
    offset: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BYTES_PER_ELEMENT


@dataclass(frozen=True, slots=True)
class SiteChunk:
    """A chunk as one stage sees it: where it is used."""

    chunk: Chunk
    site: SiteIndex
    parameter: str  # the name of the stage's own parameter


@dataclass(frozen=True, slots=True)
class StageLayers:
    """Decoder layers `first … end - 1` of a model of `num_layers`; the first stage embeds, the last one has the head."""

    first: int
    end: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.num_layers


def tensor_specs(model: ModelConfig) -> list[TensorSpec]:
    """Every parameter in the fixed order: embedding, layers, final norm, head."""
    hidden, inner, last = model.hidden_size, model.intermediate_size, model.num_hidden_layers - 1
    kv = model.num_key_value_heads * model.head_dim
    specs: list[TensorSpec] = []

    def add(name: str, shape: tuple[int, ...], *layers: int, names: tuple[str, ...] = ()) -> None:
        specs.append(TensorSpec(len(specs), name, shape, layers, names or (name,), decay=len(shape) > 1))

    if model.tie_word_embeddings:
        add(EMBEDDING, (model.vocab_size, hidden), 0, last, names=(EMBEDDING, HEAD))
    else:
        add(EMBEDDING, (model.vocab_size, hidden), 0)
    for layer in range(model.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        add(prefix + "input_layernorm.weight", (hidden,), layer)
        add(prefix + "self_attn.q_proj.weight", (hidden, hidden), layer)
        add(prefix + "self_attn.k_proj.weight", (kv, hidden), layer)
        add(prefix + "self_attn.v_proj.weight", (kv, hidden), layer)
        add(prefix + "self_attn.o_proj.weight", (hidden, hidden), layer)
        add(prefix + "post_attention_layernorm.weight", (hidden,), layer)
        add(prefix + "mlp.gate_proj.weight", (inner, hidden), layer)
        add(prefix + "mlp.up_proj.weight", (inner, hidden), layer)
        add(prefix + "mlp.down_proj.weight", (hidden, inner), layer)
    add(FINAL_NORM, (hidden,), last)
    if not model.tie_word_embeddings:
        add(HEAD, (model.vocab_size, hidden), last)
    return specs


class Layout:
    """Tensors and chunks of one config, with the look-ups that every service needs."""

    def __init__(self, model: ModelConfig, chunk_bytes: int) -> None:
        self.model = model
        self.tensors = tensor_specs(model)
        self.chunks: list[Chunk] = []
        most = chunk_bytes // BYTES_PER_ELEMENT
        for tensor in self.tensors:
            for offset in range(0, tensor.num_elements, most):
                size = min(most, tensor.num_elements - offset)
                self.chunks.append(Chunk(ChunkId(len(self.chunks)), tensor.index, offset, size))

    @classmethod
    def of(cls, config: Config) -> Layout:
        return cls(config.model, config.numerics.chunk_bytes)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)

    def num_sites(self, chunk: ChunkId) -> int:
        return len(self.tensors[self.chunks[chunk].tensor].site_layers)

    @cached_property
    def loss_chunk(self) -> ChunkId:
        """The chunk whose contributions carry the step's loss: the first of the final norm, which only a last stage pushes."""
        tensor = next(tensor.index for tensor in self.tensors if tensor.name == FINAL_NORM)
        return next(chunk.id for chunk in self.chunks if chunk.tensor == tensor)

    def stage_chunks(self, stage: StageLayers) -> list[SiteChunk]:
        """What a stage pulls and pushes, in chunk order. A tied tensor shows up once for each of its sites in the stage."""
        found = []
        for chunk in self.chunks:
            tensor = self.tensors[chunk.tensor]
            for site, layer in enumerate(tensor.site_layers):
                if stage.first <= layer < stage.end:
                    found.append(SiteChunk(chunk, SiteIndex(site), tensor.site_names[site]))
        return found

    def decays(self, stage: StageLayers) -> dict[str, bool]:
        """Which of a stage's own parameters have weight decay, by name."""
        return {item.parameter: self.tensors[item.chunk.tensor].decay for item in self.stage_chunks(stage)}


def layer_costs(model: ModelConfig, seq_len: int) -> list[float]:
    """Multiply-adds a token of each decoder layer, forward; the head's are added to the last layer.

    The embedding is a look-up and costs nothing. Attention scores and their application are 2 · seq_len · hidden, halved
    by the causal mask.
    """
    kv = model.num_key_value_heads * model.head_dim
    projections = 2 * model.hidden_size**2 + 2 * model.hidden_size * kv + 3 * model.hidden_size * model.intermediate_size
    costs = [float(projections + seq_len * model.hidden_size)] * model.num_hidden_layers
    costs[-1] += model.hidden_size * model.vocab_size
    return costs


def split_layers(costs: Sequence[float], num_stages: int) -> list[StageLayers]:
    """Contiguous stages, each with at least one layer, whose dearest stage is as cheap as possible.

    Dynamic programming over (stages, layers); among equals the earlier cut wins, so the answer is unique.
    Raises `ConfigError` if there are fewer layers than stages.
    """
    num_layers = len(costs)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"cannot cut {num_layers} layers into {num_stages} stages; each stage needs at least one layer")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    best = [[math.inf] * (num_layers + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (num_layers + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for stages in range(1, num_stages + 1):
        for end in range(stages, num_layers + 1):
            for start in range(stages - 1, end):
                dearest = max(best[stages - 1][start], before[end] - before[start])
                if dearest < best[stages][end]:
                    best[stages][end], cut[stages][end] = dearest, start
    bounds = [num_layers]
    for stages in range(num_stages, 0, -1):
        bounds.append(cut[stages][bounds[-1]])
    bounds.reverse()
    return [StageLayers(first, end, num_layers) for first, end in pairwise(bounds)]


OPTIMIZER_STATES = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "nesterov": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
"""State tensors of each optimizer, by torch's names, each of the chunk's shape, fp32."""


def past_names(num_past: int) -> tuple[str, ...]:
    """The parameters one version ago, two, …: from which steps are still to be computed under SSP."""
    return tuple(f"parameter_{back}_ago" for back in range(1, num_past + 1))


def state_names(optimizer: str, num_past: int = 0) -> tuple[str, ...]:
    """What is kept of each chunk beside its parameters."""
    return (*OPTIMIZER_STATES[optimizer], *past_names(num_past))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that one process of each role holds for good, without activations and transport buffers."""

    model: int
    shard: int  # the fullest shard: weights, optimizer state and one sum of each chunk that it holds; under ASP what lanes read
    stage: int  # the fullest stage: weights and one gradient of each site, and the partial sums of its lanes


def memory_plan(config: Config, shard_chunks: Sequence[Sequence[ChunkId]], num_shard_copies: int = 1) -> MemoryPlan:
    """`shard_chunks`: the chunks of which each shard is primary; a shard holds about `num_shard_copies` times as much."""
    layout = Layout.of(config)
    states = 2 + len(state_names(config.optimizer.name, config.train.num_past))
    states += config.train.lanes if config.train.goes_by_turns else 0  # what each lane's turn is computed from
    shard = max(sum(layout.chunks[chunk].num_bytes for chunk in chunks) for chunks in shard_chunks)
    stage = stage_bytes(config, config.cluster.stages, config.cluster.replicas)
    return MemoryPlan(layout.num_parameters * BYTES_PER_ELEMENT, shard * states * num_shard_copies, stage)


def stage_bytes(config: Config, num_stages: int, num_replicas: int) -> int:
    """What the fullest of `num_stages` stages holds for good: weights, one gradient, the sums and residuals of its lanes."""
    layout = Layout.of(config)
    lanes = -(-config.train.lanes // num_replicas)
    copies = 2 + (lanes.bit_length() if lanes > 1 else 0)
    if config.train.local_steps > 1:
        copies += 1 + len(OPTIMIZER_STATES[config.inner.name])  # what a lane began with, and its optimizer
    if config.train.looks_ahead:
        copies += 3  # the version before, the one that comes back, and the way between them
    if config.communication.push.startswith("top_k"):
        copies += 2 * lanes  # what was left out before this step, and after it
    stages = split_layers(layer_costs(config.model, config.train.seq_len), num_stages)
    return max(sum(item.chunk.num_bytes for item in layout.stage_chunks(each)) for each in stages) * copies
