"""What every section of the config is, and the sections that say where a run's data and checkpoints lie."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from shardlane.uris import check_place

Place = Annotated[str, AfterValidator(check_place)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    path: Place = Field(
        "", description="prepared token files: a folder, or s3://, gs://, az://; empty: RUN_DIR/data, prepared on first use"
    )
    cache: str = Field("", description="folder for token files of a URI, fetched once a machine; empty: ~/.cache/shardlane")
    source: str = Field("python-stdlib", description="text to prepare when `path` is empty: python-stdlib, a file or a folder")
    tokenizer: str = Field("", description="a tokenizer.json to use; empty: train a byte-level BPE on the source")
    source_bytes_max: int = Field(0, ge=0, description="stop reading the source after so many bytes; 0: read it all")
    held_out_fraction: float = Field(0.02, ge=0, lt=1, description="part of the documents kept for validation")


class CheckpointConfig(Section):
    path: Place = Field(
        "",
        description="where checkpoints lie: a folder that every shard sees, or s3://BUCKET/PREFIX, gs://, az://, with endpoint"
        " and credentials in the store's own variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …); empty: RUN_DIR/checkpoints",
    )
    every_steps: int = Field(0, ge=0, description="0: only at the end and on request")
    keep_last: int = Field(3, ge=1)
    resume: Literal["auto", "never"] = "auto"
    init_from: str = Field("", description="a safetensors file with Hugging Face names to take version 0 from")
