"""Vector quantization: every latent vector becomes the nearest of `size` learned codes (VQ-VAE, arXiv 1711.00937).

z_q = e_k with k = argmin |z - e_k|; loss = |sg(z) - e_k|^2 + commitment * |z - sg(e_k)|^2. The codebook learns by that gradient, or is a moving
average of what was assigned to it. It begins as the k-means of latents, and codes that nothing chooses any more begin again from recent latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.nearest import nearest_index

DECAY = 0.99  # of the moving average, an update
SPREAD = 4096  # codes up to which k-means begins far apart
ENTROPY_ROWS = 1024  # latents on which the entropy term looks at all codes


class Codes:
    """What the configs of discrete bottlenecks have in common, where they do not say otherwise: one index a latent."""

    @property
    def encoder_channels(self) -> int:
        return self.channels  # type: ignore[attr-defined]

    @property
    def codebook_size(self) -> int:
        return self.size  # type: ignore[attr-defined]

    @property
    def levels(self) -> int:
        return 1


class Counted(nn.Module):
    """A discrete bottleneck: `counts` are how often each code was chosen since `forget`, over all processes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    def count(self, indices: Int[Tensor, " *shape"]) -> Int[Tensor, " size"]:
        """How often each code is among the indices of all processes."""
        found = all_sum(torch.bincount(indices.flatten(), minlength=len(self.counts)))
        self.counts += found
        return found

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor]) -> None:
        """Counts what a step chose."""
        self.count(stats["indices"])

    def forget(self) -> None:
        """Begins to count anew."""
        self.counts.zero_()


@dataclass(frozen=True, kw_only=True)
class VQConfig(Codes):
    """`size` codes of `channels` numbers. Few channels (8) use many codes better than hundreds: the encoder's last layer is the factorisation of
    arXiv 2110.04627, as are `cosine` codes, which are compared by direction.

    `gradient`: how the encoder learns through the choice, straight through or by the rotation trick (arXiv 2410.06424). `learn`: the codebook
    learns by its gradient, or as a moving average (ema). `entropy` rewards latents that are sure of their code and codes that are equally used
    (arXiv 2310.05737). `restart`: a code begins again once it was chosen by none of restart * size latents in a row; 0 is never. `legacy_beta`
    puts the commitment on the codebook's term, as taming-transformers did; it is for importing only.
    """

    kind: str = "vq"
    size: int = 1024
    channels: int = 8
    cosine: bool = True
    gradient: Literal["straight-through", "rotation"] = "rotation"
    learn: Literal["gradient", "ema"] = "gradient"
    commitment: float = 0.25
    entropy: float = 0.0
    restart: float = 20.0
    legacy_beta: bool = False

    def __post_init__(self) -> None:
        if self.size < 2 or self.channels < 1:
            raise ValueError(f"size (={self.size}) must be at least 2 codes and channels (={self.channels}) at least 1")
        if self.commitment < 0 or self.entropy < 0 or self.restart < 0:
            raise ValueError(f"commitment (={self.commitment}), entropy (={self.entropy}) and restart (={self.restart}) must be at least 0")


class VQ(Counted):
    """See `sfumato.core.seams.Bottleneck`. `unused` is for how many latents each code was not chosen; `placed` which codes were put somewhere else by
    something other than learning: averages of weights are to follow them at once.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config.size)
        self.config = config
        self.codebook = nn.Parameter(torch.randn(config.size, config.channels), requires_grad=config.learn == "gradient")
        self.register_buffer("unused", torch.zeros(config.size, dtype=torch.int64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.placed: list[Tensor] = []
        if config.learn == "ema":
            self.register_buffer("cluster_size", torch.ones(config.size))
            self.register_buffer("sums", self.codebook.detach().clone())

    @property
    def codes(self) -> Float[Tensor, "size channels"]:
        """The codebook as it is compared and decoded: with cosine codes, directions of length sqrt(channels)."""
        return self.directed(self.codebook)

    def directed(self, x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows c"]:
        """Vectors as they are compared."""
        return F.normalize(x, dim=-1) * self.config.channels**0.5 if self.config.cosine else x

    def forward(self, z_e: Float[Tensor, "b c h w"], noise: None = None) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, ""], dict[str, Tensor]]:
        """Quantized latents, loss, and what `update` needs: the latents "n c" and their indices "b h w 1"."""
        c = self.config
        with torch.autocast(z_e.device.type, enabled=False):
            z = self.directed(rearrange(z_e.float(), "b c h w -> (b h w) c"))
            codes = self.codes
            index = nearest_index(z.detach(), codes.detach())
            chosen = codes[index]
            to_code, to_latent = F.mse_loss(chosen, z.detach()), F.mse_loss(z, chosen.detach())
            beta = (c.commitment, 1.0) if c.legacy_beta else (1.0, c.commitment)
            loss = beta[0] * to_code + beta[1] * to_latent if c.learn == "gradient" else c.commitment * to_latent
            if c.entropy:
                loss = loss + c.entropy * entropy_loss(z, codes)
            passed = rotated(z, chosen) if c.gradient == "rotation" else z + (chosen - z).detach()
        grid = {"b": len(z_e), "h": z_e.shape[2]}
        indices = rearrange(index, "(b h w) -> b h w 1", **grid)
        return rearrange(passed, "(b h w) c -> b c h w", **grid), loss, {"latents": z.detach(), "indices": indices, "commitment": to_latent.detach()}

    def quantize(self, z_e: Float[Tensor, "b c h w"]) -> Int[Tensor, "b h w 1"]:
        """The index of every latent's nearest code."""
        z = self.directed(rearrange(z_e.float(), "b c h w -> (b h w) c"))
        return rearrange(nearest_index(z, self.codes), "(b h w) -> b h w 1", b=len(z_e), h=z_e.shape[2])

    def lookup(self, indices: Int[Tensor, "b h w 1"]) -> Float[Tensor, "b c h w"]:
        """The codes of indices. Raises ValueError for one outside of the codebook."""
        check_indices(indices, self.config.size)
        return rearrange(self.codes[indices[..., 0]], "b h w c -> b c h w")

    # --- learning outside of the gradient: once after the optimiser's step -----------------------------------------------------------------------

    @torch.no_grad()
    def update(self, stats: dict[str, Tensor]) -> None:
        """Counts what a step chose, moves an EMA codebook, and restarts codes that are dead; over all processes, the same in each."""
        z, index = stats["latents"], stats["indices"].flatten()
        counted = self.count(index)
        self.unused += counted.sum()
        self.unused[counted > 0] = 0
        self.updates += 1
        if self.config.learn == "ema":
            self._average(z, index, counted)
        if self.config.restart:
            self._restart(z)

    def _average(self, z: Tensor, index: Tensor, counted: Tensor) -> None:
        """sums and sizes of clusters as moving averages; the codebook is their quotient (arXiv 1711.00937, appendix A.1)."""
        sums = all_sum(torch.zeros_like(self.sums).index_add_(0, index, z))
        self.cluster_size.lerp_(counted.to(self.cluster_size), 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        alive = self.cluster_size > 1e-5
        self.codebook[alive] = self.sums[alive] / self.cluster_size[alive, None]

    def _restart(self, z: Tensor) -> None:
        dead = (self.unused >= self.config.restart * self.config.size).nonzero().flatten()
        if len(dead):
            self.place(dead, of_first(some_of(z, len(dead), int(self.updates))))

    def place(self, which: Int[Tensor, " k"], at: Float[Tensor, "k c"]) -> None:
        """Puts codes to latents; they count as just used."""
        self.codebook.data[which] = at.to(self.codebook)
        self.unused[which] = 0
        self.placed.append(which)
        if self.config.learn == "ema":
            self.cluster_size[which], self.sums[which] = 1.0, at.to(self.sums)

    @torch.no_grad()
    def fit(self, z_e: Float[Tensor, "b c h w"], seed: int = 0, rounds: int = 10, fresh: bool = True) -> None:
        """The codebook becomes the k-means of latents; not `fresh`, it goes on from where it is."""
        z = self.directed(rearrange(z_e.float(), "b c h w -> (b h w) c"))
        found = k_means(z, self.config.size, seed=seed, rounds=rounds, begin=None if fresh else self.codes)
        self.place(torch.arange(self.config.size, device=z.device), found)


# --- functions that other bottlenecks share ------------------------------------------------------------------------------------------------------


def rotated(z: Float[Tensor, "n c"], code: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """The code, as z turned and scaled onto it: the gradient is turned back by the same rotation (arXiv 2410.06424, section 4.2)."""
    with torch.no_grad():
        a, b = F.normalize(z, dim=1), F.normalize(code, dim=1)
        r = F.normalize(a + b, dim=1)
        scale = code.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(1e-6)
    turned = scale * (z - 2 * (z * r).sum(1, keepdim=True) * r + 2 * (z * a).sum(1, keepdim=True) * b)
    return code.detach() + (turned - turned.detach())  # to the last bit the code


def entropy_loss(z: Float[Tensor, "n c"], codes: Float[Tensor, "k c"]) -> Float[Tensor, ""]:
    """Mean entropy of the soft choice minus the entropy of the mean choice, in parts of log k; of ENTROPY_ROWS latents from all over them."""
    some = z[:: max(1, len(z) // ENTROPY_ROWS)]
    logits = 2 * some @ codes.T - codes.square().sum(1)
    p = logits.softmax(1)
    each, mean = -(p * logits.log_softmax(1)).sum(1).mean(), p.mean(0)
    return (each + (mean * mean.clamp_min(1e-20).log()).sum()) / torch.tensor(float(len(codes))).log()


def all_sum(t: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *shape"]:
    """Summed over the processes of a launcher, in place; alone as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(t)
    return t


def some_of(z: Float[Tensor, "n c"], k: int, seed: int) -> Float[Tensor, "k c"]:
    """k of the rows by chance; where there are fewer, some twice."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(z), generator=rng)[:k] if len(z) >= k else torch.randint(len(z), (k,), generator=rng)
    return z[rows.to(z.device)].clone()


def of_first(t: Shaped[Tensor, " *shape"]) -> Shaped[Tensor, " *shape"]:
    """That of the first process for all of a launcher, in place; alone as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(t, 0)
    return t


def k_means(z: Float[Tensor, "n c"], k: int, *, seed: int = 0, rounds: int = 10, begin: Float[Tensor, "k c"] | None = None) -> Float[Tensor, "k c"]:
    """Centres by Lloyd's rounds, begun far apart (k-means++, up to SPREAD centres) or from k of the rows, or from `begin`; a centre that nothing is
    nearest to moves to a row that is far from its own.
    """
    centres = some_of(_spread_out(z, k, seed) if k <= min(SPREAD, len(z)) else z, k, seed) if begin is None else begin.clone()
    for _ in range(rounds):
        index = nearest_index(z, centres)
        counts = torch.bincount(index, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, index, z)
        empty = (counts == 0).nonzero().flatten()
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centres)
        if 0 < len(empty) <= len(z):
            far = (z - centres[index]).square().sum(1).topk(len(empty)).indices
            centres[empty] = z[far]
    return centres


def _spread_out(z: Float[Tensor, "n c"], k: int, seed: int) -> Float[Tensor, "k c"]:
    """k of the rows, each by chance in proportion to its squared distance from those before (Arthur and Vassilvitskii 2007)."""
    rng = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(z), (1,), generator=rng))]
    apart = (z - z[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        weight = apart.double().cumsum(0).cpu()
        at = float(torch.rand((), generator=rng, dtype=torch.float64)) * float(weight[-1])
        chosen.append(min(int(torch.searchsorted(weight, at, right=True)), len(z) - 1))
        apart = torch.minimum(apart, (z - z[chosen[-1]]).square().sum(1))
    return z[chosen]


def check_indices(indices: Int[Tensor, " *shape"], size: int) -> None:
    """Raises ValueError for an index outside of [0, size)."""
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise ValueError(f"indices (from {int(indices.min())} to {int(indices.max())}) must be from 0 to {size - 1}: the codebook has {size} codes")


def use_of(counts: Int[Tensor, " k"] | Sequence[int]) -> dict[str, float]:
    """Share of codes that were chosen at all, and perplexity (exp of the entropy) in codes and in parts of all."""
    c = torch.as_tensor(counts, dtype=torch.float64).cpu()
    p = c[c > 0] / c.sum().clamp_min(1)
    perplexity = float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0
    return {"usage": float((c > 0).double().mean()), "perplexity": perplexity, "perplexity_share": perplexity / len(c)}
