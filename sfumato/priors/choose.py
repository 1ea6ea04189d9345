"""How a token is drawn from logits: temperature, top-k, top-p, guidance, and an exponential race, which needs only noise that is there before."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.core.seams import Cond
from sfumato.nn.conditions import concat_conds

Terms = Sequence[tuple[Cond, float]]  # conditions and their weights, which sum to 1


def weighted(logits: Float[Tensor, "tb *rest v"], weights: Sequence[float]) -> Float[Tensor, "b *rest v"]:
    """The logits of several conditions, one below the other, as their weighted sum: classifier-free guidance (arXiv 2207.12598) of (g, 1 - g)."""
    parts = logits.chunk(len(weights))
    if len(parts) == 1:
        return parts[0]
    found = sum(w * p.log_softmax(-1) for p, w in zip(parts, weights, strict=True))
    return torch.where(torch.isneginf(parts[0]), -torch.inf, found)  # type: ignore[arg-type]  # a token that a slot does not have


def together(terms: Terms, rows: int) -> Cond:
    """The conditions of `rows` pictures, term below term, as one batch."""
    return terms[0][0] if len(terms) == 1 else concat_conds([c for c, _ in terms], rows)


def limited(logits: Float[Tensor, " *rest v"], *, top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, " *rest v"]:
    """-inf for all but the `top_k` likeliest (ties with the last stay; 0: all), then for all that are not among the likeliest which together reach
    `top_p` (arXiv 1904.09751); the likeliest always stays.
    """
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        p = logits.gather(-1, order).softmax(-1)
        before = p.cumsum(-1) - p
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p), -torch.inf)
    return logits


def chosen(logits: Float[Tensor, " *rest v"], race: Float[Tensor, " *rest v"], *, greedy: bool = False) -> Int[Tensor, " *rest"]:
    """A token each with probability softmax(logits): the largest p / e for e from Exp(1), which is what `torch.multinomial` does too.

    `greedy` takes the likeliest. `race` is that exponential noise. Raises FloatingPointError for logits that are no numbers.
    """
    if bool(logits.isnan().any()):
        raise FloatingPointError("logits are not finite")
    return (logits if greedy else logits.softmax(-1) / race).argmax(-1)


def race_of(normal: Float[Tensor, " *rest"]) -> Float[Tensor, " *rest"]:
    """Exponential noise from unit Gaussian noise, so that what lies between two seeds can be drawn: -log of the normal distribution function."""
    return -torch.special.log_ndtr(normal.double()).float().clamp(max=-1e-38)


def check_choice(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError."""
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature (={temperature}) must be at least 0: 0 takes the likeliest code, 1 draws as was learned")
    if top_k < 0:
        raise ValueError(f"top_k (={top_k}) must be at least 0: how many of the likeliest codes are drawn from, 0 is all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p (={top_p}) must be above 0 and at most 1: the share of probability that is drawn from")
