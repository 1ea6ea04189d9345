"""Failed pictures are named, whole ones are not; sharpness and blur tell a soft picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data as photographs

from sfumato.metrics import cost
from sfumato.metrics.stability import Usual, blur, failures, sharpness, spread, spreads


def shot(name: str, radius: float = 0, side: int = 128) -> torch.Tensor:
    image = Image.fromarray(getattr(photographs, name)()).convert("RGB").resize((side, side)).filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


REAL = torch.cat([shot(n) for n in ("astronaut", "coffee", "chelsea", "rocket")])


def test_whole_pictures_have_not_failed_and_failed_ones_have() -> None:
    usual = Usual.of(REAL)
    assert not any(mask.any() for mask in failures(REAL, usual).values())
    broken = shot("coffee")
    broken[..., 5, 5] = float("nan")
    wild = ((shot("coffee") - 0.5) * 50 + 0.5).clamp(0, 1)
    cases = {"not_finite": broken, "blank": torch.full((1, 3, 64, 64), 0.4), "saturated": wild, "blurred": shot("coffee", 6)}
    for kind, x in cases.items():
        found = [k for k, mask in failures(x, usual).items() if mask.any()]
        assert found == [kind]
    line = torch.ones(1, 3, 64, 64)
    line[..., 20:44, 30:33] = 0
    assert not any(mask.any() for mask in failures(line, usual).values()), "black on white is no failure"


def test_softer_pictures_are_less_sharp_and_more_blurred() -> None:
    soft = [torch.cat([shot(n, r) for n in ("astronaut", "coffee")]) for r in (0, 1, 2, 4)]
    for i in range(3):
        assert bool((sharpness(soft[i]) > sharpness(soft[i + 1])).all())
        assert bool((blur(soft[i]) < blur(soft[i + 1])).all())
    assert float(blur(soft[0]).min()) >= 0
    assert float(blur(soft[3]).max()) <= 1
    assert torch.allclose(blur(soft[1]), blur(soft[1] * 0.5), atol=1e-6), "it must not depend on contrast"


def test_spreads() -> None:
    assert spread([1.0, 3.0]) == pytest.approx({"mean": 2, "std": 2**0.5, "min": 1, "max": 3, "relative": 2**0.5 / 2})
    assert spreads([{"a": 1, "b": "x", "c": 2.0}, {"a": 3, "c": 2.0}]) == {"a": spread([1, 3]), "c": spread([2, 2])}


def test_cost_counts_operations_and_says_what_is_real_time() -> None:
    a, b = torch.zeros(8, 16), torch.zeros(16, 4)
    assert cost.flops(lambda: a @ b) == 2 * 8 * 16 * 4
    q = torch.zeros(1, 2, 70, 16)
    attention = cost.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == 2 * 2 * 2 * 70 * 70 * 16, "that of the CPU's fused kernel counts too"
    assert cost.parameters({"x": torch.nn.Linear(3, 4)}) == {"x": 16}
    found = cost.latency(lambda: None, repeats=5)
    assert 0 <= found["median_s"] <= found["p95_s"]
    assert cost.pace(0.01)["real_time"]
    assert not cost.pace(0.09)["real_time"]
    assert "at once" in cost.pace(0.09)["said"]
    assert cost.pace(2)["said"].startswith("not real-time: 0.5 pictures a second")
