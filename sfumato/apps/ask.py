"""Questions about models and files: `sfumato styles`, `concepts`, `models`, `info`. Each answer is lines to print; no torch is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sfumato.apps.describe import describe
from sfumato.core.checkpoint import FileError, read_metadata
from sfumato.pipelines.find import bundled, find
from sfumato.text.words import nearest_words, normalise


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
    """Prints the models that come with this installation: name, size, file."""


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
    yield from _meta(asked.model)["styles"]


def concepts(asked: Concepts) -> Iterator[str]:
    if asked.word is not None and not asked.word.strip():
        raise ValueError("word is empty: name a thing, or leave it out to see everything")
    rows = list(_meta(asked.model)["words"].values())
    if asked.word is not None:
        rows = _called(asked.word, rows)
    for row in {r["emoji"][0]: r for r in rows}.values():
        yield f"{row['emoji'][0]}\t{row['en'][0]}\t{row['zh'][0]}"


def _called(word: str, rows: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    wanted = normalise(word)
    exact = [r for r in rows if any(wanted == normalise(w) for t in ("emoji", "en", "zh", "zh-hant") for w in r[t])]
    if exact:
        return exact
    named = {normalise(w): r for r in rows for t in ("en", "zh") for w in r[t] if w}
    near = [named[w] for w in nearest_words(word, named, 8)]
    print(f"nothing is called {word!r}" + ("; the nearest are" if near else ""), file=sys.stderr)
    return near


def models(asked: Models) -> Iterator[str]:
    for name, path in bundled().items():
        yield f"{name}\t{path.stat().st_size / 1e6:.1f} MB\t{path}"


def info(asked: Info) -> Iterator[str]:
    for key, value in describe(asked.file).items():
        yield f"{key}: {value}"


QUESTIONS: dict[str, tuple[type, Callable[[Any], Iterator[str]]]] = {
    "styles": (Styles, styles),
    "concepts": (Concepts, concepts),
    "models": (Models, models),
    "info": (Info, info),
}
