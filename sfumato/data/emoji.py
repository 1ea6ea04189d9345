"""The embedded data set: emoji drawn in six open styles, as vectors with names and keywords in English and Chinese.

A drawing is a (concept, style) pair, rasterised at any size as RGBA with premultiplied alpha. One pair in twenty is held out of
every training run: it tests whether a style carries over to a concept that was never seen in it.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sfumato.core.checkpoint import cache_folder, cached
from sfumato.core.images import premultiply
from sfumato.core.language import translated

STYLES = ("twemoji", "noto", "fluent", "fluent-flat", "openmoji", "emojione")
LANGUAGES = ("en", "zh", "zh-hant")
RASTER_VERSION = 1
DIRECTED = ("arrow", "keycap", "alphanum", "math", "punctuation", "currency", "time", "geometric", "other-symbol", "religion", "transport-sign")
COLOUR_WORDS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray", "blond"}
DIRECTED_WORDS = ("left", "right", "arrow", "clock", "o’clock", "thirty", "calendar", "sign", "button", "writing", "book", "memo", "musical",
                  "chart", "medal", "hundred", "8 ball")  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """A thing that can be drawn. `names` and `keywords` are per language of LANGUAGES; `index` is its row in the table."""

    index: int
    hexcode: str
    emoji: str
    group: str
    subgroup: str
    names: dict[str, str]
    keywords: dict[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.names["en"]

    @property
    def may_flip(self) -> bool:
        """Whether the mirrored drawing still means the same."""
        directed = self.group == "symbols" or any(self.subgroup.startswith(s) for s in DIRECTED)
        return not directed and not any(w in self.name for w in DIRECTED_WORDS)

    @property
    def may_recolour(self) -> bool:
        """Whether "a blue ..." can be said of it: not of what has a colour in its name already."""
        return not COLOUR_WORDS & set(self.name.split())


def _art(name: str) -> bytes:
    return (resources.files("sfumato.data") / "art" / name).read_bytes()


@cache
def _table() -> dict:
    return json.loads(lzma.decompress(_art("concepts.json.xz")))


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts in emojibase's order."""
    return tuple(
        Concept(
            index=i,
            hexcode=c["hexcode"],
            emoji=c["emoji"],
            group=c["group"],
            subgroup=c["subgroup"],
            names={t: c[t]["name"] for t in LANGUAGES},
            keywords={t: tuple(c[t]["keywords"]) for t in LANGUAGES},
        )
        for i, c in enumerate(_table()["concepts"])
    )


def sources() -> dict[str, dict[str, str]]:
    """{style: package, version, licence, attribution, home}."""
    return _table()["sources"]


def credits() -> list[dict[str, str]]:
    """Whose drawings these are: attribution, licence (SPDX) and home of each, as a model that learned from them must say."""
    return [{k: s[k] for k in ("attribution", "licence", "home")} for s in sources().values()]


@cache
def vectors(style: str) -> dict[str, str]:
    """{hexcode: SVG text} of one style."""
    if style not in STYLES:
        raise ValueError(f"style (={style!r}) must be one of {', '.join(STYLES)}")
    with tarfile.open(fileobj=io.BytesIO(_art(f"{style}.tar.xz"))) as tar:
        return {m.name[:-4]: tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".svg")}  # type: ignore[union-attr]


@cache
def art_digest() -> str:
    """Twelve hexadecimal digits that change with the drawings."""
    return hashlib.sha256(b"".join(_art(f"{s}.tar.xz") for s in STYLES)).hexdigest()[:12]


def is_held_out(hexcode: str, style: str) -> bool:
    """True for the one pair in twenty that no training run may see."""
    return int(hashlib.sha256(f"{hexcode}/{style}".encode()).hexdigest(), 16) % 20 == 0


def rasterise(svg: str, size: int) -> np.ndarray:
    """SVG text -> uint8 "size size 4", premultiplied; a drawing that is not square is centred."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError(
            "drawing the vector art needs the extra `data`: in the folder of sfumato, pip install -c constraints.txt -e '.[data]'"
        ) from None
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size):
        square = Image.new("RGBA", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    return premultiply(np.asarray(image))


def _rasterise_many(job: tuple[list[str], int]) -> np.ndarray:
    return np.stack([rasterise(svg, job[1]) for svg in job[0]])


@dataclass(frozen=True)
class Drawings:
    """A set of drawings: row i shows concept[i] (an index into `concepts()`) in style[i] (an index into STYLES).

    pixels is uint8 "n 4 size size", premultiplied.
    """

    pixels: Tensor
    concept: np.ndarray
    style: np.ndarray

    def __len__(self) -> int:
        return len(self.concept)

    def rows(self, keep: np.ndarray) -> Drawings:
        """Those where `keep`, a mask and not indices, is True."""
        assert keep.dtype == bool
        return Drawings(self.pixels[torch.from_numpy(np.flatnonzero(keep))], self.concept[keep], self.style[keep])

    @property
    def held_out(self) -> np.ndarray:
        return np.array([is_held_out(concepts()[c].hexcode, STYLES[s]) for c, s in zip(self.concept, self.style, strict=True)], dtype=bool)

    @property
    def may_flip(self) -> np.ndarray:
        return np.array([concepts()[c].may_flip for c in self.concept], dtype=bool)

    @property
    def may_recolour(self) -> np.ndarray:
        return np.array([concepts()[c].may_recolour for c in self.concept], dtype=bool)


def pairs(which: Sequence[Concept], styles: Sequence[str] = STYLES) -> list[tuple[Concept, str]]:
    """The (concept, style) pairs that exist, concept by concept."""
    return [(c, s) for c in which for s in styles if c.hexcode in vectors(s)]


def drawings(size: int, which: Sequence[Concept] | None = None, styles: Sequence[str] = STYLES) -> Drawings:
    """Rasterises the art at `size` pixels (all of it: once, kept in the cache folder; a part: each time)."""
    every = which is None and tuple(styles) == STYLES
    found = pairs(concepts() if which is None else which, styles)

    def make() -> tuple[dict[str, Tensor], dict[str, object]]:
        svgs = [vectors(s)[c.hexcode] for c, s in found]
        jobs = [(svgs[i : i + 64], size) for i in range(0, len(svgs), 64)]
        if len(jobs) > 4:
            with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                done = pool.map(_rasterise_many, jobs)
                parts = list(tqdm(done, total=len(jobs), desc=translated(f"rasterising {len(svgs)} drawings at {size} px"), leave=False))
        else:
            parts = [_rasterise_many(j) for j in jobs]
        return {"pixels": torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()}, {"size": size}

    path = cache_folder() / f"emoji-v{RASTER_VERSION}-{art_digest()}-{size}.safetensors"
    pixels = cached(path, make)["pixels"] if every else make()[0]["pixels"]
    return Drawings(pixels, np.array([c.index for c, _ in found]), np.array([STYLES.index(s) for _, s in found]))


LEARNED = ("animals-nature", "food-drink", "objects", "travel-places", "activities")
LEFT_OUT = ("hotel", "place-map", "book-paper", "mail", "sound", "money", "office", "time", "place-religious", "writing")
ALIKE = ("oncoming", "waxing", "waning", "quarter moon", "sun behind", "with flash", "tilted right", "cityscape at", "clinking", "tram car")


@cache
def drawable() -> tuple[Concept, ...]:
    """The concepts that the bundled model learns: things, animals, plants, food, places and fantasy figures that all six styles draw.

    Left out are people, faces, signs and papers, and things that only details of a drawing tell apart ("oncoming taxi").
    """
    return tuple(c for c in concepts() if _is_thing(c) and all(c.hexcode in vectors(s) for s in STYLES))


def _is_thing(c: Concept) -> bool:
    if c.subgroup == "face-costume":  # ghost, robot, alien
        return True
    return c.group in LEARNED and c.subgroup not in LEFT_OUT and not any(w in c.name for w in ALIKE)
