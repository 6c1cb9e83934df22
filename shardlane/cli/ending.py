"""What a run leaves behind, said at its end: checkpoint, digest, a sample, the export, and what to try next."""

from __future__ import annotations

import json
from pathlib import Path

from shardlane.cli.rows import Row, RowsTail
from shardlane.cli.run_folder import RunFolder
from shardlane.config import Config
from shardlane.manifest import read_complete
from shardlane.partition import Layout
from shardlane.storage import Location, locate

DIGEST_BYTES_MAX = 8 << 30  # of a checkpoint that is read whole unasked
FETCHED_BYTES_MAX = 1 << 28  # of one in an object store
SAMPLE_PARAMETERS_MAX = 100_000_000  # of a model that is small enough to try here, on the CPU
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 48


def print_ending(config: Config, folder: RunFolder, *, sample: bool) -> None:
    """`sample`: generate some text and export, if the run is done and small. Prints nothing if there is no checkpoint."""
    if folder.newest_version(config) is None:
        print("no checkpoint yet")
        return
    version, checkpoint = folder.checkpoint(config)
    manifest = read_complete(checkpoint)
    is_done = manifest.num_steps >= config.train.max_steps
    print()
    _say("steps", f"{manifest.num_steps} of {config.train.max_steps}{_losses(folder)}")
    _say("checkpoint", str(checkpoint))
    num_bytes = sum(part.num_bytes for part in manifest.parts)
    if num_bytes > (DIGEST_BYTES_MAX if isinstance(checkpoint, Path) else FETCHED_BYTES_MAX):
        _say("digest", f"shardlane digest {folder.path}  (reads {num_bytes / 1e9:.0f} GB)")
    else:
        from shardlane.digest import checkpoint_digest

        _say("digest", f"{checkpoint_digest(checkpoint)} {version}")
    if sample and is_done and Layout.of(config).num_parameters <= SAMPLE_PARAMETERS_MAX:
        _show_sample(config, folder, version, checkpoint)
    _say("next", _next_steps(config, folder, is_done=is_done))


def _show_sample(config: Config, folder: RunFolder, version: int, checkpoint: Location) -> None:
    from shardlane.cli.export import export_checkpoint
    from shardlane.cli.generate import generate_text

    out = folder.path / "exports" / checkpoint.name
    if not out.exists():
        export_checkpoint(config, folder, checkpoint, out)
    _say("export", f"{out}  (transformers: AutoModelForCausalLM.from_pretrained({str(out)!r}))")
    text = generate_text(
        config, folder, checkpoint, SAMPLE_PROMPT, num_tokens=SAMPLE_TOKENS, temperature=0.7, top_k=40, seed=config.train.seed
    )
    _say("sample", text)


def _next_steps(config: Config, folder: RunFolder, *, is_done: bool) -> str:
    if not is_done:
        return f"shardlane local {folder.config_file} --run-dir {folder.path} --train.stop_at_step 0"
    elsewhere = " --checkpoint.path=" if config.checkpoint.path else ""
    return "\n".join(
        (
            f"shardlane generate {folder.path} --prompt 'import ' --num-tokens 80",
            f"shardlane digest {folder.path}",
            f"shardlane reference {folder.config_file} --run-dir {folder.path}-reference{elsewhere}   # the same digest",
        )
    )


def _losses(folder: RunFolder) -> str:
    rows: list[Row] = RowsTail(folder.metrics_file, skip_present=False).read()
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    validations = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    said = f", loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
    return said + (f", validation {validations[-1]:.3f}{_unigram(folder)}" if validations else "")


def _unigram(folder: RunFolder) -> str:
    """What a model that only counts tokens would reach, if the data's index says so."""
    try:
        index = json.loads((locate(folder.config().data.path) / "index.json").read_bytes())
        entropy = index["unigram_entropy_nats"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return "" if entropy is None else f" (unigram entropy {entropy:.3f})"


def _say(what: str, text: str) -> None:
    """The lines of `text` side by side below each other, behind `what`."""
    first, *rest = text.splitlines() or [""]
    print(f"{what:<11} {first}")
    for line in rest:
        print(f"{'':<11} {line}")
