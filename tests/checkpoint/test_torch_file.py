from __future__ import annotations

import contextlib
import io
import pickle
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bigtrain.checkpoint.dtypes import DTYPES
from bigtrain.checkpoint.inert import Inert, read_pickle, unfolds
from bigtrain.checkpoint.torch_file import Archive, TensorRef
from bigtrain.checkpoint.torch_item import item_bound, write_tensor
from bigtrain.errors import CheckpointError


def test_structure_and_places_are_those_that_torch_finds(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "whole": base,
        "part": base[1:3, 2:],
        "turned": base.t(),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 2),
        "plain": OrderedDict(a=[1, 2.5, None, True], b=("x", {"y"}, torch.Size([2, 3]))),
    }
    path = tmp_path / "x.pt"
    torch.save(saved, path)
    read = Archive(path).read()
    with FakeTensorMode():
        oracle = torch.load(path, weights_only=False)
    for name in ("whole", "part", "turned", "parameter", "scalar", "empty"):
        ours, theirs = read[name], oracle[name]
        assert isinstance(ours, TensorRef)
        assert (ours.shape, ours.strides) == (tuple(theirs.shape), theirs.stride())
        assert f"torch.{ours.dtype.name}" == str(theirs.dtype)
        begin = theirs.untyped_storage()._checkpoint_offset
        if theirs.numel():
            assert ours.offset == begin + theirs.storage_offset() * theirs.itemsize
    assert read["plain"] == {"a": [1, 2.5, None, True], "b": ("x", {"y"}, (2, 3))}


@pytest.mark.parametrize("name", DTYPES)
def test_a_written_item_is_read_by_torch_zip_and_us(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    for shape in [(2, 3), (), (0, 3), (5,), (2, 1, 4)]:
        tensor = torch.randint(0, 2, shape).to(getattr(torch, name))
        data = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
        stream = io.BytesIO()
        stream.write(b"something before")
        item = write_tensor(stream, memoryview(data), dtype=dtype, shape=shape)
        assert item.length < item_bound(len(data))
        raw = stream.getvalue()[item.offset :]
        loaded = torch.load(io.BytesIO(raw), weights_only=True)
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert bytes(loaded.untyped_storage().tolist()) == data
        assert zipfile.ZipFile(io.BytesIO(raw)).testzip() is None
        (tmp_path / "x").write_bytes(stream.getvalue())
        found = Archive(tmp_path / "x", offset=item.offset, length=item.length).read()
        assert (found.offset, found.dtype, found.shape) == (item.payload, dtype, shape)


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_hostile_pickle_does_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"a": torch.ones(2), "b": Hostile(touched)}, tmp_path / "x.pt")
    read = Archive(tmp_path / "x.pt").read()
    assert not touched.exists()
    assert isinstance(read["a"], TensorRef) and isinstance(read["b"], Inert)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert touched.exists(), "the pickle was not hostile at all"


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch {path}'\ntR.",
        b'cbuiltins\nexec\n(S\'open("{path}", "w")\'\ntR.',
        b"(S'touch {path}'\nios\nsystem\n.",
        b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch {path}'\ntR.",
    ],
)
def test_hand_made_pickle_code_does_nothing(tmp_path: Path, code: bytes) -> None:
    touched = tmp_path / "touched"
    pickled = code.replace(b"{path}", str(touched).encode())
    assert isinstance(read_pickle(pickled, path=tmp_path), Inert)
    assert not touched.exists()


def test_a_pickle_cannot_change_what_the_next_one_means(tmp_path: Path) -> None:
    # BUILD on a class and on a type's name: state that would stick to something shared.
    poison = b"ctorch\nfloat32\n}S'qualified'\nS'torch.int8'\nsb."
    with contextlib.suppress(CheckpointError):
        read_pickle(poison, path=tmp_path)
    torch.save(torch.ones(2), tmp_path / "x.pt")
    assert Archive(tmp_path / "x.pt").read().dtype == DTYPES["float32"]


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"Np2147483647\n.",
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x02T\xff\xff\xff\x7f.",
    ],
    ids=["LONG_BINPUT", "PUT", "BINBYTES8", "BYTEARRAY8", "BINSTRING"],
)
def test_a_pickle_of_few_bytes_takes_no_memory(tmp_path: Path, code: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"its structure can't be read .* at byte "):
        read_pickle(code, path=tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize("memo", [200, 300, 70_000])
def test_indexes_of_the_memo_that_a_pickler_writes_are_read(memo: int, tmp_path: Path) -> None:
    names = [f"layer.{number}" for number in range(memo)]
    for protocol in range(6):
        pickled = pickle.dumps([*names, *names], protocol)
        assert read_pickle(pickled, path=tmp_path) == [*names, *names]


def test_values_that_unfold_without_end_are_named_in_few_words(tmp_path: Path) -> None:
    # Fifty lists, each of which holds the one before twice.
    nested = b"]" + b"2\x86" * 50
    with pytest.raises(CheckpointError, match="can't be read") as refused:
        read_pickle(b"\x80\x02" + nested + b"Q.", path=tmp_path)
    assert len(str(refused.value)) < 1000
    assert unfolds(read_pickle(b"\x80\x02" + nested + b".", path=tmp_path))


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_survive_every_protocol(protocol: int, tmp_path: Path) -> None:
    value = {"a": [1, -(2**70), 2.5, None, True, "ü", b"x"], "b": (1, {2}, frozenset({3}))}
    if protocol < 3:
        value["a"].pop()  # type: ignore[attr-defined]
    assert read_pickle(pickle.dumps(value, protocol), path=tmp_path) == value


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            Archive(path).read()
    path.write_bytes(b"no zip at all")
    with pytest.raises(CheckpointError, match=r"no whole torch\.save zip"):
        Archive(path).read()


def test_an_encrypted_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    while entry >= 0:
        content[entry + 8] |= 1
        entry = content.find(b"PK\x01\x02", entry + 4)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is encrypted, which torch.save never does"):
        Archive(path).read()


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.ones(4, 5), path)
    data = path.read_bytes()
    assert data.count(b"K\x04K\x05\x86") == 1
    path.write_bytes(data.replace(b"K\x04K\x05\x86", b"K\x14K\x05\x86"))
    with pytest.raises(CheckpointError, match="outside its storage|damaged"):
        Archive(path).read()


def test_a_flipped_bit_is_found_by_the_zip_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.arange(1000.0), path)
    assert Archive(path).first_damaged() is None
    data = bytearray(path.read_bytes())
    data[Archive(path).read().offset + 100] ^= 1
    path.write_bytes(data)
    assert Archive(path).first_damaged() == "x/data/0"
