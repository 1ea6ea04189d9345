"""A style from ten drawings: `python bench/style.py --icons icons.json`, of the npm package @iconify-json/streamline-emojis. One JSON on stdout.

The bundled model learns by a LoRA how ten drawings of a set look that it never saw, and draws a hundred other things. Two questions to a judge that
was trained on the drawings of this set and of the six of the bundled model: is it the new style (one of seven), and is it the thing that was asked
for? Beside that: how near each picture comes to the ten, and whether the real drawing of the same thing is nearer; and what the training took.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, report
from PIL import Image

import sfumato
from sfumato.core.images import flatten, grid, to_tensor
from sfumato.core.request import GenerateRequest
from sfumato.core.rng import numpy_rng
from sfumato.data.emoji import STYLES, Concept, drawable, drawings
from sfumato.metrics.features import feature_net, look
from sfumato.pipelines.load import load_judge
from sfumato.train import judge, lora

NEW = "streamline"  # CC BY 4.0, Streamline
TEN = ("airplane", "cat-face", "mushroom", "house-with-garden", "sailboat", "red-apple", "honeybee", "rocket", "umbrella", "guitar")
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
    """Where drawings, judge, LoRA and pictures are kept."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""


def icons(options: Options) -> dict[str, tuple[Concept, bytes]]:
    """{icon: (the concept that it shows, PNG)} of those that the bundled model knows."""
    import resvg_py

    names = {re.sub(r"[^a-z0-9]+", "-", c.names["en"].lower()).strip("-"): c for c in drawable()}
    found: dict[str, tuple[Concept, bytes]] = {}
    for name, icon in json.loads(options.icons.read_text())["icons"].items():
        concept = names.get(re.sub(r"-\d$", "", name))
        if concept and concept not in [c for c, _ in found.values()]:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">{icon["body"]}</svg>'
            found[re.sub(r"-\d$", "", name)] = concept, bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    return found


def write_ten(options: Options, found: dict[str, tuple[Concept, bytes]]) -> Path:
    """The drawings that are taught, with captions."""
    folder = options.out / "ten"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEN:
        concept, png = found[name]
        (folder / f"{name}.png").write_bytes(png)
        (folder / f"{name}.txt").write_text(concept.names["en"])
    return folder


def write_all(options: Options, found: dict[str, tuple[Concept, bytes]]) -> Path:
    """What the judge learns from: every style's drawing of each thing, but for the ten in the new style."""
    folder, done = options.out / "all", options.out / "all" / "metadata.jsonl"
    if done.exists():
        return folder
    concepts = [c for c, _ in found.values()]
    art, lines = drawings(SIDE, concepts), []
    known = {c.index: name for name, (c, _) in found.items()}
    for i in range(len(art)):
        name = f"{known[int(art.concept[i])]}/{STYLES[int(art.style[i])]}.png"
        lines.append({"file_name": name, "style": STYLES[int(art.style[i])]})
        premultiplied = art.pixels[i].permute(1, 2, 0).numpy()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGBa", (SIDE, SIDE), premultiplied.tobytes()).convert("RGBA").save(folder / name)
    for name, (_, png) in found.items():
        if name not in TEN:
            (folder / name / f"{NEW}.png").write_bytes(png)
            lines.append({"file_name": f"{name}/{NEW}.png", "style": NEW})
    done.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pictures(model: Any, names: list[tuple[str, Concept]], seed: int, loras: tuple[str, ...] = (), style: str | None = None) -> list[Image.Image]:
    """One of each thing, unselected."""
    requests = [GenerateRequest(prompt=c.names["en"], seed=seed + i, lora=loras, size=model.size, style=style) for i, (_, c) in enumerate(names)]
    return [flatten(p.image) for p in model.draw(requests)]


def stacked(images: list[Image.Image]) -> torch.Tensor:
    """In [0, 1]."""
    return torch.cat([to_tensor(i, 3) for i in images]) / 2 + 0.5


def judged(found: Any, images: list[Image.Image], names: list[tuple[str, Concept]]) -> dict[str, float]:
    label, style = found(stacked(images))
    wanted = torch.tensor([found.labels.index(name) for name, _ in names])
    return {
        "style": float((style.argmax(1) == found.styles.index(NEW)).float().mean()),
        "concept": float((label.argmax(1) == wanted).float().mean()),
        "concept5": float((label.topk(5).indices == wanted[:, None]).any(1).float().mean()),
    }


def nearness(images: list[Image.Image], names: list[tuple[str, Concept]], found: dict[str, tuple[Concept, bytes]], model: Any) -> dict[str, float]:
    """The share of pictures whose nearest of all real drawings of the new style is one of the ten, and of those that are of another thing of the set."""
    net = feature_net()
    side = (model.size, model.size)
    real = [flatten(Image.open(io.BytesIO(png)).convert("RGBA")).resize(side, Image.Resampling.LANCZOS) for _, png in found.values()]
    a, b = (torch.nn.functional.normalize(look(net, stacked(x))[0], dim=1) for x in (images, real))
    keys = list(found)
    nearest = [keys[i] for i in (a @ b.T).argmax(1).tolist()]
    return {
        "one of the ten": float(np.mean([n in TEN for n in nearest])),
        "its own drawing": float(np.mean([n == name for n, (name, _) in zip(nearest, names, strict=True)])),
    }


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    if options.quick:
        shutil.rmtree(options.out / "quick", ignore_errors=True)
        options = replace(options, out=options.out / "quick", count=4)
    found = icons(options)
    ten, whole = write_ten(options, found), write_all(options, found)
    recipe, loop = judge.preset_own()
    loop = replace(loop, seed=options.seed, dtype="fp32", **({"images": 64, "warmup": 0} if options.quick else {}))
    judge.train(replace(recipe, data=str(whole), limit=0), loop, options.out / "judge")
    taught, loop = lora.preset_own()
    loop = replace(loop, seed=options.seed, threads=options.threads, **({"images": 64, "warmup": 0} if options.quick else {}))
    began = time.perf_counter()
    lora.train(replace(taught, data=str(ten)), loop, options.out / "lora")
    seconds = time.perf_counter() - began
    return report(started, options.seed, *measured(options, found, seconds))


def measured(options: Options, found: dict[str, tuple[Concept, bytes]], seconds: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    others = [(name, concept) for name, (concept, _) in found.items() if name not in TEN]
    chosen = numpy_rng(options.seed, "style").permutation(len(others))[: options.count]
    names = [others[i] for i in sorted(chosen)]
    model, told = sfumato.load(device="cpu"), load_judge(options.out / "judge")
    drawn = {"before": pictures(model, names, 1), "after": pictures(model, names, 1, (str(options.out / "lora"),))}
    real = [flatten(Image.open(io.BytesIO(found[n][1])).convert("RGBA")).resize((model.size,) * 2, Image.Resampling.LANCZOS) for n, _ in names]
    rows = {k: judged(told, v, names) for k, v in (drawn | {"real": real}).items()}
    near = nearness(drawn["after"], names, found, model)
    for k, v in drawn.items():
        grid(v, columns=20).save(options.out / f"{k}.png", optimize=True)
    claims = [
        claim("a style from ten drawings: pictures of other things that a judge takes for it", rows["after"]["style"], "", ">= 0.8"),
        claim("concept accuracy lost", rows["before"]["concept"] - rows["after"]["concept"], "", "<= 0.1"),
        claim("nearest real drawing is one of the ten", near["one of the ten"], "", "<= 0.2"),
        claim("training", seconds, "s", "<= 300"),
    ]
    return claims, {"rows": rows, "nearest": near, "judge": told.scores}


if __name__ == "__main__":
    emit(run(tyro.cli(Options)))
