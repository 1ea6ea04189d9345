"""Hostile safetensors files: each is one clear line, soon, and none is read any further."""

from __future__ import annotations

import json
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfumato.convert.checkpoint import read_tensors
from sfumato.convert.header import Entry, read_header
from sfumato.core.checkpoint import FileError


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def one(**change: Any) -> dict[str, Any]:
    """A good entry of two numbers, but for the change."""
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


A = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
HOSTILE: dict[str, tuple[Any, bytes, int | None, str]] = {
    "nothing": (b"", b"", None, "is no JSON"),
    "a length beyond the file": (one(), b"", 10**6, "was cut off"),
    "a length beyond all files": (one(), b"", 2**63, "was cut off"),
    "no JSON": (b"{nonsense", b"", None, "is no JSON"),
    "no text": (b"\xff\xfe{}", b"", None, "is no JSON"),
    "a list": ([], b"", None, "must have a JSON object"),
    "deep": (b"[" * 100_000, b"", None, "is no JSON"),
    "the same name twice": (f"{{{A}, {A}}}".encode(), b"0" * 8, None, "names 'a' twice"),
    "the same key twice": (b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', b"0" * 8, None, "names 'dtype' twice"),
    "a name that climbs": ({"../a": one()["a"]}, b"0" * 8, None, "is a path"),
    "a name from the root": ({"/etc/a": one()["a"]}, b"0" * 8, None, "is a path"),
    "a name of a drive": ({"C:a": one()["a"]}, b"0" * 8, None, "is a path"),
    "a name with a zero": ({"a\0b": one()["a"]}, b"0" * 8, None, "not printable"),
    "a name without end": ({"a" * 5000: one()["a"]}, b"0" * 8, None, "too long"),
    "no name": ({"": one()["a"]}, b"0" * 8, None, "is empty"),
    "an unknown dtype": (one(dtype="F128"), b"0" * 8, None, "in the dtype 'F128'"),
    "a dtype that is a list": (one(dtype=[]), b"0" * 8, None, "in the dtype"),
    "a negative side": (one(shape=[-2]), b"0" * 8, None, "whole numbers from 0 on"),
    "a side that is no number": (one(shape=[True]), b"0" * 8, None, "whole numbers from 0 on"),
    "a shape that overflows": (one(shape=[2**33, 2**33]), b"0" * 8, None, "is not what F32 of"),
    "sides without end": (one(shape=[1] * 99, data_offsets=[0, 4]), b"0" * 4, None, "at most 8"),
    "offsets that are swapped": (one(data_offsets=[8, 0]), b"0" * 8, None, "is not what F32 of"),
    "offsets that are negative": (one(data_offsets=[-8, 0]), b"0" * 8, None, "is not what F32 of"),
    "offsets beyond the data": (one(data_offsets=[800, 808]), b"0" * 8, None, "after a gap"),
    "too few bytes": (one(), b"0" * 4, None, "it was cut off"),
    "bytes behind": (one(), b"0" * 8 + b"#!/bin/sh", None, "something is hidden after it"),
    "two that overlap": (one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"0" * 12, None, "over others"),
    "a gap": (one() | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, b"0" * 16, None, "after a gap"),
    "another key": (one(more=1), b"0" * 8, None, "and those alone"),
    "an entry that is text": ({"a": "F32"}, b"", None, "and those alone"),
    "metadata that is no text": (one() | {"__metadata__": {"a": 1}}, b"0" * 8, None, "metadata that is not text"),
    "too many": ({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}, b"", None, "100,001 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind: str, tmp_path: Path) -> None:
    header, data, length, said = HOSTILE[kind]
    path = written(tmp_path / "x.safetensors", header, data, length)
    for read in (read_header, read_tensors):
        with pytest.raises(FileError, match=said):
            read(path)


def test_a_file_of_a_few_bytes_or_none(tmp_path: Path) -> None:
    for data in (b"", b"\0" * 7, b"\0" * 8):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(FileError, match=r"is no safetensors file"):
            read_header(tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")


def test_good_files_are_read(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros((), dtype=torch.float16), "c": torch.zeros(0, 4), "d": torch.ones(1, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries, about = read_header(tmp_path / "x.safetensors")
    assert entries == {"a.weight": Entry("F32", (2, 3)), "b": Entry("F16", ()), "c": Entry("F32", (0, 4)), "d": Entry("I64", (1,))}
    assert about == {"format": "pt"}
    assert all(torch.equal(v, tensors[k]) for k, v in read_tensors(tmp_path / "x.safetensors").items())


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(at: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing else may come of it, whatever the byte."""
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_file({"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path, metadata={"format": "pt"})
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    raw[at % len(raw)] = value
    path.write_bytes(raw.tobytes())
    with suppress(FileError):
        read_tensors(path)


def test_many_names_of_which_the_last_is_there_twice(tmp_path: Path) -> None:
    entry = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    names = ", ".join(f'"{i}": {entry}' for i in [*range(60_000), 59_999])
    begun = time.perf_counter()
    with pytest.raises(FileError, match="names '59999' twice"):
        read_header(written(tmp_path / "bad.safetensors", ("{" + names + "}").encode()))
    assert time.perf_counter() - begun < 2
