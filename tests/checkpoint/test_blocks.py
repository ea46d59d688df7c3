from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import blocks
from bigtrain.checkpoint.blocks import BLOCK_BYTES, FilePool, FileReader, HashingFile, hash_file
from bigtrain.errors import CheckpointError


def write(path: Path, data: bytes) -> blocks.FileDigest:
    with HashingFile(path) as file:
        view = memoryview(data)
        while view.nbytes:
            step = random.Random(len(view)).randint(1, 3 << 20)
            file.write(view[:step])
            view = view[step:]
    return file.digest


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 17])
def test_hashes_while_writing_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    data = random.Random(0).randbytes(size)
    digest = write(tmp_path / "x", data)
    assert digest == hash_file(tmp_path / "x")
    assert len(digest.blocks) == 16 * -(-size // BLOCK_BYTES)
    assert FileReader(tmp_path / "x", digest).read(0, size) == data


def test_a_flipped_bit_is_found_only_by_who_reads_its_block(tmp_path: Path) -> None:
    data = bytearray(random.Random(0).randbytes(3 * BLOCK_BYTES + 5))
    digest = write(tmp_path / "x", bytes(data))
    broken = BLOCK_BYTES + 12345
    flipped = bytearray(data)
    flipped[broken] ^= 4
    (tmp_path / "x").write_bytes(flipped)
    reader = FileReader(tmp_path / "x", digest)
    assert reader.read(BLOCK_BYTES - 10, 10) == data[BLOCK_BYTES - 10 : BLOCK_BYTES]
    assert reader.read(2 * BLOCK_BYTES, BLOCK_BYTES + 5) == data[2 * BLOCK_BYTES :]
    for offset, length in [(BLOCK_BYTES, 1), (BLOCK_BYTES - 1, 2), (0, len(data))]:
        with pytest.raises(CheckpointError, match=f"bytes {BLOCK_BYTES} to {2 * BLOCK_BYTES} are"):
            reader.read(offset, length)


def test_any_range_is_read_right_through_the_checked_reader(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(2 * BLOCK_BYTES + 999)
    digest = write(tmp_path / "x", data)
    dice = random.Random(2)
    for _ in range(20):
        reader = FileReader(tmp_path / "x", digest)
        for _ in range(5):
            begin = dice.randrange(len(data))
            length = dice.randrange(len(data) - begin)
            assert reader.read(begin, length) == data[begin : begin + length]
        reader.close()


def test_another_size_and_a_missing_file_are_named(tmp_path: Path) -> None:
    digest = write(tmp_path / "x", b"12345")
    (tmp_path / "x").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="x: has 4 bytes, but 5 were written"):
        FileReader(tmp_path / "x", digest)
    with pytest.raises(CheckpointError, match="y: can't be opened: No such file"):
        FileReader(tmp_path / "y", None)


def test_torch_saves_through_a_hashing_file(tmp_path: Path) -> None:
    value = {"a": torch.arange(5_000_000), "b": "text"}
    with HashingFile(tmp_path / "x.pt") as stream:
        torch.save(value, stream)  # type: ignore[arg-type]
    assert stream.digest == hash_file(tmp_path / "x.pt")
    loaded = torch.load(io.BytesIO((tmp_path / "x.pt").read_bytes()), weights_only=True)
    assert torch.equal(loaded["a"], value["a"])


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path / "x", b"1")
    with pytest.raises(FileExistsError):
        HashingFile(tmp_path / "x")


def test_a_pool_reads_more_files_than_it_keeps_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(blocks._OPEN_FILES + 20)]
    digests = {path: write(path, path.name.encode()) for path in paths}
    with contextlib.closing(FilePool(digests)) as pool:
        for path in paths + paths[:3]:
            assert pool.reader(path).read(0, len(path.name)) == path.name.encode()
        assert len(pool._open) == blocks._OPEN_FILES
