"""What the bundled model can do, measured on the shipped file: `python bench/bundled.py`. One JSON object on stdout, pictures in runs/bench/.

Two judges look at every picture. **Lite0**: the pooled features of EfficientNet-Lite0 (over white, 128 pixels) find the nearest real
drawing by cosine; Lite0 served in the codec's training, so it does not judge alone. **Classifier**: the network of judge.py, which saw
real training drawings only.

Concept right (rank 1): among the real drawings of the asked style, held-out ones included, the nearest is of the asked concept; for the
classifier its first choice is. The candidates are the concepts that the model learned to draw, all that the classifier can tell apart;
accuracy is also reported with the drawings of all 1,644 concepts as candidates for Lite0, the harder question. A word that names more
than three concepts counts any of them. Style right: the nearest real drawing of all styles is in the asked one; with "twins", fluent and
fluent-flat count as one style. A held-out pair is right when the style is right and the concept is among the best five.

Beside the model stand three others, through the codec too and judged in the same way:
- *ceiling*: the real drawing of the asked pair through the codec, itself among the candidates. No generator behind this codec can be
  expected to do better, so goals are fractions of it. It stands as it was drawn; *moved ceiling* is the same drawing placed, turned
  and mirrored as training does, which costs the judges something and is the fairer comparison for a model that learned to vary.
- *another style*: the real drawing of the concept in a random other style. Its concept score says how far the concept alone carries
  (a model above it draws the style too); its style score should be near zero.
- *nearest training drawing*: the model's picture replaced by the training drawing that Lite0 finds nearest. On held-out pairs it says
  what a model that merely repeats its training set would score: the model must lie above it to have carried a style over.

Default counts draw about 2,500 pictures of 20 steps: some 10 to 15 minutes of two cores, with the judge trained before (judge.py, 20 more).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import judge as second
import numpy as np
import torch
import tyro
from common import ROOT, claim, draw, emit, from_pil, gap, interval, mean, ratio, report, with_interval
from PIL import Image
from skimage.color import rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

import sfumato
from sfumato.core.checkpoint import cache_folder, cached, hash_tensors, write_bytes
from sfumato.core.images import flatten, grid, save_png, to_pil
from sfumato.core.rng import derive, numpy_rng
from sfumato.data.augment import COLOURS, Variety, draw_scene, recolour, render
from sfumato.data.captions import COLOURS_ZH, HELD_OUT_TEMPLATES, article, held_out_keywords, meanings
from sfumato.data.emoji import STYLES, Drawings, concepts, drawings
from sfumato.losses.perceptual import perceptual
from sfumato.nn.backbones import efficientnet_lite0, over, resize
from sfumato.pipelines.find import find
from sfumato.pipelines.generate import Model
from sfumato.train.upscaler import lanczos

SECTIONS = ("codec", "enlargement", "accuracy", "diversity", "colours", "mixtures", "cost")
MANY = 3  # a word that names more concepts than this counts any of them
TWINS = np.array([STYLES.index("fluent") if s == "fluent-flat" else i for i, s in enumerate(STYLES)])
STILL = Variety(place=0.6, scale=(0.75, 1.0), angle=10.0, recolour=0.0)  # placement, rotation and mirroring only
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BLENDS = (("twemoji", "openmoji"), ("noto", "fluent"), ("emojione", "fluent-flat"), ("openmoji", "noto"))
LAB = rgb2lab(np.array(list(COLOURS.values()))[None])[0]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures the bundled model, or another, and prints one JSON object."""

    model: str | None = None
    """A model file, a run folder or a bundled name; the bundled model when left out."""
    quick: bool = False
    """A smoke run of seconds on 12 concepts with an untrained second judge: its figures mean nothing."""
    only: str = ""
    """Sections to measure, separated by commas; all when empty: codec, enlargement, accuracy, diversity, colours, mixtures, cost."""
    out: Path = ROOT / "runs" / "bench"
    """Where the unselected pictures go."""
    judges: Path = second.FOLDER
    """Where trained second judges are kept."""
    judge_images: int = second.LOOP.images
    """Pictures that the second judge learns from, if it must be trained."""
    seed: int = 0
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    steps: int = 20
    guidance: float = 3.0
    names: int = 400
    """Seen pairs, each asked for by name in English and in Chinese."""
    held_out: int = 300
    """Held-out pairs, in English and Chinese by turns."""
    keywords: int = 150
    """Held-out keywords per language."""
    templates: int = 100
    """Names in held-out templates per language."""
    diversity: int = 48
    """Prompts of 8 seeds."""
    colours: int = 132
    """Coloured prompts per language."""
    blends: int = 12
    """Concepts per pair of styles, five mixtures each."""
    repeats: int = 3
    """Runs of each timed command; the median counts."""

    @property
    def sections(self) -> tuple[str, ...]:
        wanted = tuple(self.only.split(",")) if self.only else SECTIONS
        for name in wanted:
            if name not in SECTIONS:
                raise ValueError(f"only (={name!r}) must be among {', '.join(SECTIONS)}")
        if "accuracy" in wanted and self.names < 1:
            raise ValueError(f"names (={self.names}) must be at least 1: everything is compared with them; --only leaves the section out")
        return wanted


SMALL = {"names": 6, "held_out": 4, "keywords": 2, "templates": 2, "diversity": 2, "colours": 4, "blends": 1, "repeats": 1, "steps": 4}


# --- what is asked, and against what it is judged ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A picture to draw: `prompt` in `style`, of `concept` (indices). `accepted`: concepts that count; `among`: styles of the candidates."""

    concept: int
    style: int
    prompt: str
    seed: int
    share: str = ""
    accepted: frozenset[int] = field(default_factory=frozenset)
    among: tuple[int, ...] = ()

    @property
    def right(self) -> frozenset[int]:
        return self.accepted | {self.concept}

    @property
    def styles(self) -> tuple[int, ...]:
        return self.among or (self.style,)


def accepted(word: str, language: str) -> frozenset[int]:
    """What a word stands for besides the asked concept: nothing, unless it names more than three."""
    named = meanings(language).get(word.casefold(), frozenset())
    return named if len(named) > MANY else frozenset()


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """Unit Lite0 features "n 1280" of premultiplied RGBA "n 4 h w" in [0, 1], over white."""
    network = efficientnet_lite0()
    return F.normalize(torch.cat([network.pooled(resize(over(p), 128) * 2 - 1) for p in pictures.split(64)]), dim=1)


@dataclass(frozen=True)
class Atlas:
    """The real drawings of all concepts that a model knows: `art` at twice its size, `pictures` at its size, `features` of these."""

    art: Drawings
    pictures: Tensor
    features: Tensor

    @cached_property
    def row(self) -> dict[tuple[int, int], int]:
        return {(int(c), int(s)): i for i, (c, s) in enumerate(zip(self.art.concept, self.art.style, strict=True))}

    @cached_property
    def held_out(self) -> np.ndarray:
        return self.art.held_out

    @cached_property
    def known(self) -> list[int]:
        return sorted({int(c) for c in self.art.concept})

    def rows_of(self, asks: Sequence[Ask]) -> Tensor:
        return torch.tensor([self.row[a.concept, a.style] for a in asks])


def make_atlas(known: tuple[int, ...], size: int) -> Atlas:
    """Rasterised, and looked at by Lite0, once: kept in the cache folder where it is large."""
    art = second.art_of(known, 2 * size)
    pictures = second.exact(art)
    if len(known) <= second.FEW:
        return Atlas(art, pictures, features(pictures))
    path = cache_folder() / f"bench-lite0-{hash_tensors({'pictures': pictures})[:12]}.safetensors"
    return Atlas(art, pictures, cached(path, lambda: ({"features": features(pictures)}, {}))["features"])


# --- the judges' verdicts ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Per picture: how many candidates came before an accepted one, the judged style, and the style probabilities where there are any."""

    rank: np.ndarray
    style: np.ndarray
    shares: np.ndarray | None = None


class Judging(Protocol):
    name: str

    def look(self, pictures: Tensor, asks: Sequence[Ask]) -> Verdict: ...


@dataclass(frozen=True)
class Lite0:
    """Nearest real drawings by Lite0 features."""

    atlas: Atlas
    name: str = "Lite0"

    def look(self, pictures: Tensor, asks: Sequence[Ask]) -> Verdict:
        return nearest(self.atlas, features(pictures), asks)


def nearest(atlas: Atlas, found: Tensor, asks: Sequence[Ask]) -> Verdict:
    """The verdict of unit features "n d" against the atlas."""
    likeness = (found @ atlas.features.T).numpy()
    ranks = []
    for values, ask in zip(likeness, asks, strict=True):
        here = np.isin(atlas.art.style, ask.styles)
        best = values[here & np.isin(atlas.art.concept, list(ask.right))].max()
        ranks.append(int((values[here] > best).sum()))
    return Verdict(np.array(ranks), atlas.art.style[likeness.argmax(1)])


@dataclass(frozen=True)
class Classifier:
    """The second judge."""

    judge: second.OfDrawings
    name: str = "classifier"

    def look(self, pictures: Tensor, asks: Sequence[Ask]) -> Verdict:
        concept, style = self.judge(pictures)
        known = np.array(self.judge.known)
        ranks = [int((v > v[np.isin(known, list(a.right))].max()).sum()) for v, a in zip(concept.numpy(), asks, strict=True)]
        return Verdict(np.array(ranks), style.argmax(1).numpy(), style.softmax(1).numpy())


def measures(verdict: Verdict, asks: Sequence[Ask]) -> dict[str, np.ndarray]:
    """What is right about each picture, 0 or 1 each. `pair`: style right and concept among the best five."""
    asked = np.array([a.style for a in asks], dtype=int)
    style, twins = verdict.style == asked, TWINS[verdict.style] == TWINS[asked]
    rank1, rank5 = verdict.rank == 0, verdict.rank < 5
    found = {"rank1": rank1, "rank5": rank5, "style": style, "style_twins": twins, "pair": style & rank5, "pair_twins": twins & rank5}
    return {k: v.astype(float) for k, v in found.items()}


def summary(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """{measure: [mean, low, high]} and the number of pictures."""
    return {k: with_interval(v) for k, v in found.items()} | {"n": len(next(iter(found.values())))}


# --- the bench: a model, its judges and its prompts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What every section works with. `claims` and `details` are filled as they go."""

    options: Options
    model: Model
    claims: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def known(self) -> tuple[int, ...]:
        """The model's concepts; a quick run takes twelve."""
        found = tuple(c.index for c in concepts() if c.hexcode in self.model.meta["words"])
        return found[:12] if self.options.quick else found

    @cached_property
    def atlas(self) -> Atlas:
        return make_atlas(self.known, self.model.size)

    @cached_property
    def judges(self) -> tuple[Judging, ...]:
        quick = self.options.quick
        recipe, loop = (second.QUICK_RECIPE, second.QUICK) if quick else (second.RECIPE, replace(second.LOOP, images=self.options.judge_images))
        found = second.judge(recipe, replace(loop, threads=self.options.threads), self.options.judges)
        self.details["second_judge"] = {"meaningful": found.meaningful, "images": found.judge.images, **found.judge.scores}
        return Lite0(self.atlas), Classifier(found, "classifier" if found.meaningful else "classifier, hardly trained: not meaningful")

    @cached_property
    def wide(self) -> Judging:
        """Lite0 with every real drawing among the candidates, those of things that the model never learned too."""
        return Lite0(make_atlas(tuple(c.index for c in concepts()), self.model.size), f"Lite0 among all {len(concepts()):,} concepts")

    def claim(self, name: str, value: float, unit: str = "", goal: str | None = None, between: list[float] | None = None) -> None:
        self.claims.append(claim(name, value, unit, goal))
        if between is not None:
            self.details.setdefault("intervals", {})[name] = between

    def draw(self, asks: Sequence[Ask], name: str) -> Tensor:
        """The model's pictures for the asks as a user gets them, "n 4 s s"; the first of them go on a sheet."""
        prompts, styles = [a.prompt for a in asks], [a.share or STYLES[a.style] for a in asks]
        images = draw(self.model, prompts, styles, [a.seed for a in asks], name, steps=self.options.steps, guidance=self.options.guidance)
        self.sheet(name, images, [f"{p} [{s}] seed {a.seed}" for p, s, a in zip(prompts, styles, asks, strict=True)])
        return from_pil(images)

    def sheet(self, name: str, images: Sequence[Image.Image], texts: Sequence[str], columns: int = 8) -> None:
        """The first 64 pictures, unselected, with what they were asked to be."""
        shown = images[: 8 * columns]
        save_png(self.options.out / f"{name}.png", flatten(grid(list(shown), columns=columns, gap=4)))
        write_bytes(self.options.out / f"{name}.txt", ("\n".join(texts[: len(shown)]) + "\n").encode())

    @torch.no_grad()
    def through_codec(self, pictures: Tensor) -> Tensor:
        """Premultiplied RGBA "n 4 s s" in [0, 1], encoded, decoded and rounded as a picture that was drawn."""
        codec, device = self.model.codec, self.model.device
        parts = [to_pil(codec.decode(codec.encode(p.to(device) * 2 - 1).mean)) for p in pictures.split(64)]  # type: ignore[operator]
        return from_pil([i for part in parts for i in part])

    def pick(self, held_out: bool, n: int, purpose: str) -> list[tuple[int, int]]:
        """Up to n (concept, style) pairs in random order, the styles by turns."""
        rng = numpy_rng(self.options.seed, f"bench/{purpose}")
        rows = [r for r in rng.permutation(len(self.atlas.held_out)) if self.atlas.held_out[r] == held_out]
        return by_turns([(int(self.atlas.art.concept[r]), int(self.atlas.art.style[r])) for r in rows])[:n]

    def seed_of(self, purpose: str, i: int) -> int:
        return derive(self.options.seed, f"bench/{purpose}/seed", i) % 2**31


def by_turns(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Reorders pairs so that each style comes once before any comes twice."""
    seen = dict.fromkeys(range(len(STYLES)), 0)
    keyed = []
    for pair in pairs:
        keyed.append((seen[pair[1]], pair))
        seen[pair[1]] += 1
    return [pair for _, pair in sorted(keyed, key=lambda k: k[0])]


# --- codec ------------------------------------------------------------------------------------------------------------------------------------


def white_u8(pictures: Tensor) -> np.ndarray:
    """Premultiplied RGBA "n 4 h w" in [0, 1] over white as uint8 "n h w 3"."""
    return (over(pictures) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two uint8 arrays in dB; 99 where they are equal."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return 99.0 if error == 0 else float(20 * np.log10(255) - 10 * np.log10(error))


def border(alpha: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns in which anything is drawn; all of them where nothing is."""
    if not alpha.any():
        return slice(None), slice(None)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two uint8 "h w 3"; nan below its window of 7."""
    return float(structural_similarity(a, b, channel_axis=2)) if min(a.shape[:2]) >= 7 else float("nan")


def fidelity(real: Tensor, copy: Tensor) -> dict[str, np.ndarray]:
    """Per picture: PSNR and SSIM over white, whole and within the drawing's own border, and PSNR of alpha."""
    a, b = white_u8(real), white_u8(copy)
    alphas = [(p[:, 3] * 255).round().byte().numpy() for p in (real, copy)]
    boxes = [border(alpha) for alpha in alphas[0]]
    return {
        "psnr": np.array([psnr(x, y) for x, y in zip(a, b, strict=True)]),
        "ssim": np.array([similarity(x, y) for x, y in zip(a, b, strict=True)]),
        "psnr_cropped": np.array([psnr(x[box], y[box]) for x, y, box in zip(a, b, boxes, strict=True)]),
        "ssim_cropped": np.array([similarity(x[box], y[box]) for x, y, box in zip(a, b, boxes, strict=True)]),
        "psnr_alpha": np.array([psnr(x, y) for x, y in zip(*alphas, strict=True)]),
    }


def codec_section(bench: Bench) -> None:
    """The codec on held-out pairs of all concepts, not only of those that the model learned to draw."""
    which = [concepts()[c] for c in bench.known] if bench.options.quick else None
    art = drawings(2 * bench.model.size, which)
    art = art.rows(art.held_out) if art.held_out.any() else art
    real = second.exact(art)
    copy = bench.through_codec(real)
    found = fidelity(real, copy)
    shown = np.linspace(0, len(art) - 1, min(32, len(art))).astype(int)
    images = [i for r in shown for i in (*to_pil(real[r : r + 1] * 2 - 1), *to_pil(copy[r : r + 1] * 2 - 1))]
    bench.sheet("codec", images, [f"{concepts()[art.concept[r]].name} [{STYLES[art.style[r]]}], real, then copy" for r in shown])
    goals = {"psnr": ">= 26", "ssim": ">= 0.90"}
    for key, values in found.items():
        unit = "dB" if key.startswith("psnr") else ""
        values = values[np.isfinite(values)]
        bench.claim(f"codec: {key} on held-out pairs", mean(values), unit, goals.get(key), interval(mean, values))
    bench.details["codec"] = {
        "pictures": len(art),
        "by_style": {s: {k: mean(v[art.style == i]) for k, v in found.items()} for i, s in enumerate(STYLES)},
    }


# --- enlargement ------------------------------------------------------------------------------------------------------------------------------


def apart(a: Tensor, b: Tensor) -> np.ndarray:
    """Per picture: distance of Lite0's feature maps (which the enlargement's training used too), premultiplied RGBA over white."""
    flat = [over(x) * 2 - 1 for x in (a, b)]
    return np.array([float(perceptual(efficientnet_lite0(), x, y)[0]) for x, y in zip(*(f.split(1) for f in flat), strict=True)])


@torch.no_grad()
def enlargement_section(bench: Bench) -> None:
    """The enlargement on held-out pairs of what the model draws: the codec's pictures against the same drawings rasterised larger."""
    model, upscaler = bench.model, bench.model.upscaler
    if upscaler is None:
        bench.details["enlargement"] = "there is none for this model"
        return
    factor = upscaler.config.factor
    art = drawings(factor * model.size, [concepts()[c] for c in bench.known])
    art = art.rows(art.held_out) if art.held_out.any() else art
    real = art.pixels.float() / 255
    small = bench.through_codec(F.avg_pool2d(real, factor)) * 2 - 1
    began = time.perf_counter()
    ours = torch.cat([upscaler(x.to(model.device)).cpu() for x in small.split(8)])
    seconds = time.perf_counter() - began
    ways = {"learned": ours, "Lanczos": lanczos(small, factor)}
    drawn = {name: ((x.clamp(-1, 1) + 1) * 127.5).round() / 255 for name, x in ways.items()}
    found = {name: fidelity(real, x) | {"feature distance": apart(x, real)} for name, x in drawn.items()}
    bench.details["enlargement"] = {"pictures": len(art), "parameters": sum(p.numel() for p in upscaler.parameters())}
    for key, unit, sign in (("psnr", "dB", 1), ("psnr_cropped", "dB", 1), ("ssim", "", 1), ("feature distance", "", -1)):
        better = sign * (found["learned"][key] - found["Lanczos"][key])
        for name in ways:
            bench.claim(f"enlargement: {key} on held-out pairs, {name}", mean(found[name][key]), unit, None, interval(mean, found[name][key]))
        bench.claim(f"enlargement: {key}, better than Lanczos by", mean(better), unit, ">= 0", interval(mean, better))
    bench.claim("enlargement: a picture, in batches of 8", 1000 * seconds / len(art), "ms")
    shown = np.linspace(0, len(art) - 1, min(16, len(art))).astype(int)
    images = [i for r in shown for x in (drawn["Lanczos"], drawn["learned"], real) for i in to_pil(x[r : r + 1] * 2 - 1)]
    names = [f"{concepts()[art.concept[r]].name} [{STYLES[art.style[r]]}], Lanczos, learned, real" for r in shown]
    bench.sheet("enlargement", images, names, columns=6)


# --- accuracy ---------------------------------------------------------------------------------------------------------------------------------


def asks_by_name(bench: Bench) -> dict[str, list[Ask]]:
    """Seen pairs by name, the same in both languages from the same seeds; and held-out pairs, the languages by turns."""
    seen, unseen = bench.pick(False, bench.options.names, "names"), bench.pick(True, bench.options.held_out, "held-out")
    asks = {
        f"names-{t}": [
            Ask(c, s, concepts()[c].names[t], bench.seed_of("names", i), accepted=accepted(concepts()[c].names[t], t))
            for i, (c, s) in enumerate(seen)
        ]
        for t in ("en", "zh")
    }
    words = [(c, s, concepts()[c].names[t], t) for (c, s), t in zip(unseen, ["en", "zh"] * len(unseen), strict=False)]
    asks["held-out"] = [Ask(c, s, w, bench.seed_of("held-out", i), accepted=accepted(w, t)) for i, (c, s, w, t) in enumerate(words)]
    return asks


def asks_unseen_words(bench: Bench) -> dict[str, list[Ask]]:
    """Keywords and templates that no training showed, and bare emoji, in seen pairs."""
    asks = {}
    for t in ("en", "zh"):
        pairs = bench.pick(False, len(bench.atlas.held_out), f"keywords/{t}")
        style_of = dict(reversed(pairs))
        rng = numpy_rng(bench.options.seed, f"bench/keywords/{t}/order")
        words = [(c, k) for c in bench.known if c in style_of for k in held_out_keywords(c, t)]
        words = [words[i] for i in rng.permutation(len(words))[: bench.options.keywords]]
        asks[f"keywords-{t}"] = [Ask(c, style_of[c], k, bench.seed_of("keywords", i), accepted=accepted(k, t)) for i, (c, k) in enumerate(words)]
        named = [(c, s, concepts()[c].names[t]) for c, s in bench.pick(False, bench.options.templates, "templates")]
        phrase = article if t == "en" else str
        asks[f"templates-{t}"] = [
            Ask(c, s, HELD_OUT_TEMPLATES[t][i % 2].format(phrase(w)), bench.seed_of("templates", i), accepted=accepted(w, t))
            for i, (c, s, w) in enumerate(named)
        ]
    signs = bench.pick(False, bench.options.templates, "emoji")
    asks["emoji"] = [Ask(c, s, concepts()[c].emoji, bench.seed_of("emoji", i)) for i, (c, s) in enumerate(signs)]
    return {k: v for k, v in asks.items() if v}


def others(bench: Bench, asks: Sequence[Ask], purpose: str) -> Tensor:
    """Rows of the same concepts in a random other style; the asked one where no other exists."""
    rng = numpy_rng(bench.options.seed, f"bench/other/{purpose}")
    rows = []
    for a in asks:
        found = [r for (c, s), r in bench.atlas.row.items() if c == a.concept and s != a.style]
        rows.append(int(rng.choice(found)) if found else bench.atlas.row[a.concept, a.style])
    return torch.tensor(rows)


def moved(bench: Bench, asks: Sequence[Ask], purpose: str) -> Tensor:
    """The asked real drawings, placed, turned and mirrored as in training."""
    flips = bench.atlas.art.may_flip
    rows = bench.atlas.rows_of(asks).tolist()
    scenes = [draw_scene(numpy_rng(bench.options.seed, f"bench/moved/{purpose}", i), STILL, r, bool(flips[r])) for i, r in enumerate(rows)]
    return render(bench.atlas.art.pixels, scenes, bench.model.size)


def stand_ins(bench: Bench, asks: Sequence[Ask], drawn: Tensor, name: str) -> dict[str, Tensor]:
    """What is judged for a set of asks: the model's pictures and those beside it."""
    training = torch.from_numpy(np.flatnonzero(~bench.atlas.held_out))
    closest = training[(features(drawn) @ bench.atlas.features[training].T).argmax(1)]
    return {
        "model": drawn,
        "ceiling": bench.through_codec(bench.atlas.pictures[bench.atlas.rows_of(asks)]),
        "moved_ceiling": bench.through_codec(moved(bench, asks, name)),
        "another_style": bench.through_codec(bench.atlas.pictures[others(bench, asks, name)]),
        "nearest_training_drawing": bench.through_codec(bench.atlas.pictures[closest]),
    }


def by_group(asks: Sequence[Ask], right: np.ndarray) -> dict[str, list[float]]:
    groups = np.array([concepts()[a.concept].group for a in asks])
    return {g: [*with_interval(right[groups == g]), int((groups == g).sum())] for g in sorted(set(groups))}


Found = dict[str, dict[str, dict[str, dict[str, np.ndarray]]]]  # set of asks -> who -> judge -> measure -> a value per picture


def accuracy_section(bench: Bench) -> None:
    """Concept and style of everything that is asked for, by both judges."""
    asked = asks_by_name(bench) | asks_unseen_words(bench)
    judges = bench.judges if bench.options.quick else (*bench.judges, bench.wide)
    found: Found = {}
    for name, asks in asked.items():
        if asks:
            shown = stand_ins(bench, asks, bench.draw(asks, name), name)
            found[name] = {who: {j.name: measures(j.look(pictures, asks), asks) for j in judges} for who, pictures in shown.items()}
    tables = {n: {who: {j: summary(m) for j, m in judged.items()} for who, judged in beside.items()} for n, beside in found.items()}
    groups = {j.name: by_group(asked["names-en"], found["names-en"]["model"][j.name]["rank1"]) for j in judges}
    bench.details["accuracy"] = tables | {"rank1_by_group_names-en": groups}
    new = new_to_training(bench, asked["held-out"])
    for j in judges:
        accuracy_claims(bench, found, j.name, new)


def new_to_training(bench: Bench, asks: Sequence[Ask]) -> np.ndarray:
    """Whose drawings training shows in no other guise: not as the fluent twin, and nothing within 0.02 (mean difference over white)."""
    row, held_out, pictures = bench.atlas.row, bench.atlas.held_out, over(bench.atlas.pictures).flatten(1)
    training = pictures[torch.from_numpy(~held_out)]
    new = []
    for a in asks:
        twins = [r for (c, s), r in row.items() if c == a.concept and s != a.style and TWINS[s] == TWINS[a.style]]
        nearest = float((training - pictures[row[a.concept, a.style]]).abs().mean(1).min())
        new.append(nearest > 0.02 and all(held_out[r] for r in twins))
    return np.array(new, dtype=bool)


def accuracy_claims(bench: Bench, found: Found, judge: str, new: np.ndarray) -> None:
    en, zh = (found[f"names-{t}"]["model"][judge] for t in ("en", "zh"))
    ceiling = found["names-en"]["ceiling"][judge]
    moved_ceiling = found["names-en"]["moved_ceiling"][judge]

    def say(what: str, statistic: Any, *columns: np.ndarray, goal: str | None = None) -> None:
        bench.claim(f"{what} ({judge})", statistic(*columns), "fraction", goal, interval(statistic, *columns))

    say("ceiling: concept at rank 1", mean, ceiling["rank1"], goal=">= 0.85")
    say("seen pairs: concept at rank 1", mean, en["rank1"])
    say("seen pairs: concept at rank 1 / ceiling", ratio, en["rank1"], ceiling["rank1"], goal=">= 0.85")
    say("seen pairs: concept at rank 1 / moved ceiling", ratio, en["rank1"], moved_ceiling["rank1"])
    say("seen pairs: style / ceiling", ratio, en["style"], ceiling["style"], goal=">= 0.97")
    say("seen pairs: style / ceiling, fluent twins as one", ratio, en["style_twins"], ceiling["style_twins"])
    say("Chinese against English: difference of concept at rank 1", gap, zh["rank1"], en["rank1"], goal="<= 0.05")
    if "held-out" in found:
        pair = {who: judged[judge] for who, judged in found["held-out"].items()}
        say("held-out pairs: style, and concept in five / ceiling", ratio, pair["model"]["pair"], pair["ceiling"]["pair"], goal=">= 0.4")
        say("held-out pairs / ceiling, fluent twins as one", ratio, pair["model"]["pair_twins"], pair["ceiling"]["pair_twins"])
        if new.any():
            columns = (pair["model"]["pair"][new], pair["ceiling"]["pair"][new])
            say(f"held-out pairs / ceiling, the {new.sum()} without twin or copy in training", ratio, *columns)
        say("held-out pairs: nearest training drawing / ceiling", ratio, pair["nearest_training_drawing"]["pair"], pair["ceiling"]["pair"])
    for kind in ("keywords", "templates"):
        for t in ("en", "zh"):
            if f"{kind}-{t}" in found:
                say(f"held-out {kind}, {t}: concept at rank 1", mean, found[f"{kind}-{t}"]["model"][judge]["rank1"])
    if "emoji" in found:
        say("asked for by emoji: concept at rank 1", mean, found["emoji"]["model"][judge]["rank1"])


# --- diversity --------------------------------------------------------------------------------------------------------------------------------


def spread(vectors: Tensor) -> np.ndarray:
    """Unit features "prompts seeds d" -> mean pairwise cosine distance per prompt."""
    n = vectors.shape[1]
    total = (vectors @ vectors.transpose(1, 2)).sum((1, 2)) - n
    return (1 - total / (n * (n - 1))).numpy()


def diversity_section(bench: Bench, each: int = 8) -> None:
    """Do seeds differ as much as 8 placements of the one real drawing do? A model that draws wrong things scores high: read it with accuracy."""
    pairs = bench.pick(False, bench.options.diversity, "diversity")
    asks = [Ask(c, s, concepts()[c].names["zh" if i % 2 else "en"], 1000 * i + k) for i, (c, s) in enumerate(pairs) for k in range(each)]
    drawn = bench.draw(asks, "diversity")
    real = bench.through_codec(moved(bench, asks, "diversity"))
    here, there = (spread(features(p).unflatten(0, (-1, each))) for p in (drawn, real))
    bench.claim("diversity: 8 seeds / 8 placements of one drawing", ratio(here, there), "fraction", ">= 0.5", interval(ratio, here, there))
    bench.details["diversity"] = {
        "distance_of_seeds": with_interval(here),
        "distance_of_placements": with_interval(there),
        "rank1": {j.name: mean(measures(j.look(drawn, asks), asks)["rank1"]) for j in bench.judges},
    }


# --- colour words -----------------------------------------------------------------------------------------------------------------------------


def mean_colour(pictures: Tensor) -> np.ndarray:
    """Mean colour "n 3" of the opaque pixels of premultiplied RGBA "n 4 h w"; white where nothing is opaque."""
    opaque = (pictures[:, 3:] > 0.5).float()
    weight = (pictures[:, 3:] * opaque).sum((2, 3))
    colour = (pictures[:, :3] * opaque).sum((2, 3)) / weight.clamp_min(1e-6)
    return torch.where(weight > 0, colour, 1.0).clamp(0, 1).numpy()


def named_colours(pictures: Tensor) -> np.ndarray:
    """The index into COLOURS that is nearest in CIELAB to each picture's mean colour."""
    lab = rgb2lab(mean_colour(pictures)[None])[0]
    return np.linalg.norm(lab[:, None] - LAB[None], axis=2).argmin(1)


def asks_colours(bench: Bench, language: str) -> tuple[list[Ask], np.ndarray]:
    """ "a blue cat", "蓝色的猫": seen pairs whose name has no colour of its own; and the colours asked for."""
    plain = [(c, s) for c, s in bench.pick(False, len(bench.atlas.held_out), "colours") if not set(concepts()[c].name.split(" ")) & set(COLOURS)]
    plain = plain[: bench.options.colours]
    wanted = np.arange(len(plain)) // len(STYLES) % len(COLOURS)
    colours = list(COLOURS)
    words = [concepts()[c].names[language] for c, _ in plain]
    prompts = [
        article(f"{colours[w]} {name}") if language == "en" else f"{COLOURS_ZH[colours[w]]}的{name}" for w, name in zip(wanted, words, strict=True)
    ]
    return [Ask(c, s, p, bench.seed_of("colours", i)) for i, ((c, s), p) in enumerate(zip(plain, prompts, strict=True))], wanted


def colours_section(bench: Bench) -> None:
    """Is the mean colour of the picture nearest to the asked one; beside it real drawings tinted so, and as they are (chance)."""
    details: dict[str, Any] = {}
    for t in ("en", "zh"):
        asks, wanted = asks_colours(bench, t)
        real = bench.atlas.pictures[bench.atlas.rows_of(asks)]
        tinted = recolour(real, torch.tensor(list(COLOURS.values()))[torch.from_numpy(wanted)])
        shown = {"model": bench.draw(asks, f"colours-{t}"), "tinted real drawings": tinted, "untinted real drawings": real}
        right = {who: (named_colours(p) == wanted).astype(float) for who, p in shown.items()}
        concept = {who: {j.name: mean(measures(j.look(p, asks), asks)["rank1"]) for j in bench.judges} for who, p in shown.items()}
        by_colour = {c: mean(right["model"][wanted == i]) for i, c in enumerate(COLOURS)}
        details[t] = {"colour": {who: with_interval(v) for who, v in right.items()}, "concept_rank1": concept, "by_colour": by_colour}
        bench.claim(f"colour words, {t}: colour as asked", mean(right["model"]), "fraction", None, interval(mean, right["model"]))
        top = right["tinted real drawings"]
        bench.claim(f"colour words, {t}: / tinted real drawings", ratio(right["model"], top), "fraction", None, interval(ratio, right["model"], top))
    bench.details["colours"] = details


# --- style mixtures ---------------------------------------------------------------------------------------------------------------------------


def asks_blends(bench: Bench) -> list[Ask]:
    """Pairs of styles x concepts that both styles have x five mixtures, each from the seed of its concept."""
    asks = []
    for number, (a, b) in enumerate(BLENDS):
        i, j = STYLES.index(a), STYLES.index(b)
        both = [c for c in bench.known if (c, i) in bench.atlas.row and (c, j) in bench.atlas.row]
        order = numpy_rng(bench.options.seed, "bench/mixtures", number).permutation(len(both))
        for c in (both[k] for k in order[: bench.options.blends]):
            seed = bench.seed_of("mixtures", len(asks))
            asks += [Ask(c, j, concepts()[c].name, seed, share=f"{a}:{1 - w},{b}:{w}", among=(i, j)) for w in SHARES]
    return asks


def step_back(rising: np.ndarray) -> float:
    """How far a curve falls from one point to the next at worst; 0 where it never does."""
    return float(max(0.0, (rising[:-1] - rising[1:]).max()))


def fall(curve: np.ndarray) -> float:
    """How far a curve lies, at its lowest inner point, below the mean of its ends."""
    return float((curve[0] + curve[-1]) / 2 - curve[1:-1].min())


def mixtures_section(bench: Bench) -> None:
    """From style A to style B in five mixtures: the classifier's probability of B, and whether the concept stays (candidates of both styles)."""
    asks = asks_blends(bench)
    drawn = bench.draw(asks, "mixtures")
    verdicts = {j.name: j.look(drawn, asks) for j in bench.judges}
    blend_of = np.array([BLENDS.index((STYLES[a.among[0]], STYLES[a.among[1]])) for a in asks])
    classifier = bench.judges[1].name
    shares = verdicts[classifier].shares
    assert shares is not None
    towards = shares[np.arange(len(asks)), [a.style for a in asks]]
    curves = {f"{a} to {b}": towards[blend_of == i].reshape(-1, len(SHARES)).mean(0) for i, (a, b) in enumerate(BLENDS) if (blend_of == i).any()}
    rises = np.array([step_back(c) == 0 for c in curves.values()], dtype=float)
    bench.claim(f"mixtures: pairs of styles along which B rises without a step back ({classifier})", mean(rises), "fraction", ">= 1")
    bench.claim(f"mixtures: largest step back ({classifier})", max(step_back(c) for c in curves.values()), "probability")
    concept = {name: (v.rank == 0).reshape(-1, len(SHARES)).mean(0) for name, v in verdicts.items()}
    for name, curve in concept.items():
        bench.claim(f"mixtures: concept accuracy falls by ({name})", fall(curve), "fraction", "<= 0.1")
    bench.details["mixtures"] = {"shares_of_b": SHARES, "probability_of_b": curves, "concept_rank1": concept, "pictures": len(asks)}


# --- cost -------------------------------------------------------------------------------------------------------------------------------------


def command() -> list[str]:
    """The installed command where there is one beside this interpreter, else the module."""
    script = shutil.which("sfumato", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "sfumato.apps.cli"]


TIMER = """
import json, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
seconds = time.perf_counter() - began
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
except ImportError:
    peak = None
print(json.dumps([seconds, peak, done.returncode, done.stderr.decode(errors="replace")[-300:]]))
"""


def timed(argv: list[str], repeats: int) -> tuple[float, float | None]:
    """Median wall-clock seconds of a command and its largest resident memory in MiB (None where the system does not say).

    A small interpreter of its own starts it: on Linux a child's peak begins at that of the process which starts it, and this one is large.
    """
    seconds, memory = [], []
    for _ in range(repeats):
        took, peak, status, error = json.loads(subprocess.run([sys.executable, "-c", TIMER, *argv], stdout=subprocess.PIPE, check=True).stdout)
        if status:
            raise ValueError(f"{' '.join(argv)} ended with status {status}: {error}")
        seconds.append(took)
        memory.append(peak)
    return float(np.median(seconds)), max(memory) if None not in memory else None


def cost_section(bench: Bench) -> None:
    """Cold starts of the command, as a user waits for them; the load of the machine is in the report."""
    o = bench.options
    chosen = ["--model", str(find(o.model))] if o.model else []
    chosen += ["--threads", str(o.threads)] if o.threads else []
    with tempfile.TemporaryDirectory() as folder:
        ask = [*command(), "generate", "a cat", "--style", "noto", "--seed", "7", "--force", "--out", str(Path(folder) / "cat.png"), *chosen]
        one, memory = timed(ask, o.repeats)
        many, memory16 = timed([*ask, "--count", "16"], o.repeats)
    helped, _ = timed([*command(), "--help"], o.repeats)
    bench.claim("one picture from a cold start", one, "s", "<= 4")
    bench.claim("16 pictures: more than one takes", many - one, "s", "<= 4")
    bench.claim("sfumato --help", helped, "s", "<= 0.5")
    for name, value in (("one picture", memory), ("16 pictures", memory16)):
        if value is not None:
            bench.claim(f"peak memory of {name}", value, "MiB")
    bench.claim("size of the model file", find(o.model).stat().st_size / 2**20, "MiB")
    bench.details["cost"] = {"command": [Path(ask[0]).name, *ask[1:7]], "repeats": o.repeats}


WORK = {
    "codec": codec_section,
    "enlargement": enlargement_section,
    "accuracy": accuracy_section,
    "diversity": diversity_section,
    "colours": colours_section,
    "mixtures": mixtures_section,
    "cost": cost_section,
}


def run(options: Options) -> dict[str, Any]:
    """All sections that are wanted, as one report."""
    started = time.perf_counter()
    if options.quick:
        options = replace(options, **{k: min(v, getattr(options, k)) for k, v in SMALL.items()})
    wanted = options.sections
    bench = Bench(options, sfumato.load(options.model, device="cpu", threads=options.threads))
    about = {"quick": options.quick, "model": bench.model.name, "hash": bench.model.meta["hash"], "concepts": len(bench.known)}
    bench.details["subject"] = about | {"size": bench.model.size, "steps": options.steps, "guidance": options.guidance}
    for name in SECTIONS:
        if name in wanted:
            began = time.perf_counter()
            WORK[name](bench)
            bench.details.setdefault("seconds", {})[name] = time.perf_counter() - began
    return report(started, options.seed, bench.claims, bench.details)


def main(argv: list[str] | None = None) -> None:
    try:
        emit(run(tyro.cli(Options, args=argv)))
    except ValueError as e:
        print(f"bench: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except second.Stopped as e:
        print(e, file=sys.stderr)
        raise SystemExit(128 + e.signum) from None


if __name__ == "__main__":
    main()
