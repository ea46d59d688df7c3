"""Float tensors from one precision to another, a tile of bytes at a time. No torch.

Rounds to the nearest, ties to even, as torch does; NaN stays NaN. bfloat16, which numpy doesn't
have, is the upper half of a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from bigtrain.checkpoint.dtypes import DTYPES, DType
from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

Cast: TypeAlias = "Callable[[memoryview, memoryview], int]"
"""(source, destination) of as many elements → how many finite ones became infinite."""

KEEP = "keep"
_CHOICES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
_CASTABLE = ("float64", "float32", "bfloat16", "float16")
_LARGEST_BF16 = 3.3895313892515355e38
_NUMPY = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def target_dtype(choice: str, stored: DType) -> DType:
    """What a tensor is written as: integers, booleans and quantised floats as they are."""
    if choice == KEEP or stored.name not in _CASTABLE:
        return stored
    return DTYPES[_CHOICES[choice]]


def check_choice(choice: str) -> None:
    """Raise unless `choice` names a precision to write."""
    if choice != KEEP and choice not in _CHOICES:
        raise ConfigError(f"dtype is {choice!r}; it must be keep, fp32, bf16 or fp16")


def make_cast(stored: DType, wanted: DType) -> Cast | None:
    """The conversion of tiles; None where the bytes stay as they are."""
    if stored == wanted:
        return None
    import numpy  # not at module level: without a cast it is not needed

    def cast(source: memoryview, destination: memoryview) -> int:
        values = numpy.frombuffer(source, _NUMPY[stored.name])
        out = numpy.frombuffer(destination, _NUMPY[wanted.name])
        with numpy.errstate(over="ignore", invalid="ignore"):
            suspicious = _write(numpy, _widen(values, stored), out, wanted)
        if not suspicious:
            return 0
        return _count_infinite(numpy, out, wanted) - _count_infinite(numpy, values, stored)

    return cast


def as_float32(data: memoryview, stored: DType) -> np.ndarray[Any, Any]:
    """The elements in float32."""
    import numpy

    return _widen(numpy.frombuffer(data, _NUMPY[stored.name]), stored)


def _widen(values: np.ndarray[Any, Any], stored: DType) -> np.ndarray[Any, Any]:
    """As float32, through which torch goes too."""
    if stored.name == "bfloat16":
        bits = values.astype("<u4")
        bits <<= 16
        widened: np.ndarray[Any, Any] = bits.view("<f4")
        return widened
    return values.astype("<f4", copy=False)


def _write(
    numpy: Any, floats: np.ndarray[Any, Any], out: np.ndarray[Any, Any], wanted: DType
) -> bool:
    """Fill `out`; whether there may be infinite values in it."""
    if wanted.name == "bfloat16":
        return _write_bfloat16(numpy, floats, out)
    out[...] = floats
    bits = out.view("<u2" if wanted.name == "float16" else "<u4")
    sign, infinity = (0x7FFF, 0x7C00) if wanted.name == "float16" else (0x7FFFFFFF, 0x7F800000)
    return bool(len(bits)) and int((bits & sign).max()) >= infinity


def _write_bfloat16(numpy: Any, floats: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> bool:
    bits = floats.view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    out[...] = rounded.view("<u2")[1::2]
    if not len(floats):
        return False
    # Their extremes say at once, nearly always, that all is well; a NaN would come out as one.
    high, low = numpy.maximum.reduce(floats), numpy.minimum.reduce(floats)
    if high <= _LARGEST_BF16 and low >= -_LARGEST_BF16:
        return False
    nan = numpy.isnan(floats)
    out[nan] = (bits[nan] >> 16) | 0x40
    return True


def _count_infinite(numpy: Any, values: np.ndarray[Any, Any], dtype: DType) -> int:
    if dtype.name == "bfloat16":
        return int(((values & 0x7FFF) == 0x7F80).sum())
    return int(numpy.isinf(values).sum())
