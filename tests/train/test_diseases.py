"""The doctor's rules for generators and discriminators: each disease is named alone, healthy logs give none, and it speaks Chinese."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.core.language import translated
from sfumato.train.doctor import diagnose

FACTS = {"kind": "gan", "images": 16_000, "pictures": 500, "variety": 0.3}


def log(looks: list[dict[str, float]] | None = None, steps: list[dict[str, float]] | None = None) -> list[dict[str, Any]]:
    """A healthy run of twelve looks, whose last ones, and last steps, have these values."""
    lines: list[dict[str, Any]] = []
    n = 12
    for i in range(n):
        look = {
            "kid": 1.0 - 0.06 * i,
            "diversity": 0.6 + 0.02 * i,
            "train_score": 1.0,
            "held_out_score": 0.9,
            "drawn_score": -1.0,
            "train_spread": 0.5,
        }
        step = {"discriminator/real_right": 0.8, "discriminator/fake_right": 0.8, "generator/grad_norm": 1.0, "discriminator/grad_norm": 1.0,
                "images_per_s": 100.0, "skipped": 0}  # fmt: skip
        look |= (looks or [])[i - n] if looks and i - n >= -len(looks) else {}
        step |= (steps or [])[i - n] if steps and i - n >= -len(steps) else {}
        lines += [step | {"images": 1000 * i + 900}, look | {"images": 1000 * i + 1000}]
    return lines


SURE = {"discriminator/real_right": 1.0, "discriminator/fake_right": 1.0}
CASES = [
    (log(), []),
    (log(looks=[{"diversity": 0.2}] * 3), ["mode-collapse"]),
    (log(looks=[{"diversity": 0.2}]), []),
    (log(looks=[{"diversity": 0.4}] * 2), ["mode-collapse"]),
    (log(looks=[{"held_out_score": -0.5}] * 2), ["discriminator-overfits"]),
    (log(looks=[{"held_out_score": 0.5}] * 2), []),
    (log(looks=[{"train_score": 0.02, "held_out_score": 0.005, "drawn_score": 0.0}] * 2), []),
    (log(looks=[{"kid": k} for k in (0.02, 0.001, 0.02, 0.001, 0.02, 0.001)]), []),
    (log(steps=[{"generator/grad_norm": 1e-3} | SURE] * 6), ["vanishing-gradient"]),
    (log(steps=[{"generator/grad_norm": 1e-3}] * 6), []),
    (log(steps=[SURE] * 6), []),
    (log(steps=[{"discriminator/grad_norm": 200.0}] * 3), ["gradient-explosion"]),
    (log(looks=[{"kid": k} for k in (0.2, 0.9, 0.2, 0.9, 0.2, 0.9)]), ["oscillation"]),
    (log(looks=[{"kid": k} for k in (0.40, 0.42, 0.40, 0.42, 0.40, 0.42)]), []),
    (log(steps=[{"skipped": 7}]), ["not-finite"]),
    (log(looks=[{"diversity": 0.1}] * 3, steps=[{"skipped": 7}]), ["not-finite"]),
]


@pytest.mark.parametrize(("lines", "expected"), CASES)
def test_each_rule_alone(lines: list[dict[str, Any]], expected: list[str]) -> None:
    assert [f.name for f in diagnose(lines, FACTS)] == expected


def test_the_doctor_of_pairs_speaks_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_LANG", "zh")
    found = [f for lines, _ in CASES for f in diagnose(lines, FACTS)]
    assert {f.name for f in found} >= {"mode-collapse", "discriminator-overfits", "vanishing-gradient", "gradient-explosion", "oscillation"}
    for f in found:
        assert "有帮助的是" in translated(f.says), f.says
        assert "the " not in translated(f.says)
