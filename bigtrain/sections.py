"""The sections of a run file that are not TrainingArguments: what each may say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bigtrain.translate.config import EngineOptions


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _read_split(value: Any) -> Any:
    is_share = isinstance(value, float) and 0 < value < 1
    if value is None or is_share or (isinstance(value, str) and value):
        return value
    raise ValueError(f"{value!r} is neither a share between 0 and 1 nor a split's name")


def _read_truth(value: Any) -> Any:
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def read_name(value: Any) -> Any:
    """Of a file, a directory or a repository: no filesystem has longer ones."""
    parts = value.split("/") if isinstance(value, str) else ()
    if any(len(part.encode()) > _LONGEST_PART for part in parts) or len(parts) > _MOST_PARTS:
        raise ValueError(f"{value:.60}… is too long to be the name of anything")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{value!r:.60} holds a NUL character, which no name can have")
    return value


_LONGEST_PART, _MOST_PARTS = 255, 500
Name = Annotated[str, BeforeValidator(read_name)]
Names = Annotated[list[Name], BeforeValidator(_as_list)]
Texts = Annotated[list[str], BeforeValidator(_as_list)]
Split = Annotated[Any, BeforeValidator(_read_split)]
Truth = Annotated[bool, BeforeValidator(_read_truth)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Strict: a value of the wrong type is a fault, not something to convert."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def said(self) -> dict[str, Any]:
        """All keys that have a value, defaults too."""
        return self.model_dump(exclude_none=True)


class LoraSection(Section):
    """Low-rank adapters (peft's LoRA): the model is frozen, and only they are trained."""

    rank: Count = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: float = 0.0
    target_modules: Texts = ["q_proj", "k_proj", "v_proj", "o_proj"]


class ModelSection(Section):
    """Weights to start from (`name`), or an architecture to start from scratch (`config`)."""

    name: Name | None = None
    revision: str | None = None
    trust_remote_code: Truth = False
    config: dict[str, Any] | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    attn_implementation: str | None = None
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name (a hub id or a path) or config (from scratch)")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, for example model_type: llama")
        if self.revision is not None and self.name is None:
            raise ValueError("revision belongs to name; a config from scratch has none")
        if self.lora is not None and self.name is None:
            raise ValueError("lora adapts weights that are there: give name, not config")
        return self


class TokenizerSection(Section):
    """A hub id or path (`name`), or one that needs no file (`kind: bytes`)."""

    name: Name | None = None
    kind: Literal["bytes"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerSection:
        if (self.name is None) == (self.kind is None):
            raise ValueError("give either name (a hub id or a path) or kind: bytes")
        return self


class DataSection(Section):
    """What is trained on, and how it is cut into sequences."""

    name: str | None = None
    config_name: str | None = None
    train_files: Names | None = None
    eval_files: Names | None = None
    format: Literal["text", "json", "parquet", "csv"] | None = None
    text_field: str = "text"
    eval_split: Split = None
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    packing: Truth = True
    cache_dir: Name | None = None
    max_samples: Count | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.name is None) == (not self.train_files):
            raise ValueError("give either name (a hub id or builtin:…) or train_files")
        if self.eval_files and self.eval_split is not None:
            raise ValueError("eval_files and eval_split both say what to evaluate on; keep one")
        if isinstance(self.eval_split, str) and self.train_files:
            raise ValueError(
                f"eval_split {self.eval_split!r} names a split, and train_files have none; give a "
                "share such as 0.05, or eval_files"
            )
        if self.config_name is not None and self.name is None:
            raise ValueError("config_name belongs to name; train_files have none")
        return self


class EngineSection(Section):
    """How the model is spread over the processes. `auto`: the fastest engine that fits."""

    name: Literal["auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"
    shard: Count | None = None
    master_dtype: Literal["fp32", "bf16"] | None = None
    reshard_after_forward: Truth | None = None
    cpu_offload: Truth | None = None
    wrap_classes: Texts | None = None
    forward_prefetch: Count | None = None
    reduce_each_micro_batch: Truth | None = None
    reduce_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    offload_parameters: Literal["cpu", "nvme"] | None = None
    nvme_path: Name | None = None
    secondary_shard: Count | None = None
    quantized_weights: Truth | None = None
    quantized_gradients: Truth | None = None

    def options(self) -> EngineOptions:
        said = self.model_dump(exclude={"name", "wrap_classes"})
        classes = None if self.wrap_classes is None else tuple(self.wrap_classes)
        return EngineOptions(**said, wrap_classes=classes)


class ClusterSection(Section):
    """Where the processes run, and how they are started."""

    nodes: Count = 1
    procs_per_node: Count | None = None
    start: Literal["fork", "fresh"] | None = None
    max_restarts: Annotated[int, Field(ge=0)] = 0
    env: dict[str, Any] = Field(default_factory=dict)
    slurm: dict[str, Any] = Field(default_factory=dict)
    interface: str | None = None
    join_timeout_s: Count = 600
    stop_grace_s: Count | None = None

    def environment(self) -> Mapping[str, str]:
        """The variables as text: YAML reads `OMP_NUM_THREADS: 4` as a number."""
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.env.items()
        }
