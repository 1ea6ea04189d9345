"""Deep features kept from step to step (DeepCache, arXiv 2312.00858): they change little, so most steps compute the outermost blocks alone.

They go on along the line through the last two that were computed (as in arXiv 2503.06923, eq. 5): nearer by 5 dB than the last one as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.core.seams import Cond


class DeepCache:
    """net(x_t, t, cond): by `whole`, which says its deep features too, at every `every`-th time that it is asked at, and by `shallow` with what they
    have become in between. Times are told apart by t, calls at one time by their order (a condition first, what guidance leans on after it).
    """

    def __init__(self, whole: Callable[..., Any], shallow: Callable[..., Any], every: int) -> None:
        self.whole, self.shallow, self.every = whole, shallow, every
        self.known: dict[int, list[tuple[float, Tensor]]] = {}  # of each call at a time: the last two times with their features
        self.told: dict[int, Cond] = {}  # and what it was told
        self.step, self.call, self.now = -1, 0, -1.0

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b out h w"]:
        now = float(t[0])
        self.step, self.call, self.now = (self.step, self.call + 1, now) if now == self.now else (self.step + 1, 0, now)
        known = self.known.setdefault(self.call, [])
        same = bool(known) and len(known[-1][1]) >= len(x_t) and alike(self.told[self.call], cond, len(x_t))
        if self.step % self.every == 0 or not same:
            out, deep = self.whole(x_t, t, cond)
            self.known[self.call] = [k for k in known[-1:] if same and len(k[1]) >= len(deep)] + [(now, deep)]
            self.told[self.call] = cond
            return out
        return self.shallow(x_t, t, cond, onward(known, now, len(x_t)))


def alike(known: Cond, cond: Cond, rows: int) -> bool:
    """Whether the text of the first rows is the same."""
    if known.text is None or cond.text is None:
        return known.text is cond.text
    return torch.equal(known.text[:rows], cond.text)


def onward(known: list[tuple[float, Tensor]], now: float, rows: int) -> Float[Tensor, "b d h w"]:
    """The first rows of features at the time `now`, on the line through the last two that are known; of one alone, as they were."""
    then, deep = known[-1]
    if len(known) == 1:
        return deep[:rows]
    before, other = known[0]
    return deep[:rows] + (now - then) / (then - before) * (deep[:rows] - other[:rows])
