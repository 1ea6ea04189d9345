"""How a model's pictures stand to the pictures that it learned from: how far they are from them together, and whether each is a copy of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.core.images import grid, to_pil, to_tensor
from sfumato.core.request import GenerateRequest
from sfumato.metrics.distribution import kernel_distance
from sfumato.metrics.diversity import copied, nearest
from sfumato.metrics.features import picture_features
from sfumato.pipelines.generate import Model

SHOWN = 24


@dataclass(frozen=True)
class Likeness:
    """What was found: figures, the first samples as they came, and beside each the training picture that is nearest to it."""

    figures: dict[str, Any]
    samples: Image.Image
    nearest: Image.Image


def likeness(model: Model, trained: Tensor, unseen: Tensor, requests: Sequence[GenerateRequest], rival: Model | None = None) -> Likeness:
    """Draws the requests and compares them, as EfficientNet-Lite0 sees them, with uint8 "n 4 s s" pictures, premultiplied.

    `distance` is the kernel distance to all the pictures; `rival` draws the same prompts, to compare it with. `nearest` are median cosine
    distances to the training picture that is nearest: of the samples, of training pictures to each other, and of unseen pictures.
    """
    drawn = pixels_of(model, requests)
    looks = {name: picture_features(p) for name, p in (("drawn", drawn), ("trained", trained), ("unseen", unseen)) if len(p)}
    real = torch.cat([looks[k] for k in ("trained", "unseen") if k in looks])
    apart, rows = nearest(looks["drawn"], looks["trained"])
    own = nearest(looks["trained"], looks["trained"], same=True)[0]
    figures: dict[str, Any] = {
        "samples": len(drawn),
        "distance": round(kernel_distance(looks["drawn"], real), 5),
        "nearest": {"samples": _median(apart), "training pictures": _median(own)},
        "copies": round(copied(apart, own), 3),
    }
    if "unseen" in looks:
        figures["nearest"]["unseen pictures"] = _median(nearest(looks["unseen"], looks["trained"])[0])
    if rival is not None:
        theirs = pixels_of(rival, [GenerateRequest(prompt=r.prompt, seed=r.seed, size=rival.size) for r in requests])
        figures[f"distance of {rival.name}"] = round(kernel_distance(picture_features(theirs), real), 5)
    shown, found = (to_pil(p[:SHOWN].float() / 127.5 - 1) for p in (drawn, trained[rows]))
    side = shown[0].size
    pairs = [i.resize(side) if i.size != side else i for pair in zip(shown, found, strict=True) for i in pair]
    return Likeness(figures, grid(shown, columns=8), grid(pairs, columns=8))


def pixels_of(model: Model, requests: Sequence[GenerateRequest]) -> Tensor:
    """What a model draws, uint8 "n 4 s s", premultiplied."""
    drawn = torch.cat([to_tensor(p.image, 4) for p in model.draw(requests)])
    return ((drawn + 1) * 127.5).round().to(torch.uint8)


def _median(x: Tensor) -> float:
    return round(float(x.median()), 4)
