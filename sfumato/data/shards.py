"""Large sets: pictures in WebDataset shards, plain tar files whose members `key.jpg`, `key.txt` and `key.json` are one sample.

Every sample is found by its number through an index of offsets, which lies on disk and is mapped, so that memory does not grow with the
set. The order of training is a pure function of (seed, position): windows of a few shards come one after another in a shuffled order,
and within a window all samples are shuffled together. So reading stays local, a resume needs no state, and any process can take any position.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, cache_folder, replacing
from sfumato.core.images import Unreadable, decode
from sfumato.core.language import translated
from sfumato.core.rng import numpy_rng
from sfumato.data.folder import MOST_EXACT, SUFFIXES, Bad, Entry, Scan, read, same_data, same_pictures, scan, square

if TYPE_CHECKING:
    from torch import Tensor

PER_SHARD = 2_000
LARGEST_SHARD = 256 * 2**20
WINDOW = 8  # shards whose samples are shuffled together
COLUMNS = 7  # of the index: shard, then offset and size of picture, caption and labels; size 0 is none
INDEX_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded, with its words. `name` is its key within its shard, after the shard's name."""

    name: str
    data: bytes
    caption: str | None
    labels: dict[str, str]


# --- writing ------------------------------------------------------------------------------------------------------------------------------------


def write_shards(found: Scan, out: Path, *, per_shard: int = PER_SHARD, largest: int = LARGEST_SHARD, force: bool = False) -> list[Path]:
    """Writes the good pictures of a folder, as they are, into `out/000000.tar`, ...; in an order by content, so that like does not lie by like.

    Raises FileError where `out` holds shards already and not `force`.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard (={per_shard}) must be at least 1")
    out = Path(out)
    before = sorted(out.glob("*.tar"))
    if before and not force:
        raise FileError(f"{out} holds {len(before)} shards already: use --force to replace them, or another --out")
    entries = sorted(found.entries, key=lambda e: (e.digest, e.name))
    written = []
    with tqdm(total=len(entries), desc=translated("writing shards"), unit=" pictures", leave=False) as bar:
        for part in _parts(entries, per_shard, largest):
            path = out / f"{len(written):06d}.tar"
            with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                for i, entry in enumerate(part):
                    for suffix, data in _members(found, entry):
                        info = tarfile.TarInfo(f"{i:06d}{suffix}")
                        info.size = len(data)
                        tar.addfile(info, BytesIO(data))
                    bar.update()
            written.append(path)
    for old in set(before) - set(written):
        old.unlink()
    return written


def _parts(entries: Sequence[Entry], per_shard: int, largest: int) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    size = 0
    for e in entries:
        if part and (len(part) == per_shard or size + e.stamp[0] > largest):
            yield part
            part, size = [], 0
        part.append(e)
        size += e.stamp[0]
    if part:
        yield part


def _members(found: Scan, entry: Entry) -> Iterator[tuple[str, bytes]]:
    try:
        data = read(found.files[entry.name])
    except Unreadable as e:
        raise FileError(f"{entry.name} {e}, though it was a good picture when the folder was scanned: give the command again") from None
    yield os.path.splitext(entry.name)[1].lower(), data
    if entry.caption is not None:
        yield ".txt", entry.caption.encode()
    yield ".json", json.dumps({"name": entry.name, "labels": entry.labels}).encode()


# --- reading ------------------------------------------------------------------------------------------------------------------------------------


class Shards:
    """A set of shards: a folder of .tar files, or the files themselves. Samples are numbered through all of them, in the order of the names."""

    def __init__(self, where: Path | str | Sequence[Path]) -> None:
        if isinstance(where, (str, Path)):
            self.paths = sorted(Path(where).glob("*.tar")) if Path(where).is_dir() else [Path(where)]
        else:
            self.paths = [Path(p) for p in where]
        if not self.paths:
            raise FileError(f"{where} holds no .tar file")
        self._index = self._mapped()
        self._count()
        if not len(self._index):
            raise FileError(f"{where} holds no sample with a picture")

    def _count(self) -> None:
        counts = np.bincount(self._index[:, 0], minlength=len(self.paths)) if len(self._index) else np.zeros(len(self.paths), dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def part(self, start: int, end: int) -> Shards:
        """The samples from `start` to before `end` alone, numbered from 0."""
        other = copy(self)
        other._index = self._index[start:end]
        other._count()
        return other

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Sample:
        """The i-th sample. Raises FileError where the shard has changed."""
        row = [int(v) for v in self._index[i]]
        path = self.paths[row[0]]
        with open(path, "rb") as f:
            data = _at(f, row[1], row[2])
        if len(data) != row[2]:
            raise FileError(f"{path} is shorter than its index says: it was cut or is being written")
        own, caption, labels = self.words(i)
        return Sample(f"{path.name}/{own or i - self._starts[row[0]]}", data, caption, labels)

    def words(self, i: int) -> tuple[str | None, str | None, dict[str, str]]:
        """What the i-th sample is called where it comes from, its caption and its labels; the picture is not read."""
        row = [int(v) for v in self._index[i]]
        with open(self.paths[row[0]], "rb") as f:
            caption, labels = _at(f, row[3], row[4]), _at(f, row[5], row[6])
        try:
            told = json.loads(labels) if labels else {}
        except ValueError as e:
            raise FileError(f"{self.paths[row[0]]}: the JSON of sample {i} cannot be read ({e}): write these shards again") from None
        told = told if isinstance(told, dict) else {}
        named = told["labels"] if isinstance(told.get("labels"), dict) else told  # ours, or anybody's
        named = {k: v for k, v in named.items() if isinstance(v, (str, int, float))}
        own = told.get("name")
        return own, " ".join(caption.decode("utf-8", "replace").split()) or None, {k: str(v) for k, v in named.items()}

    def order(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Which samples stand at `positions` of the endless order of training: each once an epoch, shuffled anew in every one."""
        n, out = len(self), np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(positions // n):
            windows, starts = self._windows(seed, int(epoch))
            here = np.flatnonzero(positions // n == epoch)
            within = positions[here] % n
            at = np.searchsorted(starts, within, side="right") - 1
            for w in np.unique(at):
                samples = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in windows[w]])
                mixed = numpy_rng(seed, f"shards/{epoch}/window", int(w)).permutation(samples)
                mine = here[at == w]
                out[mine] = mixed[within[at == w] - starts[w]]
        return out

    def _windows(self, seed: int, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each window of an epoch, and the position at which each window begins."""
        shards = numpy_rng(seed, "shards/order", epoch).permutation(len(self.paths))
        windows = [shards[i : i + WINDOW] for i in range(0, len(shards), WINDOW)]
        sizes = [int(sum(self._starts[s + 1] - self._starts[s] for s in w)) for w in windows]
        return windows, np.concatenate([[0], np.cumsum(sizes)])

    def check(self) -> Iterator[Bad]:
        """Decodes every picture, and names those that cannot be used."""
        for i in tqdm(range(len(self)), desc=translated("looking at pictures"), unit=" files", leave=False):
            sample = self[i]
            try:
                decode(sample.data)
            except Unreadable as e:
                yield Bad(sample.name, e.kind, str(e))

    # --- the index ----------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def stamp(self) -> str:
        """Changes when a shard does."""
        facts = [(os.path.realpath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths if p.exists()]
        return hashlib.sha256(json.dumps([INDEX_VERSION, facts]).encode()).hexdigest()[:24]

    def _mapped(self) -> np.ndarray:
        """The index "samples COLUMNS", mapped from the cache folder; made first where it is missing."""
        for p in self.paths:
            if not p.is_file():
                raise FileError(f"there is no shard {p}")
        path = cache_folder() / f"shards-{self.stamp}.npy"
        if not path.exists():
            bar = tqdm(self.paths, desc=translated("indexing"), unit=" shards", leave=False)
            rows = [np.array(list(_rows(i, p)), dtype=np.int64).reshape(-1, COLUMNS) for i, p in enumerate(bar)]
            with replacing(path) as temporary, open(temporary, "wb") as f:
                np.save(f, np.concatenate(rows))
        return np.load(path, mmap_mode="r")


def are_shards(where: Path | str) -> bool:
    """Whether a path is one shard, or a folder that holds some and neither pictures nor folders."""
    where = Path(where)
    if not where.is_dir():
        return where.suffix.lower() == ".tar"
    names = [p.name.lower() for p in where.iterdir() if not p.name.startswith(".") and (p.suffix.lower() in (".tar", *SUFFIXES) or p.is_dir())]
    return bool(names) and all(n.endswith(".tar") for n in names)


# --- training on them ---------------------------------------------------------------------------------------------------------------------------


class ShardPictures:
    """Samples of shards as training reads pictures: decoded when they are asked for, by `workers` threads (0: one a core).

    `pixels[rows]` is uint8 "b 4 size size", premultiplied: what `Pictures.pixels` would hold. Nothing is kept.
    """

    def __init__(self, shards: Shards, size: int, workers: int = 0) -> None:
        self.shards, self.size, self.workers = shards, size, workers or os.cpu_count() or 1
        self.style, self.may_flip = np.zeros(len(shards), dtype=np.int8), np.ones(len(shards), dtype=bool)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def pixels(self) -> ShardPictures:
        return self

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        import torch

        wanted = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        with ThreadPoolExecutor(self.workers) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._square, wanted))))

    def _square(self, row: int) -> np.ndarray:
        sample = self.shards[row]
        try:
            return square(decode(sample.data), self.size)
        except Unreadable as e:
            raise FileError(f"{sample.name} {e}: `sfumato data check` names all that are bad; `sfumato data shard` leaves them out") from None


def split_shards(where: Path | str, size: int, fraction: float = 0.05) -> tuple[ShardPictures, ShardPictures]:
    """(training, validation): the last samples are kept apart.

    Shards of `sfumato data shard` lie in an order by content, so copies stay together; of others that are sorted, the last kinds are kept apart.
    """
    shards = Shards(Path(where))
    if len(shards) < 2:
        raise FileError(f"{where} holds a single picture: training needs two at least")
    cut = len(shards) - min(max(int(len(shards) * fraction), 1), MOST_EXACT)
    while cut > 1 and shards[cut - 1].data == shards[cut].data:
        cut -= 1
    return ShardPictures(shards.part(0, cut), size), ShardPictures(shards.part(cut, len(shards)), size)


def same_source(run: Path, where: Path | str, *, words: bool = True) -> None:
    """Notes in a run folder what it is trained on, or raises ValueError where a folder (with `words`, its captions too) or shards have changed."""
    if are_shards(where):
        same_shards(run, where)
    else:
        same_pictures(run, scan(where, progress=False), words=words)


def same_shards(run: Path, where: Path | str) -> None:
    """Notes in a run folder which shards it is trained on, or raises ValueError where they have changed since the run was begun.

    When it begins every picture is looked at: nothing bad is met in the middle of a training. Raises FileError where one is.
    """
    shards = Shards(Path(where))
    bad = [] if (run / "data.json").exists() else list(shards.check())
    if bad:
        raise FileError(
            f"{len(bad)} of {len(shards)} pictures in {where} cannot be used, such as {bad[0].name}, which {bad[0].reason}: "
            "unpack them, and `sfumato data shard` leaves them out"
        )
    facts = [(p.name, p.stat().st_size) for p in shards.paths]
    same_data(run, where, {"pictures": len(shards), "digest": hashlib.sha256(json.dumps(facts).encode()).hexdigest()})


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    if not size:
        return b""
    file.seek(offset)
    return file.read(size)


def _rows(shard: int, path: Path) -> Iterator[list[int]]:
    """The index of one shard: its members grouped by what stands before their first dot, as WebDataset does."""
    key, row, size = None, [0] * COLUMNS, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise FileError(f"{path} is cut off: it ends within {member.name}; get it again")
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if (folder, stem) != key:
                    if row[2]:
                        yield row
                    key, row = (folder, stem), [shard] + [0] * (COLUMNS - 1)
                column = 1 if f".{suffix.lower()}" in SUFFIXES else {"txt": 3, "json": 5}.get(suffix.lower())
                if column is not None:
                    row[column : column + 2] = [member.offset_data, member.size]
                tar.members = []  # type: ignore[assignment]  # tarfile would remember every member
        if row[2]:
            yield row
    except (tarfile.TarError, EOFError, OSError) as e:
        raise FileError(f"{path} is not a readable tar file: {e}; compressed ones must be unpacked to plain .tar") from None
