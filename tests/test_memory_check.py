"""A run that can't fit is refused before it starts, with what would fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bigtrain.cluster_flags import ClusterFlags
from bigtrain.errors import ConfigError
from bigtrain.launch_command import Launch, _require_fit
from bigtrain.layers import parse_assignment
from bigtrain.planning import Request, device_memory

_RUN = """\
model:
  config: {model_type: llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 16}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 512}
training: {per_device_train_batch_size: 2}
cluster: {procs_per_node: 2}
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    (tmp_path / "run.yaml").write_text(_RUN)
    monkeypatch.setattr(device_memory, "_host_bytes", lambda: 8 << 30)
    return Launch(
        request=Request(target="run.yaml", overrides=(parse_assignment("engine=ddp"),)),
        where=ClusterFlags(),
        environment={"CUDA_VISIBLE_DEVICES": ""},
        working_dir=tmp_path,
    )


def test_a_run_that_can_not_fit_is_refused_with_the_engine_that_would(launch: Launch) -> None:
    with pytest.raises(ConfigError) as raised:
        _require_fit(launch.plan(), launch)

    message = str(raised.value)
    assert message.startswith("engine ddp needs ")
    assert "and there are 4.0 GiB (this machine's memory ÷ 2 processes)" in message
    assert "--engine auto would fit (fsdp, 2.6 GiB)" in message
    assert message.endswith("start it all the same with --no-memory-check")


def test_a_run_that_no_engine_can_fit_is_refused_and_one_that_is_told_to_starts(
    launch: Launch,
) -> None:
    said = parse_assignment("model.config.num_hidden_layers=400")
    request = dataclasses.replace(launch.request, overrides=(*launch.request.overrides, said))
    large = dataclasses.replace(launch, request=request)
    plan = large.plan()

    with pytest.raises(ConfigError, match="no engine would fit here"):
        _require_fit(plan, large)
    _require_fit(plan, dataclasses.replace(large, checks_memory=False))


def test_recomputing_is_named_where_it_would_do(launch: Launch) -> None:
    said = (
        parse_assignment("training.per_device_train_batch_size=24"),
        parse_assignment("model.config.num_hidden_layers=4"),
        parse_assignment("model.config.max_position_embeddings=2048"),
    )
    request = dataclasses.replace(launch.request, overrides=(*launch.request.overrides, *said))

    with pytest.raises(ConfigError, match="training.gradient_checkpointing=true would fit"):
        large = dataclasses.replace(launch, request=request)
        _require_fit(large.plan(), large)
