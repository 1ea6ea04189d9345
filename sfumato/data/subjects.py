"""What a generator is taught: pictures, and what is said of each. The embedded drawings and one's own folder, behind one face."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
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
from sfumato.data.folder import Entry, Scan, evenly, pixels_of, scan, split
from sfumato.data.shards import Shards, are_shards, split_shards

EMOJI = "emoji"
PREVIEW = (("a cat", 1), ("a red apple", 0), ("一只狐狸", 2), ("蓝色的鲸鱼", 3), ("a rocket", 4), ("a frog", 5), ("sunflower", 0), ("汉堡", 1),
           ("a purple dog", 0), ("guitar", 2), ("两只猫", 1), ("a penguin in the snow", 0))  # fmt: skip
LISTED = 1000  # captions that a model of one's own pictures remembers, to say what it can draw
MOST_WORDS = 20_000
MOST_CLASSES = 1000
MOST_EXACT = 512  # pictures kept apart that are looked at while training
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
    if are_shards(data):
        return OwnShards(data, size, labels)
    return Own(scan(data), size, labels)


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


class Own:
    """The pictures of a folder: captions as they are written; the label `style` gives styles, sub-folders (or one other label) give labels."""

    def __init__(self, found: Scan, size: int, labels: Labels = "auto") -> None:
        self.found = found
        train, unseen = split(found.entries)
        kept = pixels_of(found, train, 2 * size)
        self.entries, self.unseen, self.size = kept.entries, unseen, size
        self.pixels = kept.pixels
        self.captioned = any(e.caption for e in self.entries)
        self.styles, self.style = _classes(self.entries, "style")
        self.labels, self.label = ([], np.full(len(train), -1)) if labels == "none" else _classes(self.entries, _label_column(self.entries))
        self.digest = hashlib.sha256("".join(e.digest for e in self.entries).encode()).hexdigest()[:12]

    def scene(self, row: int, variety: Variety, rng: np.random.Generator) -> Scene:
        return draw_scene(rng, _still_said(variety), row, True)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str | None:
        return self.entries[scene.items[0].drawing].caption

    def names(self) -> list[list[str]]:
        return [[c] for c in dict.fromkeys(e.caption for e in self.entries) if c]

    def validation(self) -> Shown:
        """Of many, some; without any, the first that are trained on."""
        chosen = [self.unseen[i] for i in evenly(len(self.unseen), MOST_EXACT)] or self.entries[:8]
        pixels = F.avg_pool2d(pixels_of(self.found, chosen, 2 * self.size).pixels.float() / 255, 2)
        style, label = (_indices(chosen, column, names) for column, names in (("style", self.styles), (_label_column(self.entries), self.labels)))
        return Shown(pixels, [e.caption for e in chosen], style, label)

    def preview(self) -> list[tuple[str | None, int, int]]:
        rows = np.linspace(0, len(self.entries) - 1, 12).round().astype(int)
        return [(self.entries[i].caption, int(self.style[i]), int(self.label[i])) for i in rows]

    def about(self) -> dict[str, Any]:
        return _about(Counter(e.caption for e in self.entries if e.caption), len(self.entries), Path(self.found.root).name)


class OwnShards:
    """Samples of shards, with what `Own` says of a folder. Captions are read when they are asked for; only classes are held, a number a sample."""

    def __init__(self, where: str, size: int, labels: Labels = "auto") -> None:
        self.where, self.size = Path(where), size
        self.part, self.held = split_shards(where, 2 * size)
        self.pixels = self.part
        self.counted, columns = _columns_of(self.part.shards)
        self.captioned = bool(self.counted)
        self.styles, self.style = _told_apart(columns, ["style"], len(self.part), checked=True)
        others = sorted((c for c in columns if c != "style"), key=lambda c: c != "folder")
        self.labels, self.label = _told_apart(columns, [] if labels == "none" else others, len(self.part))
        facts = [(p.name, p.stat().st_size) for p in self.part.shards.paths]
        self.digest = hashlib.sha256(f"{len(self.part)} {facts}".encode()).hexdigest()[:12]

    def scene(self, row: int, variety: Variety, rng: np.random.Generator) -> Scene:
        return draw_scene(rng, _still_said(variety), row, True)

    def caption(self, scene: Scene, rng: np.random.Generator) -> str | None:
        return self.part.shards.words(scene.items[0].drawing)[1]

    def names(self) -> list[list[str]]:
        return [[c] for c in self.counted]

    def validation(self) -> Shown:
        rows = evenly(len(self.held), MOST_EXACT)
        said = [self.held.shards.words(i) for i in rows]
        pixels = F.avg_pool2d(self.held[torch.tensor(rows)].float() / 255, 2)
        style = [self.styles.index(v) if (v := told.get("style")) in self.styles else -1 for _, _, told in said]
        label = [next((self.labels.index(v) for v in told.values() if v in self.labels), -1) for _, _, told in said]
        return Shown(pixels, [c for _, c, _ in said], np.array(style), np.array(label))

    def preview(self) -> list[tuple[str | None, int, int]]:
        return [(self.part.shards.words(i)[1], int(self.style[i]), int(self.label[i])) for i in evenly(len(self.part), 12)]

    def about(self) -> dict[str, Any]:
        return _about(self.counted, len(self.part), self.where.name)


def _still_said(variety: Variety) -> Variety:
    """A variety without what a caption that is given once would have to say."""
    return replace(variety, recolour=0.0, count=0.0, pair=0.0, scene=0.0)


def _about(counted: Counter[str], pictures: int, name: str) -> dict[str, Any]:
    """What a pack says of captions, which came so often."""
    spoken: Counter[str] = Counter()
    for caption, n in counted.items():
        spoken.update(dict.fromkeys(set(re.findall(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+", caption)), n))
    words = {f"caption {i}": {"en": [c], "zh": [""], "zh-hant": [""], "emoji": [""]} for i, (c, _) in enumerate(counted.most_common(LISTED))}
    whose = {"attribution": f"{pictures} pictures of {name}", "licence": "not said", "home": ""}
    return {"words": words, "filler": [*FILLER, *(w for w, _ in spoken.most_common(MOST_WORDS))], "credits": [whose]}


def _columns_of(shards: Shards) -> tuple[Counter[str], dict[str, tuple[list[str], np.ndarray]]]:
    """How often each caption is said, up to MOST_WORDS different ones, and each label's values with their index of every sample (-1: none)."""
    counted: Counter[str] = Counter()
    found: dict[str, tuple[dict[str, int], np.ndarray]] = {}
    for i in tqdm(range(len(shards)), desc=translated("reading captions"), unit=" samples", leave=False):
        _, caption, labels = shards.words(i)
        if caption and (caption in counted or len(counted) < MOST_WORDS):
            counted[caption] += 1
        for column, value in labels.items():
            values, rows = found.setdefault(column, ({}, np.full(len(shards), -1, dtype=np.int32)))
            if len(values) <= MOST_CLASSES:  # more are no classes: it is enough to know that there are more
                rows[i] = values.setdefault(value, len(values))
    return counted, {c: (list(values), rows) for c, (values, rows) in found.items()}


def _told_apart(
    columns: dict[str, tuple[list[str], np.ndarray]], wanted: list[str], count: int, checked: bool = False
) -> tuple[list[str], np.ndarray]:
    """The first of the wanted columns that tells samples into classes: names in their order, and the index of each sample; none: [] and -1."""
    for column in wanted:
        values, rows = columns.get(column, ([], np.zeros(0, dtype=np.int32)))
        if 2 <= len(values) <= min(MOST_CLASSES, max(count // 2, 2)):
            names = sorted(values)
            if checked:
                _check_styles(names)
            places = np.array([*(names.index(v) for v in values), -1], dtype=np.int32)  # the last is for -1
            return names, places[rows]
    return [], np.full(count, -1)


def _check_styles(names: list[str]) -> None:
    if odd := next((n for n in names if n != unicodedata.normalize("NFKC", n).strip() or set(n) & set(",:、")), None):
        raise ValueError(
            f"style (={odd!r}) must be plain letters without comma and colon, which mean mixtures of styles: write it otherwise in the metadata"
        )


def _label_column(entries: Sequence[Entry]) -> str | None:
    """The label that tells pictures into classes: sub-folders, else the first other column, with two values or more that recur; None: none does."""
    columns = list(dict.fromkeys(k for e in entries for k in e.labels if k != "style"))
    for column in sorted(columns, key=lambda c: c != "folder"):
        values = {e.labels[column] for e in entries if column in e.labels}
        if 2 <= len(values) <= min(MOST_CLASSES, max(len(entries) // 2, 2)):
            return column
    return None


def _classes(entries: Sequence[Entry], column: str | None) -> tuple[list[str], np.ndarray]:
    """The values of a label in their order, none where there is only one, and each entry's index among them."""
    names = sorted({v for e in entries if (v := e.labels.get(column or ""))})
    if column is None or len(names) < 2:
        return [], np.full(len(entries), -1)
    if column == "style":
        _check_styles(names)
    if len(names) > MOST_CLASSES:
        raise ValueError(f"the label {column} has {len(names):,} values: more than {MOST_CLASSES:,} are captions, not classes")
    return names, _indices(entries, column, names)


def _indices(entries: Sequence[Entry], column: str | None, names: list[str]) -> np.ndarray:
    at = {name: i for i, name in enumerate(names)}
    return np.array([at.get(e.labels.get(column or "", ""), -1) for e in entries], dtype=int)
