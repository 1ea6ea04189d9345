"""`sfumato data check | show | shard DIR`: what a folder of pictures, or of shards, is good for, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from sfumato.apps.cli import OUT
from sfumato.core.checkpoint import FileError
from sfumato.core.images import Unreadable, decode, grid, png_bytes, write_bytes
from sfumato.data.folder import TOO_MANY_BAD, Entry, Scan, check, framed, near_duplicates, open_picture, passed_over, scan, split, survey
from sfumato.data.shards import PER_SHARD, Shards, are_shards, write_shards

SHOWN = 20  # lines of one kind, unless all are asked for


@dataclass(frozen=True)
class Check:
    """Looks at every picture of a folder, a zip or shards and names what cannot be used, with the reason."""

    folder: Annotated[Path, tyro.conf.Positional]
    strict: bool = False
    """End with status 2 if a single file is bad, not only if more than one in ten is."""
    all: bool = False
    """Name all bad files, not the first 20."""
    workers: int = 0
    """Files that are looked at together; 0: one a core."""


@dataclass(frozen=True)
class Show:
    """Puts pictures of a folder, a zip or shards on one sheet, as training reads them, and prints their names, captions and labels."""

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path = OUT / "data.png"
    """The PNG to write."""
    count: int = 36
    """How many; evenly from the whole folder."""
    size: int = 128
    """Pixels of a side."""
    force: bool = False
    """Overwrite a file that exists."""


@dataclass(frozen=True)
class Shard:
    """Writes a folder or zip as WebDataset shards, for sets too large to be looked at anew each time; bad files are left out and named."""

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path
    """The folder of the shards."""
    per_shard: int = PER_SHARD
    """Pictures of one shard, at most; and at most 256 MiB."""
    strict: bool = False
    """Refuse where a single file is bad."""
    force: bool = False
    """Replace shards that are there already."""


def run_shard(asked: Shard) -> Iterator[str]:
    """Lines to print; the folder is the last."""
    found = scan(asked.folder, strict=asked.strict)
    yield from (f"left out: {b.name} {b.reason}" for b in found.bad)
    if found.others:
        yield f"passed over, as they cannot be read here: {passed_over(found)}"
    paths = write_shards(found, asked.out, per_shard=asked.per_shard, force=asked.force)
    yield f"{len(found.entries)} pictures in {len(paths)} shards"
    yield str(asked.out)


def _check_shards(asked: Check) -> Iterator[str]:
    shards = Shards(asked.folder)
    yield f"pictures: {len(shards)} in {len(shards.paths)} shards"
    yield "near-duplicates are not looked for in shards: check the folder that they are made from"
    bad = list(shards.check())
    limit = len(bad) if asked.all else SHOWN
    yield f"bad: {len(bad)}"
    yield from (f"  {b.name} {b.reason}" for b in bad[:limit])
    if len(bad) > limit:
        yield f"  and {len(bad) - limit} more: --all names them"
    if bad and (asked.strict or len(bad) > TOO_MANY_BAD * len(shards)):
        raise FileError(f"{len(bad)} of {len(shards)} pictures in {asked.folder} cannot be used, such as {bad[0].name}, which {bad[0].reason}")


def run_check(asked: Check) -> Iterator[str]:
    """Lines to print. Raises FileError, after all lines, where one could not train on the folder."""
    if are_shards(asked.folder):
        yield from _check_shards(asked)
        return
    found = survey(asked.folder, workers=asked.workers)
    yield from _facts(found)
    if found.others:
        yield f"passed over, as they cannot be read here: {passed_over(found)}"
    limit = len(found.bad) if asked.all else SHOWN
    if found.bad:
        yield f"bad: {len(found.bad)} ({', '.join(f'{n} {kind}' for kind, n in found.kinds.items())})"
        yield from (f"  {b.name} {b.reason}" for b in found.bad[:limit])
        if len(found.bad) > limit:
            yield f"  and {len(found.bad) - limit} more: --all names them"
    yield from _remarks(found.entries, limit)
    train, held = split(found.entries)
    yield f"split: {len(train)} for training, {len(held)} for validation"
    pairs = near_duplicates(train, held)
    if pairs:
        yield f"near-duplicates across the split: {len(pairs)}; what is measured on them flatters"
        yield from (f"  {a.name} and {b.name}" for a, b in pairs[:limit])
    check(found, asked.strict)


def _facts(found: Scan) -> Iterator[str]:
    entries = found.entries
    yield f"pictures: {len(entries)}"
    if not entries:
        return
    sides = sorted(min(e.width, e.height) for e in entries)
    yield f"shorter sides: {sides[0]} to {sides[-1]} pixels, half of them {sides[len(sides) // 2]} or more"
    yield f"with transparency: {sum(e.transparent for e in entries)}"
    yield f"with a caption: {sum(e.caption is not None for e in entries)}"
    for name, values in sorted(_labels(entries).items()):
        most = ", ".join(f"{v} ({n})" for v, n in values.most_common(6))
        yield f"label {name}: {len(values)} values: {most}{', ...' if len(values) > 6 else ''}"
    copies = len(entries) - len({e.digest for e in entries})
    if copies:
        yield f"exact copies: {copies}"


def _labels(entries: tuple[Entry, ...]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for e in entries:
        for name, value in e.labels.items():
            found.setdefault(name, Counter())[value] += 1
    return found


def _remarks(entries: tuple[Entry, ...], limit: int) -> Iterator[str]:
    noted = [(e.name, n) for e in entries for n in e.notes]
    if noted:
        yield f"remarks: {len(noted)}; these pictures are used all the same"
        yield from (f"  {name} {note}" for name, note in noted[:limit])
        if len(noted) > limit:
            yield f"  and {len(noted) - limit} more: --all names them"


def run_show(asked: Show) -> Iterator[str]:
    """Lines to print; the sheet's path is the last."""
    if not 1 <= asked.count <= 1024:
        raise ValueError(f"count (={asked.count}) must be between 1 and 1,024")
    if not 8 <= asked.size <= 1024:
        raise ValueError(f"size (={asked.size}) must be between 8 and 1,024 pixels")
    if asked.out.exists() and not asked.force:
        raise FileError(f"{asked.out} exists: use --force to overwrite it, or another --out")
    images, lines = [], []
    for image, name, caption, labels in _some(asked):
        images.append(framed(image, asked.size))
        lines.append("\t".join([name, caption or "", ", ".join(f"{k}: {v}" for k, v in labels.items())]).rstrip())
    write_bytes(asked.out, png_bytes(grid(images, gap=4)))
    yield from lines
    yield str(asked.out)


def _some(asked: Show) -> Iterator[tuple[Image.Image, str, str | None, dict[str, str]]]:
    """Evenly chosen pictures with their names, captions and labels."""
    if are_shards(asked.folder):
        shards = Shards(asked.folder)
        for i in _evenly(len(shards), asked.count):
            sample = shards[i]
            try:
                yield decode(sample.data), sample.name, sample.caption, sample.labels
            except Unreadable as e:
                raise FileError(f"{sample.name} {e}: `sfumato data check {asked.folder}` names all that are bad") from None
        return
    found = scan(asked.folder)
    for i in _evenly(len(found.entries), asked.count):
        e = found.entries[i]
        yield open_picture(found, e), e.name, e.caption, e.labels


def _evenly(n: int, count: int) -> list[int]:
    return [int(i * max(1, n / count)) for i in range(min(count, n))]
