"""A diffusion transformer over latents: one shared adaptive norm (PixArt's adaLN-single, arXiv 2310.00426) on a DiT (arXiv 2212.09748).

Text enters by cross-attention and, pooled, beside time, style and label in the conditioning vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.core.seams import Cond
from sfumato.nn.attention import Attention
from sfumato.nn.embeddings import grid_positions, sinusoidal
from sfumato.nn.layers import MLP


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A denoiser of latents; in every `cross_every`-th block tokens attend to the text.

    `text_width`, `styles` or `labels` 0: no such input.
    """

    kind: str = "dit"
    channels: int = 16
    patch: int = 2
    width: int = 384
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 3.0
    cross_every: int = 2
    text_width: int = 256
    styles: int = 6
    labels: int = 0

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width (={self.width}) must be a multiple of 4 and of heads (={self.heads})")


class DiTBlock(nn.Module):
    """Self-attention, cross-attention (some blocks) and MLP; shift, scale and gate come from outside, plus this block's own offsets."""

    def __init__(self, config: DiTConfig, cross: bool) -> None:
        super().__init__()
        w = config.width
        self.norm1 = nn.LayerNorm(w, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(w, config.heads)
        self.cross = Attention(w, config.heads, config.text_width) if cross else None
        self.cross_norm = nn.LayerNorm(w) if cross else None
        self.norm2 = nn.LayerNorm(w, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(w, config.mlp_ratio)
        self.offsets = nn.Parameter(torch.randn(6, w) / w**0.5)
        if self.cross is not None:
            nn.init.zeros_(self.cross.out.weight)
            nn.init.zeros_(self.cross.out.bias)

    def forward(
        self, x: Float[Tensor, "b n d"], modulation: Float[Tensor, "b 6 d"], context: Float[Tensor, "b m e"] | None, mask: Bool[Tensor, "b m"] | None
    ) -> Float[Tensor, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.offsets)[:, :, None].unbind(1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        if self.cross is not None:
            assert self.cross_norm is not None
            x = x + self.cross(self.cross_norm(x), context, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """net(x_t, t in [0, 1], Cond) -> prediction. Sides must be multiples of the patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.stem = nn.Linear(config.channels * config.patch**2, w)
        self.time = nn.Sequential(nn.Linear(256, w), nn.SiLU(), nn.Linear(w, w))
        if config.text_width:
            self.pooled = nn.Linear(config.text_width, w)
        if config.styles:  # one row more: no style
            self.style = nn.Embedding(config.styles + 1, w)
            self.style_token = nn.Embedding(config.styles + 1, config.text_width) if config.text_width else None
        if config.labels:  # one row more: no label
            self.label = nn.Embedding(config.labels + 1, w)
        self.modulation = nn.Linear(w, 6 * w)
        cross = [bool(config.text_width) and i % config.cross_every == 0 for i in range(config.depth)]
        self.blocks = nn.ModuleList(DiTBlock(config, c) for c in cross)
        self.norm = nn.LayerNorm(w, elementwise_affine=False, eps=1e-6)
        self.last_modulation = nn.Linear(w, 2 * w)
        self.last = nn.Linear(w, config.channels * config.patch**2)
        self._start()

    def _start(self) -> None:
        """Small embeddings; the last layer starts at zero."""
        for name, parameter in self.named_parameters():
            if name.startswith(("style", "label")):
                nn.init.normal_(parameter, std=0.02)
        for layer in (self.modulation, self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        c, p = self.config, self.config.patch
        if x.ndim != 4 or x.shape[1] != c.channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"x must be 'b {c.channels} h w' with sides that are multiples of {p}, not of shape {tuple(x.shape)}")
        h, w = x.shape[2] // p, x.shape[3] // p
        tokens = self.stem(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        tokens = tokens + grid_positions(h, w, c.width).to(tokens)
        vector, context, mask = self._condition(t, cond, x)
        active = nn.functional.silu(vector)
        modulation = rearrange(self.modulation(active), "b (k w) -> b k w", k=6)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, mask)
        shift, scale = self.last_modulation(active)[:, None].chunk(2, dim=-1)
        out = self.last(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)

    def _condition(self, t: Tensor, cond: Cond, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The conditioning vector "b width", and what cross-attention sees: token states and a style token, with their mask.

        Time is embedded in fp32 whatever the dtype of x: bf16 has too few digits to tell steps apart.
        """
        c, batch = self.config, len(x)
        vector = self.time(sinusoidal(t, 256).to(self.last.weight.dtype))
        styles = None
        if c.styles:
            weights = x.new_zeros(batch, c.styles) if cond.style is None else cond.style.to(x)
            styles = torch.cat([weights, 1 - weights.sum(1, keepdim=True)], dim=1)
            vector = vector + styles @ self.style.weight
        if c.labels:
            label = torch.full((batch,), -1, device=x.device) if cond.label is None else cond.label
            vector = vector + self.label(torch.where(label < 0, c.labels, label))
        if not c.text_width:
            return vector, None, None
        if cond.text is None or cond.mask is None or cond.pooled is None:
            context, mask = x.new_zeros(batch, 1, c.text_width), torch.ones(batch, 1, dtype=torch.bool, device=x.device)
            return vector + self.pooled(context[:, 0]), *self._with_style(context, mask, styles)
        return vector + self.pooled(cond.pooled.to(x)), *self._with_style(cond.text.to(x), cond.mask, styles)

    def _with_style(self, context: Tensor, mask: Tensor, styles: Tensor | None) -> tuple[Tensor, Tensor]:
        if styles is None or self.style_token is None:
            return context, mask
        token = (styles @ self.style_token.weight)[:, None]
        return torch.cat([context, token.to(context.dtype)], dim=1), torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def without_text(cond: Cond, rows: Bool[Tensor, " b"]) -> Cond:
    """The condition with the text of `rows` taken away: as if nothing had been said."""
    if cond.text is None or cond.mask is None or cond.pooled is None:
        return cond
    keep = ~rows
    empty = torch.zeros_like(cond.mask)
    empty[:, 0] = True  # one zero token stands for silence
    mask = torch.where(keep[:, None], cond.mask, empty)
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
