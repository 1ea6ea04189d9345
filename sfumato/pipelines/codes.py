"""Drawing codes: a prior over the codebook of a codec writes them one after the other, or fills them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.request import GenerateRequest
from sfumato.core.rng import torch_rng
from sfumato.diffusion.guidance import cfg, text_style
from sfumato.nn.layers import slerp
from sfumato.pipelines.generate import CHUNK, Begun, Model, NotFinite, Row
from sfumato.priors.choose import Terms, race_of
from sfumato.priors.gpt import cached, sample_gpt
from sfumato.priors.maskgit import sample_maskgit
from sfumato.priors.tokens import Vocabulary
from sfumato.priors.transformer import MASKED

USUAL_STEPS = 10
MOST_LOGITS = 2**27  # of pictures drawn together: half a GiB, of which a step of MaskGIT holds several


@dataclass(frozen=True, kw_only=True)
class CodesModel(Model):
    """See `Model`; `prior` is of the way gpt or maskgit."""

    prior: nn.Module
    part: ClassVar[str] = "prior"

    @property
    def way(self) -> str:  # type: ignore[override]
        return self.prior.config.way  # type: ignore[union-attr, return-value]

    @property
    def guided(self) -> bool:
        """Whether it learned to draw with nothing said, so that guidance has something to lean on."""
        return getattr(self.prior.config, "guided", True)

    @property
    def needs_label(self) -> bool:
        """Whether it draws one of its classes only."""
        return not self.guided and getattr(self.prior.config, "labels", 0) > 0

    @property
    def vocabulary(self) -> Vocabulary:
        return self.prior.config.vocabulary  # type: ignore[union-attr, return-value]

    def together(self, request: GenerateRequest) -> int:
        """Fewer where a large vocabulary would fill the memory: MaskGIT has the logits of all codes at once."""
        each = max(self.vocabulary.slots) * (1 if self.way == "gpt" else self.vocabulary.length)
        return max(1, min(CHUNK, MOST_LOGITS // each))

    def steps_of(self, request: GenerateRequest) -> int:
        """gpt: one a code; maskgit: as asked for, but not more than there are codes."""
        return self.vocabulary.length if self.way == "gpt" else min(request.steps or USUAL_STEPS, self.vocabulary.length)

    def steps_taken(self, request: GenerateRequest, begun: Begun | None) -> int:
        """Where a mask says what is drawn anew all of them, but no more than there are codes under it."""
        if begun is None or begun.mask is None:
            return super().steps_taken(request, begun)
        return max(1, min(self.steps_of(request), int(begun.redraw().sum()) * len(self.vocabulary.slots)))

    def check_way(self, request: GenerateRequest) -> None:
        """Raises ValueError for an init picture where codes are written from the upper left on."""
        if self.needs_label and request.label is None:
            raise ValueError(f"label (=None) must be named: this model draws one of {len(self.meta['labels'])} classes, by their numbers")
        if request.init is not None and self.way == "gpt":
            raise ValueError(
                f"init (={request.init!r}) must be left out: this model writes codes from the upper left on; one of --kind maskgit redraws"
            )

    @torch.no_grad()
    def begin(self, request: GenerateRequest) -> Begun | None:
        """As usual, with a mask that is soft inside of its edge, so that no seam shows; what is black in it stays black."""
        begun = super().begin(request)
        if begun is None or begun.mask is None:
            return begun
        return replace(begun, mask=feathered(begun.mask, self.codec.spec.factor * begun.x.shape[-1] // self.size // 2))

    @torch.no_grad()
    def latents(self, rows: list[Row], begun: Begun | None = None) -> Iterator[Tensor]:
        """Tokens "b n" after each step: those that are known, or all with MASKED where one is not."""
        request = rows[0].request
        how = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
        unknown = self._unknown(rows, begun)
        try:
            yield from drawn(self.prior, self._terms(rows), unknown, Noise(rows, self.device), steps=self.steps_taken(request, begun), **how)
        except FloatingPointError:
            raise NotFinite from None

    def _decoded(self, z: Tensor) -> Tensor:
        return self.codec.decode_indices(self.vocabulary.indices(z))

    def _terms(self, rows: list[Row]) -> Terms:
        """What is asked for, and what guidance leans on, with their weights."""
        request, predict = rows[0].request, None  # of each term only the condition and the weight are wanted
        cond, empty = self._sides(rows)
        if not self.guided:
            return [(cond, 1.0)]
        scale = self.usual["guidance"] if request.guidance is None else request.guidance
        if request.style_guidance is None:
            terms = cfg(predict, cond, empty, scale)  # type: ignore[arg-type]
        else:
            terms = text_style(predict, cond, empty, self._neither(rows, empty), scale, request.style_guidance)  # type: ignore[arg-type]
        return [(c, w) for _, c, w in terms if w]  # type: ignore[misc]

    def _unknown(self, rows: list[Row], begun: Begun | None) -> Tensor:
        """Tokens to begin with: none is known, or those of the init picture but where it is redrawn: under the mask, or at as many places, each
        picture its own, as `strength` says.
        """
        v = self.vocabulary
        if begun is None:
            return torch.full((len(rows), v.length), MASKED, device=self.device)
        assert begun.indices is not None
        tokens, cells, slots = v.tokens(begun.indices).expand(len(rows), -1), v.grid[0] * v.grid[1], len(v.slots)
        if begun.mask is not None:
            redrawn = begun.redraw().flatten(1).bool().expand(len(rows), -1)
        else:
            count = max(1, round(rows[0].request.strength * cells))
            order = torch.stack([torch.randperm(cells, generator=torch_rng(r.seed, "generate/redrawn")) for r in rows])
            redrawn = torch.zeros(len(rows), cells, dtype=torch.bool).scatter(1, order[:, :count], True).to(self.device)
        return torch.where(redrawn.repeat_interleave(slots, 1), MASKED, tokens)


def drawn(
    prior: Any, terms: Terms, tokens: Int[Tensor, "b n"], race: Callable[..., Tensor], *, steps: int = USUAL_STEPS, **how: Any
) -> Iterator[Int[Tensor, "b _"]]:
    """Tokens after each step, in the way of the prior: all are written, or those that are MASKED are filled in. `race(*shape)` gives exponential
    noise "b *shape"; `how`: temperature, top_k, top_p.
    """
    v: Vocabulary = prior.config.vocabulary
    n, most = v.length, max(v.slots)
    if prior.config.way == "gpt":
        return sample_gpt(cached(prior, terms, len(tokens)), n, lambda _: race(most), **how)
    return sample_maskgit(prior, terms, tokens, lambda _: race(n, most), lambda _: race(n), steps=steps, **how)


class Noise:
    """Exponential noise, one stream a picture; on the way to another picture, between its noise and that one's."""

    def __init__(self, rows: list[Row], device: torch.device) -> None:
        self.device = device
        self.streams = [(torch_rng(r.seed, "generate/codes"), r.toward and torch_rng(r.toward.seed, "generate/codes"), r.share) for r in rows]

    def __call__(self, *shape: int) -> Float[Tensor, " b *of"]:
        return torch.stack([self._one(shape, *stream) for stream in self.streams]).to(self.device)

    def _one(self, shape: tuple[int, ...], own: torch.Generator, other: torch.Generator | None, share: float) -> Tensor:
        a = torch.empty(shape).exponential_(generator=own)
        if other is None:
            return a
        b = torch.empty(shape).exponential_(generator=other)
        if share in (0.0, 1.0):
            return b if share else a
        return race_of(slerp(*(torch.special.ndtri((-e.double()).exp()).float() for e in (a, b)), share))


def feathered(mask: Float[Tensor, "1 1 h w"], radius: int) -> Float[Tensor, "1 1 h w"]:
    """A mask that rises to 1 within `radius` pixels inside of its edge: the mean of the mask narrowed by 0, 1, 2... pixels. What is too thin for that
    rises to 1 in its middle.
    """
    narrowed = [-F.max_pool2d(-mask, 2 * k + 1, stride=1, padding=k) for k in range(radius + 1)]
    soft = torch.stack(narrowed).mean(0)
    return soft / F.max_pool2d(soft, 2 * radius + 1, stride=1, padding=radius).clamp_min(1e-6)
