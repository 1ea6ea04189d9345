"""Questions about models and files: `sfumato styles`, `concepts`, `models`, `info`. Each answer is lines to print; no torch is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sfumato.apps.cli import OUT, say
from sfumato.apps.describe import describe
from sfumato.core.checkpoint import FileError, cache_folder, read_metadata, size_of
from sfumato.pipelines.find import bundled, find
from sfumato.text.words import nearest_words, normalise

# what we keep in the cache folder
OURS = re.compile(r"\.?(bench-lite0|emoji|features|folder|hash|pixels|shards)-.*\.(safetensors|npy|jsonl|txt|part)")


@dataclass(frozen=True)
class Styles:
    """Prints the styles of a model, one a line."""

    model: str | None = None
    """A model file, a run folder or the name of a bundled model."""


@dataclass(frozen=True)
class Concepts:
    """Prints what a model can draw: emoji, English name, Chinese name. With a word: what is called so, or else what is near."""

    word: Annotated[str | None, tyro.conf.Positional] = None
    """In English or Chinese, or an emoji."""
    model: str | None = None
    """A model file, a run folder or the name of a bundled model."""


@dataclass(frozen=True)
class Models:
    """Prints the models that come with this installation: name, kind, size, file."""


@dataclass(frozen=True)
class Credits:
    """Prints whose works a model learned from, with their licences: of the bundled model, another one, or the one that drew a picture."""

    file: Annotated[Path | None, tyro.conf.Positional] = None
    """A model file, a run folder or one of our pictures."""


@dataclass(frozen=True)
class Paths:
    """Prints where sfumato keeps things, and how large they are."""

    clean: bool = False
    """Remove what is kept to save time (rasterised drawings, looked-at folders); it is made again when it is needed."""


@dataclass(frozen=True)
class Info:
    """Says what a model file, a run folder or a picture is, by its content."""

    file: Annotated[Path, tyro.conf.Positional]


def _meta(model: str | None) -> dict[str, Any]:
    path = find(model)
    meta = read_metadata(path)
    if "words" not in meta:
        raise FileError(f"{path} holds no model that draws from words")
    return meta


def styles(asked: Styles) -> Iterator[str]:
    found = _meta(asked.model)["styles"]
    if not found:
        say("note: this model has no styles")
    yield from found


def concepts(asked: Concepts) -> Iterator[str]:
    if asked.word is not None and not asked.word.strip():
        raise ValueError("word is empty: name a thing, or leave it out to see everything")
    rows = list(_meta(asked.model)["words"].values())
    if not rows:
        say("note: this model knows nothing by name: it was trained without captions")
    if asked.word is not None and rows:
        rows = _called(asked.word, rows)
    for row in {r["emoji"][0] or r["en"][0]: r for r in rows}.values():
        yield "\t".join(w for w in (row["emoji"][0], row["en"][0], row["zh"][0]) if w)


def _called(word: str, rows: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    wanted = normalise(word)
    exact = [r for r in rows if any(wanted == normalise(w) for t in ("emoji", "en", "zh", "zh-hant") for w in r[t])]
    if exact:
        return exact
    named = {normalise(w): r for r in rows for t in ("en", "zh") for w in r[t] if w}
    near = [named[w] for w in nearest_words(word, named, 8)]
    say(f"nothing is called {word!r}" + ("; the nearest are" if near else ""))
    return near


def models(asked: Models) -> Iterator[str]:
    for name, path in bundled().items():
        yield f"{name}\t{read_metadata(path).get('kind')}\t{path.stat().st_size / 1e6:.1f} MB\t{path}"


def info(asked: Info) -> Iterator[str]:
    file = asked.file if asked.file.exists() else bundled().get(str(asked.file), asked.file)
    for key, value in describe(file).items():
        yield f"{key}: {value}"


def credits(asked: Credits) -> Iterator[str]:
    if asked.file is not None and asked.file.suffix.lower() in (".png", ".apng", ".webp", ".gif"):
        told = describe(asked.file).get("source")
        if told is None:
            raise FileError(f"{asked.file} does not say where it comes from: it was drawn by something else, or its metadata was stripped")
        yield str(told)
        return
    path = find(asked.file)
    found = read_metadata(path).get("credits")
    if not found:
        raise FileError(f"{path} does not say whose works it learned from")
    for c in found:  # type: ignore[attr-defined]
        yield f"{c['attribution']}\t{c['licence']}\t{c['home']}"


def paths(asked: Paths) -> Iterator[str]:
    kept = [p for p in sorted(cache_folder().glob("*")) if p.is_file() and OURS.fullmatch(p.name)]
    graphs = cache_folder() / "engine"
    of_graphs = size_of(graphs) / 1e6
    size = sum(p.stat().st_size for p in kept) / 1e6 + of_graphs
    if asked.clean:
        for p in kept:
            p.unlink()
        shutil.rmtree(graphs, ignore_errors=True)
        yield f"removed\t{size:.1f} MB\t{len(kept)} files of {cache_folder()}, and graphs"
        return
    yield f"cache\t{size:.1f} MB\t{cache_folder()}"
    if graphs.exists():
        yield f"graphs\t{of_graphs:.1f} MB\t{graphs}"
    yield f"pictures\t\t{OUT.absolute()}"
    for name, path in bundled().items():
        yield f"model {name}\t{path.stat().st_size / 1e6:.1f} MB\t{path}"


QUESTIONS: dict[str, tuple[type, Callable[[Any], Iterator[str]]]] = {
    "styles": (Styles, styles),
    "concepts": (Concepts, concepts),
    "models": (Models, models),
    "credits": (Credits, credits),
    "paths": (Paths, paths),
    "info": (Info, info),
}
