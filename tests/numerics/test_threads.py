"""The rows of the numerics contract (DESIGN.md, section 8) about threads and hashing: whole processes compared by their output.

This machine's unpinned LayerNorm may or may not differ between thread counts; pinned, no machine's may.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

PINNED = """
import os, sys
from shardlane.process import prepare_process
prepare_process({threads})
assert "torch" not in sys.modules
import torch
from shardlane.config import NumericsConfig
from shardlane.numerics import configure_torch, fast_digest, square_sum
configure_torch(NumericsConfig(threads={threads}))
assert torch.get_num_threads() == {threads} and torch.get_num_interop_threads() == 1
"""

LAYER_NORM_GRADIENTS = """
x = torch.randn(4096, 384, generator=torch.Generator().manual_seed(0))
norm = torch.nn.LayerNorm(384)
norm(x).square().sum().backward()
print(fast_digest(norm.weight.grad), fast_digest(norm.bias.grad))
"""

SQUARE_SUMS = """
for size in (1, 333, 10_007, 32_768, 100_000, 1 << 20):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    found = set()
    for offset in (0, 1, 3, 8, 13):
        moved = torch.empty(size + offset)[offset:]
        moved.copy_(values)
        found.add(square_sum(moved))
    assert len(found) == 1, (size, found)
    print(found.pop().hex())
"""

FUSED_STEPS = """
from shardlane.config import OptimizerConfig
from shardlane.optimizers import ChunkOptimizer
for size in (333, 10_007, 1 << 20):
    draws = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    optimizer = ChunkOptimizer(OptimizerConfig(), draws[0].clone(), decay=True)
    for gradient in draws[1:]:
        optimizer.apply(gradient.clone(), scale=0.1, learning_rate=1e-3)
    print(*[fast_digest(values) for values in (optimizer.parameter, *optimizer.states().values())])
"""

TRAINED = """
from pathlib import Path
from tests.numerics.toy import toy_config, toy_tokens
from shardlane.reference import Reference
reference = Reference(toy_config(**{{"train.max_steps": 2}}), toy_tokens(Path({folder!r})))
print([row.get("loss", row.get("val_loss")).hex() for row in reference.run()], reference.digest())
"""


def printed(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    return result.stdout


def with_ambient_threads(code: str, count: int) -> str:
    return printed(PINNED.format(threads=1) + code, OMP_NUM_THREADS=str(count), MKL_NUM_THREADS=str(count))


def test_threads_are_pinned_by_the_config_before_torch_is_imported() -> None:
    assert with_ambient_threads(LAYER_NORM_GRADIENTS, 1) == with_ambient_threads(LAYER_NORM_GRADIENTS, 2)


def test_square_sums_and_fused_steps_do_not_depend_on_threads() -> None:
    one, two = (printed(PINNED.format(threads=threads) + SQUARE_SUMS + FUSED_STEPS) for threads in (1, 2))
    assert one == two


def test_sort_before_it_reaches_arithmetic(tmp_path: Path) -> None:
    """A whole run under three hash seeds and two ambient thread counts."""
    runs = [
        printed(TRAINED.format(folder=str(tmp_path / seed)), PYTHONHASHSEED=seed, OMP_NUM_THREADS=threads)
        for seed, threads in (("0", "1"), ("1", "2"), ("4242", "1"))
    ]
    assert len(set(runs)) == 1


def test_a_child_process_gets_the_same_settings_from_its_environment() -> None:
    code = """
import os
from shardlane.process import prepare_process, process_environment
os.environ.update(OMP_NUM_THREADS="7")
prepare_process(2)
assert all(os.environ[name] == value for name, value in process_environment(2).items())
print({name: value for name, value in process_environment(2).items() if "THREADS" in name})
"""
    assert printed(code) == "{'OMP_NUM_THREADS': '2', 'MKL_NUM_THREADS': '2', 'OPENBLAS_NUM_THREADS': '2'}\n"
