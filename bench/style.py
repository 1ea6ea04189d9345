"""A style from ten drawings: `python bench/style.py --icons icons.json`, of the npm package @iconify-json/streamline-emojis. One JSON on stdout.

The bundled model learns by a LoRA how ten drawings of a set look that it never saw, and draws a hundred other things. Whether a picture is of the
new style, of seven, is said by a linear classifier of statistics of EfficientNet-Lite0's early maps, which learned from real drawings of things that
are not asked here; whether it shows what was asked, of a hundred things, by one of its pooled features. Both learned from drawings as they are, as
the codec gives them back, and from latents with noise: how a generator errs is no sign of any style. Beside that: whether the real drawing that is
nearest to a picture is one of the ten; and what the training took.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import ROOT, claim, emit, report
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import sfumato
from sfumato.core.images import flatten, grid, to_tensor
from sfumato.core.request import GenerateRequest
from sfumato.core.rng import numpy_rng
from sfumato.data.emoji import STYLES, Concept, drawable, drawings
from sfumato.metrics.features import feature_net, look, style_statistics
from sfumato.nn.backbones import over
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.train import lora

NEW = len(STYLES)  # the index of the new style: Streamline Emojis, CC BY 4.0
TEN = ("airplane", "cat-face", "mushroom", "house-with-garden", "sailboat", "red-apple", "honeybee", "rocket", "umbrella", "guitar")
NOISE = (0.0, 0.2, 0.4)  # of latents that the judges learn from, at most
SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    """Teaches the bundled model a style, and prints one JSON object."""

    icons: Path
    """icons.json of @iconify-json/streamline-emojis."""
    count: int = 100
    """Other things that are drawn."""
    threads: int = 2
    out: Path = ROOT / "runs" / "bench-style"
    """Where drawings, LoRA and pictures are kept."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""


# --- drawings -------------------------------------------------------------------------------------------------------------------------------------


def icons(options: Options) -> dict[str, tuple[Concept, Image.Image]]:
    """{icon: (the concept that it shows, its picture)} of those that the bundled model knows."""
    import resvg_py

    names = {re.sub(r"[^a-z0-9]+", "-", c.names["en"].lower()).strip("-"): c for c in drawable()}
    found: dict[str, tuple[Concept, Image.Image]] = {}
    for name, icon in json.loads(options.icons.read_text())["icons"].items():
        concept = names.get(re.sub(r"-\d$", "", name))
        if concept and concept not in [c for c, _ in found.values()]:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">{icon["body"]}</svg>'
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
            found[re.sub(r"-\d$", "", name)] = concept, Image.open(io.BytesIO(png)).convert("RGBA")
    return found


def write_ten(options: Options, found: dict[str, tuple[Concept, Image.Image]]) -> Path:
    """The drawings that are taught, with captions."""
    folder = options.out / "ten"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEN:
        concept, image = found[name]
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(concept.names["en"])
    return folder


@dataclass(frozen=True)
class Real:
    """Drawings x "n 4 64 64" in [0, 1] with the style and the thing (its place among the icons) of each; not the ten."""

    x: Tensor
    style: Tensor
    thing: Tensor


def real_drawings(found: dict[str, tuple[Concept, Image.Image]]) -> Real:
    concepts = [c for c, _ in found.values()]
    place, art = {c.index: i for i, c in enumerate(concepts)}, drawings(SIDE, concepts)
    new = [(i, image) for i, (name, (_, image)) in enumerate(found.items()) if name not in TEN]
    pixels = torch.cat([art.pixels.float() / 255, *(to_tensor(image, 4) / 2 + 0.5 for _, image in new)])
    things = [place[int(c)] for c in art.concept] + [i for i, _ in new]
    styles = [int(s) for s in art.style] + [NEW] * len(new)
    return Real(F.avg_pool2d(pixels, 2), torch.tensor(styles), torch.tensor(things))


# --- judges ---------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def seen(rgba: Tensor) -> tuple[Tensor, Tensor]:
    """(how they are drawn, what they show) of pictures over white."""
    rgb = over(rgba.clamp(0, 1))
    return style_statistics(rgb), look(feature_net(), rgb)[0]


@torch.no_grad()
def copies(model: LatentDiffusion, x: Tensor, noise: float, seed: int) -> Tensor:
    """Drawings as the codec gives them back, with up to so much noise in their latents."""
    rng, found = torch.Generator().manual_seed(seed), []
    alive = (model.codec.latent_std > 0)[:, None, None]  # type: ignore[union-attr]
    for part in x.split(64):
        z = model.codec.encode(part * 2 - 1).mean  # type: ignore[union-attr]
        strength = noise * torch.rand(len(z), 1, 1, 1, generator=rng)  # type: ignore[arg-type]
        found.append(model.codec.decode(z + strength * torch.randn(z.shape, generator=rng) * alive) / 2 + 0.5)  # type: ignore[union-attr]
    return torch.cat(found)


def linear(features: Tensor, right: Tensor, classes: int, decay: float = 1e-2) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardised features: features -> logits."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    z = (features - mean) / std
    weight, bias = torch.zeros(z.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(z @ weight + bias, right) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return lambda v: (((v - mean) / std) @ weight + bias).detach()


@dataclass(frozen=True)
class Judges:
    style: Callable[[Tensor], Tensor]
    thing: Callable[[Tensor], Tensor]
    nearest: Tensor  # directions of the pooled features of all drawings of the new style
    ten: Tensor  # and of the ten
    accuracy: dict[str, float]


def judges(options: Options, model: LatentDiffusion, real: Real, asked: list[int], ten: list[Image.Image]) -> Judges:
    """`asked` are the things that pictures will be of: the judge of the style does not learn from them, the judge of the thing from them alone."""
    views = [seen(real.x), *(seen(copies(model, real.x, noise, options.seed)) for noise in NOISE)]
    of_asked = torch.isin(real.thing, torch.tensor(asked))
    style = linear(torch.cat([v[0][~of_asked] for v in views]), real.style[~of_asked].repeat(len(views)), NEW + 1)
    thing = torch.searchsorted(torch.tensor(asked), real.thing[of_asked])
    of_thing = linear(torch.cat([v[1][of_asked] for v in views]), thing.repeat(len(views)), len(asked))
    said, right = style(views[1][0][of_asked]).argmax(1), real.style[of_asked]
    accuracy = {
        "of the new style found": float((said[right == NEW] == NEW).float().mean()),
        "of the others taken for it": float((said[right != NEW] == NEW).float().mean()),
    }
    small = torch.cat([F.avg_pool2d(to_tensor(i, 4) / 2 + 0.5, 2) for i in ten])
    return Judges(style, of_thing, F.normalize(views[0][1][real.style == NEW]), F.normalize(seen(small)[1]), accuracy)


def judged(told: Judges, images: list[Image.Image]) -> dict[str, float]:
    """Of pictures of each of the asked things, in their order."""
    early, pooled = seen(torch.cat([to_tensor(i.convert("RGBA"), 4) / 2 + 0.5 for i in images]))
    logits, right, near = told.thing(pooled), torch.arange(len(images)), F.normalize(pooled)
    return {
        "new style": float((told.style(early).argmax(1) == NEW).float().mean()),
        "thing": float((logits.argmax(1) == right).float().mean()),
        "thing among five": float((logits.topk(min(5, logits.shape[1])).indices == right[:, None]).any(1).float().mean()),
        "nearest is one of the ten": float(((near @ told.ten.T).amax(1) > (near @ told.nearest.T).amax(1)).float().mean()),
    }


# --- the bench ------------------------------------------------------------------------------------------------------------------------------------


def pictures(model: LatentDiffusion, concepts: list[Concept], seed: int, **more: Any) -> list[Image.Image]:
    """One of each thing, unselected."""
    requests = [GenerateRequest(prompt=c.names["en"], seed=seed + i, size=model.size, **more) for i, c in enumerate(concepts)]
    return [p.image for p in model.draw(requests)]


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    if options.quick:
        shutil.rmtree(options.out / "quick", ignore_errors=True)
        options = replace(options, out=options.out / "quick", count=8)
    found = icons(options)
    ten = write_ten(options, found)
    recipe, loop = lora.preset_style()
    loop = replace(loop, seed=options.seed, threads=options.threads, device="cpu", **({"images": 64, "warmup": 0} if options.quick else {}))
    began = time.perf_counter()
    lora.train(replace(recipe, data=str(ten), **({"each": 2} if options.quick else {})), loop, options.out / "lora")
    seconds = time.perf_counter() - began
    names = list(found)
    others = [i for i, name in enumerate(names) if name not in TEN]
    asked = sorted(numpy_rng(options.seed, "style").permutation(others)[: options.count].tolist())
    model = sfumato.load(device="cpu")
    assert isinstance(model, LatentDiffusion)
    told = judges(options, model, real_drawings(found), asked, [found[n][1] for n in TEN])
    concepts = [found[names[i]][0] for i in asked]
    drawn = {
        "before": pictures(model, concepts, 1),
        "before, in the style that is changed": pictures(model, concepts, 1, style=style_of(options.out / "lora")),
        "after": pictures(model, concepts, 1, lora=(str(options.out / "lora"),)),
        "real drawings": [found[names[i]][1].resize((model.size,) * 2, Image.Resampling.BOX) for i in asked],
    }
    for name in ("before", "after"):
        grid([flatten(i) for i in drawn[name]], columns=20).save(options.out / f"{name}.png", optimize=True)
    rows = {name: judged(told, images) for name, images in drawn.items()}
    after = rows["after"]
    claims = [
        claim("of a hundred other things, pictures that a judge takes for the new style", after["new style"], "", ">= 0.8"),
        claim("things recognised: before less after", rows["before"]["thing"] - after["thing"], "", "<= 0.1"),
        claim("the nearest real drawing is one of the ten", after["nearest is one of the ten"], "", "<= 0.2"),
        claim("training", seconds, "s", "<= 300"),
    ]
    return report(started, options.seed, claims, {"rows": rows, "judge": told.accuracy, "things": len(asked)})


def style_of(run: Path) -> str:
    from sfumato.convert.kohya import style_of_lora
    from sfumato.pipelines.find import named_file

    return style_of_lora(named_file(run)) or ""


if __name__ == "__main__":
    emit(run(tyro.cli(Options)))
