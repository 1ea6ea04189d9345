"""Evaluates a model, or a folder of samples, against reference pictures: every figure with its interval and with what it was made from.

Samples are looked at as they come and not kept: their features, a few numbers of each, and the few that the page shows. A stop (Ctrl-C) ends
the drawing, not the evaluation: what was drawn until then is what the figures say.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import sfumato
from sfumato.core.checkpoint import cache_folder, cached, write_bytes, write_json
from sfumato.core.config import nearest as spelt
from sfumato.core.images import grid, png_bytes, to_pil, to_tensor
from sfumato.core.language import translated
from sfumato.core.report import Curve, Figure, Report, Shot, to_html
from sfumato.core.request import LONGEST_PROMPT, GenerateRequest
from sfumato.data.emoji import STYLES, concepts, drawings
from sfumato.data.folder import evenly, pixels_of, scan
from sfumato.data.shards import ShardPictures, Shards, are_shards
from sfumato.metrics import cost
from sfumato.metrics.distribution import (
    NEIGHBOURS,
    Moments,
    compare_pairs,
    frechet_distance,
    frechet_infinity,
    frechet_interval,
    gaussian_distance,
    inception_score,
    kid_subsets,
    pair_intervals,
    remarks,
    subset_size,
)
from sfumato.metrics.diversity import (
    copied,
    intra_class_distance,
    mode_coverage,
    modes_of,
    ms_ssim_diversity,
    nearest,
    pairwise_distance,
    vendi_score,
)
from sfumato.metrics.features import FeatureNet, Resize, look
from sfumato.metrics.intervals import mean_interval, share_interval
from sfumato.metrics.judge import Judge
from sfumato.metrics.pairwise import PAIRWISE, over_both
from sfumato.metrics.stability import Usual, blur, failures, sharpness, spreads
from sfumato.nn.backbones import over
from sfumato.nn.lpips import LPIPS
from sfumato.pipelines.generate import Model, NotFinite, Picture

GROUPS = ("pairwise", "distribution", "diversity", "memorisation", "stability", "text", "cost")
EMOJI = "emoji"
MOST = 2048  # samples, unless asked for more
BATCH = 64
SHOWN = 32
FEWEST_PAIRS = 256  # reference pictures that a codec is tried on, however few samples are drawn
MODES = 48
SMALLEST_LPIPS = 32  # pixels: the deepest layers of its backbones see nothing of smaller pictures
FEWEST_FOR_BLOCKS = 30  # pictures, to leave out tenths of
SAME = 1e-5  # cosine distance of features, below which a sample is a reference picture itself
KEPT_SIDE = 64  # pixels of pictures that are kept for the page
MOST_SEARCHED = 100_000  # reference pictures among which the nearest are looked for
MOST_LEFT_OUT = 10_000  # pictures up to which tenths are left out of neighbourhoods, ten times the work
CMMD_MODEL = "clip-vit-large-patch14-336"  # with bicubic resizing it is what CMMD means
OPAQUE_CROP = "opaque pictures cut to their middle, others kept whole; Lanczos"


# --- sets of pictures ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureSet:
    """Pictures as squares, `pixels[rows]` uint8 "b 4 s s", premultiplied, with what is said of each.

    `digest` is of their contents in their order (of shards: of names, sizes, and the bytes of MOST pictures from all over them); `crop` says how
    they became squares; `stamp` changes with shards that were written anew.
    """

    path: str
    digest: str
    crop: str
    side: int
    pixels: Any
    names: list[str]
    captions: list[str | None]
    labels: list[str | None]
    styles: list[str | None]
    stamp: str = ""
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, rows: Sequence[int]) -> Iterator[Tensor]:
        """Premultiplied RGBA "b 4 s s" in [0, 1]."""
        for i in range(0, len(rows), BATCH):
            yield self.pixels[torch.tensor(rows[i : i + BATCH])].float() / 255

    def about(self, count: int) -> dict[str, Any]:
        return {"path": self.path, "count": count, "of": len(self), "sha256": self.digest}


def picture_set(where: str | Path, side: int, known: set[str] | None = None) -> PictureSet:
    """The pictures of a folder, a zip or shards, or with "emoji" the embedded drawings, of `known` concepts (hexcodes), as squares of `side`."""
    if str(where) == EMOJI:
        which = [c for c in concepts() if known is None or c.hexcode in known]
        art = drawings(2 * side, which)
        pixels = F.avg_pool2d(art.pixels.float(), 2).round().to(torch.uint8)
        said = [concepts()[c].name for c in art.concept]
        styles = [STYLES[s] for s in art.style]
        names = [f"{c} [{s}]" for c, s in zip(said, styles, strict=True)]
        crop = f"drawings, kept whole, rasterised at {2 * side} pixels and averaged 2 x 2"
        return PictureSet(EMOJI, _sha(art.pixels.numpy().tobytes()), crop, side, pixels, names, list(said), list(said), list(styles))
    if are_shards(where):
        shards = Shards(Path(where))
        words = [shards.words(i) for i in range(len(shards))]
        names = [own or str(i) for i, (own, _, _) in enumerate(words)]
        some = "".join(_sha(shards[i].data) for i in evenly(len(shards), MOST))
        digest = _sha((json.dumps([(p.name, p.stat().st_size) for p in shards.paths]) + some).encode())
        captions, told = [c for _, c, _ in words], [t for _, _, t in words]
        return PictureSet(
            str(where), digest, OPAQUE_CROP, side, ShardPictures(shards, side), names, captions, *_columns(told), stamp=shards.stamp
        )  # fmt: skip
    found = scan(where)
    entries = found.entries
    digest = _sha("".join(e.digest for e in entries).encode())
    pixels = pixels_of(found, entries, side).pixels
    return PictureSet(
        str(where), digest, OPAQUE_CROP, side, pixels, [e.name for e in entries], [e.caption for e in entries],
        *_columns([e.labels for e in entries]), skipped=tuple(f"{where}: {b.name} {b.reason}" for b in found.bad),
    )  # fmt: skip


def _columns(told: Sequence[dict[str, str]]) -> tuple[list[str | None], list[str | None]]:
    """(labels, styles) of pictures: the sub-folder, else the first label that is no style."""
    label = [t.get("folder") or next((v for k, v in t.items() if k != "style"), None) for t in told]
    return label, [t.get("style") for t in told]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- what every part works with -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How to evaluate: which groups, how many samples, what looks at them, and how a generator is asked."""

    groups: tuple[str, ...] = GROUPS
    count: int = 0
    resize: Resize = "antialias"
    steps: int | None = None
    guidance: float = 3.0
    truncation: float = 1.0
    seed: int = 0
    repeats: int = 5
    command: str = ""
    keep: Path | None = None

    def __post_init__(self) -> None:
        for group in self.groups:
            if group not in GROUPS:
                raise ValueError(f"metrics (={group!r}) must be all or among {', '.join(GROUPS)}{spelt(group, GROUPS)}")


@dataclass
class Evaluation:
    """Figures as they are found. `values` are numbers per picture, by what they are called, for paired comparisons."""

    options: Options
    net: FeatureNet
    reference: PictureSet
    rows: list[int]
    judge: Judge | None = None
    lpips: LPIPS | None = None
    samples: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    shots: list[Shot] = field(default_factory=list)
    nearest: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    began: float = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def add(self, group: str, name: str, value: float, *, n: int, looked: bool = True, **more: Any) -> None:
        """A figure with its provenance; `seconds` are those since the figure before or the last `start`."""
        source = {
            "reference": self.reference.about(len(self.rows)),
            "samples": dict(self.samples),
            "crop": f"squares of {self.reference.side} pixels: {self.reference.crop}",
            "resize": self.options.resize if looked else None,
            "features": {"network": self.net.name, "sha256": self.net.digest, "verified": self.net.verified} if looked else None,
            "seed": self.options.seed,
            "version": sfumato.__version__,
            "command": self.options.command,
        }
        interval = more.pop("interval", None)
        between = tuple(interval) if interval and all(np.isfinite(interval)) else None
        if looked and not self.net.verified:
            more["note"] = "; ".join(filter(None, (more.get("note"), "this network is not verified offline")))
        seconds = round(time.perf_counter() - self.began, 3)
        self.figures.append(Figure(group, name, float(value), interval=between, n=n, seconds=seconds, source=source, **more))  # type: ignore[arg-type]
        self.start()

    def mean(self, group: str, name: str, values: np.ndarray, **more: Any) -> None:
        """A mean over pictures, with its bootstrap interval; the values are kept for comparisons."""
        mean, low, high = mean_interval(values, self.options.seed)
        self.values[f"{group}/{name}"] = np.asarray(values, dtype=np.float64)
        self.add(group, name, mean, n=len(values), interval=(low, high), **more)


def white(rgba: Tensor) -> Tensor:
    """Premultiplied RGBA in [0, 1] over white; RGB as it is."""
    return over(rgba) if rgba.shape[1] == 4 else rgba


def features_of(net: FeatureNet, pictures: PictureSet, rows: Sequence[int], how: Resize) -> tuple[Tensor, Tensor | None]:
    """Features (and logits) of pictures of a set over white, kept in the cache folder."""
    key = json.dumps([net.name, net.digest, how, pictures.digest, pictures.stamp, pictures.crop, pictures.side, list(rows)])
    path = cache_folder() / f"features-{_sha(key.encode())[:24]}.safetensors"

    def make() -> tuple[dict[str, Tensor], dict[str, object]]:
        bar = tqdm(pictures.batches(rows), total=-(-len(rows) // BATCH), desc=translated("features of the pictures"), leave=False)
        parts = [look(net, white(b), how) for b in bar]
        found = {"features": torch.cat([f for f, _ in parts])}
        if parts[0][1] is not None:
            found["logits"] = torch.cat([logits for _, logits in parts if logits is not None])
        return found, {"network": net.name}

    found = cached(path, make)
    return found["features"], found.get("logits")


# --- samples ------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Looked:
    """What is kept of pictures that went by. What is no number is counted as failed and left out of everything else; `rows` are the others."""

    rows: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    sharp: list[np.ndarray] = field(default_factory=list)
    blurred: list[np.ndarray] = field(default_factory=list)
    failed: dict[str, list[np.ndarray]] = field(default_factory=dict)
    small: list[Tensor] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    seen: int = 0
    stopped: bool = False

    def take(self, e: Evaluation, batch: Tensor, usual: Usual) -> None:
        """Everything is computed before anything is kept, so that a stop leaves whole batches only."""
        rgb = white(batch)
        failed = failures(rgb, usual)
        finite = ~failed["not_finite"]
        good = rgb[finite]
        rows = [self.seen + i for i in finite.nonzero().flatten().tolist()]
        features, logits = look(e.net, good, e.options.resize) if rows else (torch.zeros(0, e.net.dimensions), None)
        sharp, blurred, small = sharpness(good).numpy(), blur(good).numpy(), reduced(good)
        data = (batch.nan_to_num() * 255).round().to(torch.uint8).numpy().tobytes()
        self.rows += rows
        for kind, mask in failed.items():
            self.failed.setdefault(kind, []).append(mask.numpy())
        self.features.append(features)
        if logits is not None:
            self.logits.append(logits)
        self.sharp.append(sharp)
        self.blurred.append(blurred)
        self.small.append(small)
        self.digest.update(data)
        self.seen += len(batch)

    @property
    def count(self) -> int:
        return len(self.rows)


def reduced(rgb: Tensor) -> Tensor:
    """RGB in [0, 1] at KEPT_SIDE pixels, uint8."""
    return (F.interpolate(rgb, size=(KEPT_SIDE, KEPT_SIDE), mode="bilinear", antialias=True) * 255).round().to(torch.uint8)


def looked_at(e: Evaluation, batches: Iterator[Tensor], total: int, usual: Usual) -> Looked:
    """Looks at pictures as they come; Ctrl-C ends that and keeps what was seen."""
    kept = Looked()
    try:
        with tqdm(total=total, desc=translated("looking at samples"), unit=" pictures", leave=False) as bar:
            for batch in batches:
                kept.take(e, batch, usual)
                bar.update(len(batch))
    except KeyboardInterrupt:
        kept.stopped = True
        e.remarks.append(f"stopped by hand after {kept.seen:,} of {total:,} samples: the figures are of these")
    if kept.count < kept.seen:
        e.remarks.append(f"{kept.seen - kept.count:,} of {kept.seen:,} samples are not finite: they count as failed, and are left out of all else")
    return kept


def _steps(model: Model, options: Options) -> int:
    return model.steps_of(GenerateRequest(steps=options.steps))


def asked_for(model: Model, pictures: PictureSet, rows: Sequence[int], options: Options) -> list[GenerateRequest]:
    """A request for each row: its caption, label and style, where the model knows them."""
    requests = []
    for i, row in enumerate(rows):
        caption = pictures.captions[row]
        prompt = caption[:LONGEST_PROMPT] if caption and model.text is not None else None
        label = pictures.labels[row] if pictures.labels[row] in model.meta["labels"] else None
        style = pictures.styles[row] if pictures.styles[row] in model.styles else None
        if model.needs_label and label is None:
            label = model.meta["labels"][i % len(model.meta["labels"])]
        shape = {"steps": options.steps, "guidance": options.guidance, "truncation": options.truncation, "size": model.size}
        requests.append(GenerateRequest(prompt=prompt, label=label, style=style, seed=options.seed + i, **shape))  # type: ignore[arg-type]
    return requests


def drawn(model: Model, requests: Sequence[GenerateRequest], keep: Path | None = None) -> Iterator[Tensor]:
    """Pictures in [0, 1], premultiplied, BATCH requests at a time, NaN where a network drew what is no number; written into the folder `keep` only
    where one is named.
    """
    for i in range(0, len(requests), BATCH):
        pictures = _attempted(model, requests[i : i + BATCH])
        for j, p in enumerate(pictures if keep else ()):
            if p is not None:
                write_bytes(keep / f"{i + j:06d}.png", p.png())  # type: ignore[operator]
        lost = torch.full((1, 4, model.size, model.size), float("nan"))
        yield torch.cat([lost if p is None else (to_tensor(p.image, 4) + 1) / 2 for p in pictures])


def _attempted(model: Model, requests: Sequence[GenerateRequest]) -> list[Picture | None]:
    """One picture a request; where they fail together each is tried alone, and None is what fails even so."""
    try:
        return list(model.draw(requests))
    except NotFinite:
        return [None] if len(requests) == 1 else [p for r in requests for p in _attempted(model, [r])]


# --- groups of figures --------------------------------------------------------------------------------------------------------------------------


def pairwise_figures(e: Evaluation, pairs: Iterator[tuple[Tensor, Tensor]], total: int, ids: Sequence[str], what: str) -> Tensor:
    """Figures of pairs (real, copy) of the same pictures or crops; returns the copies' features."""
    e.start()
    found: dict[str, list[np.ndarray]] = {}
    features, small, lpips = [], [], []
    grounds = ""
    for real, copy in tqdm(pairs, total=-(-total // BATCH), desc=translated("comparing pairs"), leave=False):
        grounds = "over white and black" if real.shape[1] == 4 else "over white"
        for name, (metric, _, _) in PAIRWISE.items():
            if min(real.shape[-2:]) < {"ssim": 7, "ms_ssim": 11}.get(name, 1):
                continue
            found.setdefault(name, []).append(over_both(metric, copy, real).numpy())
        if e.lpips is not None and min(real.shape[-2:]) >= SMALLEST_LPIPS:
            with torch.no_grad():
                lpips.append(over_both(e.lpips, copy, real).numpy())
        features.append(look(e.net, white(copy), e.options.resize)[0])
        small += [(white(a), white(b)) for a, b in zip(real.split(1), copy.split(1), strict=True)]
    for name, parts in found.items():
        _, unit, better = PAIRWISE[name]
        note = "fewer than five scales: the pictures are small" if name == "ms_ssim" and e.reference.side < 176 else ""
        e.mean(f"pairwise ({what})", name, np.concatenate(parts), unit=unit, better=better, looked=False, note=note, how=grounds)
    if lpips and e.lpips is not None:
        note = "not verified offline" if e.lpips.verified else "not verified offline; the backbone's weights are not torchvision's"
        how = f"{e.lpips.kind}, sha256 {e.lpips.digest[:16]}, {grounds}, arXiv 1801.03924"
        e.mean(f"pairwise ({what})", "LPIPS", np.concatenate(lpips), better=-1, looked=False, note=note, how=how)
    e.ids = list(ids)
    order = np.argsort(np.concatenate(found["psnr"]))
    for title, rows in (("Worst", order[:12]), ("Best", order[::-1][:12])):
        images = [to_pil(x * 2 - 1)[0] for r in rows for x in small[r]]
        e.shots.append(Shot(f"{title} of {what}, by PSNR", grid(images, columns=8), "real, copy: " + "; ".join(ids[r] for r in rows)))
    return torch.cat(features)


def distribution_figures(e: Evaluation, real: Tensor, fake: Tensor, logits: Tensor | None, group: str = "distribution") -> None:
    """Frechet and kernel distances, precision and recall, density and coverage."""
    inception = e.net.name.startswith("Inception")
    e.start()
    distance = frechet_distance(*(Moments().update(x) for x in (real, fake)))
    said = "; ".join(remarks(len(real), len(fake), real.shape[1]))
    name = "Frechet Inception distance (FID)" if inception else f"Frechet distance ({e.net.name})"
    between = frechet_interval(real, fake) if min(len(real), len(fake)) >= FEWEST_FOR_BLOCKS else None
    how = "arXiv 1706.08500; interval of its spread, not of its bias, by leaving out tenths of both sets"
    e.add(group, name, distance, n=len(fake), better=-1, interval=between, note=said, how=how, of_count=True)
    if len(fake) >= 2 * fake.shape[1]:
        limit, points = frechet_infinity(real, fake, seed=e.options.seed)
        how = f"a line in 1/n through 15 sizes, arXiv 1911.07023; what the {len(real):,} reference pictures add by being so few remains"
        e.add(group, f"{name}, of infinitely many samples", limit, n=len(fake), better=-1, how=how, note=said)
        e.curves.append(Curve(f"{name}: how it falls with n ({group})", "1 / n", "distance", {"measured": [(1 / n, d) for n, d in points]}))
    pairs = compare_pairs(real, fake, k=min(NEIGHBOURS, len(real) - 1, len(fake) - 1))
    kid = "kernel distance (KID)" if inception else f"kernel distance ({e.net.name})"
    e.add(
        group, kid, pairs.kid, n=len(fake), better=-1, interval=pairs.kid_interval, how="unbiased, arXiv 1801.01401; interval by leaving out blocks"
    )
    subsets = kid_subsets(real, fake, seed=e.options.seed)
    how = f"standard deviation {subsets.std(ddof=1):.3g}; as it is usually published"
    how = f"of {subset_size(len(real), len(fake))} pictures; {how}"
    name = f"{kid}, mean of {len(subsets)} subsets"
    e.add(group, name, subsets.mean(), n=len(fake), better=-1, how=how)
    blocks = min(len(real), len(fake)) >= FEWEST_FOR_BLOCKS and max(len(real), len(fake)) <= MOST_LEFT_OUT
    intervals = pair_intervals(real, fake, pairs) if blocks else {}
    for label, values in (("precision", pairs.inside), ("recall", pairs.reached), ("density", pairs.covers / pairs.k), ("coverage", pairs.covered)):
        e.values[f"{group}/{label}"] = values
        how = f"neighbourhoods of {pairs.k}" + ("; interval by leaving out tenths of both sets" if blocks else "")
        e.add(group, label, values.mean(), n=len(values), better=1, interval=intervals.get(label), how=how, of_count=label in ("recall", "coverage"))
    cmmd = "CMMD" if e.net.name.endswith(CMMD_MODEL) and e.options.resize == "bicubic" else f"Gaussian kernel distance ({e.net.name})"
    how = "sigma 10, times 1000, each picture's own pair counted: above 0 for few pictures even of one kind; arXiv 2401.09603"
    e.add(group, cmmd, gaussian_distance(real, fake), n=len(fake), better=-1, how=how, of_count=True)
    if inception and logits is not None and len(logits) >= 10:
        mean, deviation = inception_score(logits)
        e.add(group, "Inception Score", mean, n=len(fake), better=1, how=f"10 splits, spread {deviation:.3f}", of_count=True)


def diversity_figures(e: Evaluation, real: Tensor, fake: Tensor, kept: Looked, labels: Sequence[str | None]) -> None:
    """How different the samples are from each other, beside the reference."""
    e.start()
    e.add(
        "diversity", "mean pairwise distance", pairwise_distance(fake), n=len(fake), better=1, how=f"cosine; reference {pairwise_distance(real):.4f}"
    )
    how = f"reference {vendi_score(real):.2f}, of {len(real)}"
    e.add("diversity", "Vendi score", vendi_score(fake), n=len(fake), better=1, how=how, of_count=True)
    pictures = torch.cat(kept.small).float() / 255
    e.mean("diversity", "1 - MS-SSIM of random pairs", ms_ssim_diversity(pictures, seed=e.options.seed), better=1, looked=False)
    told = np.array([label or "" for label in labels])
    counts = {k: int((told == k).sum()) for k in set(told.tolist()) - {""}}
    if counts and max(counts.values()) > 1:
        inside = told != ""
        e.add("diversity", "within one class", intra_class_distance(fake[torch.from_numpy(inside)], told[inside]), n=int(inside.sum()), better=1)
    centres = modes_of(real, min(MODES, max(len(real) // 5, 2)), e.options.seed)
    coverage = mode_coverage(real, fake, centres)
    how = f"{len(centres)} kinds of reference pictures by k-means"
    for name, key, better, said in (("modes reached", "covered", 1, how), ("modes: difference of shares", "total_variation", -1, "total variation")):
        e.add("diversity", name, float(coverage[key]), n=len(fake), better=better, how=said, of_count=True)  # type: ignore[arg-type]
    _, rows = nearest(centres, real)
    shares = list(zip(coverage["real"], coverage["fake"], strict=True))  # type: ignore[call-overload]
    order = np.argsort([-r for r, _ in shares])
    images = [to_pil(white(e.reference.pixels[rows[i : i + 1]].float() / 255) * 2 - 1)[0] for i in map(int, order)]
    text = "the middle picture of each kind, with its share of reference / of samples: "
    text += ", ".join(f"{shares[i][0]:.1%} / {shares[i][1]:.1%}" for i in order)
    e.shots.append(Shot("Coverage map", grid(images, columns=12), text))


def memorisation_figures(e: Evaluation, fake: Tensor, kept: Looked) -> None:
    """The nearest of all reference pictures of each sample, beside what reference pictures keep from each other."""
    e.start()
    rows = evenly(len(e.reference), MOST_SEARCHED)
    whole, _ = features_of(e.net, e.reference, rows, e.options.resize)
    apart, found = nearest(fake, whole)
    own = nearest(whole, whole, same=True)[0]
    note = "" if len(rows) == len(e.reference) else f"searched among {len(rows):,} of {len(e.reference):,} reference pictures only"
    how = f"cosine, mean; theirs to each other {own.mean():.4f}; of {len(rows):,}"
    e.mean("memorisation", "distance to the nearest reference picture", apart.numpy(), better=0, how=how, note=note)
    share = share_interval(copied(apart, own), len(fake))
    how = "nearer than half of what reference pictures keep from each other; means copying where the reference is what was trained on"
    e.add("memorisation", "copies", copied(apart, own), n=len(fake), better=-1, interval=share, how=how, note=note)
    theirs = [rows[i] for i in found.tolist()]
    e.nearest = [{"sample": i, "reference": e.reference.names[r], "distance": d} for i, r, d in zip(kept.rows, theirs, apart.tolist(), strict=True)]
    small, order = torch.cat(kept.small), torch.argsort(apart)
    for title, chosen in (("Nearest to the reference", order[:SHOWN]), ("Farthest from the reference", order.flip(0)[:SHOWN])):
        beside = e.reference.pixels[torch.tensor([theirs[i] for i in chosen.tolist()])].float() / 255
        pairs = zip(to_pil(small[chosen].float() / 127.5 - 1), to_pil(white(beside) * 2 - 1), strict=True)
        images = [i.resize((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS) for pair in pairs for i in pair]
        e.shots.append(Shot(title, grid(images, columns=16), "sample, nearest reference picture"))


def stability_figures(e: Evaluation, kept: Looked, usual: Usual, model: Model | None, real: Tensor) -> None:
    """Failed pictures, sharpness and blur; of a generator also how figures move with seed, steps, guidance and words."""
    e.start()
    for kind, parts in kept.failed.items():
        e.mean("stability", f"failed: {kind.replace('_', ' ')}", np.concatenate(parts).astype(float), better=-1, unit="", looked=False)
    sharp = np.concatenate(kept.sharp)
    e.mean("stability", "sharpness", sharp, looked=False, how=f"variance of the Laplacian; median of the reference {usual.sharpness:.4g}")
    e.mean("stability", "blur", np.concatenate(kept.blurred), better=-1, looked=False, how="0 sharp, 1 wholly blurred (Crete et al. 2007)")
    if model is None or kept.stopped:
        return
    rows = [e.rows[i] for i in evenly(len(e.rows), 64)]
    ask = lambda options: asked_for(model, e.reference, rows, options)  # noqa: E731

    def measure(requests: Sequence[GenerateRequest]) -> dict[str, float]:
        looked = Looked()
        for batch in drawn(model, requests):
            looked.take(e, batch, usual)
        failed = float(np.any([np.concatenate(v) for v in looked.failed.values()], axis=0).mean())
        if looked.count < 2:
            return {"failed": failed}
        fake = torch.cat(looked.features)
        pairs = compare_pairs(real, fake, k=min(NEIGHBOURS, len(fake) - 1))
        return {
            "kernel distance": pairs.kid,
            "precision": pairs.precision,
            "recall": pairs.recall,
            "density": pairs.density,
            "coverage": pairs.coverage,
            "Gaussian kernel distance": gaussian_distance(real, fake),
            "mean pairwise distance": pairwise_distance(fake),
            "Vendi score": vendi_score(fake),
            "distance to the nearest reference picture": float(nearest(fake, real)[0].mean()),
            "sharpness": float(np.concatenate(looked.sharp).mean()),
            "blur": float(np.concatenate(looked.blurred).mean()),
            "failed": failed,
        }

    o = e.options
    changes = {
        "seed": [ask(replace(o, seed=o.seed + 10_000 * (i + 1))) for i in range(o.repeats)],
        "steps": [ask(replace(o, steps=n)) for n in sorted({max(1, round(_steps(model, o) * f)) for f in (0.5, 0.8, 1.0, 1.25, 2.0)})],
        "guidance": [ask(replace(o, guidance=o.guidance * f)) for f in (0.67, 0.83, 1.0, 1.2, 1.5)],
    }
    if model.way == "gpt":
        del changes["steps"]  # one a code
    if model.way == "gan":
        changes = {"seed": changes["seed"], "truncation": [ask(replace(o, truncation=t)) for t in (0.5, 0.7, 0.85, 1.0)]}
    if model.text is not None:
        worded = [lambda p: p, lambda p: f"a picture of {p}", lambda p: f"{p}.", str.upper]
        changes["words"] = [[replace(r, prompt=w(r.prompt)[:LONGEST_PROMPT]) if r.prompt else r for r in ask(o)] for w in worded]
    for change, several in changes.items():
        e.start()
        for name, found in spreads([measure(requests) for requests in several]).items():
            how = f"mean {found['mean']:.4g}, from {found['min']:.4g} to {found['max']:.4g}, of {len(several)} settings of {len(rows)} pictures"
            e.add("stability", f"{name}: spread over {change}", found["std"], n=len(several), better=-1, how=f"standard deviation; {how}")


@dataclass(frozen=True)
class Asked:
    """What each sample was asked to be: of a model's what it was told, of a folder's what lies beside its pictures."""

    captions: list[str | None]
    labels: list[str | None]
    styles: list[str | None]

    def of(self, rows: Sequence[int]) -> Asked:
        return Asked(*([column[r] for r in rows] for column in (self.captions, self.labels, self.styles)))


def told(pictures: PictureSet, rows: Sequence[int], requests: Sequence[GenerateRequest] | None = None) -> Asked:
    """Of a set's rows; where a model was asked, only what the requests say: words say the label too."""
    all_of = Asked(pictures.captions, pictures.labels, pictures.styles).of(rows)
    if requests is None:
        return all_of
    labels = [label if r.prompt or r.label else None for label, r in zip(all_of.labels, requests, strict=True)]
    return Asked([r.prompt for r in requests], labels, [r.style for r in requests])  # type: ignore[misc]


def text_figures(e: Evaluation, found: Tensor, fake: Tensor, asked: Asked, kept: Looked) -> None:
    """Whether what was asked for is what is seen: by the nearest reference picture (`found` says which), by a judge, and by CLIP, as far as these
    are there.
    """
    before = len(e.figures)
    retrieval_figures(e, found, asked)
    if e.judge is not None:
        judge_figures(e, e.judge, asked, kept)
    said = [(i, c) for i, c in enumerate(asked.captions) if c]
    if e.net.texts is not None and said:
        words = F.normalize(e.net.texts([c for _, c in said]), dim=1)
        scores = 100 * (F.normalize(fake[[i for i, _ in said]], dim=1) * words).sum(1).clamp_min(0)
        e.mean("text and style", "CLIP score", scores.numpy(), better=1, how="100 times the cosine of picture and words, 0 at least")
    if len(e.figures) == before:
        e.remarks.append("no figures of text and style: the samples have no labels, styles or captions of two kinds that the reference has too")


def judge_figures(e: Evaluation, judge: Judge, asked: Asked, kept: Looked) -> None:
    """What a judge names first in the samples, beside what it names in the reference pictures; both at the same size."""
    e.start()
    drawn = judge(torch.cat(kept.small).float() / 255)
    real = [torch.cat(p) for p in zip(*(judge(reduced(white(b)).float() / 255) for b in e.reference.batches(e.rows)), strict=True)]
    theirs = told(e.reference, e.rows)
    for what, names, i in (("label", judge.labels, 0), ("style", judge.styles, 1)):
        wanted, own = (np.array([names.index(v) if v in names else -1 for v in getattr(a, what + "s")]) for a in (asked, theirs))
        if len(set(wanted[wanted >= 0].tolist())) < 2:
            continue
        right, ceiling = ((x[i].argmax(1).numpy() == y)[y >= 0].astype(float) for x, y in ((drawn, wanted), (real, own)))
        how = f"named first among {len(names)} by the judge {judge.digest[:10]}; of the reference pictures themselves {ceiling.mean():.3f}"
        e.mean("text and style", f"{what} as asked, by the judge", right, better=1, looked=False, how=how)


def retrieval_figures(e: Evaluation, found: Tensor, asked: Asked) -> None:
    """The nearest reference picture has the asked label, the asked style, the asked words."""
    e.start()
    theirs = told(e.reference, e.rows)
    for what in ("label", "style", "caption"):
        wanted, there = getattr(asked, what + "s"), getattr(theirs, what + "s")
        known = [i for i, a in enumerate(wanted) if a is not None and a in set(there)]
        if len({wanted[i] for i in known}) < 2 or (what == "caption" and wanted == asked.labels):
            continue
        right = np.array([wanted[i] == there[int(found[i])] for i in known], dtype=float)
        chance = np.mean([there.count(wanted[i]) for i in known]) / len(there)
        how = f"of the nearest of {len(there):,} reference pictures; of one drawn by chance {chance:.3f}"
        name = f"{what} as asked" if "model" in e.samples else f"{what} like that of the nearest reference picture"
        e.mean("text and style", name, right, better=1, how=how)


def cost_figures(e: Evaluation, model: Model, trained: float | None) -> None:
    """Parameters, operations, seconds and pictures a second, in drawing and in training, memory."""
    e.start()
    parts = {"codec": model.codec, model.part: model.network, "text": model.text}
    networks = {name: network for name, network in parts.items() if network is not None}
    for name, count in cost.parameters(networks).items():
        e.add("cost", f"parameters: {name}", count, n=1, looked=False)
    label = (model.meta["labels"] or [None])[0]
    request = GenerateRequest(prompt="a cat" if model.text is not None else None, label=label, steps=20, seed=0, size=model.size)
    only = {"gpt": "one code at a time", "gan": "in one pass"}.get(model.way)
    ways = {only: None} if only else {f"{n} step{'s' * (n > 1)}": n for n in (1, 4, 20)}
    many = list(ways)[-1]
    flops = cost.flops(lambda: list(model.pictures(request))) / 1e9
    e.add("cost", "operations of one picture" + ("" if only else f" in {many}"), flops, n=1, unit="GFLOP", looked=False)
    for said, steps in ways.items():
        e.start()
        asked = replace(request, steps=steps)
        found = cost.latency(lambda asked=asked: list(model.pictures(asked)), repeats=10)  # type: ignore[misc]
        pace = cost.pace(found["median_s"])
        how = f"p95 {1000 * found['p95_s']:.0f} ms; {pace['pictures_per_s']:.3g} pictures a second; {pace['said']}"
        e.add("cost", f"one picture, {said}", 1000 * found["median_s"], n=10, unit="ms", better=-1, looked=False, how=how)
    e.start()
    seconds = cost.latency(lambda: list(model.pictures(replace(request, count=16))), repeats=3)["median_s"]
    e.add("cost", "throughput, 16 pictures together", 16 / seconds, n=3, unit="pictures/s", better=1, looked=False, how=many)
    if trained is not None:
        e.add("cost", "training", trained, n=1, unit="images/s", better=1, looked=False, how="median of the run's log, on the machine that it ran on")
    if (peak := cost.peak_memory()) is not None:
        e.add("cost", "peak memory of this evaluation", peak, n=1, unit="MiB", looked=False)


# --- the whole ----------------------------------------------------------------------------------------------------------------------------------


def paired_rows(samples: PictureSet, reference: PictureSet) -> list[tuple[int, int]]:
    """(sample, reference) rows of pictures that have the same name apart from its ending."""
    stem = lambda name: name.rpartition(".")[0] or name  # noqa: E731
    at = {stem(n): i for i, n in enumerate(reference.names)}
    return [(i, at[stem(n)]) for i, n in enumerate(samples.names) if stem(n) in at]


def evaluate(
    subject: Model | PictureSet, name: str, reference: PictureSet, net: FeatureNet, options: Options, *, judge: Judge | None = None,
    lpips: LPIPS | None = None, trained: float | None = None,
) -> tuple[Report, Evaluation]:  # fmt: skip
    """The report of a model or of a set of samples; `trained`: pictures a second that its training took. Raises ValueError where there is too
    little to say anything of.
    """
    model = subject if isinstance(subject, Model) else None
    count = options.count or min(len(reference) if model else len(subject), MOST)  # type: ignore[arg-type]
    rows = evenly(len(reference), max(count, min(len(reference), MOST)))
    if min(len(rows), count) < 2:
        raise ValueError(f"{name} gives {count} samples and {reference.path} has {len(rows)} pictures: two of each are needed at least")
    e = Evaluation(options, net, reference, rows, judge, lpips)
    e.start()
    real, _ = features_of(net, reference, rows, options.resize)
    usual = Usual.of(white(next(reference.batches([rows[i] for i in evenly(len(rows), BATCH)]))))
    wanted = [rows[i * len(rows) // count % len(rows)] for i in range(count)]  # from all over them, however few are drawn
    if model:
        e.samples = {"model": name, "hash": model.meta["hash"], "count": count, "steps": _steps(model, options), "guidance": options.guidance}
        requests = asked_for(model, reference, wanted, options)
        batches, asked = drawn(model, requests, options.keep), told(reference, wanted, requests)
    else:
        assert isinstance(subject, PictureSet)
        chosen = evenly(len(subject), count)
        e.samples = subject.about(len(chosen))
        batches, asked = subject.batches(chosen), told(subject, chosen)
    groups = set(options.groups)
    try:
        if "pairwise" in groups:
            samples = e.samples
            _part(e, "pairwise", lambda: _pairs(e, subject, real))
            e.samples = samples
        if groups - {"pairwise", "cost"}:
            kept = looked_at(e, batches, count, usual)
            e.stopped = kept.stopped
            if model:
                e.samples |= {"count": kept.count, "sha256": kept.digest.hexdigest()}
            if kept.count:
                _of_samples(e, groups, real, kept, usual, model, asked.of(kept.rows))
        if "cost" in groups and not e.stopped:
            if model:
                cost_figures(e, model, trained)
            elif groups != set(GROUPS):
                e.remarks.append("no figures of cost: they are of models, not of pictures")
    except KeyboardInterrupt:
        e.stopped = True
        if e.figures:
            e.remarks.append(f"stopped by hand in {e.figures[-1].group}: what would have come later is missing")
    if not e.figures and e.stopped:
        raise KeyboardInterrupt
    if not e.figures:
        raise ValueError(f"there is nothing to say: {'; '.join(e.remarks)}")
    about = {"subject": name, "reference": reference.path, "reference pictures": len(rows), "samples": e.samples.get("count")}
    about |= {"features": f"{net.name} ({net.digest})", "resize": options.resize, "seed": options.seed, "version": sfumato.__version__}
    return Report(f"{name} against {reference.path}", e.figures, about | {"command": options.command}, e.remarks, e.curves, e.shots), e


def _pairs(e: Evaluation, subject: Model | PictureSet, real: Tensor) -> None:
    """Reconstruction by a model's codec of the same crops, or samples that are named like reference pictures."""
    if isinstance(subject, PictureSet):
        pairs = paired_rows(subject, e.reference)
        if len(pairs) < 2:
            e.remarks.append("no pairwise figures: samples are not named like the reference pictures")
            return
        if len(pairs) < len(subject):
            e.remarks.append(f"pairwise figures are of {len(pairs):,} of {len(subject):,} samples: the others are not named like a reference picture")
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        both = zip(e.reference.batches(theirs), subject.batches(ours), strict=True)
        pairwise_figures(e, both, len(pairs), [e.reference.names[b] for b in theirs], "named alike")
        return
    if (codec := subject.codec) is None:
        e.remarks.append("no pairwise figures: this model draws pixels and has no codec")
        return
    rows = [e.rows[i] for i in evenly(len(e.rows), min(MOST, max(e.options.count, FEWEST_PAIRS)) if e.options.count else MOST)]
    e.samples = {"model": e.samples["model"], "hash": e.samples["hash"], "count": len(rows), "of": "the reference pictures, through its codec"}

    @torch.no_grad()
    def copies() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in e.reference.batches(rows):
            x = batch if codec.spec.image_channels == 4 else over(batch)
            y = codec.decode(codec.encode(x.to(subject.device) * 2 - 1).mean).cpu()  # type: ignore[arg-type]
            yield x, ((y.clamp(-1, 1) + 1) * 127.5).round() / 255

    fake = pairwise_figures(e, copies(), len(rows), [e.reference.names[r] for r in rows], "reconstruction by the codec")
    same = real if len(rows) == len(e.rows) else real[torch.tensor(evenly(len(e.rows), len(rows)))]
    e.start()
    distance = frechet_distance(*(Moments().update(x) for x in (same, fake)))
    note = "; ".join(remarks(len(same), len(fake), fake.shape[1]))
    how = "the same crops on both sides, so the distance is of the codec alone"
    name = "rFID" if e.net.name.startswith("Inception") else f"Frechet distance of reconstructions ({e.net.name})"
    e.add("pairwise (reconstruction by the codec)", name, distance, n=len(fake), better=-1, how=how, note=note, of_count=True)


def _of_samples(e: Evaluation, groups: set[str], real: Tensor, kept: Looked, usual: Usual, model: Model | None, asked: Asked) -> None:
    fake = torch.cat(kept.features)
    apart, found = nearest(fake, real)
    same = float((apart < SAME).float().mean())
    if same > 0.05:
        e.remarks.append(
            f"{same:.0%} of the samples are reference pictures themselves: kernel distances are below 0 then, and say nothing of other pictures"
        )
    first = torch.cat(kept.small)[: 2 * SHOWN]
    e.shots.insert(0, Shot("Samples, the first ones as they came", grid(to_pil(first.float() / 127.5 - 1), columns=16)))
    parts: dict[str, Callable[[], None]] = {
        "distribution": lambda: distribution_figures(e, real, fake, torch.cat(kept.logits) if kept.logits else None),
        "diversity": lambda: diversity_figures(e, real, fake, kept, asked.labels),
        "memorisation": lambda: memorisation_figures(e, fake, kept),
        "stability": lambda: stability_figures(e, kept, usual, model, real),
        "text": lambda: text_figures(e, found, fake, asked, kept),
    }
    for name, part in parts.items():
        if name in groups:
            _part(e, name, part)


def _part(e: Evaluation, name: str, part: Callable[[], None]) -> None:
    """One group of figures; where too little is there to say one of them, a remark instead, and the other groups all the same."""
    try:
        part()
    except ValueError as why:
        e.remarks.append(f"{name}: {why}")


def save(report: Report, e: Evaluation, out: Path) -> list[Path]:
    """Writes report.json, index.html and the values of single pictures (for `sfumato compare`) into the folder `out`."""
    write_json(out / "report.json", report.to_json())
    write_json(out / "values.json", {"values": {k: v.tolist() for k, v in e.values.items()}, "ids": e.ids, "nearest": e.nearest})
    write_bytes(out / "index.html", to_html(report).encode())
    for i, shot in enumerate(report.shots):
        write_bytes(out / f"{i:02d}.png", png_bytes(shot.image, {"Title": shot.title}))
    return [out / "report.json", out / "index.html"]
