"""Randomness: every stream is a pure function of (seed, purpose, index), so nothing depends on what ran before."""

from __future__ import annotations

import hashlib
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
