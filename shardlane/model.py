"""A Llama-style decoder, read top to bottom, small to large; a pipeline stage is the same modules over a range of layers.

Sources: Llama 2 (Touvron et al. 2023, arXiv:2307.09288); RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467); rotary embeddings
(Su et al. 2021, arXiv:2104.09864) with the half-rotation of Hugging Face's `LlamaForCausalLM`; grouped queries (Ainslie et
al. 2023, arXiv:2305.13245); SwiGLU (Shazeer 2020, arXiv:2002.05202). Parameter names are those of `LlamaForCausalLM`.

Shapes: B sequences of T tokens; H hidden, I inner, V vocabulary; N query heads, K key-value heads, D = H / N a head.
There are no buffers: a stage built under `torch.device("meta")` needs only `to_empty` and its weights.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardlane.config import ModelConfig
from shardlane.partition import StageLayers
from shardlane.weight_gradients import WeightGradients

Rotary: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, each fp32 [T, D]

# With deterministic algorithms on, both repeat their bits. cuDNN's kernel does not promise to, and is what torch may prefer.
ATTENTION_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """x · weightᵀ. With `put_off`, a backward pass leaves the weight's gradient there."""

    put_off: WeightGradients | None = None

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.put_off is None else self.put_off.linear(x, self.weight)


class Embedding(nn.Embedding):
    """weight[ids]. With `put_off`, a backward pass leaves the weight's gradient there."""

    put_off: WeightGradients | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) if self.put_off is None else self.put_off.embedding(ids, self.weight)


def rotary_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Angles position · theta^(-2i / D). Computed anew in each forward: microseconds, and no buffer to go stale on `meta`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim  # [D/2]
    frequencies = 1.0 / theta**exponents  # rounded as Hugging Face rounds it: far positions multiply a last bit
    angles = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None] * frequencies  # [T, D/2]
    angles = torch.cat((angles, angles), dim=-1)  # [T, D]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) by its position's angle, in fp32. x: [B, heads, T, D], and so is the result."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        key_value_size = model.num_key_value_heads * model.head_dim
        self.q_proj = Linear(model.hidden_size, model.hidden_size)
        self.k_proj = Linear(model.hidden_size, key_value_size)
        self.v_proj = Linear(model.hidden_size, key_value_size)
        self.o_proj = Linear(model.hidden_size, model.hidden_size)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q = rotate(self._heads(self.q_proj(x)), rotary)  # [B, N, T, D]
        k = rotate(self._heads(self.k_proj(x)), rotary)  # [B, K, T, D]
        v = self._heads(self.v_proj(x))  # [B, K, T, D]
        with sdpa_kernel(ATTENTION_BACKENDS):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, N, T, D]
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))  # [B, T, N·D] -> [B, T, H]
        return out

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)  # [B, T, heads·D] -> [B, heads, T, D]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(model.hidden_size, model.intermediate_size)
        self.up_proj = Linear(model.hidden_size, model.intermediate_size)
        self.down_proj = Linear(model.intermediate_size, model.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [B, T, I] -> [B, T, H]
        return out


class DecoderLayer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.mlp = MLP(model)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)  # [B, T, H]
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))  # [B, T, H]
        return out


class Decoder(nn.Module):
    """The layers of one stage, keyed by their number in the whole model, with the embedding first and the norm last."""

    def __init__(self, model: ModelConfig, layers: StageLayers) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = model.head_dim, model.rope_theta
        self.embed_tokens = Embedding(model.vocab_size, model.hidden_size) if layers.is_first else None
        self.layers = nn.ModuleDict({str(layer): DecoderLayer(model) for layer in range(layers.first, layers.end)})
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps) if layers.is_last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)  # [B, T] -> [B, T, H]
        rotary = rotary_tables(x.shape[1], self.head_dim, self.rope_theta, x.device)
        for layer in self.layers.values():
            x = layer(x, rotary)
        return x if self.norm is None else self.norm(x)


class Stage(nn.Module):
    """Decoder layers `layers.first … layers.end - 1`, with the embedding in the first stage and norm and head in the last.

    A tied head is still a leaf of its own, `lm_head.weight`, everywhere: one leaf in a whole model and two in a cut one would
    add gradients in different orders (DESIGN.md, section 8). Weights are not initialised here.
    """

    def __init__(self, model: ModelConfig, layers: StageLayers) -> None:
        super().__init__()
        self.model = Decoder(model, layers)
        self.lm_head = Linear(model.hidden_size, model.vocab_size) if layers.is_last else None

    @classmethod
    def empty(cls, model: ModelConfig, layers: StageLayers, device: torch.device | str) -> Stage:
        """A stage with uninitialised weights on `device`, without the time and the draws of torch's own initialisation."""
        with torch.device("meta"):
            stage = cls(model, layers)
        return stage.to_empty(device=device)

    def put_off_weight_gradients(self) -> WeightGradients:
        """From now on a backward pass leaves the gradients of products and embedding pending; norms get theirs at once."""
        pending = WeightGradients()
        for module in self.modules():
            if isinstance(module, Linear | Embedding):
                module.put_off = pending
                pending.weights.append(module.weight)
        return pending

    def forward(self, x: Tensor) -> Tensor:
        """x: int64 token ids [B, T] in a first stage, else hidden states [B, T, H] of the stage before.

        Returns logits [B, T, V] of a last stage, else hidden states [B, T, H]. Hidden states are fp32 under bf16 autocast too:
        only the matrix products run in bf16, and the residual stream that they are added to stays as the embedding gave it.
        """
        x = self.model(x)
        return x if self.lm_head is None else self.lm_head(x)


def whole_model(model: ModelConfig) -> StageLayers:
    """The one stage of an uncut model."""
    return StageLayers(0, model.num_hidden_layers, model.num_hidden_layers)


IGNORED_TARGET = -100  # a target that counts neither in the loss nor among the tokens; torch's and Hugging Face's default


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the token cross-entropies in nats, fp32 []. logits: [B, T, V]; targets: int64 [B, T], or `IGNORED_TARGET`.

    A sum, not a mean: shards divide once, by the whole step's tokens, so uneven micro-batches stay exact.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def autocast(precision: Literal["fp32", "bf16"], device_type: str) -> torch.autocast:
    """The context for a forward pass. No cast is cached: each weight is used once a pass, and a cached one outlives a pull."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
