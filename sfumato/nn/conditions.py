"""Conditions (`sfumato.core.seams.Cond`): of several terms put together, parts of them taken away, and what a network makes of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from sfumato.core.seams import Cond


def concat_conds(conds: Sequence[Cond], rows: int) -> Cond:
    """Conds of `rows` samples each, one below the other.

    Text is padded to the longest (mask False there). What only some have is filled in for the others as networks have it for "none":
    one zero token (attention needs something to attend to), all-zero style, label -1; zeros for pooled and concat.
    Raises ValueError where `extra` or the row counts differ.
    """
    if len({frozenset(c.extra) for c in conds}) > 1:
        raise ValueError(f"extra (={[sorted(c.extra) for c in conds]}) must have the same names in every term: give each term all of them")
    for c in conds:
        c.map(lambda v: _check_rows(v, rows))
    text, mask = _concat_text(conds, rows)
    filled = {name: _concat([getattr(c, name) for c in conds], rows, fill) for name, fill in _NONE.items()}
    return Cond(text=text, mask=mask, **filled, extra={k: torch.cat([c.extra[k] for c in conds]) for k in conds[0].extra})


_NONE = {"pooled": 0, "style": 0, "label": -1, "concat": 0}  # the value that stands for "none"


def _check_rows(v: Tensor, rows: int) -> Tensor:
    if len(v) != rows:
        raise ValueError(f"a condition has {len(v)} rows, but x_t has {rows}: repeat it for every sample")
    return v


def _concat(values: list[Tensor | None], rows: int, fill: float) -> Tensor | None:
    given = next((v for v in values if v is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_full((rows, *given.shape[1:]), fill) if v is None else v for v in values])


def _concat_text(conds: Sequence[Cond], rows: int) -> tuple[Tensor | None, Tensor | None]:
    like = next((c.text for c in conds if c.text is not None), None)
    if like is None:
        return None, None
    silence = like.new_zeros(rows, 1, like.shape[2])
    texts = [silence if c.text is None else c.text for c in conds]
    lengths = {text.shape[1] for text in texts}
    if len(lengths) == 1 and all(c.mask is None and c.text is not None for c in conds):
        return torch.cat(texts), None
    masks = [
        text.new_ones(text.shape[:2], dtype=torch.bool) if c.text is None or c.mask is None else c.mask for c, text in zip(conds, texts, strict=True)
    ]
    missing = [max(lengths) - text.shape[1] for text in texts]
    text = torch.cat([F.pad(v, (0, 0, 0, n)) for v, n in zip(texts, missing, strict=True)])
    return text, torch.cat([F.pad(v, (0, n)) for v, n in zip(masks, missing, strict=True)])


def without_text(cond: Cond, rows: Bool[Tensor, " b"]) -> Cond:
    """The condition with the text of `rows` taken away: as if nothing had been said."""
    if cond.text is None or cond.pooled is None:
        return cond
    keep = ~rows
    given = torch.ones(cond.text.shape[:2], dtype=torch.bool, device=cond.text.device) if cond.mask is None else cond.mask
    empty = torch.zeros_like(given)
    empty[:, 0] = True  # one zero token stands for silence
    mask = torch.where(keep[:, None], given, empty)
    values = cond.__dict__ | {"text": cond.text * keep[:, None, None], "mask": mask, "pooled": cond.pooled * keep[:, None]}
    return Cond(**values)


def without_style(cond: Cond, rows: Bool[Tensor, " b"]) -> Cond:
    """The condition with the style of `rows` taken away."""
    return cond if cond.style is None else Cond(**(cond.__dict__ | {"style": cond.style * (~rows)[:, None]}))


def without_label(cond: Cond, rows: Bool[Tensor, " b"]) -> Cond:
    """The condition with the label of `rows` taken away."""
    return cond if cond.label is None else Cond(**(cond.__dict__ | {"label": cond.label.masked_fill(rows, -1)}))


def silent(cond: Cond, rows: Bool[Tensor, " b"]) -> Cond:
    """The condition with text and label of `rows` taken away: what guidance leans on."""
    return without_label(without_text(cond, rows), rows)


def told(network: Any, cond: Cond, vector: Float[Tensor, "b w"], like: Shaped[Tensor, " *any"]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a network is told of a condition: `vector` and what is added to it (style, label, pooled text, memory), and token states "b n e" with a
    style token, and their mask "b n"; None without text. All in the dtype and on the device of `like`.

    The network has the embeddings `style`, `style_token`, `label`, `pooled`, `memory` as far as its config has `styles`, `labels`, `text_width`
    and `memory`.
    """
    c, batch, styles = network.config, len(vector), None
    if c.styles:
        weights = like.new_zeros(batch, c.styles) if cond.style is None else cond.style.to(like)
        styles = torch.cat([weights, 1 - weights.sum(1, keepdim=True)], dim=1)
        vector = vector + styles @ network.style.weight
    if c.labels:
        label = torch.full((batch,), -1, device=like.device) if cond.label is None else cond.label
        vector = vector + network.label(torch.where(label < 0, c.labels, label))
    if not c.text_width:
        return vector, None, None
    if cond.text is None or cond.pooled is None:
        states, mask = like.new_zeros(batch, 1, c.text_width), torch.ones(batch, 1, dtype=torch.bool, device=like.device)
        vector = vector + network.pooled(states[:, 0])
    else:
        states, pooled = cond.text.to(like), cond.pooled.to(like)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=like.device) if cond.mask is None else cond.mask
        vector = vector + network.pooled(pooled)
        if network.memory is not None:
            vector = vector + network.memory(pooled)
    if styles is not None and network.style_token is not None:
        token = (styles @ network.style_token.weight)[:, None]
        states, mask = torch.cat([states, token.to(states.dtype)], dim=1), torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
    return vector, states, mask
