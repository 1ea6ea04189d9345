"""The doctor on runs that were made sick on purpose: each gets its disease and no other; healthy ones get none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.apps.cli import main
from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.fsq import FSQConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.core.language import translated
from sfumato.core.runlog import read_log
from sfumato.data.augment import Variety
from sfumato.gans.discriminators import PatchConfig
from sfumato.train.adversary import AdversaryConfig
from sfumato.train.autoencoder import AutoencoderRecipe, AutoencoderTask, train
from sfumato.train.doctor import Finding, diagnose, facts_of
from sfumato.train.loop import Diverged, LoopConfig, Trainer

NET = ConvnetConfig(image_channels=3, patch=2, widths=(32, 32), encoder_blocks=(0, 1), decoder_blocks=(1, 0))
STILL = Variety(place=0.0, scale=(1.0, 1.0), angle=0.0, recolour=0.0)
LOOP = LoopConfig(
    images=6_000, batch_size=40, lr=3e-3, warmup=400, save_every=3_000, sample_every=1_000, log_every=200, device="cpu", weight_decay=0.0
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 smooth pictures: a ramp of one colour into another, in some direction."""
    out = tmp_path_factory.mktemp("ramps")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:16, 0:16] / 15 - 0.5
    for i in range(200):
        angle, (a, b) = rng.uniform(0, 2 * np.pi), rng.uniform(0, 255, (2, 3))
        share = np.clip(0.5 + np.cos(angle) * x + np.sin(angle) * y, 0, 1)[..., None]
        Image.fromarray((a * share + b * (1 - share)).astype(np.uint8)).save(out / f"{i:03d}.png")
    return out


def recipe(pictures: Path, bottleneck: object = None, **more: object) -> AutoencoderRecipe:
    codec = AutoencoderConfig(convnet=NET, bottleneck=bottleneck or VQConfig(size=64, channels=4))  # type: ignore[arg-type]
    base = AutoencoderRecipe(data=str(pictures), codec=codec, size=16, perceptual=0.0, variety=STILL, mixed_channels=0.0)
    return replace(base, **more)  # type: ignore[arg-type]


def found_in(run: Path) -> list[str]:
    return [f.name for f in diagnose(read_log(run / "log.jsonl"), facts_of(run))]


ADVERSARY = AdversaryConfig(weight=0.3, begins=0.1, joins=0.5, discriminator=PatchConfig(width=32, layers=1), lr=2.0)


@pytest.mark.parametrize(
    ("name", "bottleneck", "more"),
    [
        ("vq", None, {}),
        ("vqgan", None, {"adversary": ADVERSARY}),
        ("kl", KLConfig(channels=4), {"kl": 1e-4}),
    ],
)
def test_healthy_runs_get_no_finding(name: str, bottleneck: object, more: dict, pictures: Path, tmp_path: Path) -> None:
    train(recipe(pictures, bottleneck, **more), LOOP, tmp_path)
    assert found_in(tmp_path) == [], (name, read_log(tmp_path / "log.jsonl")[-2:])
    assert not any("finding" in line for line in read_log(tmp_path / "log.jsonl"))


def test_a_discriminator_that_learns_far_too_fast_is_named(pictures: Path, tmp_path: Path) -> None:
    """Nothing else is changed; the healthy run beside it has the same settings. (At 50 times it depends on the processor whether it overshoots.)"""
    train(recipe(pictures, adversary=replace(ADVERSARY, lr=150 * ADVERSARY.lr)), LOOP, tmp_path)
    assert found_in(tmp_path) == ["discriminator-too-fast"]


def test_eight_thousand_codes_for_two_hundred_pictures(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(pictures, VQConfig(size=8192, channels=4)), replace(LOOP, images=1_200, sample_every=400), tmp_path)
    assert found_in(tmp_path) == ["too-many-codes"]
    said = [line for line in read_log(tmp_path / "log.jsonl") if "finding" in line]
    assert len(said) == 1, "each thing is said once"
    assert "8,192 codes for 189 pictures: 0.4 latents a code; what helps: more pictures, or about 128 codes" in said[0]["says"]
    assert "doctor: 8,192 codes" in capsys.readouterr().err
    main(["doctor", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith("too-many-codes: 8,192 codes")
    page = (tmp_path / "doctor.html").read_text()
    assert "<svg" in page
    assert "Codebook" in page
    assert page.count("data:image/png;base64") == 2


def test_nan_is_named_and_a_run_that_may_goes_back(pictures: Path, tmp_path: Path) -> None:
    loop = replace(LOOP, images=1_600, save_every=400, sample_every=400, auto=True)
    task = AutoencoderTask(recipe(pictures, FSQConfig(steps=(4, 4, 4))), 0, auto=True).begin(loop)
    whole, bad = task.batch, {"left": 5}

    def batch(positions: np.ndarray) -> dict:
        made = whole(positions)
        if int(positions[0]) >= 1_000 and bad["left"]:
            bad["left"] -= 1
            made["x"][0, 0, 0, 0] = math.nan
        return made

    task.batch = batch  # type: ignore[method-assign]
    trainer = Trainer(task, loop, tmp_path, task.recipe)
    trainer.train()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["images"] for line in lines if line.get("action") == "rollback"] == [800]
    assert trainer.counters["rollbacks"] == 1
    rates = [line["lr"] for line in lines if "lr" in line and line["images"] == 1_000]
    assert rates[-1] == pytest.approx(loop.lr_at(920) / 2, rel=0.2), "half of what was asked for"
    bad["left"] = 10_000
    again = Trainer(AutoencoderTask(task.recipe, 0).begin(replace(loop, auto=False)), replace(loop, auto=False), tmp_path / "b", task.recipe)
    again.task.batch = batch  # type: ignore[method-assign]
    with pytest.raises(Diverged):
        again.train()
    assert found_in(tmp_path / "b") == ["not-finite"]


def test_steps_that_were_skipped_are_a_finding() -> None:
    facts = {"pictures": 1000, "cells": 64, "codes": 0, "parameters": 1, "values": 768, "images": 100}
    lines = [{"images": 100, "images_per_s": 5.0, "skipped": 4, "loss": 1.0}]
    assert [f.name for f in diagnose(lines, facts)] == ["not-finite"]
    assert diagnose([{**lines[0], "skipped": 1}], facts) == []


def test_equal_pictures_are_the_only_thing_said(tmp_path: Path) -> None:
    folder = tmp_path / "equal"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(np.clip(np.full((16, 16, 3), 120) + rng.integers(0, 2, (16, 16, 3)), 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    train(recipe(folder), replace(LOOP, images=800, sample_every=400), tmp_path / "run")
    assert found_in(tmp_path / "run") == ["equal-data"]


def test_far_too_much_beta_collapses_the_posterior(pictures: Path, tmp_path: Path) -> None:
    net = AutoencoderConfig(convnet=replace(NET, vector=4), bottleneck=KLConfig(channels=16))
    sick = replace(recipe(pictures), codec=net, likelihood=True, kl=500.0)
    train(sick, replace(LOOP, images=2_000), tmp_path)
    assert found_in(tmp_path) == ["posterior-collapse"]


# --- rules alone ------------------------------------------------------------------------------------------------------------------------------------

FACTS = {
    "pictures": 5000,
    "cells": 64,
    "codes": 1024,
    "parameters": 10**6,
    "values": 12288,
    "images": 1000,
    "most": 10.0,
    "blank": 1.0,
    "adversary": True,
    "variety": 0.5,
}
STEP = {
    "images_per_s": 9.0, "skipped": 0, "usage": 0.9, "codec/adaptive": 1.0, "discriminator/real_right": 0.8, "discriminator/fake_right": 0.8,
}  # fmt: skip
LOOK = {"psnr": 25.0, "train_psnr": 26.0, "detail": 0.9}


def log(steps: list[dict] | None = None, looks: list[dict] | None = None) -> list[dict]:
    """Ten lines of steps and five looks, the last of which are as given."""
    s = [STEP] * (10 - len(steps or [])) + [{**STEP, **x} for x in steps or []]
    k = [LOOK] * (5 - len(looks or [])) + [{**LOOK, **x} for x in looks or []]
    return [{**line, "images": 100 * (i + 1)} for i, line in enumerate(s)] + [{**line, "images": 200 * (i + 1)} for i, line in enumerate(k)]


@pytest.mark.parametrize(
    ("lines", "facts", "expected"),
    [
        (log(), {}, []),
        (log(steps=[{"usage": 0.3}, {"usage": 0.3}]), {}, ["dead-codes"]),
        (log(steps=[{"discriminator/real_right": 0.99, "discriminator/fake_right": 0.99}] * 5), {}, ["discriminator-too-strong"]),
        (log(steps=[{"discriminator/real_right": 0.5, "discriminator/fake_right": 0.5}] * 10), {}, ["discriminator-too-weak"]),
        (
            log(steps=[{"discriminator/classification": 2.0, "discriminator/real_right": 0.5, "discriminator/fake_right": 0.5}] * 10),
            {},
            ["discriminator-too-fast"],
        ),
        (log(steps=[{"discriminator/classification": 1.1}] * 10), {}, []),
        (log(steps=[{"codec/adaptive": 10.0}] * 5), {}, ["weight-at-cap"]),
        (log(looks=[{"psnr": 20.0, "train_psnr": 20.5}]), {}, ["collapse"]),
        (log(looks=[{"psnr": 23.0, "train_psnr": 30.0}]), {}, ["overfit"]),
        (log(looks=[{"psnr": 23.0, "train_psnr": 30.0}]), {"pictures": 50, "codes": 64}, ["few-pictures"]),
        (log(looks=[{"detail": 0.2}, {"detail": 0.2}]), {}, ["blurred"]),
        (log(looks=[{"detail": 0.2}]), {"images": 10_000}, []),
    ],
)
def test_each_rule_alone(lines: list[dict], facts: dict, expected: list[str]) -> None:
    assert [f.name for f in diagnose(lines, FACTS | facts)] == expected


@pytest.mark.parametrize("language", ["zh"])
def test_the_doctor_speaks_chinese(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_LANG", language)
    found: list[Finding] = []
    found += diagnose(log(steps=[{"discriminator/real_right": 0.99, "discriminator/fake_right": 0.99, "usage": 0.1}] * 5), FACTS)
    found += diagnose(log(looks=[{"psnr": 23.0, "train_psnr": 30.0}]), FACTS | {"pictures": 50, "codes": 8192})
    found += diagnose(log(looks=[{"psnr": 20.0, "train_psnr": 20.0, "live_channels": 0.0}] * 3), FACTS | {"variety": 0.001})
    assert len(found) >= 3
    for f in found:
        said = translated(f.says)
        assert "有帮助的是" in said
        assert "the " not in said, said


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path)])
    assert "holds no log.jsonl" in capsys.readouterr().err


def test_the_weight_is_lowered_where_remedies_may_act(pictures: Path, tmp_path: Path) -> None:
    task = AutoencoderTask(recipe(pictures, adversary=ADVERSARY), 0, auto=True).begin(LOOP)
    task.doctor.look = lambda _: [{"finding": "weight-at-cap", "says": "x"}]  # type: ignore[method-assign]
    tmp_path.mkdir(exist_ok=True)
    (line,) = task.remarks(tmp_path)
    assert float(task.controls.lowered) == 0.5
    assert "0.5" in line["action"]
    assert torch.equal(task.networks["controls"].state_dict()["lowered"], torch.tensor(0.5)), "a checkpoint holds it"
