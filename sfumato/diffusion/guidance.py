"""Several predictions made one denoiser: D(x_t, t) = sum_i w_i D_i(x_t, t, cond_i), weights summing to 1.

One term is plain sampling, two are classifier-free guidance (arXiv 2207.12598) or autoguidance (arXiv 2406.02507), three text and style apart.
After the sum come `post` functions; the first term is the fully conditioned one wherever a post function asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sfumato.core.seams import Cond, Denoise, Predict
from sfumato.diffusion.path import Path
from sfumato.diffusion.precond import Prediction, check_prediction, from_x0, to_x0
from sfumato.nn.conditions import concat_conds

Weight = float | Callable[[float], float]
Term = tuple[Predict, Cond, Weight]
Part = tuple[float, Tensor | None]  # the weight at this t and the x0 of a term: None where the weight is 0
Post = Callable[[Tensor, Tensor, Tensor, list[Part]], Tensor]  # (x0, x_t, t, parts in the order of the terms) -> x0


def guided(terms: Iterable[Term], post: Iterable[Post] = (), batched: bool | None = None) -> Denoise:
    """The weighted sum of the terms (Predict, Cond, weight or weight(t)), then `post` in order (the last one is outermost).

    A term of weight 0 is not evaluated. `batched`: the terms of one Predict are one network call on a concatenated batch (True), or one
    call each (False); None batches where all terms are of the same Predict. Where a weight depends on t, t must be the same for
    the whole batch, as the samplers have it. Raises ValueError where there is nothing to evaluate.
    """
    terms, post = list(terms), list(post)
    if not terms:
        raise ValueError("terms (=[]) must hold at least one (predict, cond, weight): plain sampling is [(predict, cond, 1.0)]")
    together = len({id(predict) for predict, _, _ in terms}) == 1 if batched is None else batched

    def denoise(x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"]) -> Float[Tensor, " b *rest"]:
        parts = _evaluate(terms, _weights(terms, t), together, x_t, t)
        x0 = sum(w * d for w, d in parts if d is not None)
        for f in post:
            x0 = f(x0, x_t, t, parts)
        return x0

    return denoise


def _weights(terms: list[Term], t: Tensor) -> list[float]:
    weights = [w(float(t.reshape(-1)[0])) if callable(w) else w for _, _, w in terms]
    if not any(weights):
        raise ValueError(f"weights (={weights}) must not all be 0 at t = {t.reshape(-1)[0]:.4f}: they should sum to 1")
    return weights


def _evaluate(terms: list[Term], weights: list[float], together: bool, x_t: Tensor, t: Tensor) -> list[Part]:
    groups: dict[int, list[int]] = {}
    for i, (predict, _, _) in enumerate(terms):
        if weights[i] != 0:
            groups.setdefault(id(predict) if together else i, []).append(i)
    x0: dict[int, Tensor] = {}
    for group in groups.values():
        x0.update(zip(group, _call(terms[group[0]][0], [terms[i][1] for i in group], x_t, t), strict=True))
    return [(w, x0.get(i)) for i, w in enumerate(weights)]


def _call(predict: Predict, conds: list[Cond], x_t: Tensor, t: Tensor) -> Sequence[Tensor]:
    """One network call for all of `conds`."""
    if len(conds) == 1:
        return [predict(x_t, t, conds[0])]
    n = len(conds)
    return predict(torch.cat([x_t] * n), torch.cat([t] * n), concat_conds(conds, len(x_t))).chunk(n)


def cfg(predict: Predict, cond: Cond, uncond: Cond, scale: Weight, interval: tuple[float, float] | None = None) -> list[Term]:
    """Classifier-free guidance, D = uncond + scale (cond - uncond); scale 1 is `cond` alone, in one call (arXiv 2207.12598).

    Outside of `interval` (low, high) of t the scale is 1 (arXiv 2404.07724).
    """
    if interval is not None:
        scale = _within(scale, *interval)
    return [(predict, cond, scale), (predict, uncond, _minus(1.0, scale))]


def autoguidance(
    predict: Predict, cond: Cond, weaker: Predict, its_cond: Cond, scale: Weight, interval: tuple[float, float] | None = None
) -> list[Term]:
    """A weaker model to lean on instead of an empty condition: D = weaker + scale (predict - weaker), both told the same (arXiv 2406.02507, eq. 3).
    `interval` as in `cfg`.
    """
    first, (_, _, rest) = cfg(predict, cond, cond, scale, interval)
    return [first, (weaker, its_cond, rest)]


def _within(scale: Weight, low: float, high: float) -> Weight:
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval (=({low}, {high})) must satisfy 0 <= low <= high <= 1: times at which guidance acts, 1 is noise")
    return lambda t: _at(scale, t) if low <= t <= high else 1.0


def _at(w: Weight, t: float) -> float:
    return w(t) if callable(w) else w


def _minus(a: Weight, b: Weight) -> Weight:
    if callable(a) or callable(b):
        return lambda t: _at(a, t) - _at(b, t)
    return a - b


def text_style(predict: Predict, both: Cond, style_only: Cond, neither: Cond, text_scale: Weight, style_scale: Weight) -> list[Term]:
    """Two scales: D = neither + style_scale (style_only - neither) + text_scale (both - style_only) (arXiv 2211.09800, eq. 3).

    Equal scales need no `style_only`, and scale 1 for both is one call.
    """
    return [(predict, both, text_scale), (predict, style_only, _minus(style_scale, text_scale)), (predict, neither, _minus(1.0, style_scale))]


def mixture(predict: Predict, conds: Sequence[Cond], weights: Sequence[float]) -> list[Term]:
    """Conditions mixed by what they predict; weights are divided by their sum. Raises ValueError for weights that cannot be shares."""
    if len(conds) != len(weights) or not conds:
        raise ValueError(f"weights (={list(weights)}) must be one for each of the {len(conds)} conditions, and there must be one at least")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"weights (={list(weights)}) must be >= 0 and not all 0: they are shares of a mixture")
    return [(predict, cond, w / sum(weights)) for cond, w in zip(conds, weights, strict=True)]


def rescale(phi: float, prediction: Prediction, path: Path) -> Post:
    """Brings the std of the guided prediction back towards that of the first term's (arXiv 2305.08891, eq. 14-16).

    phi 0 is the identity, 1 the whole way, the paper has 0.7. Acts on what the network itself predicts, not on x0.
    """
    check_prediction(prediction, path)
    if not 0 <= phi <= 1:
        raise ValueError(f"phi (={phi}) must be in [0, 1]: 0 rescales nothing, arXiv 2305.08891 has 0.7")

    def post(x0: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], parts: list[Part]) -> Float[Tensor, " b *rest"]:
        first = parts[0][1]
        if phi == 0 or first is None or _alone(parts):
            return x0
        out = from_x0(prediction, x0, x_t, t, path)
        ratio = _std(from_x0(prediction, first, x_t, t, path)) / _std(out).clamp_min(1e-12)
        return to_x0(prediction, out * (phi * ratio + 1 - phi), x_t, t, path)

    return post


def apg(eta: float = 0.0, norm_threshold: float = 0.0) -> Post:
    """Adaptive projected guidance: the part of the guidance parallel to the first term's x0, which saturates, counts only eta
    (arXiv 2410.02416, Alg. 1, without its momentum: a denoiser has no memory).

    eta 1 is plain guidance. The difference of the conditional and the other terms is cut to the L2 norm `norm_threshold` before the
    scale acts (the paper's r); 0 cuts nothing.
    """
    if norm_threshold < 0:
        raise ValueError(f"norm_threshold (={norm_threshold}) must be >= 0: 0 cuts nothing")

    def post(x0: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], parts: list[Part]) -> Float[Tensor, " b *rest"]:
        weight, first = parts[0]
        if first is None or _alone(parts):
            return x0
        push = (x0 - first).flatten(1)  # (weight - 1) (first - mean of the others), as the weights sum to 1
        if norm_threshold > 0:
            push = push * (norm_threshold * abs(weight - 1) / push.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
        onto = F.normalize(first.flatten(1), dim=1)
        parallel = (push * onto).sum(1, keepdim=True) * onto
        return first + (push - (1 - eta) * parallel).reshape(x0.shape)

    return post


def along(changed: Predict, term: Term, scale: Weight) -> Post:
    """Some way along a change of the network: D + scale (changed - predict), both told what the first of the terms, `term`, is told. Guidance and
    what acts on it lean on what the network knows without the change. (arXiv 2311.12092 goes along a LoRA by its strength, here by its prediction.)

    Belongs after all that acts on guidance.
    """
    predict, cond, _ = term

    def post(x0: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], parts: list[Part]) -> Float[Tensor, " b *rest"]:
        s, first = _at(scale, float(t.reshape(-1)[0])), parts[0][1]
        if s == 0:
            return x0
        return x0 + s * (changed(x_t, t, cond) - (predict(x_t, t, cond) if first is None else first))

    return post


def inpaint(known: Float[Tensor, "#b c *sides"], redraw: Float[Tensor, "#b #c *sides"]) -> Post:
    """Where `redraw` is 0 the denoised picture is the known one, so that the path ends there; where it is 1 it is the network's.

    Belongs last, outside of all other post functions.
    """

    def post(x0: Float[Tensor, " b *rest"], x_t: Float[Tensor, " b *rest"], t: Float[Tensor, " b"], parts: list[Part]) -> Float[Tensor, " b *rest"]:
        return torch.lerp(known.to(x0), x0, redraw.to(x0).expand_as(x0))

    return post


def _alone(parts: list[Part]) -> bool:
    """Only one term was evaluated: nothing was guided."""
    return sum(d is not None for _, d in parts) == 1


def _std(x: Tensor) -> Tensor:
    """Per sample, "b ..." -> "b 1 ..."."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
