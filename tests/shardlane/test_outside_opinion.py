"""An outside opinion: a Llama and a trainer of plain `torch.nn` and `torch.optim`, which share nothing with ours but initial
weights and batches. It has no lanes, no micro-batches, no chunks: one batch, the mean cross-entropy, torch's clipping, torch's
schedulers. Twenty losses must agree to 1e-5; and they must not when the trainer makes one of the classic mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardlane.config import Config
from shardlane.data import TokenFolder
from shardlane.digest import read_tensors
from shardlane.reference import Reference
from shardlane.samples import sample_ids
from tests.numerics.toy import toy_config, toy_tokens

NUM_STEPS = 20
TOLERANCE = 1e-5


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())


def turn(x: Tensor) -> Tensor:
    """Rotary embedding as complex multiplication. x: [B, T, heads, D]; the pair (i, i + D/2) is one complex number."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([10_000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequency)
    unit = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[None, :, None, :]
    turned = torch.complex(x[..., :half], x[..., half:]) * unit
    return torch.cat((turned.real, turned.imag), dim=-1)


class Block(nn.Module):
    def __init__(self, size: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, size // heads
        self.before_attention, self.before_mlp = Norm(size), Norm(size)
        self.q, self.o = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.k, self.v = (nn.Linear(size, groups * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, size, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        q = turn(self.q(x).view(batch, length, self.heads, self.head))
        k = turn(self.k(x).view(batch, length, self.groups, self.head)).repeat_interleave(self.heads // self.groups, dim=2)
        v = self.v(x).view(batch, length, self.groups, self.head).repeat_interleave(self.heads // self.groups, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.head)
        future = torch.ones(length, length).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before_attention(x))
        y = self.before_mlp(x)
        gate = self.gate(y)
        return x + self.down(gate * gate.sigmoid() * self.up(y))


class Llama(nn.Module):
    def __init__(self, vocab: int, size: int, inner: int, layers: int, heads: int, groups: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, size)
        self.blocks = nn.Sequential(*(Block(size, inner, heads, groups) for _ in range(layers)))
        self.norm = Norm(size)
        self.head = nn.Linear(size, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


RENAMED = {
    "model.layers": "blocks", "model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head", "self_attn.": "",
    "mlp.": "", "_proj": "", "input_layernorm": "before_attention", "post_attention_layernorm": "before_mlp",
}  # fmt: skip


def renamed(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


class Trainer:
    """The whole batch at once. Each mistake is one keyword."""

    def __init__(self, model: Llama, config: Config, *, decays_norms: bool = False, corrects_bias: bool = True) -> None:
        wanted = config.optimizer
        self.model, self.max_grad_norm, self.corrects_bias = model, wanted.max_grad_norm, corrects_bias
        matrices = [p for p in model.parameters() if p.dim() == 2]
        norms = [p for p in model.parameters() if p.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": wanted.weight_decay},
            {"params": norms, "weight_decay": wanted.weight_decay if decays_norms else 0.0},
        ]
        self.optimizer: torch.optim.Optimizer
        if wanted.name == "adamw":
            self.optimizer = torch.optim.AdamW(
                groups, lr=wanted.learning_rate, betas=(wanted.beta1, wanted.beta2), eps=wanted.eps
            )
        else:
            self.optimizer = torch.optim.SGD(groups, lr=wanted.learning_rate, momentum=wanted.momentum)
        self.betas = (wanted.beta1, wanted.beta2) if wanted.name == "adamw" else None
        self.scheduler = scheduler(self.optimizer, config)

    def step(self, windows: Tensor) -> float:
        logits = self.model(windows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if not self.corrects_bias:
            self._undo_bias_correction()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def _undo_bias_correction(self) -> None:
        """As if 10^6 steps had gone by, which makes both corrections 1."""
        for values in self.model.parameters():
            state = self.optimizer.state[values]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(values), exp_avg_sq=torch.zeros_like(values))
            state["step"].fill_(1e6)


def scheduler(optimizer: torch.optim.Optimizer, config: Config) -> torch.optim.lr_scheduler.LRScheduler:
    rates = torch.optim.lr_scheduler
    wanted, steps, warmup = config.schedule, config.train.max_steps, config.schedule.warmup_steps
    if wanted.name == "constant":
        return rates.ConstantLR(optimizer, factor=1.0)
    cosine_steps = steps - 1 - warmup
    floor = config.optimizer.learning_rate * wanted.min_ratio
    if not warmup:
        return rates.CosineAnnealingLR(optimizer, T_max=cosine_steps, eta_min=floor)
    rising = rates.LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=warmup - 1)
    falling = rates.CosineAnnealingLR(optimizer, T_max=cosine_steps, eta_min=floor)
    return rates.SequentialLR(optimizer, [rising, falling], milestones=[warmup])


def config_for(name: str, **changes: Any) -> Config:
    """AdamW with clipping, warm-up and cosine; or SGD with momentum at a constant rate."""
    settings: dict[str, dict[str, Any]] = {
        "adamw": {"schedule.name": "cosine", "schedule.warmup_steps": 4, "optimizer.max_grad_norm": 0.5},
        "momentum": {"schedule.name": "constant", "optimizer.learning_rate": 0.05, "optimizer.max_grad_norm": 0.0},
    }
    return toy_config(**{
        "train.max_steps": NUM_STEPS, "validation.num_micro_batches": 0, "optimizer.name": name, **settings[name], **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    return toy_tokens(tmp_path_factory.mktemp("toy") / "data")


Losses = Callable[..., tuple[list[float], list[float]]]


@pytest.fixture
def losses(tokens: TokenFolder, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Ours and the outsider's over 20 steps; keywords are the outsider's mistakes."""

    def both(config: Config, **mistakes: bool) -> tuple[list[float], list[float]]:
        reference = Reference(config, tokens)
        initial = reference.save(tmp_path_factory.mktemp("initial"))
        shape = config.model
        model = Llama(
            shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers,
            shape.num_attention_heads, shape.num_key_value_heads, shape.tie_word_embeddings,
        )  # fmt: skip
        weights = {renamed(name): values for name, values in read_tensors(initial)}
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and missing.missing_keys == (["head.weight"] if shape.tie_word_embeddings else [])
        trainer = Trainer(model, config, **mistakes)
        theirs = [trainer.step(whole_batch(config, tokens, step)) for step in range(NUM_STEPS)]
        return [float(row["loss"]) for row in reference.run()], theirs

    return both


def whole_batch(config: Config, tokens: TokenFolder, step: int) -> Tensor:
    """All sequences of a step as one batch: int64 [global_batch_size, seq_len + 1]."""
    train = config.train
    ids = sample_ids(
        step,
        0,
        num_windows=tokens.train.num_windows(train.seq_len),
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.global_batch_size,
        seed=train.seed,
    )
    return tokens.train.windows(ids, train.seq_len)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_the_outsider_agrees(losses: Losses, name: str, tied: bool) -> None:
    config = config_for(name, **{"model.tie_word_embeddings": tied})
    ours, theirs = losses(config)
    assert len(ours) == NUM_STEPS and ours[-1] < 0.9 * ours[0], "a loss that does not move proves little"
    assert largest_difference(ours, theirs) < TOLERANCE


def test_clipping_was_at_work(tokens: TokenFolder) -> None:
    config = config_for("adamw")
    norms = [row["grad_norm"] for row in Reference(config, tokens).run()]
    assert all(norm > config.optimizer.max_grad_norm for norm in norms[:5])


@pytest.mark.parametrize("mistake", [{"decays_norms": True}, {"corrects_bias": False}], ids=lambda mistake: next(iter(mistake)))
def test_the_outsider_notices(losses: Losses, mistake: dict[str, bool]) -> None:
    """The other way round: were ours to decay norms or to leave out bias correction, the two would differ by as much."""
    assert largest_difference(*losses(config_for("adamw"), **mistake)) > 10 * TOLERANCE


def test_the_outsider_notices_decay_of_norms_under_momentum(losses: Losses) -> None:
    assert largest_difference(*losses(config_for("momentum"), decays_norms=True)) > 10 * TOLERANCE


def test_the_outsider_notices_in_ours(losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own trainer spoilt: decay on every tensor."""
    from shardlane import reference

    honest = reference.ChunkOptimizer
    monkeypatch.setattr(
        reference, "ChunkOptimizer", lambda config, values, decay, **rest: honest(config, values, decay=True, **rest)
    )
    assert largest_difference(*losses(config_for("adamw"))) > 10 * TOLERANCE
