"""Codes drawn without looking at each other: by chance, or as often as they were seen. What a learned prior adds is measured against these."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfumato.priors.tokens import Vocabulary

Known = Literal["nothing", "counts", "places"]  # any code is as likely; as often as in the whole data; as often as at its place


def frequencies(vocabulary: Vocabulary, tokens: Int[Tensor, "m n"], known: Known) -> Float[Tensor, "n v"]:
    """The logarithm of how often each token was seen at each position, -inf for never."""
    slots, n = vocabulary.slots, vocabulary.length
    counts = torch.zeros(n, max(slots), dtype=torch.float64)
    counts.scatter_add_(1, tokens.T, torch.ones(tokens.T.shape, dtype=torch.float64))
    for s, size in enumerate(slots):
        here = slice(s, n, len(slots))
        if known == "nothing":
            counts[here] = 0
            counts[here, :size] = 1
        elif known == "counts":
            counts[here] = counts[here].sum(0)
    return (counts / counts.sum(1, keepdim=True)).log().float()
