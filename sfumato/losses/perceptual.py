"""Distance in the feature space of a network trained on photographs (arXiv 1801.03924 without its learned weights)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sfumato.nn.backbones import EfficientNetLite0


def perceptual(
    network: EfficientNetLite0, prediction: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"], last: int = 10
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Mean over resolutions of the squared distance between unit-normalised feature maps.

    prediction and target are in [-1, 1]; gradients flow into the prediction only. `last` is the last block used.
    """
    ours = network.maps(prediction, last)
    with torch.no_grad():
        theirs = network.maps(target, last)
    terms = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(terms).mean(), {f"perceptual_{i}": t.detach() for i, t in enumerate(terms)}
