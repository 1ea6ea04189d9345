"""What the metrics are worth: `python bench/evaluation.py`. One JSON object on stdout; --plots DIR draws the curves.

- accuracy: each metric beside an independent implementation (scikit-image, torchmetrics, scipy, scikit-learn, prdc, vendi-score);
- speed: Frechet distance, KID, precision, recall, density and coverage of 5,000 + 5,000 features of 1,280 dimensions, beside scipy, scikit-learn
  and prdc, by turns; and what each adds to the memory of a process of its own;
- moves: how the Frechet distance of the *same drawings* moves with the resize policy, with their number, and with JPEG quality. It should be 0.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import added_memory, claim, emit, of_parts
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sfumato.core.images import to_pil, to_tensor
from sfumato.core.report import Curve, svg
from sfumato.data.emoji import concepts, drawings
from sfumato.metrics import diversity, pairwise
from sfumato.metrics.distribution import Moments, compare_pairs, frechet_distance, kernel_distance
from sfumato.metrics.features import RESIZES, Resize, feature_net, look
from sfumato.nn.backbones import over

PARTS = ("accuracy", "speed", "moves")
SIDE = 320  # pixels of the drawings whose distances are looked at
QUALITIES = (95, 90, 75, 50, 30)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures the metrics, and prints one JSON object."""

    only: str = "all"
    """all, or some of: accuracy, speed, moves (with commas)."""
    plots: Path | None = None
    """A folder to draw the curves into, as SVG."""
    pictures: int = 4_000
    """Drawings whose distances are looked at."""
    rows: int = 5_000
    """Features of each side that are timed."""
    repeats: int = 3
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""
    memory: str = ""
    """Only for this script itself: one implementation in a process of its own."""


# --- accuracy -----------------------------------------------------------------------------------------------------------------------------------


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """As the published code of FID computes it: scipy's matrix root of the product of both covariances."""
    from scipy.linalg import sqrtm

    ca, cb = (np.cov(x, rowvar=False) for x in (a, b))
    cross = sqrtm(ca @ cb)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(np.real(cross)))


def sklearn_kid(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate from scikit-learn's polynomial kernels."""
    from sklearn.metrics.pairwise import polynomial_kernel

    aa, bb, ab = (polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    return float((aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1)) - 2 * ab.mean())


def prdc_reference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """With a loop's progress messages kept away from stdout."""
    import contextlib

    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        return compute_prdc(a, b, 5)


def features(n: int, dimensions: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated rows whose variances fall as those of feature networks do, never below 0, fp64."""
    rng = np.random.Generator(np.random.PCG64(seed))
    spectrum = 1 / np.sqrt(1 + np.arange(dimensions))
    turned = np.random.Generator(np.random.PCG64(99)).standard_normal((dimensions, 64)) / 8
    return np.maximum((rng.standard_normal((n, 64)) @ turned.T) + spectrum * rng.standard_normal((n, dimensions)) + shift, 0)


def accuracy(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Relative differences to independent implementations, in units of 1e-6."""
    from skimage import data
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    from vendi_score import vendi

    photograph = np.asarray(Image.fromarray(data.astronaut()).resize((192, 192))) / 255.0
    noisy = (photograph + 0.1 * np.random.Generator(np.random.PCG64(0)).standard_normal(photograph.shape)).clip(0, 1)
    x, y = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (noisy, photograph))
    few = (300, 64) if options.quick else (1_000, 256)
    a, b = features(*few, 1), features(*few, 2, 0.1)
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    pairs, theirs = compare_pairs(ta, tb), prdc_reference(a, b)
    beside: dict[str, tuple[float, float]] = {
        "PSNR, scikit-image": (float(pairwise.psnr(x, y)), peak_signal_noise_ratio(photograph, noisy, data_range=1)),
        "SSIM, scikit-image": (float(pairwise.ssim(x, y)), structural_similarity(photograph, noisy, channel_axis=2, data_range=1)),
        "MS-SSIM, torchmetrics": (
            float(pairwise.ms_ssim(x, y)),
            float(multiscale_structural_similarity_index_measure(x, y, data_range=1.0, sigma=1.5, kernel_size=11)),
        ),
        "Frechet distance, scipy": (frechet_distance(Moments().update(ta), Moments().update(tb)), scipy_frechet(a, b)),
        "KID, scikit-learn": (pairs.kid, sklearn_kid(a, b)),
        "precision, prdc": (pairs.precision, theirs["precision"]),
        "recall, prdc": (pairs.recall, theirs["recall"]),
        "density, prdc": (pairs.density, theirs["density"]),
        "coverage, prdc": (pairs.coverage, theirs["coverage"]),
        "Vendi score, vendi-score": (diversity.vendi_score(ta), vendi.score_X(a / np.linalg.norm(a, axis=1, keepdims=True))),
    }
    claims = [claim(f"{name}: relative difference", abs(o / t - 1) / 1e-6, "1e-6", "<= 1") for name, (o, t) in beside.items()]
    net = feature_net()
    pictures = over(drawings(2 * net.side, concepts()[:4]).pixels[:24].float() / 255)
    together, alone = look(net, pictures)[0], torch.cat([look(net, p)[0] for p in pictures.split(1)])
    apart = float((together - alone).abs().max() / together.abs().max())
    claims.append(claim("features alone or in a batch of 24: largest difference, relative", apart / 1e-5, "1e-5", "<= 1"))
    return claims, {"values": {k: [float(o), float(t)] for k, (o, t) in beside.items()}}


# --- speed --------------------------------------------------------------------------------------------------------------------------------------


def ours(a: np.ndarray, b: np.ndarray, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    x, y = (torch.from_numpy(v).to(dtype) for v in (a, b))
    found = {"frechet": frechet_distance(Moments().update(x), Moments().update(y))}
    pairs = compare_pairs(x, y)
    return found | {"kid": pairs.kid, "precision": pairs.precision, "recall": pairs.recall, "density": pairs.density, "coverage": pairs.coverage}


def ours_pairs(a: np.ndarray, b: np.ndarray) -> None:
    compare_pairs(*(torch.from_numpy(v).float() for v in (a, b)))


WAYS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "ours, all": ours,
    "ours, KID and PRDC": ours_pairs,
    "scipy, Frechet": scipy_frechet,
    "scikit-learn, KID": sklearn_kid,
    "prdc": prdc_reference,
}


def sets(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The features that are timed."""
    shape = (300, 64) if options.quick else (options.rows, 1_280)
    return features(*shape, 1), features(*shape, 2, 0.02)


def speed(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    a, b = sets(options)
    rows, dimensions = a.shape
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(1 if options.quick else options.repeats):
        for name, way in WAYS.items():
            began = time.perf_counter()
            way(a, b)
            seconds[name].append(time.perf_counter() - began)
    median = {k: float(np.median(v)) for k, v in seconds.items()}
    exact, fast = ours(a, b, torch.float64), ours(a, b)
    apart = max(abs(fast[k] - exact[k]) / max(abs(exact[k]), 1e-12) for k in ("frechet", "kid"))
    counted = max(abs(fast[k] - exact[k]) for k in ("precision", "recall", "density", "coverage"))
    added = {name: used(name, options) for name in (("ours, KID and PRDC", "prdc") if options.quick else WAYS)}
    claims = [
        claim(f"Frechet, KID and PRDC of {rows:,} + {rows:,} x {dimensions:,}", median["ours, all"], "s", "<= 10"),
        claim("PRDC (with KID): prdc / ours", median["prdc"] / median["ours, KID and PRDC"], "times", ">= 3"),
        claim("Frechet, KID and PRDC: scipy, scikit-learn and prdc / ours", sum(list(median.values())[2:]) / median["ours, all"], "times"),
        claim("fp32 beside fp64: Frechet and KID, relative", apart, "fraction", "<= 0.001"),
        claim("fp32 beside fp64: PRDC", counted, "fraction", "<= 0.001"),
        claim("memory that PRDC and KID add, beside that of prdc", added["ours, KID and PRDC"] / max(added["prdc"], 1e-9), "fraction", "<= 0.5"),
    ]
    return claims, {"seconds": median, "added MiB": added, "rows": rows, "dimensions": dimensions}


def used(name: str, options: Options) -> float:
    """The memory that one thing adds in a process of its own, in MiB."""
    command = [sys.executable, __file__, "--memory", name, "--rows", str(options.rows), *(["--quick"] if options.quick else [])]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def peak_of(name: str, options: Options) -> float:
    """What a way adds to the memory that is in use before it: the peak is set back first, so that what made the features does not hide it."""
    import prdc  # noqa: F401  # each process has imported the same
    import scipy.linalg
    import sklearn.metrics.pairwise  # noqa: F401

    a, b = sets(options)
    scipy.linalg.sqrtm(np.eye(8))
    return added_memory(lambda: WAYS[name](a, b))


# --- how the Frechet distance moves -------------------------------------------------------------------------------------------------------------


def pictures(options: Options) -> Tensor:
    """Drawings over white as uint8 "n 3 s s", shuffled."""
    art = drawings(SIDE, concepts()[:12] if options.quick else concepts()[:: max(1, 9_000 // options.pictures)])
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(art))[: options.pictures]
    return torch.cat([(over(p.float() / 255) * 255).round().to(torch.uint8) for p in art.pixels[torch.from_numpy(order)].split(256)])


def seen(x: Tensor, how: Resize = "antialias", change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    net = feature_net()
    parts = tqdm(x.split(64), leave=False, desc=how)
    return torch.cat([look(net, (change(p) if change else p).float() / 255, how)[0] for p in parts])


def as_jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        out = []
        for image in to_pil(x.float() / 127.5 - 1):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=quality)
            out.append(to_tensor(Image.open(buffer), 3))
        return ((torch.cat(out) + 1) * 127.5).round().to(torch.uint8)

    return change


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(Moments().update(a), Moments().update(b))


def moves(options: Options) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Distances of drawings to themselves, which would be 0 if nothing but the drawings counted."""
    x = pictures(options)
    real = seen(x)
    by_policy = {how: distance(real, real if how == "antialias" else seen(x, how)) for how in RESIZES}
    by_quality = {q: distance(real, seen(x, change=as_jpeg(q))) for q in QUALITIES}
    half = len(real) // 2
    sizes = [n for n in (64, 128, 256, 512, 1_024, 2_048, 4_096) if n <= half] or [half]
    rng = np.random.Generator(np.random.PCG64(1))
    by_count: dict[int, dict[str, list[float]]] = {n: {"Frechet": [], "KID": []} for n in sizes}
    for _ in range(2 if options.quick else 5):
        order = torch.from_numpy(rng.permutation(len(real)))
        for n in sizes:
            a, b = real[order[:n]], real[order[half : half + n]]
            by_count[n]["Frechet"].append(distance(a, b))
            by_count[n]["KID"].append(kernel_distance(a, b))
    means = {n: {k: float(np.mean(v)) for k, v in found.items()} for n, found in by_count.items()}
    spread = {n: {k: float(np.std(v, ddof=1)) for k, v in found.items()} for n, found in by_count.items()}
    first, last = sizes[0], sizes[-1]
    claims = [
        claim("Frechet distance of drawings to themselves, other resize policy: the largest", max(by_policy.values())),
        claim("... saved as JPEG of quality 75", by_quality[75]),
        claim(f"... of two random halves of the same drawings, {first} of each", means[first]["Frechet"]),
        claim(f"... {last} of each", means[last]["Frechet"]),
        claim(f"kernel distance (KID) of the halves, {first} of each, in its standard deviations", means[first]["KID"] / (spread[first]["KID"] or 1)),
    ]
    if options.plots:
        plots(options.plots, by_policy, by_quality, means)
    return claims, {
        "features": feature_net().name,
        "drawings": len(x),
        "resize": by_policy,
        "jpeg": by_quality,
        "count": means,
        "spread": spread,
    }


def plots(folder: Path, by_policy: dict[Resize, float], by_quality: dict[int, float], means: dict[int, dict[str, float]]) -> None:
    curves = {
        "count": Curve("n", "pictures on each side, log2", "distance of the same drawings", {
            "Frechet": [(float(np.log2(n)), m["Frechet"]) for n, m in means.items()],
        }),
        "jpeg": Curve("JPEG", "quality of JPEG on one side", "Frechet distance of the same drawings", {
            "JPEG": [(float(q), d) for q, d in by_quality.items()],
        }),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, curve in curves.items():
        (folder / f"frechet-{name}.svg").write_text(svg(curve, alone=True), encoding="utf-8")


def run(options: Options) -> dict[str, Any]:
    return of_parts({"accuracy": accuracy, "speed": speed, "moves": moves}, ",".join(PARTS) if options.only == "all" else options.only, options, 0)


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.memory:
        print(json.dumps(peak_of(options.memory, options)))
        return
    emit(run(options))


if __name__ == "__main__":
    main()
