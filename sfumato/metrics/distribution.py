"""How far two sets of pictures are apart, from their features."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

ROWS = 1024  # compared at once, so that memory grows with one set only


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / d + 1)^3 (KID, arXiv 1801.01401), unbiased: around 0 for equal distributions.

    Features as they come from a network, in fp64. Raises ValueError for fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs two pictures on each side at least, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float(kernel(part, b).sum()) for part in a.split(ROWS))

    def within(a: Tensor) -> float:
        own = float(((a.square().sum(1) / a.shape[1] + 1) ** 3).sum())  # each with itself
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))
