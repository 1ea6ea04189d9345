from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato.core import checkpoint
from sfumato.core.checkpoint import (
    FileError,
    cache_folder,
    cached,
    hash_tensors,
    load_tensors,
    read_metadata,
    replacing,
    save_tensors,
    write_bytes,
    write_json,
)

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3),
    "c": torch.ones(2, dtype=torch.bfloat16),
    "d": torch.zeros(0),
    "e": torch.tensor([True, False]),
}
METADATA = {"kind": "猫", "images": 3, "nested": {"x": [1, None, 0.5]}}


def one_line(error: pytest.ExceptionInfo[FileError], path: Path) -> None:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert error.value.__context__ is None or error.value.__suppress_context__, "the user would see a chain of tracebacks"


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save_tensors(path, TENSORS, METADATA)
    tensors, metadata = load_tensors(path)
    assert metadata == METADATA == read_metadata(path)
    assert tensors.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert tensors[name].dtype == t.dtype
        assert torch.equal(tensors[name], t)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_channels_last_and_slices_come_back(tmp_path: Path) -> None:
    x = torch.arange(48.0).reshape(1, 3, 4, 4)
    save_tensors(tmp_path / "a", {"last": x.contiguous(memory_format=torch.channels_last), "part": x[:, 1:2, ::2]}, {})
    tensors, _ = load_tensors(tmp_path / "a")
    assert torch.equal(tensors["last"], x)
    assert torch.equal(tensors["part"], x[:, 1:2, ::2])


def test_the_files_mode_follows_the_umask(tmp_path: Path) -> None:
    write_bytes(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failing_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of a fi")
            assert temporary.parent == path.parent, "a rename must stay on one file system"
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS, {})
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(FileError, match="No space left on device") as error:
        save_tensors(path, {"a": torch.zeros(1)}, {})
    one_line(error, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_is_visible_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_cut_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_tensors(path, TENSORS, METADATA)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (load_tensors, read_metadata):
        with pytest.raises(FileError, match="not a readable safetensors file") as error:
            read(path)
        one_line(error, path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + b"x" * 500, b"hello", b"\x80\x02}q\x00." * 40, b"\x08" + b"\x00" * 7 + b"not json"])
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match="not a readable safetensors file") as error:
        load_tensors(path)
    one_line(error, path)


def test_absent_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no file") as error:
        load_tensors(tmp_path / "none.safetensors")
    one_line(error, tmp_path / "none.safetensors")
    with pytest.raises(FileError, match="is a folder"):
        load_tensors(tmp_path)


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where a folder is needed: refused for every user, root too."""
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "model.safetensors", Path("/proc/sfumato/model.safetensors")):
        with pytest.raises(FileError, match="cannot write") as error:
            save_tensors(target, TENSORS, {})
        one_line(error, target)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="cannot write"):
        write_bytes(tmp_path / "folder", b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_foreign_metadata_is_kept_as_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"format": "pt"})
    assert read_metadata(tmp_path / "a.safetensors") == {"format": "pt"}


def test_the_hash_sees_everything_that_matters() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    others: list[dict[str, Tensor]] = [
        {"a": torch.arange(4.0).reshape(2, 2), "b": torch.zeros(2)},
        {"a": torch.arange(4.0).double(), "b": torch.zeros(2)},
        {"a2": torch.arange(4.0), "b": torch.zeros(2)},
        {"a": torch.arange(4.0)},
        {"a": torch.arange(4.0), "b": torch.tensor([0.0, 1e-30])},
        {"a": torch.arange(4.0), "b": torch.tensor([0.0, -0.0])},
        {"a": torch.zeros(2), "b": torch.arange(4.0)},
    ]
    hashes = [hash_tensors(t) for t in (base, *others)]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_ignores_order_and_memory_layout() -> None:
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert hash_tensors({"a": x, "b": torch.ones(1)}) == hash_tensors({"b": torch.ones(1), "a": last})
    assert hash_tensors({"a": TENSORS["c"], "d": TENSORS["d"], "s": TENSORS["b"]})


@given(st.integers(0, 63), st.integers(0, 7))
def test_the_hash_sees_any_bit(byte: int, bit: int) -> None:
    x = torch.zeros(64, dtype=torch.uint8)
    before = hash_tensors({"x": x})
    x[byte] = 1 << bit
    assert hash_tensors({"x": x}) != before


def test_cached_makes_once_and_again_when_broken(tmp_path: Path) -> None:
    calls = []

    def make() -> tuple[dict[str, Tensor], dict[str, object]]:
        calls.append(1)
        return {"a": torch.ones(3)}, {}

    path = tmp_path / "c.safetensors"
    for expected in (1, 1):
        assert torch.equal(cached(path, make)["a"], torch.ones(3))
        assert len(calls) == expected
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(cached(path, make)["a"], torch.ones(3))
    assert len(calls) == 2


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("SFUMATO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/sfumato")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "sfumato"


def test_an_array_takes_its_room_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map into a full disk would kill the process; now it is an error like any other."""
    with checkpoint.replacing(tmp_path / "a.npy") as temporary:
        held = checkpoint.new_array(temporary, np.uint8, (3, 1000))
        held[1] = 7
        held.flush()
        assert temporary.stat().st_blocks * 512 >= 3000
    assert np.load(tmp_path / "a.npy")[:, 5].tolist() == [0, 7, 0]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(FileError, match="No space left on device"), checkpoint.replacing(tmp_path / "b.npy") as temporary:
        checkpoint.new_array(temporary, np.uint8, (3, 1000))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]
