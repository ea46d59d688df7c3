"""Weights that compute in fp16 and are kept in fp32 (O2), or kept in fp16 too (O3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigtrain.engine.casting import cast_weights


class Tied(nn.Module):
    """An embedding whose weights are the head's too, around a layer that may be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.recomputes = False

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        hidden = self.embed(tokens) * scale
        if self.recomputes:
            hidden = torch.utils.checkpoint.checkpoint(self.layer, hidden, use_reentrant=False)
        else:
            hidden = self.layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 5]])


def _gradients(model: Tied) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(TOKENS, scale=torch.tensor(2.0))
    assert logits.dtype == torch.float16
    logits.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_arrive_at_the_weights_as_they_are_kept() -> None:
    torch.manual_seed(0)
    model = Tied()
    model(TOKENS, torch.tensor(2.0)).square().mean().backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    cast_weights(model, torch.float16)
    halves = _gradients(model)
    assert halves.keys() == full.keys() == dict(model.named_parameters()).keys()
    for name, gradient in halves.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, full[name], rtol=2e-2, atol=2e-3)


def test_what_is_computed_anew_has_the_same_weights() -> None:
    torch.manual_seed(0)
    model = Tied()
    cast_weights(model, torch.float16)
    straight = _gradients(model)
    model.recomputes = True
    again = _gradients(model)
    assert all(torch.equal(again[name], straight[name]) for name in straight)


def test_a_module_keeps_its_parameters_also_when_its_forward_fails() -> None:
    model = Tied()
    cast_weights(model, torch.float16)
    with pytest.raises(IndexError):
        model(torch.tensor([[9]]), torch.tensor(1.0))
    assert model.embed.weight is model.head.weight is dict(model.named_parameters())["embed.weight"]
    assert model(TOKENS, torch.tensor(1.0)).dtype == torch.float16


def test_another_trainer_of_the_same_model_takes_the_cast_away() -> None:
    model = Tied()
    cast_weights(model, torch.float16)
    cast_weights(model, torch.bfloat16)
    assert model(TOKENS, torch.tensor(1.0)).dtype == torch.bfloat16
    cast_weights(model, None)
    assert model(TOKENS, torch.tensor(1.0)).dtype == torch.float32


def test_batch_normalisation_keeps_its_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    cast_weights(model, torch.float16)
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    assert model(torch.randn(8, 4)).dtype == torch.float16
    assert seen == [torch.float32] and model[1].running_mean.dtype == torch.float32
