"""Shards: written and read back, found by number, in an order that needs no state."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfumato.core.checkpoint import FileError
from sfumato.core.images import decode
from sfumato.data import shards as subject
from sfumato.data.folder import scan
from sfumato.data.shards import Shards, write_shards


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for i in range(30):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[i % 2] / f"{i:02}.png").write_bytes(png(i))
    (root / "a" / "00.txt").write_text("一只猫，坐着")
    return root


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_was_written_is_read(folder: Path, tmp_path: Path) -> None:
    found = scan(folder, progress=False)
    paths = write_shards(found, tmp_path / "out", per_shard=8)
    assert [p.name for p in paths] == ["000000.tar", "000001.tar", "000002.tar", "000003.tar"]
    shards = Shards(tmp_path / "out")
    assert len(shards) == 30
    samples = {s.name.partition("/")[2]: s for s in (shards[i] for i in range(30))}
    for e in found.entries:
        s = samples[e.name]
        assert s.data == (folder / e.name).read_bytes()
        assert (s.caption, s.labels) == (e.caption, e.labels)
    assert list(shards.check()) == []


def test_shards_do_not_grow_beyond_their_largest_size(folder: Path, tmp_path: Path) -> None:
    found = scan(folder, progress=False)
    two = 2 * max(e.stamp[0] for e in found.entries)
    assert len(write_shards(found, tmp_path / "out", largest=two)) == 15


def test_shards_are_not_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    found = scan(folder, progress=False)
    write_shards(found, tmp_path / "out", per_shard=5)
    with pytest.raises(FileError, match="holds 6 shards already: use --force"):
        write_shards(found, tmp_path / "out")
    write_shards(found, tmp_path / "out", force=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["000000.tar"]


def test_shards_of_other_programs(tmp_path: Path) -> None:
    """Keys with folders, captions and JSON of theirs, members that are nothing to us, a sample without a picture."""
    members = {
        "x/0001.jpg": png(1), "x/0001.txt": b"a cat", "x/0001.json": json.dumps({"width": 12, "style": "ink", "list": [1]}).encode(),
        "x/0002.txt": b"no picture", "x/0003.cls": b"7", "x/0003.png": png(3),
    }  # fmt: skip
    shards = Shards(tar_of(tmp_path / "their.tar", members))
    assert len(shards) == 2
    assert (shards[0].caption, shards[0].labels) == ("a cat", {"width": "12", "style": "ink"})
    assert decode(shards[1].data).size == (12, 12)
    assert shards[1].caption is None


def test_bad_pictures_in_shards_are_named(tmp_path: Path) -> None:
    shards = Shards(tar_of(tmp_path / "a.tar", {"0.png": png(0), "1.png": b"<html>", "2.png": png(2)[:60]}))
    assert [(b.name, b.kind) for b in shards.check()] == [("a.tar/1", "html"), ("a.tar/2", "truncated")]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a readable tar"), (b"no tar at all" * 100, "not a readable tar"), (None, "there is no shard"), (b"CUT", "is cut off")],
)
def test_what_is_no_shard_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.tar"
    if content == b"CUT":
        whole = tar_of(path, {"0.png": b"x" * 5000}).read_bytes()
        path.write_bytes(whole[:3000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        Shards([path])


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds no \.tar file"):
        Shards(tmp_path)


def test_a_shard_that_changed_after_it_was_indexed_is_indexed_again(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"0.png": png(0)})
    assert len(Shards([path])) == 1
    tar_of(path, {"0.png": png(0), "1.png": png(1)})
    assert len(Shards([path])) == 2


# --- order ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Nineteen shards of uneven sizes: three windows."""
    root = tmp_path_factory.mktemp("several")
    for s in range(19):
        tar_of(root / f"{s:02}.tar", {f"{i}.png": b"not decoded here" for i in range(1 + s % 4)})
    return Shards(root)


def test_every_epoch_holds_every_sample_once_in_another_order(several: Shards) -> None:
    n = len(several)
    epochs = several.order(0, np.arange(3 * n)).reshape(3, n)
    assert all(sorted(e) == list(range(n)) for e in epochs.tolist())
    assert not (epochs[0] == epochs[1]).all()
    assert not (several.order(1, np.arange(n)) == epochs[0]).all()
    assert (epochs[0] != np.arange(n)).sum() > n / 2


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(0, 3))
def test_a_position_is_the_same_sample_whoever_asks_and_when(several: Shards, positions: list[int], seed: int) -> None:
    """So a resume, and any number of processes, see the same order."""
    together = several.order(seed, np.array(positions))
    alone = [int(several.order(seed, np.array([p]))[0]) for p in positions]
    assert together.tolist() == alone


def test_a_window_reads_a_few_shards_only(several: Shards) -> None:
    windows, starts = several._windows(0, 0)
    for window, start, end in zip(windows, starts, starts[1:], strict=False):
        read = np.searchsorted(several._starts, several.order(0, np.arange(start, end)), side="right") - 1
        assert set(read.tolist()) == set(window.tolist())
        assert len(window) <= subject.WINDOW


def test_labels_of_foreign_shards(tmp_path: Path) -> None:
    """Lists are no classes; what is no JSON is named with its shard and number."""
    path = tar_of(tmp_path / "a.tar", {"0.png": png(0), "0.json": b'{"labels": ["cat"], "style": "ink"}', "1.png": png(1), "1.json": b"{oops"})
    shards = Shards(path)
    assert shards.words(0)[2] == {"style": "ink"}
    with pytest.raises(FileError, match=r"a\.tar: the JSON of sample 1 cannot be read"):
        shards.words(1)
