"""What one micro-batch of a decoder leaves for its backward pass, by formula.

The terms are the tensors that autograd saves in transformers' own modules (RMSNorm, rotary
attention by `scaled_dot_product_attention`, gated MLP, experts by `grouped_mm`, cross entropy in
fp32), counted with `torch.autograd.graph.saved_tensors_hooks`. They refine the count of Korthikanti
et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv:2205.05198, section
4.1), which is for GPT with dropout and without a gate: like there, attention's own matrix is not
kept, because the fused kernels recompute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bigtrain.memory.shapes import Architecture


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Bytes of one micro-batch on one rank."""

    layer: int
    """What one layer saves, when it is not recomputed."""
    checkpoint: int
    """What is kept of a layer that is recomputed: its input."""
    layer_extra: int
    """What the backward pass of a layer needs beside what the layer saved."""
    head: int
    """What the final norm saves."""
    logits: int
    """Logits with their gradients, at their largest."""
    fixed: int
    """Token ids, labels, rotary tables."""
    layer_casts: int = 0
    """Low-precision copies of a layer's weights that autocast makes and autograd saves."""
    head_casts: int = 0


class ActivationTimeline(Protocol):
    """How activations rise and fall in a step, whether by formula or as traced."""

    @property
    def fixed(self) -> int:
        """What is there from first to last."""
        ...

    @property
    def head(self) -> int:
        """The most until the backward pass reaches the last layer."""
        ...

    def in_layer(self, remaining: int) -> int:
        """The most in the backward pass of the layer that has `remaining` layers below it."""
        ...


@dataclass(frozen=True, kw_only=True)
class FormulaActivations:
    """The timeline of a decoder with `layers` equal layers, each kept or recomputed."""

    each: ActivationBytes
    layers: int
    recompute: bool

    @property
    def fixed(self) -> int:
        return self.each.fixed

    @property
    def logits(self) -> int:
        return self.each.logits

    @property
    def head(self) -> int:
        each = self.each
        # Autocast keeps its copies of weights until the forward pass is left; by then there are
        # the logits, twice, and their log-softmax, but no gradients.
        copies = self.layers * each.layer_casts if self.recompute else 0
        most = max(each.logits, each.logits * 5 // 6 + copies)
        return self._saved(self.layers) + each.head + each.head_casts + most

    def in_layer(self, remaining: int) -> int:
        each = self.each
        return self._saved(remaining) + each.layer + each.layer_casts + each.layer_extra

    def _saved(self, layers: int) -> int:
        each = self.each
        kept = each.checkpoint if self.recompute else each.layer + each.layer_casts
        return each.fixed + layers * kept


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What goes through the model at once, and how."""

    sequences: int
    sequence_length: int
    compute_bytes: int
    is_autocast: bool
    """Each operation casts what it is given, and norms and the stream between layers stay fp32."""
    copies_weights: bool
    """Weights are wider than the arithmetic and are kept a second time as it needs them, from the
    forward pass to the backward pass. Not where the big matrices are frozen in its own precision,
    as under LoRA."""
    keeps_logits: bool = True
    """False with a fused loss (Liger), which never holds all logits."""

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length


def activation_bytes(shape: Architecture, batch: Batch) -> ActivationBytes:
    """The formula, for a decoder of `shape`."""
    tokens, width = batch.tokens, batch.compute_bytes
    # Autocast leaves the residual stream in fp32; without it, it has the compute precision.
    stream = 4 if batch.is_autocast else width
    casts = width if batch.copies_weights else 0
    return ActivationBytes(
        layer=tokens * (_norms(shape, batch) + _attention(shape, batch) + _mlp(shape, batch)),
        checkpoint=tokens * stream * shape.hidden,
        layer_extra=tokens * _backward(shape, batch, stream),
        head=tokens * ((4 + 2 * stream) * shape.hidden + 4),
        logits=_logits(shape, batch),
        fixed=tokens * (16 + 2 * stream * shape.head_dim // batch.sequences),
        layer_casts=casts * _layer_weights(shape),
        head_casts=casts * shape.hidden * shape.vocabulary,
    )


def evaluation_bytes(shape: Architecture, batch: Batch, *, layers: int) -> int:
    """The most in a forward pass that keeps nothing for a backward pass: a layer at work, or the
    logits with their fp32 copy and its log-softmax.

    Autocast keeps its copies of all weights until the pass is over, without gradients too
    (aten/src/ATen/autocast_mode.cpp, `cached_cast`).
    """
    each, width = activation_bytes(shape, batch), batch.compute_bytes
    stream = 2 * (4 if batch.is_autocast else width) * shape.hidden
    inner = 3 * width * shape.intermediate * max(1, shape.experts_per_token)
    logits = (width + (4 if width < 4 else 0) + 4) * shape.vocabulary if batch.keeps_logits else 0
    casts = layers * each.layer_casts + each.head_casts
    return each.fixed + casts + batch.tokens * (stream + max(inner, logits))


def _norms(shape: Architecture, batch: Batch) -> int:
    """Two RMSNorms per token: input in fp32, what it is divided to, and the output.

    Under autocast each projection casts the output anew: three of attention's, two of the MLP's.
    """
    hidden, width = shape.hidden, batch.compute_bytes
    if batch.is_autocast:
        return 2 * (4 + 4) * hidden + (3 + (2 if shape.is_gated else 1)) * width * hidden + 8
    return 2 * (4 + 2 * width) * hidden + 8


def _attention(shape: Architecture, batch: Batch) -> int:
    """Query, key and value after the rotation, the output, and the softmax's normaliser."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    saved = batch.compute_bytes * (2 * query + 2 * key) + 4 * shape.heads
    if shape.has_qk_norm:
        saved += (4 + batch.compute_bytes) * (query + key)
    return saved


def _mlp(shape: Architecture, batch: Batch) -> int:
    """Gate, its activation, up and their product; for experts, once for each that a token takes."""
    copies = 4 if shape.is_gated else 2
    inner = copies * batch.compute_bytes * shape.intermediate
    if not shape.experts:
        return inner
    # The router's probabilities and choices, and the tokens sorted by expert, before and after.
    chosen = shape.experts_per_token
    gathered = 2 * batch.compute_bytes * shape.hidden + 24 + 8 + 8 + 4
    return 4 * shape.experts + chosen * (inner + gathered)


def _backward(shape: Architecture, batch: Batch, stream: int) -> int:
    """The gradient of the stream, twice, and of the MLP's product and its two factors."""
    copies = max(1, shape.experts_per_token)
    return 2 * stream * shape.hidden + 2 * batch.compute_bytes * shape.intermediate * copies


def _logits(shape: Architecture, batch: Batch) -> int:
    """The log-softmax in fp32, its gradient, and the logits' own."""
    return 12 * batch.tokens * shape.vocabulary if batch.keeps_logits else 0


def _layer_weights(shape: Architecture) -> int:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = 3 if shape.is_gated else 2
    mlp = matrices * shape.hidden * shape.intermediate * max(1, shape.experts)
    return shape.hidden * (2 * query + 2 * key) + mlp
