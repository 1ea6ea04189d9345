"""Features of pictures, by which they are compared: EfficientNet-Lite0 (arXiv 1905.11946, without squeeze and swish), trained on ImageNet."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sfumato.core.language import translated
from sfumato.nn.backbones import efficientnet_lite0, over

SIDE = 128  # pixels at which pictures are looked at, whatever they have


def picture_features(pixels: UInt8[Tensor, "n 4 s s"]) -> Float[Tensor, "n 1280"]:
    """Lite0 features of premultiplied RGBA over white; smaller and larger pictures are resized bilinearly to SIDE pixels."""
    network, rows = efficientnet_lite0(), []
    for part in tqdm(pixels.split(64), desc=translated("features of the pictures"), leave=False):
        flat = over(part.float() / 255) * 2 - 1
        if flat.shape[-1] != SIDE:
            flat = F.interpolate(flat, size=(SIDE, SIDE), mode="bilinear", antialias=flat.shape[-1] > SIDE, align_corners=False)
        with torch.no_grad():
            rows.append(network.pooled(flat))
    return torch.cat(rows)
