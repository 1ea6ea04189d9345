"""Filling in codes, the surest first (MaskGIT, arXiv 2202.04200): the network learns tokens that are masked from those that are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.seams import Cond
from sfumato.priors.choose import Terms, check_choice, chosen, limited, together, weighted
from sfumato.priors.transformer import MASKED, Prior

Race = Callable[[int], Tensor]  # step -> exponential noise "b n v"
Sway = Callable[[int], Tensor]  # step -> exponential noise "b n" in which cells are chosen


def drawn_mask(rng: np.random.Generator, length: int) -> np.ndarray:
    """Which tokens a training picture loses: a share cos(pi u / 2) of them, u uniform, at least one."""
    mask = np.zeros(length, dtype=bool)
    mask[rng.permutation(length)[: max(1, math.ceil(math.cos(math.pi / 2 * rng.random()) * length))]] = True
    return mask


def maskgit_loss(
    network: nn.Module, tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"], cond: Cond
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean cross-entropy of the masked tokens, in nats."""
    logits = network(torch.where(mask, MASKED, tokens), cond)[mask]
    loss = F.cross_entropy(logits, tokens[mask])
    return loss, {"right": (logits.detach().argmax(-1) == tokens[mask]).float().mean()}


def left_masked(step: int, steps: int, count: int) -> int:
    """How many of `count` unknown tokens stay so after a step: the cosine schedule, at least one less each step."""
    return max(0, min(math.floor(count * math.cos(math.pi / 2 * (step + 1) / steps)), count - step - 1))


@torch.no_grad()
def sample_maskgit(
    network: Prior,
    terms: Terms,
    tokens: Int[Tensor, "b n"],
    race: Race,
    sway: Sway,
    *,
    steps: int = 10,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    spread: float = 4.5,
    order: Literal["confidence", "random"] = "confidence",
) -> Iterator[Int[Tensor, "b n"]]:
    """Fills in the tokens that are MASKED, the same number in each row; yields them after each step, MASKED where they are not known yet.

    In each step all are drawn, and kept where log p + spread * (1 - progress) * gumbel is largest; `order` random takes no heed of p, and is
    exact where each step adds one token.
    """
    unknown = tokens == MASKED
    check_choice(temperature, top_k, top_p)
    count = int(unknown[0].sum())
    if not count:
        yield tokens
    steps = min(steps, count)
    spread = spread if temperature else 0.0
    cond, weights = together(terms, len(tokens)), [w for _, w in terms]
    for step in range(steps):
        logits = weighted(network(tokens.repeat(len(terms), 1), cond), weights)
        logits = limited(logits / (temperature or 1.0), top_k=top_k, top_p=top_p)
        drawn = chosen(logits, race(step)[..., : logits.shape[-1]], greedy=not temperature)
        masked = tokens == MASKED
        gumbel = -sway(step).log()
        sure = gumbel
        if order == "confidence":
            p = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            sure = p + spread * (1 - (step + 1) / steps) * gumbel
        least = sure.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        fixed = count - left_masked(step, steps, count) - (count - int(masked[0].sum()))
        keep = torch.zeros_like(masked).scatter(1, least[:, :fixed], True)
        tokens = torch.where(keep, drawn, tokens)
        yield tokens
