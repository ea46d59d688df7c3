"""transformers' own arguments, as bigtrain's: for a script that has kept their import.

The object stays the script's: what it changes later counts, and a class of its own keeps its
fields and methods. Only its class is exchanged, for one that is bigtrain's as well.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from bigtrain.trainer import theirs
from bigtrain.trainer.arguments import TrainingArguments

_THEIRS: dict[str, type] = {
    "TrainingArguments": theirs.TrainingArguments,
    "Seq2SeqTrainingArguments": theirs.Seq2SeqTrainingArguments,
}
# What transformers' arguments hold of devices and DeepSpeed, which are the engine's here. While
# DeepSpeed's config is alive, transformers builds every model under `zero.Init`.
_THEIR_PLACE = ("_setup_devices", "_n_gpu", "hf_deepspeed_config", "deepspeed_plugin")


def adopt(
    args: theirs.TrainingArguments, kind: type[TrainingArguments] = TrainingArguments
) -> TrainingArguments:
    """`args` itself, from now on of bigtrain's class `kind` too; TypeError where it extends
    neither that class nor transformers' of that name."""
    if isinstance(args, kind):
        return args
    base = _THEIRS[kind.__name__]
    if not isinstance(args, base):
        raise TypeError(
            f"args is a {type(args).__name__}, which extends neither bigtrain.{kind.__name__} nor "
            f"transformers.{kind.__name__}; change its base class"
        )
    adopted: Any = args
    own: Any = type(args)
    wanted: Any = kind
    adopted.__class__ = kind if own is base else joined(own, wanted)
    for name in _THEIR_PLACE:
        adopted.__dict__.pop(name, None)
    for field in dataclasses.fields(kind):
        if field.name not in adopted.__dict__:
            setattr(adopted, field.name, field.default)
    adopted.settle()
    return adopted  # type: ignore[no-any-return]


@functools.cache
def joined(own: Any, kind: Any) -> Any:
    """A script's class `own`, its methods first, that is bigtrain's class `kind` too."""
    body = {"__module__": own.__module__, "__doc__": own.__doc__, "__reduce__": _reduce}
    return dataclasses.dataclass(repr=False, eq=False)(type(own.__name__, (own, kind), body))


def _reduce(args: TrainingArguments) -> tuple[Any, ...]:
    """Pickled as an object of the two classes: the joined one has no name to be found by."""
    own, kind = type(args).__bases__
    return _made, (own, kind), args.__getstate__()


def _made(own: type, kind: type) -> Any:
    return object.__new__(joined(own, kind))
