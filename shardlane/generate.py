"""Text from a trained model: one token at a time, the whole context computed anew for each."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlane.errors import UserError
from shardlane.model import Stage


@torch.inference_mode()
def generate(
    stage: Stage,
    prompt_ids: list[int],
    *,
    num_tokens: int,
    seq_len: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[int]:
    """The `num_tokens` ids that follow the prompt. `stage` is a whole model; it sees the last `seq_len` ids at most.

    `temperature` divides the logits; 0 takes the likeliest token. `top_k` keeps that many of the likeliest; 0 keeps all. Draws
    are made on the CPU by a generator of `seed`, whatever the device. Raises `UserError` for an empty prompt or foreign ids.
    """
    weight = next(stage.parameters())  # the embedding: [V, H]
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one token to go on from")
    if not all(0 <= token < weight.shape[0] for token in prompt_ids):
        raise UserError(f"the prompt has token ids outside 0..{weight.shape[0] - 1}; it was made with another tokenizer")
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        context = torch.tensor([ids[-seq_len:]], device=weight.device)  # [1, T]
        logits = stage(context)[0, -1].float().cpu()  # [V]
        ids.append(_sample(logits, temperature, top_k, generator))
    return ids[len(prompt_ids) :]


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token id of fp32 logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    kept = logits.topk(min(top_k or len(logits), len(logits)))  # likeliest first
    probabilities = (kept.values / temperature).softmax(dim=0)
    return int(kept.indices[torch.multinomial(probabilities, 1, generator=generator)])
