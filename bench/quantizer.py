"""The lookup of vector quantization against other ways to do it: `python bench/quantizer.py`. One JSON object on stdout.

Time (by turns, medians) and memory beside taming-transformers' formula, torch.cdist and vector-quantize-pytorch; how near what is found is to the
fp64 minimum, of random codes, of trained ones, and of codes that are there twice; and a training step of the whole quantizer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from common import added_memory, claim, emit, report
from torch import Tensor
from tqdm import tqdm

from sfumato.codecs.bottlenecks.vq import VQ, VQConfig, k_means
from sfumato.nn.nearest import nearest_index

CASES = {"dim 8": (65_536, 16_384, 8), "dim 256": (65_536, 16_384, 256)}  # vectors, codes, dimensions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Times the lookup, and prints one JSON object."""

    repeats: int = 3
    """Of every way, by turns."""
    seed: int = 0
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""
    memory: str = ""
    """Measures one way's memory in this process; used by the bench itself."""
    case: str = ""


def taming(z: Tensor, e: Tensor) -> Tensor:
    """As taming-transformers' VectorQuantizer2 writes it."""
    d = torch.sum(z**2, dim=1, keepdim=True) + torch.sum(e**2, dim=1) - 2 * torch.einsum("bd,dn->bn", z, e.T)
    return torch.argmin(d, dim=1)


def cdist(z: Tensor, e: Tensor) -> Tensor:
    return torch.cdist(z, e).argmin(1)


def vector_quantize_pytorch(z: Tensor, e: Tensor) -> Tensor:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(dim=z.shape[1], codebook_size=len(e)).eval()
    quantizer._codebook.embed.data = e[None].clone()
    return quantizer(z[None])[1][0]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sfumato": nearest_index,
    "taming": taming,
    "torch.cdist": cdist,
    "vector-quantize-pytorch": vector_quantize_pytorch,
}


def vectors(options: Options, case: str) -> tuple[Tensor, Tensor]:
    n, k, d = (256, 128, 8) if options.quick else CASES[case]
    g = torch.Generator().manual_seed(options.seed)
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


@torch.no_grad()
def speed(options: Options, case: str) -> dict[str, float]:
    z, e = vectors(options, case)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in tqdm(range(1 if options.quick else options.repeats), desc=case, file=sys.stderr):
        for name, way in WAYS.items():
            began = time.perf_counter()
            way(z, e)
            seconds[name].append(time.perf_counter() - began)
    return {k: float(np.median(v)) for k, v in seconds.items()}


def used(options: Options, name: str, case: str) -> float:
    """MiB that one lookup adds in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, "--case", case, *(["--quick"] if options.quick else [])]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@torch.no_grad()
def peak_of(options: Options) -> float:
    z, e = vectors(options, options.case)
    WAYS[options.memory](z[:64], e[:64])  # what is loaded at the first call is not the lookup's
    return added_memory(lambda: WAYS[options.memory](z, e))


@torch.no_grad()
def accuracy(options: Options) -> dict[str, tuple[float, float]]:
    """{codebook: (largest excess of the squared distance over the fp64 minimum, relative; share of indices that are its own)}."""
    found = {}
    for case in CASES:
        z, e = (x[: 4096 if not options.quick else 128] for x in vectors(options, case))
        learned = k_means(z, len(e) // 4, seed=options.seed, rounds=4)
        for name, codes in ((f"{case}, random", e), (f"{case}, trained", learned), (f"{case}, twice", torch.cat([learned, learned]))):
            index, apart = nearest_index(z, codes), torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
            best, first = apart.min(1)
            mine = apart.gather(1, index[:, None])[:, 0]
            found[name] = float(((mine - best) / best.clamp_min(1e-12)).max()), float((index == first).double().mean())
    return found


def steps(options: Options) -> dict[str, float]:
    """Seconds of forward, backward and update of the quantizer on 4,096 latents."""
    from vector_quantize_pytorch import VectorQuantize

    size, rows = (64, 4) if options.quick else (16_384, 64)
    z = torch.randn(1, 8, rows, 64, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[Tensor], None]] = {}
    for learn in ("gradient", "ema"):
        ours = VQ(VQConfig(size=size, channels=8, cosine=False, gradient="straight-through", learn=learn))  # type: ignore[arg-type]

        def go(x: Tensor, ours: VQ = ours) -> None:
            y, loss, stats = ours(x)
            (y.sum() + loss).backward()
            ours.update(stats)

        ways[f"sfumato, {learn}"] = go
        theirs = VectorQuantize(
            dim=8, codebook_size=size, accept_image_fmap=True, rotation_trick=False, threshold_ema_dead_code=0,
            **({"learnable_codebook": True, "ema_update": False} if learn == "gradient" else {}),
        )  # fmt: skip

        def their(x: Tensor, theirs: VectorQuantize = theirs) -> None:
            y, _, loss = theirs(x)
            (y.sum() + loss.sum()).backward()

        ways[f"vector-quantize-pytorch, {learn}"] = their
    seconds: dict[str, list[float]] = {k: [] for k in ways}
    for i in range(2 if options.quick else 1 + options.repeats):
        for name, way in ways.items():
            x = z.clone().requires_grad_()
            began = time.perf_counter()
            way(x)
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {k: float(np.median(v)) for k, v in seconds.items()}


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    claims, details = [], {}
    for case, least in (("dim 8", 10), ("dim 256", 3)):
        seconds = speed(options, case)
        memory = {name: used(options, name, case) for name in ("sfumato", "taming")}
        claims.append(claim(f"lookup, {case}: taming's formula / ours", seconds["taming"] / seconds["sfumato"], "times", f">= {least}"))
        claims.append(claim(f"lookup, {case}: memory that it adds", memory["sfumato"], "MiB", "<= 64"))
        details[case] = {"seconds": seconds, "added MiB": memory}
    near = accuracy(options)
    claims.append(claim("squared distance above the fp64 minimum, relative, at most", max(v[0] for v in near.values()) / 1e-6, "1e-6", "<= 1"))
    claims.append(claim("equal indices, at least", min(v[1] for v in near.values()), "share", ">= 0.9999"))
    training = steps(options)
    for learn in ("gradient", "ema"):
        ratio = training[f"vector-quantize-pytorch, {learn}"] / training[f"sfumato, {learn}"]
        claims.append(claim(f"a training step of the quantizer, {learn}: vector-quantize-pytorch / ours", ratio, "times"))
    return report(started, options.seed, claims, details | {"accuracy": near, "step": training})


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.memory:
        print(json.dumps(peak_of(options)))
        return
    emit(run(options))


if __name__ == "__main__":
    main()
