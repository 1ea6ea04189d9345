"""Randomness: every stream is a pure function of (seed, purpose, index), so nothing depends on what ran before."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, index)))


def torch_rng(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, index))


def shuffled(n: int, seed: int, purpose: str, positions: np.ndarray) -> np.ndarray:
    """The items at `positions` of an endless sequence of shuffled epochs of n items: data order without state."""
    out = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(positions // n):
        here = positions // n == epoch
        out[here] = numpy_rng(seed, purpose, int(epoch)).permutation(n)[positions[here] % n]
    return out


# --- the noise of other programs ------------------------------------------------------------------------------------------------------------------

MULTIPLIERS, WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # of Philox 4x32 (Salmon et al., 2011, table 2)
ROUNDS = 10


@dataclass
class Philox:
    """Normal numbers as CUDA makes them from a seed, in blocks that begin anew with each call: what AUTOMATIC1111's interface calls NV noise."""

    seed: int
    calls: int = 0

    def normal(self, *shape: int) -> np.ndarray:
        """fp32 of this shape."""
        n = math.prod(shape)
        bits = _philox(np.stack([np.full(n, self.calls), np.zeros(n), np.arange(n), np.zeros(n)]).astype(np.uint64), self.seed)
        self.calls += 1
        unit = 2.0**-32
        u, v = bits[0] * unit + unit / 2, (bits[1] + 0.5) * (unit * np.float32(2 * np.pi))
        return (np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(np.float32).reshape(shape)


def _philox(c: np.ndarray, seed: int) -> np.ndarray:
    """Counters "4 n" of 32 bits -> as many random ones."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(ROUNDS):
        a, b = c[0] * np.uint64(MULTIPLIERS[0]), c[2] * np.uint64(MULTIPLIERS[1])
        c = np.stack([(b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]), a & low])
        key = [(k + w) & 0xFFFFFFFF for k, w in zip(key, WEYL, strict=True)]
    return c
