"""What a text encoder learns from: captions of things, and what those things look like. Of the embedded drawings, or of one's own pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sfumato.core.checkpoint import cache_folder, cached
from sfumato.core.rng import numpy_rng
from sfumato.data.augment import COLOURS, GROUNDS, Scene, Variety, draw_scene
from sfumato.data.captions import any_caption, caption, folded, held_out_keywords, meanings, means, training_keywords
from sfumato.data.emoji import LANGUAGES, RASTER_VERSION, art_digest, concepts, drawings
from sfumato.data.folder import pixels_of, scan, split
from sfumato.data.shards import are_shards, split_shards
from sfumato.metrics.features import SIDE, picture_features

KINDS = ("one", "count", "pair", "scene")
ATTRIBUTES = {"colour": (None, *COLOURS), "number": (1, 2, 3), "kind": KINDS, "ground": (None, *GROUNDS)}
MOST_CAPTIONS = 20_000  # different captions of one's own that are compared with each other
MOST_ALIKE = 64  # pictures of one caption that are looked at
ASKED = 1000  # of them that are asked for while training
SHORTENED = 0.5  # how often a word or two of one's own captions are left out


@dataclass(frozen=True)
class Said:
    """A caption; the things it may mean, and those it shows, as indices; attributes: an index into each of ATTRIBUTES, -1 where there is none."""

    text: str
    means: frozenset[int]
    shows: tuple[int, ...]
    attributes: tuple[int, ...] = (-1,) * len(ATTRIBUTES)


Question = tuple[str, frozenset[int]]  # a text, and the things that are a right answer


class Sayings(Protocol):
    """`count` things, numbered from 0; `digest` changes when what is said changes, "" where it never does."""

    count: int
    digest: str

    def say(self, thing: int, rng: np.random.Generator) -> Said:
        """A caption of a thing."""
        ...

    def features(self) -> Tensor:
        """What each thing looks like: its mean Lite0 feature "count 1280"."""
        ...

    def corpus(self) -> list[str]:
        """Everything that may be said in training, roughly as often as it is."""
        ...

    def questions(self) -> dict[str, list[Question]]:
        """What to ask for, to see whether it is found, by the name of the score."""
        ...


class EmojiSayings:
    """Names, keywords and scenes of the first `limit` concepts, or of all (0), in English and Chinese."""

    def __init__(self, limit: int, variety: Variety) -> None:
        self.limit, self.variety, self.digest = limit, variety, ""
        self.count = len(concepts()[: limit or None])

    def scene(self, rng: np.random.Generator, concept: int) -> tuple[Scene, tuple[int, ...]]:
        """A scene about a concept, without drawings, and the concepts of its items."""
        known, other = concepts(), int(rng.choice([c for c in range(self.count) if c != concept]))
        partners = [(1, known[other].may_flip)]
        scene = draw_scene(rng, self.variety, 0, known[concept].may_flip, partners, known[concept].may_recolour)
        return scene, tuple(other if i.drawing else concept for i in scene.items)

    def say(self, thing: int, rng: np.random.Generator) -> Said:
        scene, shown = self.scene(rng, thing)
        text, words = any_caption(scene, shown, rng)
        values = (scene.items[0].colour, len(scene.items) if scene.kind == "count" else 1, scene.kind, scene.ground)
        known = tuple(v.index(x) for v, x in zip(ATTRIBUTES.values(), values, strict=True))  # type: ignore[arg-type]
        return Said(text, frozenset(i for i in means(words, shown) if i < self.count), shown, known)

    def features(self) -> Tensor:
        """Of the training drawings; of all concepts kept in the cache folder."""

        def make() -> tuple[dict[str, Tensor], dict[str, object]]:
            art = drawings(SIDE, concepts()[: self.limit] if self.limit else None)
            art = art.rows(~art.held_out)
            return {"features": mean_of(picture_features(art.pixels), art.concept, self.count)}, {}

        if self.limit:
            return make()[0]["features"]
        return cached(cache_folder() / f"emoji-v{RASTER_VERSION}-{art_digest()}-lite0-train.safetensors", make)["features"]

    def corpus(self) -> list[str]:
        texts = []
        for c in concepts()[: self.count]:
            rng = numpy_rng(0, "tokenizer", c.index)
            words = [w for t in LANGUAGES for w in (c.names[t], *training_keywords(c.index, t))]
            variety = Variety(recolour=0.5, count=0.2, scene=0.3)
            scenes = [draw_scene(rng, variety, 0, c.may_flip, may_recolour=c.may_recolour) for _ in range(8)]
            texts += [*words, *words, *(any_caption(s, [c.index] * len(s.items), rng)[0] for s in scenes)]
        return texts

    def questions(self) -> dict[str, list[Question]]:
        """Names, and words and templates never seen in training."""
        found: dict[str, list[Question]] = {}
        for language in ("en", "zh"):
            names = [(concepts()[c].names[language], c) for c in range(self.count)]
            rng = numpy_rng(0, "evaluate")
            plain = draw_scene(rng, Variety(place=0, recolour=0), 0, False)
            templates = [(caption(plain, [c], language, rng, words=[n], unseen=True), c) for n, c in names]
            unseen = [(k, c) for c in range(self.count) for k in held_out_keywords(c, language)]
            for name, asked in (("names", names), ("templates", templates), ("unseen_words", unseen)):
                if asked:
                    found[f"{name}_{language}"] = [(t, meanings(language).get(folded(t), frozenset()) | {c}) for t, c in asked]
        return found


class OwnSayings:
    """The captions of a folder or of shards: a thing is what has one caption. Of very many captions a sample is taken, by their hash."""

    def __init__(self, where: str) -> None:
        said: Iterable[tuple[str | None, int]]
        if are_shards(where):
            part = split_shards(where, SIDE)[0]
            said = ((part.shards.words(i)[1], i) for i in range(len(part)))
            self.pixels: Callable[[list[int]], Tensor] = lambda rows: part[torch.tensor(rows)]
        else:
            found = scan(where, progress=False)
            entries = split(found.entries)[0]
            said = ((e.caption, i) for i, e in enumerate(entries))
            self.pixels = lambda rows: pixels_of(found, [entries[i] for i in rows], SIDE).pixels
        self.rows = _sampled(said)
        if len(self.rows) < 2:
            raise ValueError(f"{where} has {len(self.rows)} different captions: a text encoder needs two at least, in NAME.txt or metadata.jsonl")
        self.captions, self.count = list(self.rows), len(self.rows)
        self.digest = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()[:12]

    def say(self, thing: int, rng: np.random.Generator) -> Said:
        text = self.captions[thing]
        return Said(shortened(text, rng) if rng.random() < SHORTENED else text, frozenset({thing}), (thing,))

    def features(self) -> Tensor:
        pairs = [(row, i) for i, c in enumerate(self.captions) for row in self.rows[c]]
        looks = [picture_features(self.pixels([row for row, _ in pairs[s : s + 1024]])) for s in range(0, len(pairs), 1024)]
        return mean_of(torch.cat(looks), np.array([i for _, i in pairs]), self.count)

    def corpus(self) -> list[str]:
        return self.captions

    def questions(self) -> dict[str, list[Question]]:
        """The captions, and the same with words left out."""
        rows = np.linspace(0, self.count - 1, min(self.count, ASKED)).round().astype(int)
        asked = [(self.captions[i], frozenset({int(i)})) for i in rows]
        return {"captions": asked, "shortened": [(shortened(t, numpy_rng(0, "evaluate", i)), right) for i, (t, right) in enumerate(asked)]}


def _sampled(said: Iterable[tuple[str | None, int]]) -> dict[str, list[int]]:
    """At most MOST_CAPTIONS different captions, those with the smallest hashes in their order, each with some rows that have it."""
    hashed = lambda c: hashlib.sha256(c.encode()).digest()  # noqa: E731
    kept: dict[str, list[int]] = {}
    largest = b"\xff" * 33

    def smallest() -> list[str]:
        return sorted(kept, key=hashed)[:MOST_CAPTIONS]

    for text, row in said:
        if not text or (text not in kept and hashed(text) > largest):
            continue
        rows = kept.setdefault(text, [])
        if len(rows) < MOST_ALIKE:
            rows.append(row)
        if len(kept) > 2 * MOST_CAPTIONS:
            kept = {c: kept[c] for c in smallest()}
            largest = hashed(list(kept)[-1])
    return {c: kept[c] for c in smallest()}


def shortened(text: str, rng: np.random.Generator) -> str:
    """A caption without some of its words (of Chinese, characters): one at least stays."""
    spaced = " " in text
    words = text.split(" ") if spaced else list(text)
    if len(words) < 3:
        return text
    keep = rng.random(len(words)) < 0.75
    keep[rng.integers(len(words))] = True
    return (" " if spaced else "").join(w for w, k in zip(words, keep, strict=True) if k)


def mean_of(features: Tensor, group: Sequence[int] | np.ndarray, count: int) -> Tensor:
    """The mean of the rows of each group "count d"; zeros where a group has none."""
    at = torch.from_numpy(np.asarray(group))
    total = torch.zeros(count, features.shape[1]).index_add_(0, at, features)
    return total / torch.bincount(at, minlength=count)[:, None].clamp_min(1)
