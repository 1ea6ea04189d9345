"""What a model costs: parameters, operations, seconds a picture, pictures a second, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.nn.winograd import as_written

REAL_TIME = 24.0  # pictures a second, as film has them
AT_ONCE = 0.1  # seconds within which an answer feels immediate (Miller 1968)


def parameters(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many parameters each network has."""
    return {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of one call, counted by PyTorch from the shapes of matrix products, convolutions and attention.

    Attention is computed without its fused kernels for this, which PyTorch does not count on a CPU, and convolutions as they are
    written, on every machine.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), as_written():
        function()
    return int(counter.get_total_flops())


def latency(function: Callable[[], Any], *, repeats: int = 10, warmup: int = 1) -> dict[str, float]:
    """Seconds of a call: median and 95th percentile of `repeats`, after `warmup` calls that do not count."""
    seconds = []
    for i in range(warmup + repeats):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= warmup:
            seconds.append(time.perf_counter() - began)
    return {"median_s": float(np.median(seconds)), "p95_s": float(np.percentile(seconds, 95)), "repeats": repeats}


def pace(seconds: float) -> dict[str, Any]:
    """Pictures a second at that latency, and what to call it."""
    a_second = 1 / seconds
    if a_second >= REAL_TIME:
        word = f"real-time: at least {REAL_TIME:g} pictures a second"
    elif seconds <= AT_ONCE:
        word = f"not real-time, but at once: within {AT_ONCE:g} s"
    else:
        word = f"not real-time: {a_second:.2g} pictures a second, {REAL_TIME:g} would be"
    return {"pictures_per_s": a_second, "real_time": a_second >= REAL_TIME, "said": word}


def peak_memory() -> float | None:
    """The largest resident memory of this process so far in MiB; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
