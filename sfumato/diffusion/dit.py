"""A diffusion transformer over latents (DiT, arXiv 2212.09748), its adaptive norms shared by all blocks (PixArt's adaLN-single, 2310.00426) or not.

Text enters by cross-attention and, pooled, beside time, style and label in the conditioning vector. One shared norm has few ways to say
*what* is drawn; a norm of each block's own ("block") says it in every block, at the price of 6 width^2 parameters a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfumato.core.config import nearest
from sfumato.core.seams import Cond
from sfumato.nn.attention import Attention
from sfumato.nn.conditions import told
from sfumato.nn.embeddings import Memory, grid_positions, sinusoidal
from sfumato.nn.layers import MLP

Modulation = Literal["single", "block"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A denoiser of latents; in every `cross_every`-th block tokens attend to the text.

    `modulation`: one adaptive norm for all blocks ("single") or one for each ("block"). `memory`: how many known things the pooled text is
    compared with (see `sfumato.nn.embeddings.Memory`). `text_width`, `styles`, `labels` or `memory` 0: no such input.
    """

    kind: str = "dit"
    channels: int = 16
    patch: int = 2
    width: int = 384
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 3.0
    cross_every: int = 2
    modulation: Modulation = "single"
    text_width: int = 256
    styles: int = 6
    labels: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "patch", "width", "depth", "heads", "cross_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least 1")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width (={self.width}) must be a multiple of 4 and of heads (={self.heads})")
        known = get_args(Modulation)
        if self.memory and not self.text_width:
            raise ValueError(f"memory (={self.memory}) compares texts: it needs text_width > 0, or must be 0")
        if self.modulation not in known:
            raise ValueError(f"modulation (={self.modulation!r}) must be one of {', '.join(known)}{nearest(self.modulation, known)}")


class DiTBlock(nn.Module):
    """Self-attention, cross-attention (some blocks) and MLP; shift, scale and gate are the shared ones plus this block's own."""

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
        self.modulation = nn.Linear(w, 6 * w, bias=False) if config.modulation == "block" else None
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
        self.memory = Memory(config.memory, config.text_width, w) if config.memory else None
        if config.styles:  # one row more: no style
            self.style = nn.Embedding(config.styles + 1, w)
            self.style_token = nn.Embedding(config.styles + 1, config.text_width) if config.text_width else None
        if config.labels:  # one row more: no label
            self.label = nn.Embedding(config.labels + 1, w)
        self.modulation = nn.Linear(w, 6 * w) if config.modulation == "single" else None
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
        for name, parameter in self.named_parameters():
            if "modulation" in name or name.startswith("last."):
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c h w"]:
        c, p = self.config, self.config.patch
        if x.ndim != 4 or x.shape[1] != c.channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"x must be 'b {c.channels} h w' with sides that are multiples of {p}, not of shape {tuple(x.shape)}")
        h, w = x.shape[2] // p, x.shape[3] // p
        tokens = self.stem(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        tokens = tokens + grid_positions(h, w, c.width).to(tokens)
        vector, context, mask = self._condition(t, cond, x)
        active = nn.functional.silu(vector)
        shared = None if self.modulation is None else self.modulation(active)
        for block in self.blocks:
            modulation = block.modulation(active) if shared is None else shared
            tokens = block(tokens, rearrange(modulation, "b (k w) -> b k w", k=6), context, mask)
        shift, scale = self.last_modulation(active)[:, None].chunk(2, dim=-1)
        out = self.last(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)

    def _condition(self, t: Tensor, cond: Cond, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The conditioning vector "b width", and what cross-attention sees: token states and a style token, with their mask.

        Time is embedded in fp32 whatever the dtype of x: bf16 has too few digits to tell steps apart.
        """
        return told(self, cond, self.time(sinusoidal(t, 256).to(self.last.weight.dtype)), x)
