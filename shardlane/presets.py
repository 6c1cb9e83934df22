"""Models by name: shapes that people know, and small ones for trying things out."""

from __future__ import annotations

from typing import Any


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, theta: float, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "rope_theta": theta, "tie_word_embeddings": tied,
    }  # fmt: skip


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _shape(512, 64, 160, 4, 4, 2, 10_000.0, False),
    "demo": _shape(4096, 256, 704, 4, 8, 4, 10_000.0, False),
    "20m": _shape(8192, 384, 1024, 8, 6, 6, 10_000.0, False),
    "llama-3.2-1b": _shape(128_256, 2048, 8192, 16, 32, 8, 500_000.0, True),
    "llama-3-8b": _shape(128_256, 4096, 14_336, 32, 32, 8, 500_000.0, False),
}
