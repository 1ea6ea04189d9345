"""Writing codes one after the other (arXiv 2012.09841 section 3.2, LlamaGen 2406.06525): p(tokens) = prod p(token_i | tokens before, condition)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.seams import Cond
from sfumato.priors.choose import Terms, check_choice, chosen, limited, together, weighted
from sfumato.priors.transformer import MASKED, Prior

Next = Callable[[Tensor | None, int], Tensor]  # (token i - 1 or None, i) -> logits of token i; called for i = 0, 1, 2...
Race = Callable[[int], Tensor]  # i -> exponential noise "b v"


def gpt_loss(network: nn.Module, tokens: Int[Tensor, "b n"], cond: Cond) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean cross-entropy of a token, in nats."""
    logits = network(tokens, cond)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return loss, {"right": (logits.detach().argmax(-1) == tokens).float().mean()}


def cached(network: Prior, terms: Terms, batch: int) -> Next:
    """Logits of the next token with guidance, keys and values of the others kept."""
    context = network.context(together(terms, batch), batch * len(terms))
    cache = network.start_cache(context)
    weights = [w for _, w in terms]

    def step(token: Tensor | None, i: int) -> Tensor:
        return weighted(network.next_logits(None if token is None else token.repeat(len(terms)), i, context, cache), weights)

    return step


def uncached(network: Prior, terms: Terms, batch: int) -> Next:
    """The same from the whole sequence each time: what the cache is measured against."""
    tokens = torch.full((batch * len(terms), network.config.vocabulary.length), MASKED, device=network.norm.scale.device)
    cond, weights = together(terms, batch), [w for _, w in terms]

    def step(token: Tensor | None, i: int) -> Tensor:
        if token is not None:
            tokens[:, i - 1] = token.repeat(len(terms))
        return weighted(network(tokens, cond)[:, i], weights)

    return step


@torch.no_grad()
def sample_gpt(step: Next, length: int, race: Race, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Iterator[Int[Tensor, "b i"]]:
    """What is written after each token; the last is the whole picture."""
    check_choice(temperature, top_k, top_p)
    written: list[Tensor] = []
    for i in range(length):
        logits = limited(step(written[-1] if written else None, i) / (temperature or 1.0), top_k=top_k, top_p=top_p)
        written.append(chosen(logits, race(i)[..., : logits.shape[-1]], greedy=not temperature))
        yield torch.stack(written, dim=1)
