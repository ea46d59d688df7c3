"""Element types by one name, and what each file format calls them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class DType:
    """One element type. `name` is torch's own, without the `torch.`."""

    name: str
    itemsize: int
    safetensors: str | None
    """Its name in a safetensors header; None: the format has none."""
    storage: str | None
    """torch's typed storage class, by which `torch.save` names it; None: named by `torch.<name>`
    beside an untyped storage."""


_TABLE = (
    ("float64", 8, "F64", "DoubleStorage"),
    ("float32", 4, "F32", "FloatStorage"),
    ("float16", 2, "F16", "HalfStorage"),
    ("bfloat16", 2, "BF16", "BFloat16Storage"),
    ("int64", 8, "I64", "LongStorage"),
    ("int32", 4, "I32", "IntStorage"),
    ("int16", 2, "I16", "ShortStorage"),
    ("int8", 1, "I8", "CharStorage"),
    ("uint8", 1, "U8", "ByteStorage"),
    ("bool", 1, "BOOL", "BoolStorage"),
    ("complex64", 8, "C64", "ComplexFloatStorage"),
    ("complex128", 16, None, "ComplexDoubleStorage"),
    ("uint16", 2, "U16", None),
    ("uint32", 4, "U32", None),
    ("uint64", 8, "U64", None),
    ("float8_e4m3fn", 1, "F8_E4M3", None),
    ("float8_e5m2", 1, "F8_E5M2", None),
    ("float8_e8m0fnu", 1, "F8_E8M0", None),
)
DTYPES = {
    name: DType(name=name, itemsize=itemsize, safetensors=safetensors, storage=storage)
    for name, itemsize, safetensors, storage in _TABLE
}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES.values() if dtype.storage}


def dtype_named(name: str) -> DType:
    """The element type that torch calls `torch.<name>`."""
    try:
        return DTYPES[name]
    except KeyError:
        raise CheckpointError(
            f"tensors of type {name} can't be stored; types that can: {', '.join(DTYPES)}"
        ) from None
