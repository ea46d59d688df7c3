"""Engine options change where things lie and when they are sent, and not what is learned."""

from __future__ import annotations

import pytest

from bigtrain.engine import build_engine
from bigtrain.errors import UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.translate import topology_for, translate
from bigtrain.translate.config import EngineConfig, EngineName, EngineOptions
from tests.engine import recipes
from tests.engine.harness import run_ranks
from tests.engine.recipes import CPU, Recipe

_RECIPE = Recipe(steps=6, windows=(2,), uneven=True)
_WAYS: tuple[tuple[EngineName, EngineOptions], ...] = (
    ("fsdp", EngineOptions()),
    ("fsdp", EngineOptions(reduce_each_micro_batch=True, forward_prefetch=1)),
    ("fsdp", EngineOptions(reshard_after_forward=False)),
    ("zero1", EngineOptions(offload_optimizer="cpu")),
    ("zero2", EngineOptions(offload_optimizer="cpu")),
    ("zero3", EngineOptions(offload_optimizer="cpu")),
    ("zero3", EngineOptions(offload_optimizer="cpu", offload_parameters="cpu")),
    ("zero3", EngineOptions(secondary_shard=2)),
)


def _config(name: EngineName, options: EngineOptions, ranks: int, device: str) -> EngineConfig:
    return translate(
        {"per_device_train_batch_size": 1},
        engine=name,
        topology=topology_for(name, procs_per_node=ranks),
        device=device,  # type: ignore[arg-type]
        hidden_size=32,
        options=options,
    ).engine


def _train(world: RankInfo) -> list[tuple[list[float], list[float]]]:
    found = []
    for name, options in _WAYS:
        config = _config(name, options, world.world_size, "cpu")
        engine = build_engine(config, world=world, device=CPU)
        model = engine.construct(
            lambda: recipes.make_model(_RECIPE), lambda: recipes.make_skeleton(_RECIPE)
        )
        model = engine.prepare(model, recipes.make_optimizer(model))
        record = recipes.train(engine, model, recipes.Record(), _RECIPE, world)
        engine.close()
        found.append((record.losses, record.norms))
    return found


def test_every_option_trains_the_same() -> None:
    found = run_ranks(2, _train)[0]

    losses, norms = found[0]
    for (name, options), (others, other_norms) in zip(_WAYS, found, strict=True):
        assert others == pytest.approx(losses, rel=1e-6), f"{name} {options}"
        assert other_norms == pytest.approx(norms, rel=5e-6), f"{name} {options}"


def test_nvme_is_refused_where_its_state_could_not_be_saved() -> None:
    options = EngineOptions(offload_optimizer="nvme", nvme_path="/local")

    with pytest.raises(UnsupportedError) as raised:
        build_engine(_config("zero3", options, 1, "cuda"), world=RankInfo(), device=CPU)

    assert str(raised.value) == (
        "engine zero3: what DeepSpeed keeps on NVMe can't be saved here; offload all of it to cpu"
    )
