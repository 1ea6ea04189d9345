"""Whether something became slower: `make bench-check`. One JSON object on stdout; it fails where something did.

Each piece of work is timed beside a fixed computation (convolutions and products of matrices, none of our code), by turns, so that a machine that is
busy or hot slows both. What is compared is the ratio of the two with `check.json`, which has it for each kind of CPU: `--write` puts it there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import claim, emit, machine, report
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sfumato.codecs.resnets import ResnetConfig, ResnetDecoder
from sfumato.core.seams import Cond
from sfumato.diffusion.unet import UNet, UNetConfig
from sfumato.metrics.intervals import bootstrap
from sfumato.nn.engine import Engine
from sfumato.pipelines.load import load

KNOWN = Path(__file__).with_name("check.json")
SLACK = 1.05


@dataclass(frozen=True, kw_only=True)
class Options:
    """Times pieces of work beside a fixed computation, and prints one JSON object."""

    pairs: int = 15
    """Of each piece of work with the fixed computation, 9 or more."""
    threads: int = 1
    write: bool = False
    """Make what is found what is known of this kind of CPU."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing, and nothing fails."""


def fixed() -> Callable[[], Any]:
    """The computation that does not change."""
    x, w = torch.randn(1, 256, 48, 48), torch.randn(256, 256, 3, 3)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def work() -> Tensor:
        for _ in range(3):
            y = F.silu(F.conv2d(x, w, padding=1))
        return y.mean() + (a @ b).mean()

    return work


def works() -> dict[str, Callable[[], Any]]:
    """What must not become slower."""
    model = load(device="cpu", engine="eager")
    unet = UNet(UNetConfig(widths=(128, 256, 512), blocks=1, depths=(1, 1, 0), heads=(4, 8, 8))).eval().requires_grad_(False)
    decoder = ResnetDecoder(ResnetConfig(width=64, multipliers=(1, 2, 4), blocks=1, attention=(), resolution=64, z_channels=4), 4).eval()
    x, t, cond, z = torch.randn(1, 4, 32, 32), torch.tensor([0.5]), Cond(text=torch.randn(1, 77, 768)), torch.randn(1, 4, 24, 24)
    learner = UNet(UNetConfig(widths=(64, 128), blocks=1, depths=(1, 0), heads=(2, 2), context=64))
    seen, told = torch.randn(8, 4, 16, 16), Cond(text=torch.randn(8, 8, 64))

    def learn() -> None:
        learner.zero_grad()
        learner(seen, torch.rand(8), told).square().mean().backward()

    graph = Engine("openvino", (unet,))
    return {
        "bundled model, one picture": lambda: model.generate("a red fox", seed=1),
        "bundled model, eight pictures": lambda: model.generate("a red fox", seed=1, count=8),
        "step of a UNet": lambda: unet(x, t, cond), "step of a UNet by openvino": lambda: graph.of(unet, dynamic=True)(x, t, cond),
        "decoder": lambda: decoder(z), "a UNet learns": learn,
    }  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    with torch.set_grad_enabled(work.__name__ == "learn"):
        work()
    return time.perf_counter() - began


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    cpu = f"{machine()['processor']}, {options.threads} threads"
    known: dict[str, dict[str, float]] = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    reference, claims, details, found = fixed(), [], {}, {}
    folder = tempfile.TemporaryDirectory()  # for graphs that nobody else needs
    os.environ["SFUMATO_CACHE"] = folder.name
    for name, work in tqdm(works().items(), desc="check", file=sys.stderr):
        for _ in range(2):
            seconds(work), seconds(reference)
        ratios = np.array([seconds(work) / seconds(reference) for _ in range(options.pairs)])
        low, high = bootstrap(lambda a: np.median(a, -1), ratios)
        found[name] = round(float(np.median(ratios)), 4)
        before = known.get(cpu, {}).get(name)
        details[name] = {"ratio": found[name], "interval": [low, high], "known": before}
        claims.append(claim(f"{name}: lower end of the interval / what is known of {cpu}", np.nan if before is None else low / before, "",
                            None if before is None or options.quick else f"<= {SLACK}"))  # fmt: skip
    folder.cleanup()
    if options.write:
        KNOWN.write_text(json.dumps(known | {cpu: found}, indent=1, sort_keys=True) + "\n")
    return report(started, options.seed, claims, details)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.pairs < 9:
        raise SystemExit(f"pairs (={options.pairs}) must be at least 9: fewer say nothing")
    found = run(replace(options, pairs=1) if options.quick else options)
    emit(found)
    if any(c["holds"] is False for c in found["claims"]):
        raise SystemExit(1)
    if not options.quick and not options.write and any(c["value"] is None for c in found["claims"]):
        raise SystemExit(f"nothing is known of this kind of CPU, so nothing was checked: --write puts what was found into {KNOWN.name}")


if __name__ == "__main__":
    main()
