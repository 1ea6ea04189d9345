"""Codes as a sequence of tokens, cell by cell from the upper left: what a prior over codes learns to write.

A cell has one token a level and factor ("slots"): residual codes have several levels, and a large codebook (lfq of 2^18 codes) is written as digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

LARGEST = 65_536  # tokens that one head tells apart


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A codebook of `codes` with `levels`, its grid (rows, columns), and the `digits` that a code is written as, the lowest first: (512, 512) for
    2^18 codes. Their product must be `codes`.
    """

    codes: int
    levels: int = 1
    grid: tuple[int, int] = (8, 8)
    digits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.codes < 2 or self.levels < 1 or min(self.grid) < 1:
            raise ValueError(f"codes (={self.codes}) must be at least 2, levels (={self.levels}) and grid (={self.grid}) at least 1")
        if self.digits and (prod(self.digits) != self.codes or min(self.digits) < 2):
            raise ValueError(f"digits (={self.digits}) must multiply to codes (={self.codes}), none of them below 2")
        if max(self.digits or (self.codes,)) > LARGEST:
            raise ValueError(
                f"digits (={self.digits or (self.codes,)}) must be at most {LARGEST:,} each: write {self.codes:,} codes as several, such as "
                f"{factorised(self.codes)}"
            )

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The tokens that each slot of a cell chooses from."""
        return (self.digits or (self.codes,)) * self.levels

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.grid[0] * self.grid[1] * len(self.slots)

    def tokens(self, indices: Int[Tensor, "b h w l"]) -> Int[Tensor, "b n"]:
        """Indices of codes -> tokens, cell after cell, in a cell level after level, of a code its lowest digit first."""
        digits, rest = [], indices
        for size in self.digits or (self.codes,):
            digits.append(rest % size)
            rest = rest // size
        return rearrange(torch.stack(digits, -1), "b h w l d -> b (h w l d)")

    def indices(self, tokens: Int[Tensor, "b n"]) -> Int[Tensor, "b h w l"]:
        """The inverse of `tokens`."""
        h, w = self.grid
        digits = rearrange(tokens, "b (h w l d) -> b h w l d", h=h, w=w, l=self.levels)
        found, place = torch.zeros_like(digits[..., 0]), 1
        for i, size in enumerate(self.digits or (self.codes,)):
            found, place = found + digits[..., i] * place, place * size
        return found


def factorised(codes: int, most: int = LARGEST) -> tuple[int, ...]:
    """The fewest, most equal digits of at most `most` whose product is `codes`; () where the codebook needs none.

    Raises ValueError where a prime factor is larger.
    """
    if codes <= most:
        return ()
    primes, rest, p = [], codes, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p = p + 1 if p * p <= rest else max(rest, p + 1)
    if primes[-1] > most:
        raise ValueError(f"codes (={codes}) has the prime factor {primes[-1]:,}: it cannot be written as digits of at most {most:,}")
    count = 2
    while True:
        digits = [1] * count
        for prime in reversed(primes):
            digits[digits.index(min(digits))] *= prime
        if max(digits) <= most:
            return tuple(sorted(digits))
        count += 1
