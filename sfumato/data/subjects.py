"""What a generator is taught: pictures, and what is said of each. The embedded drawings and one's own folder, behind one face."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sfumato.core.language import translated
from sfumato.data.augment import Rows, Scene, Variety, draw_scene
from sfumato.data.captions import FILLER, any_caption
from sfumato.data.emoji import LANGUAGES, STYLES, Drawings, art_digest, concepts, credits, drawable, drawings
from sfumato.data.folder import MOST_EXACT, Entry, Scan, evenly, pixels_of, scan, split
from sfumato.data.shards import are_shards, split_shards

EMOJI = "emoji"
PREVIEW = (("a cat", 1), ("a red apple", 0), ("一只狐狸", 2), ("蓝色的鲸鱼", 3), ("a rocket", 4), ("a frog", 5), ("sunflower", 0), ("汉堡", 1),
           ("a purple dog", 0), ("guitar", 2), ("两只猫", 1), ("a penguin in the snow", 0))  # fmt: skip
LISTED = 1000  # captions that a model of one's own pictures remembers, to say what it can draw
MOST_WORDS = 20_000
MOST_CLASSES = 1000
Words = tuple[str | None, dict[str, str]]  # a caption, and labels by their column
Column = tuple[list[str], np.ndarray]  # the values of a label, and the index among them of each row
Labels = Literal["none", "group", "concept", "auto"]


@dataclass(frozen=True)
class Shown:
    """Pictures with what is said of them: pixels "n 4 s s" in [0, 1], premultiplied; caption None: nothing; style and label -1: none."""

    pixels: Tensor
    captions: list[str | None]
    style: np.ndarray
    label: np.ndarray


class Subjects(Protocol):
    """Row i of `pixels` (`pixels[rows]` is uint8 "b 4 s s", premultiplied) has style[i] of `styles` and label[i] of `labels`; -1 is none."""

    pixels: Tensor | Rows
    style: np.ndarray
    label: np.ndarray
    styles: list[str]
    labels: list[str]
    captioned: bool
    digest: str

    def scene(self, row: int, variety: Variety, rng: np.random.Generator) -> Scene:
        """A picture about a row."""
        ...

    def caption(self, scene: Scene, rng: np.random.Generator) -> str | None:
        """What is said of a scene; None: nothing."""
        ...

    def names(self) -> list[list[str]]:
        """The things that a memory keeps, each with what it is called."""
        ...

    def validation(self) -> Shown:
        """Pictures that no training sees, at half the side of `pixels`, as they are."""
        ...

    def preview(self) -> list[tuple[str | None, int, int]]:
        """What the sample grids show: caption, style, label."""
        ...

    def about(self) -> dict[str, Any]:
        """What a pack says of them: the words that it knows, and whose works they are."""
        ...


def subjects(data: str, size: int, *, limit: int = 0, labels: Labels = "auto") -> Subjects:
    """The embedded drawings for "emoji", else the pictures of a folder, a zip or shards; `pixels` have twice `size`: moving them loses nothing."""
    if data == EMOJI:
        return Emoji(size, limit, labels)
    if labels in ("group", "concept"):
        raise ValueError(f"labels (={labels!r}) is of the embedded drawings: auto or none are for one's own pictures")
    return Own(of_shards(data, 2 * size) if are_shards(data) else of_a_folder(scan(data), 2 * size), labels)


class Emoji:
    """The embedded drawings that no one holds out; `limit` takes the first concepts only."""

    captioned = True

    def __init__(self, size: int, limit: int = 0, labels: Labels = "none") -> None:
        self.styles = list(STYLES)
        self.known = concepts()[:limit] if limit else drawable()
        art = drawings(2 * size, self.known if limit else None)
        wanted = {c.index for c in self.known}
        art = art.rows(np.array([c in wanted for c in art.concept]))
        self.kept_apart, self.art = art.rows(art.held_out), art.rows(~art.held_out)
        self.pixels, self.style = self.art.pixels, self.art.style
        self.flips, self.recolours = self.art.may_flip, self.art.may_recolour
        self.of_style = [np.flatnonzero(self.style == s) for s in range(len(STYLES))]
        self.labels, self.label_of = self._labels("none" if labels == "auto" else labels)
        self.label = self.label_of[self.art.concept]
        self.digest = hashlib.sha256(f"{art_digest()} {self.art.concept.tolist()} {self.art.style.tolist()}".encode()).hexdigest()[:12]

    def _labels(self, labels: Labels) -> tuple[list[str], np.ndarray]:
        """The names of the labels, and the label of each concept (by its index)."""
        known = concepts()
        if labels == "group":
            names = sorted({known[c].group for c in self.art.concept})
            return names, np.array([names.index(c.group) if c.group in names else -1 for c in known])
        if labels == "concept":
            there = sorted(set(self.art.concept.tolist()))
            return [known[c].name for c in there], np.array([there.index(i) if i in there else -1 for i in range(len(known))])
        return [], np.full(len(known), -1)

    def scene(self, row: int, variety: Variety, rng: np.random.Generator) -> Scene:
        others = self.of_style[self.style[row]]
        friend = int(rng.choice(others[self.art.concept[others] != self.art.concept[row]]))
        return draw_scene(rng, variety, row, bool(self.flips[row]), [(friend, bool(self.flips[friend]))], bool(self.recolours[row]))

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        return any_caption(scene, [int(self.art.concept[i.drawing]) for i in scene.items], rng)[0]

    def names(self) -> list[list[str]]:
        return [[c.names[t] for t in LANGUAGES] for c in self.known]

    def validation(self) -> Shown:
        of: Drawings = self.kept_apart if len(self.kept_apart) else self.art.rows(np.arange(len(self.art)) < 8)
        captions: list[str | None] = [concepts()[c].names["en" if i % 2 else "zh"] for i, c in enumerate(of.concept)]
        return Shown(F.avg_pool2d(of.pixels.float() / 255, 2), captions, of.style, self.label_of[of.concept])

    def preview(self) -> list[tuple[str | None, int, int]]:
        return [(prompt, style, i % len(self.labels) if self.labels else -1) for i, (prompt, style) in enumerate(PREVIEW)]

    def about(self) -> dict[str, Any]:
        words = {c.hexcode: {t: [c.names[t], *c.keywords[t]] for t in LANGUAGES} | {"emoji": [c.emoji], "group": [c.group]} for c in self.known}
        return {"words": words, "filler": FILLER, "credits": credits()}


@dataclass(frozen=True)
class Source:
    """One's own pictures, wherever they lie: `pixels[rows]` is uint8 "b 4 s s", premultiplied; `words(i)` is what is said of row i.

    `unseen` gives pictures that no training sees with what is said of them: of many some; where there are none, the first that are trained on.
    """

    name: str
    count: int
    digest: str
    pixels: Tensor | Rows
    words: Callable[[int], Words]
    unseen: Callable[[], tuple[Tensor, list[Words]]]


def of_a_folder(found: Scan, side: int) -> Source:
    train, unseen = split(found.entries)
    said = lambda e: (e.caption, e.labels)  # noqa: E731
    chosen = [unseen[i] for i in evenly(len(unseen), MOST_EXACT)] or train[:8]
    return Source(
        name=Path(found.root).name,
        count=len(train),
        digest=hashlib.sha256("".join(e.digest for e in train).encode()).hexdigest()[:12],
        pixels=pixels_of(found, train, side).pixels,
        words=lambda i: said(train[i]),
        unseen=lambda: (pixels_of(found, chosen, side).pixels, [said(e) for e in chosen]),
    )


def of_shards(where: str, side: int) -> Source:
    """Captions are read when they are asked for."""
    train, held = split_shards(where, side)
    rows = evenly(len(held), MOST_EXACT)
    facts = [(p.name, p.stat().st_size) for p in train.shards.paths]
    return Source(
        name=Path(where).name,
        count=len(train),
        digest=hashlib.sha256(f"{len(train)} {facts}".encode()).hexdigest()[:12],
        pixels=train,
        words=lambda i: train.shards.words(i)[1:],
        unseen=lambda: (held[torch.tensor(rows)], [held.shards.words(i)[1:] for i in rows]),
    )


class Own:
    """Pictures with captions as they are written; the label `style` gives styles, sub-folders (or one other label) give labels.

    Of as many as there are, only classes are held, a number a picture, and MOST_WORDS different captions.
    """

    def __init__(self, source: Source, labels: Labels = "auto") -> None:
        self.source, self.pixels, self.digest = source, source.pixels, source.digest
        self.counted, columns = _columns_of(source.count, source.words)
        self.captioned = bool(self.counted)
        self.styles, self.style = _classes(columns, "style", source.count)
        self.column = None if labels == "none" else _label_column(columns, source.count)
        self.labels, self.label = _classes(columns, self.column, source.count)

    def scene(self, row: int, variety: Variety, rng: np.random.Generator) -> Scene:
        """Without what a caption that is given once would have to say."""
        return draw_scene(rng, replace(variety, recolour=0.0, count=0.0, pair=0.0, scene=0.0), row, True)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str | None:
        return self.source.words(scene.items[0].drawing)[0]

    def names(self) -> list[list[str]]:
        return [[c] for c in self.counted]

    def validation(self) -> Shown:
        pixels, said = self.source.unseen()
        indices = lambda column, names: np.array([names.index(v) if (v := told.get(column)) in names else -1 for _, told in said])  # noqa: E731
        return Shown(F.avg_pool2d(pixels.float() / 255, 2), [c for c, _ in said], indices("style", self.styles), indices(self.column, self.labels))

    def preview(self) -> list[tuple[str | None, int, int]]:
        return [(self.source.words(i)[0], int(self.style[i]), int(self.label[i])) for i in evenly(self.source.count, 12)]

    def about(self) -> dict[str, Any]:
        spoken: Counter[str] = Counter()
        for caption, n in self.counted.items():
            spoken.update(dict.fromkeys(set(re.findall(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+", caption)), n))
        listed = enumerate(self.counted.most_common(LISTED))
        words = {f"caption {i}": {"en": [c], "zh": [""], "zh-hant": [""], "emoji": [""]} for i, (c, _) in listed}
        whose = {"attribution": f"{self.source.count} pictures of {self.source.name}", "licence": "not said", "home": ""}
        return {"words": words, "filler": [*FILLER, *(w for w, _ in spoken.most_common(MOST_WORDS))], "credits": [whose]}


def classes_in(entries: Sequence[Entry]) -> tuple[list[str], str | None, list[str]]:
    """What `Own` would learn of pictures: styles, the column of the classes, classes. Raises ValueError where it would."""
    _, columns = _columns_of(len(entries), lambda i: (entries[i].caption, entries[i].labels))
    column = _label_column(columns, len(entries))
    return _classes(columns, "style", len(entries))[0], column, _classes(columns, column, len(entries))[0]


def _columns_of(count: int, words: Callable[[int], Words]) -> tuple[Counter[str], dict[str, Column]]:
    """How often each caption is said, up to MOST_WORDS different ones, and each label's values with their index of every row (-1: none)."""
    counted: Counter[str] = Counter()
    found: dict[str, tuple[dict[str, int], np.ndarray]] = {}
    for i in tqdm(range(count), desc=translated("reading captions"), unit=" samples", leave=False, delay=1):
        caption, labels = words(i)
        if caption and (caption in counted or len(counted) < MOST_WORDS):
            counted[caption] += 1
        for column, value in labels.items():
            values, rows = found.setdefault(column, ({}, np.full(count, -1, dtype=np.int32)))
            if len(values) <= MOST_CLASSES:  # more are no classes: it is enough to know that there are more
                rows[i] = values.setdefault(value, len(values))
    return counted, {c: (list(values), rows) for c, (values, rows) in found.items()}


def _label_column(columns: dict[str, Column], count: int) -> str | None:
    """The label that tells pictures into classes: sub-folders, else the first other column, with two values or more that recur; None: none does."""
    others = sorted((c for c in columns if c != "style"), key=lambda c: c != "folder")
    return next((c for c in others if 2 <= len(columns[c][0]) <= min(MOST_CLASSES, max(count // 2, 2))), None)


def _classes(columns: dict[str, Column], column: str | None, count: int) -> tuple[list[str], np.ndarray]:
    """The values of a label in their order, none where there is only one, and the index of each row among them, -1 for none."""
    values, rows = columns.get(column or "", ([], np.zeros(0, dtype=np.int32)))
    names = sorted(values)
    if len(names) < 2:
        return [], np.full(count, -1)
    if len(names) > MOST_CLASSES:
        raise ValueError(f"the label {column} has more than {MOST_CLASSES:,} values: these are captions, not classes")
    if column == "style":
        _check_styles(names)
    places = np.array([*(names.index(v) for v in values), -1])  # the last is for -1
    return names, places[rows]


def _check_styles(names: list[str]) -> None:
    if odd := next((n for n in names if n != unicodedata.normalize("NFKC", n).strip() or set(n) & set(",:、")), None):
        raise ValueError(
            f"style (={odd!r}) must be plain letters without comma and colon, which mean mixtures of styles: write it otherwise in the metadata"
        )
