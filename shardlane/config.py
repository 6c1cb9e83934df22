"""Validated settings. Built once, at the edge, from file < environment < command line; nothing reads the environment later.

Keys carry the names that the field knows. A file is TOML or YAML; `SHARDLANE_SECTION__KEY` overrides it; `--section.key value`
overrides both. Unknown keys are refused with a suggestion. `Config.mathematics()` is the part that a resumed run may not change.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from shardlane.errors import ConfigError
from shardlane.presets import MODEL_PRESETS
from shardlane.sections import CheckpointConfig, DataConfig, Section
from shardlane.train_config import TrainConfig

ENVIRONMENT_PREFIX = "SHARDLANE_"


class ModelConfig(Section):
    """A Llama-style decoder. Names are Hugging Face's (`LlamaConfig`)."""

    preset: Literal["demo", "tiny", "20m", "llama-3.2-1b", "llama-3-8b", ""] = Field("", description="fills every key not given")
    vocab_size: int = Field(8192, ge=2, le=1 << 20)
    hidden_size: int = Field(384, ge=2)
    intermediate_size: int = Field(1024, ge=2)
    num_hidden_layers: int = Field(6, ge=1, le=1024)
    num_attention_heads: int = Field(6, ge=1)
    num_key_value_heads: int = Field(2, ge=1, description="grouped-query attention: a divisor of num_attention_heads")
    rope_theta: float = Field(10_000.0, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("preset") in MODEL_PRESETS:
            return {**MODEL_PRESETS[values["preset"]], **values}
        return values

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple"
                f" of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"the head size {self.head_dim} is odd; rotary embeddings need an even one")
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class OptimizerConfig(Section):
    name: Literal["sgd", "momentum", "nesterov", "adam", "adamw"] = "adamw"
    learning_rate: float = Field(3e-3, ge=0)
    weight_decay: float = Field(0.1, ge=0, description="decoupled for adamw; never applied to norms")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global norm to this; 0: do not clip")


class ScheduleConfig(Section):
    """Learning rate over steps: a linear warm-up, then `name`. With local steps it is theirs, counted in them."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0, description="wsd only: steps of the final linear decay")
    min_ratio: float = Field(0.1, ge=0, le=1, description="the last learning rate over the peak")


class PipelineConfig(Section):
    schedule: Literal["1f1b", "gpipe", "zero_bubble"] = Field(
        "1f1b", description="zero_bubble idles half as long, for stages + 1 micro-batches in flight in every stage; the same bits"
    )


class ValidationConfig(Section):
    every_steps: int = Field(0, ge=0, description="0: only at the end")
    num_micro_batches: int = Field(8, ge=0, description="held-out micro-batches a validation; 0: never validate")


class ClusterConfig(Section):
    stages: int = Field(1, ge=1, le=1024, description="P: pipeline stages")
    replicas: int = Field(1, ge=1, le=1024, description="R: chains of workers that a run begins with; at most `train.lanes`")
    replicas_max: int = Field(
        0,
        ge=0,
        le=1024,
        description="replicas once more workers come, never more than `train.lanes`; 0: none but R, others are spares",
    )
    shards: int = Field(1, ge=1, le=1024, description="S: parameter shards")
    replication: int = Field(0, ge=0, le=8, description="copies of each chunk, at most S; 0: two where there are two shards")
    lease_seconds: float = Field(
        10.0, ge=1, description="a member silent for so long is dead; from 2 s on, if its heartbeats usually come faster"
    )

    def num_copies(self, num_shards: int) -> int:
        """Of each chunk, while there are so many shards."""
        return min(self.replication or 2, num_shards)


class NumericsConfig(Section):
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights, sums and moments stay fp32")
    threads: int = Field(1, ge=1, le=256, description="torch threads in every process; a changed count changes bits")
    determinism: Literal["warn", "strict"] = Field("warn", description="strict: refuse a member of another numerics class")
    chunk_bytes: int = Field(4 << 20, ge=1 << 10, le=4 << 20, multiple_of=64, description="most bytes (fp32) of a chunk")


class TransportConfig(Section):
    """Bounds on memory that peers can make a process take."""

    inbox_bytes: int = Field(256 << 20, ge=1 << 20, description="activations waiting in a worker, at most")
    push_queue_bytes: int = Field(256 << 20, ge=1 << 20, description="gradients waiting to be pushed, at most")


class CommunicationConfig(Section):
    """What travels in how many bits. Weights, sums and moments are fp32 whatever it says."""

    push: Literal["fp32", "bf16", "fp16", "int8", "int8_stochastic", "top_k", "top_k_int8"] = Field(
        "fp32", description="a lane's gradients on their way to the shards; all but fp32 round, and go lane by lane"
    )
    top_k_fraction: float = Field(0.01, gt=0, le=1, description="of a chunk's values that top_k pushes in a step, the largest")
    pull: Literal["fp32", "bf16"] = Field(
        "fp32", description="parameters on their way to the workers, who compute and validate with what they get"
    )
    touched_rows: bool = Field(True, description="of an embedding push only the rows of tokens that occurred, if push is fp32")
    coded_elements_min: int = Field(4096, ge=1, description="smaller tensors travel as fp32")


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    every_steps: int = Field(1, ge=1, description="steps a line, on a terminal and in the coordinator's log")


class Config(Section):
    run_name: str = Field("run", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    inner: OptimizerConfig = OptimizerConfig()  # of local steps; `max_grad_norm` is not for it
    schedule: ScheduleConfig = ScheduleConfig()
    pipeline: PipelineConfig = PipelineConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    numerics: NumericsConfig = NumericsConfig()
    communication: CommunicationConfig = CommunicationConfig()
    transport: TransportConfig = TransportConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        if self.cluster.stages > self.model.num_hidden_layers:
            raise ValueError(
                f"cluster.stages {self.cluster.stages} is more than model.num_hidden_layers {self.model.num_hidden_layers};"
                " a stage has at least one layer"
            )
        if self.cluster.replicas > self.train.lanes:
            raise ValueError(
                f"cluster.replicas {self.cluster.replicas} is more than train.lanes {self.train.lanes};"
                " a replica has at least one lane"
            )
        num_updates = self.train.max_steps * self.train.local_steps
        if self.schedule.warmup_steps + self.schedule.decay_steps > num_updates:
            raise ValueError(
                f"schedule.warmup_steps + decay_steps ({self.schedule.warmup_steps} + {self.schedule.decay_steps})"
                f" exceed train.max_steps {self.train.max_steps}"
                + (f" x local_steps {self.train.local_steps}" if self.train.local_steps > 1 else "")
            )
        return self

    @property
    def num_replicas_max(self) -> int:
        """That a plan may have, however many workers there are."""
        return max(self.cluster.replicas, min(self.cluster.replicas_max, self.train.lanes))

    @property
    def goes_by_lanes(self) -> bool:
        """Whether lanes are pushed one by one, not their sums: what rounds is a lane's own, and so are local steps; and under SSP
        no sum of an earlier step need be taken apart when lanes move.
        """
        train = self.train
        return self.communication.push != "fp32" or train.local_steps > 1 or train.staleness > 0 or train.goes_by_turns

    def mathematics(self) -> dict[str, Any]:
        """The settings that decide the weights, bit for bit within a numerics class; the data's hash is kept beside it."""
        keep: dict[str, Any] = {name: getattr(self, name).model_dump() for name in ("model", "train", "optimizer", "schedule")}
        del keep["train"]["stop_at_step"], keep["model"]["preset"]
        if not self.train.goes_by_turns:
            del keep["train"]["consistency"], keep["train"]["staleness_max"], keep["train"]["staleness_aware"]
        if not self.train.staleness:
            del keep["train"]["staleness"], keep["train"]["staleness_warmup_steps"], keep["train"]["look_ahead"]
        keep["numerics"] = self.numerics.model_dump(exclude={"determinism"})
        if self.train.local_steps > 1:
            keep["inner"] = self.inner.model_dump()
        keep["communication"] = self.communication.model_dump(exclude={"touched_rows"})  # lossless
        keep["init_from"] = self.checkpoint.init_from
        return keep

    def mathematics_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.mathematics(), sort_keys=True).encode()).hexdigest()

    def with_changes(self, changes: Mapping[str, Any]) -> Config:
        """A copy with dotted keys changed, validated again: `config.with_changes({"train.max_steps": 8})`."""
        values = self.model_dump()
        if "model.preset" in changes:
            values["model"] = {}  # the preset's keys, not those of the model before it
        for dotted, value in changes.items():
            _set_dotted(values, dotted, value)
        return build(values)


def load(path: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Config:
    """Reads a TOML or YAML file, then `environment`, then `overrides` (`["--section.key", "value", …]`).

    Raises `ConfigError` with one line that names the key, what was found and what was expected.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {file}: {error.strerror}; `configs/` has ready ones") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    try:
        values = yaml.safe_load(text) if file.suffix in (".yaml", ".yml") else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file} is not valid {'YAML' if file.suffix in ('.yaml', '.yml') else 'TOML'}: {reason}") from error
    values = values or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold sections of keys, found a {type(values).__name__}")
    values = {key: value for key, value in values.items() if value is not None}  # an empty section of YAML
    for name, value in sorted((environment or {}).items()):
        if name.startswith(ENVIRONMENT_PREFIX) and "__" in name:
            _set_dotted(values, name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."), value)
    for dotted, value in parse_overrides(overrides):
        _set_dotted(values, dotted, value)
    return build(values)


def build(values: Mapping[str, Any]) -> Config:
    """Validates plain values. Raises `ConfigError` in one line."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from error


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`["--train.max_steps", "8", "--model.preset=tiny"]` as pairs. Raises `ConfigError`."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.partition("=")
        if not key.startswith("--"):
            raise ConfigError(f"found {flag!r} where an override was expected; write --section.key value")
        if not equals and not rest:
            raise ConfigError(f"{flag} has no value; write {flag} value")
        pairs.append((key[2:].replace("-", "_"), value if equals else rest.pop(0)))
    return pairs


def to_toml(config: Config) -> str:
    """The whole resolved config as TOML that `load` reads back to an equal value."""

    def literal(value: Any) -> str:
        if isinstance(value, float):
            return repr(value)
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML knows no surrogate pairs, and no bare DEL

    lines = []
    for name, value in config.model_dump().items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *(f"{key} = {literal(item)}" for key, item in value.items())]
        else:
            lines.append(f"{name} = {literal(value)}")
    return "\n".join(lines) + "\n"


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {section} is a single value, not a section")
    values[key] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if first["type"] == "model_type":
        return f"{where} is {first['input']!r}: expected a section of keys"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {first['input']!r}: {message}"
