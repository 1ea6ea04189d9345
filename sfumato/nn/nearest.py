"""The nearest of many vectors: the lookup of vector quantization, without the matrix of all distances.

argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2): the squares of z do not matter. A few rows at a time, so that their products stay in the
cache; the largest is found by `amax` over blocks of codes, which runs in vector registers, and only the winning block is searched for its index.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 128  # codes of which the largest is taken at once
PRODUCTS = 2**20  # products that are held at once: 4 MiB, about the cache of a core
ON_GPU = 2**26


@torch.no_grad()
def nearest_index(z: Float[Tensor, "n d"], codebook: Float[Tensor, "k _"]) -> Int[Tensor, " n"]:
    """For each row of z the row of the codebook that is nearest by Euclidean distance, int64; of equally near ones the first.

    In fp32 whatever the inputs' dtype; a row that is not finite gets some index. Raises ValueError where the widths differ, or the codebook is empty
    or not finite.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(f"vectors (={tuple(z.shape)}) and codebook (={tuple(codebook.shape)}) must be 'n d' and 'k d' with the same d and k >= 1")
    with torch.autocast(z.device.type, enabled=False):
        return _nearest(z.float(), codebook.float())


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    k, block = len(codebook), min(BLOCK, len(codebook))
    whole = -(-k // block) * block
    offset = codebook.new_full((whole,), float("-inf"))
    offset[:k] = codebook.square().sum(1).div_(-2)
    if not torch.isfinite(offset[:k]).all():
        raise ValueError("the codebook holds values that are not finite")
    columns = torch.cat([codebook, codebook.new_zeros(whole - k, codebook.shape[1])]).T
    rows = max((PRODUCTS if z.device.type == "cpu" else ON_GPU) // whole, 16)
    found = torch.empty(len(z), dtype=torch.int64, device=z.device)
    scores = z.new_empty(min(rows, len(z)), whole)
    for i in range(0, len(z), rows):
        part = z[i : i + rows]
        blocks = torch.addmm(offset, part, columns, out=scores[: len(part)]).view(len(part), -1, block)
        best, winner = blocks.amax(2).max(1)
        inside = blocks.gather(1, winner[:, None, None].expand(-1, 1, block)).squeeze(1)
        found[i : i + rows] = winner * block + (inside == best[:, None]).to(torch.uint8).argmax(1)
    return found
