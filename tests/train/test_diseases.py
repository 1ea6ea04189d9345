"""The doctor on generators and discriminators: its rules alone, and pairs that were made sick on purpose; healthy ones get no finding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sfumato.core.language import translated
from sfumato.core.runlog import read_log
from sfumato.gans.dcgan import DCGANConfig
from sfumato.gans.pair import DiscriminatorConfig, GeneratorConfig
from sfumato.train.doctor import diagnose, facts_of
from sfumato.train.gan import GANRecipe, PenaltyConfig, preset_own, train
from sfumato.train.loop import LoopConfig

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
    (log(looks=[{"diversity": 0.2}] * 2), []),
    (log(looks=[{"diversity": 0.4}] * 3), ["mode-collapse"]),
    (log(looks=[{"diversity": 0.05 + 0.02 * i} for i in range(12)]), []),  # still young
    (log(looks=[{"held_out_score": -0.5}] * 2), ["discriminator-overfits"]),
    (log(looks=[{"held_out_score": 0.5}] * 2), []),
    (log(looks=[{"train_score": 0.02, "held_out_score": 0.005, "drawn_score": 0.0}] * 2), []),
    (log(looks=[{"kid": k} for k in (0.02, 0.001) * 4]), []),
    (log(steps=[{"generator/grad_norm": 1e-3} | SURE] * 6), ["vanishing-gradient"]),
    (log(steps=[{"generator/grad_norm": 1e-3}] * 6), []),
    (log(steps=[SURE] * 6), []),
    (log(steps=[{"discriminator/grad_norm": 200.0}] * 3), ["gradient-explosion"]),
    (log(looks=[{"kid": k} for k in (0.4, 0.8) * 4]), ["oscillation"]),
    (log(looks=[{"kid": k} for k in (0.40, 0.42) * 4]), []),
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


# --- planted --------------------------------------------------------------------------------------------------------------------------------------

LOOP = LoopConfig(
    images=16_000, batch_size=32, lr=1e-3, warmup=320, decay=0.3, weight_decay=0.0, clip=0.0, log_every=320, save_every=16_000, sample_every=2_000,
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 pictures of a disc, a box or a triangle of some colour on another."""
    out, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for i in range(1_000):
        ground, colour = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(2))
        (x, y), (a, b) = rng.uniform(16, 48, 2), rng.uniform(8, 28, 2)
        image = Image.new("RGB", (64, 64), ground)
        draw, box = ImageDraw.Draw(image), (x - a, y - b, x + a, y + b)
        match i % 3:
            case 0:
                draw.ellipse(box, fill=colour)
            case 1:
                draw.rectangle(box, fill=colour)
            case 2:
                draw.polygon([(x - a, y + b), (x + a, y + b), (x, y - b)], fill=colour)
        image.resize((16, 16), Image.Resampling.BOX).save(out / f"{i:04d}.png")
    return out


def pair(pictures: Path, **more: Any) -> GANRecipe:
    made: dict[str, Any] = {"network": DCGANConfig(width=16, most=32, norm="group"), "size": 16}
    generator, discriminator = GeneratorConfig(z=16, **made), DiscriminatorConfig(**made)
    base = GANRecipe(data=str(pictures), labels="none", generator=generator, discriminator=discriminator, loss="non-saturating")
    return replace(base, **{"penalty": PenaltyConfig(r1=1.0)} | more)


def found_in(recipe: GANRecipe, loop: LoopConfig, run: Path) -> tuple[list[str], set[str]]:
    """(what the doctor says in the end, all that it said on the way)."""
    train(recipe, loop, run, text=run)
    lines = read_log(run / "log.jsonl")
    return [f.name for f in diagnose(lines, facts_of(run))], {line["finding"] for line in lines if "finding" in line}


@pytest.mark.slow
def test_a_generator_that_runs_after_a_slow_discriminator_collapses(shapes: Path, tmp_path: Path) -> None:
    sick = pair(shapes, loss="hinge", penalty=PenaltyConfig(), d_lr=0.02)
    assert found_in(sick, replace(LOOP, images=6_400, sample_every=1_600), tmp_path) == (["mode-collapse"], {"mode-collapse"})


def test_sixty_pictures_are_known_by_heart(shapes: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted(shapes.iterdir())[:60]:
        shutil.copy(path, some)
    assert found_in(pair(some), LOOP, tmp_path / "run") == (["discriminator-overfits"], {"discriminator-overfits"})


@pytest.mark.slow
def test_a_healthy_pair_gets_no_finding(shapes: Path, tmp_path: Path) -> None:
    assert found_in(pair(shapes), LOOP, tmp_path) == ([], set())


@pytest.mark.slow
def test_the_default_preset_is_healthy(shapes: Path, tmp_path: Path) -> None:
    recipe, loop = preset_own()
    made: dict[str, Any] = {"network": replace(recipe.generator.network, width=16, most=32), "size": 16}
    recipe = replace(recipe, data=str(shapes), generator=GeneratorConfig(**made), discriminator=DiscriminatorConfig(**made))
    loop = replace(loop, images=16_000, warmup=320, log_every=320, save_every=16_000, sample_every=2_000, device="cpu")
    assert found_in(recipe, loop, tmp_path) == ([], set())


@pytest.mark.slow
def test_the_first_loss_with_five_steps_of_the_discriminator_leaves_no_gradient(shapes: Path, tmp_path: Path) -> None:
    """log(1 - D) of the first paper, and a discriminator that is trained well: what its section 3 warns of."""
    sick = pair(shapes, loss="minimax", penalty=PenaltyConfig(), steps=5, betas=(0.5, 0.999))
    assert found_in(sick, replace(LOOP, lr=2e-4, warmup=0), tmp_path)[0] == ["vanishing-gradient"]


@pytest.mark.slow
def test_scores_without_a_bound_explode(shapes: Path, tmp_path: Path) -> None:
    sick = pair(shapes, loss="wasserstein", penalty=PenaltyConfig(), betas=(0.9, 0.99))
    assert found_in(sick, replace(LOOP, lr=5e-3), tmp_path)[0] == ["gradient-explosion"]


@pytest.mark.slow
def test_momentum_and_a_high_rate_go_in_circles(shapes: Path, tmp_path: Path) -> None:
    """Raw weights: averaged ones hide it. Circles come and go, so that what counts is what was said on the way."""
    sick = pair(shapes, loss="hinge", penalty=PenaltyConfig(), betas=(0.9, 0.99))
    loop = replace(LOOP, lr=5e-3, warmup=0, decay=0.0, ema=0.001, sample_every=800)
    assert found_in(sick, loop, tmp_path)[1] == {"oscillation"}
