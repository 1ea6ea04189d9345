"""What the benches share: claims and their JSON, 95 % intervals, the machine, and a model that draws many prompts in one batch."""

from __future__ import annotations

import gc
import json
import math
import operator
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sfumato.core.images import premultiply
from sfumato.core.request import GenerateRequest
from sfumato.core.runlog import read_log
from sfumato.metrics.intervals import bootstrap as interval
from sfumato.pipelines.generate import Model

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = 16  # pictures drawn in one batch, as many as the model itself draws together
GOALS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


def added_memory(work: Callable[[], Any]) -> float:
    """MiB that one piece of work adds to what is in use before it (Linux): the peak is set back first, so that nothing earlier hides it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(what: str) -> float:
    """MiB, as Linux counts them of this process."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told[what].split()[0]) / 1024


def of_parts(work: dict[str, Callable[[Any], tuple[list[dict[str, Any]], dict[str, Any]]]], wanted: str, options: Any, seed: int) -> dict[str, Any]:
    """The report of the parts that are wanted (names with commas), each with its claims and details."""
    started = time.perf_counter()
    claims: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for name in (part.strip() for part in wanted.split(",")):
        found, details[name] = work[name](options)
        claims += found
    return report(started, seed, claims, details)


def speed_of(log: Path, skip: int) -> float:
    """Pictures a second of a training, without its first `skip` lines."""
    lines = [line for line in read_log(log) if "images_per_s" in line]
    span = [line["images"] / line["images_per_s"] for line in lines]  # seconds since the beginning
    return (lines[-1]["images"] - lines[skip]["images"]) / (span[-1] - span[skip])


# --- the report -------------------------------------------------------------------------------------------------------------------------------


def claim(name: str, value: float, unit: str = "", goal: str | None = None) -> dict[str, Any]:
    """One line of the report. `goal` is such as ">= 26"; a value that is not a number holds no goal."""
    holds = None
    if goal is not None:
        sign, number = goal.split()
        holds = bool(math.isfinite(value) and GOALS[sign](value, float(number)))
    return {"name": name, "value": round(float(value), 4) if math.isfinite(value) else None, "unit": unit, "goal": goal, "holds": holds}


def report(started: float, seed: int, claims: list[dict[str, Any]], details: dict[str, Any]) -> dict[str, Any]:
    """The one JSON object that a bench prints; `started` is a reading of time.perf_counter."""
    seconds = round(time.perf_counter() - started, 1)
    return {"machine": machine(), "commit": commit(), "seed": seed, "seconds": seconds, "claims": claims, "details": plain(details)}


def plain(value: Any) -> Any:
    """Numbers rounded to four places, what is not finite as None, arrays as lists: ready for JSON."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 4) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def emit(found: dict[str, Any]) -> None:
    print(json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False))


def machine() -> dict[str, Any]:
    """What the figures were measured on; `load` tells whether it had other work to do."""
    names = [line.split(":")[1].strip() for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _text("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    return {
        "system": platform.platform(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory[0], 1) if memory else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def commit() -> str | None:
    """The commit, with "+" where tracked files have changed since; None outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


# --- arithmetic -------------------------------------------------------------------------------------------------------------------------------


def mean(a: np.ndarray) -> Any:
    """The mean over the last axis; nan where there is nothing."""
    return np.mean(a, axis=-1) if a.shape[-1] else math.nan


def ratio(a: np.ndarray, b: np.ndarray) -> Any:
    """mean(a) / mean(b); nan where nothing is to be divided by."""
    below = np.asarray(mean(b), dtype=np.float64)
    return np.where(below > 0, mean(a) / np.where(below > 0, below, 1.0), math.nan)[()]


def gap(a: np.ndarray, b: np.ndarray) -> Any:
    """|mean(a) - mean(b)|."""
    return abs(mean(a) - mean(b))


def with_interval(a: np.ndarray) -> list[float]:
    """[mean, low, high]."""
    return [mean(a), *interval(mean, a)]


# --- drawing ----------------------------------------------------------------------------------------------------------------------------------


def draw(model: Model, prompts: Sequence[str], styles: Sequence[str], seeds: Sequence[int], what: str = "", **options: Any) -> list[Image.Image]:
    """Picture i of prompt i in style i from seed i, as `model.generate` draws it alone (within a level); far quicker in batches."""
    options = {"size": model.size} | options
    requests = [GenerateRequest(prompt=p, style=s, seed=seed, **options) for p, s, seed in zip(prompts, styles, seeds, strict=True)]
    return [p.image for p in tqdm(model.draw(requests), total=len(requests), desc=what, unit=" pictures", leave=False)]


def from_pil(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as a user gets them -> premultiplied RGBA "b 4 h w" in [0, 1]."""
    arrays = np.stack([premultiply(np.asarray(i.convert("RGBA"))) for i in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
