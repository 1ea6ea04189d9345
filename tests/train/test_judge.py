"""The judge learns from what generators learn from, tells classes and styles apart, and is resumed exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.apps.cli import main
from sfumato.core.checkpoint import FileError
from sfumato.data.emoji import drawable
from sfumato.metrics.judge import JudgeConfig, JudgeNet
from sfumato.nn.backbones import over
from sfumato.pipelines.load import load_judge
from sfumato.train.judge import JudgeRecipe, JudgeTask, preset_smoke, train
from sfumato.train.loop import checkpoints

RECIPE, LOOP = preset_smoke()
LOOP = replace(LOOP, device="cpu", threads=1)


def test_batches_are_functions_of_their_positions_and_see_training_pairs_only() -> None:
    task = JudgeTask(RECIPE, 0)
    assert not task.shown.art.held_out.any()  # type: ignore[attr-defined]
    assert len(task.apart.pixels)
    x, again = task.batch(np.arange(3, 7)), task.batch(np.arange(5, 6))
    assert x["x"].shape == (4, 3, 64, 64)
    assert x["x"].abs().max() <= 1
    torch.testing.assert_close(x["x"][2:3], again["x"], atol=1e-5, rtol=0)


def test_it_learns_two_classes_of_one_s_own_and_says_what_it_sees(own_folder: Path, tmp_path: Path) -> None:
    """Discs and squares: far above chance after 640 pictures, on pictures that it never saw too."""
    torch.set_num_threads(1)
    recipe = replace(RECIPE, data=str(own_folder), limit=0)
    loop = replace(LOOP, images=1_280, batch_size=32, lr=2e-3, warmup=64, ema=0.01)
    train(recipe, loop, tmp_path / "run")
    judge = load_judge(tmp_path / "run")
    assert (judge.labels, judge.styles) == (["circle", "square"], [])
    assert judge.images == 1_280
    task = JudgeTask(recipe, 0)
    rows = np.arange(len(task.shown.pixels))
    pictures = over(task.shown.pixels[torch.from_numpy(rows)].float() / 255)
    label, style = judge(pictures)
    assert style.shape == (len(rows), 0)
    assert float((label.argmax(1).numpy() == task.shown.label).mean()) > 0.85


def test_n_steps_are_k_steps_and_the_rest(own_folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    loop = replace(LOOP, save_every=48)
    train(RECIPE, loop, tmp_path / "whole")
    train(RECIPE, loop, tmp_path / "run", stop_at=48)
    train(RECIPE, loop, tmp_path / "run")
    a, b = (checkpoints(tmp_path / name, "model")[-1] for name in ("whole", "run"))
    assert load_judge(a).digest == load_judge(b).digest


def test_the_full_judge_has_two_to_three_million_parameters() -> None:
    assert 2e6 < sum(p.numel() for p in JudgeNet(JudgeConfig(labels=len(drawable()), styles=6)).parameters()) < 3e6


def test_without_classes_there_is_nothing_to_judge(own_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two labels or two styles"):
        JudgeTask(JudgeRecipe(data=str(own_folder / "circle")), 0)
    with pytest.raises(FileError, match="holds no judge"):
        load_judge("emoji")


def test_an_evaluation_asks_it(smoke: Path, own_folder: Path, tmp_path: Path) -> None:
    main(["train", "judge", "--preset", "smoke", "--out", str(tmp_path / "judge"), "--device", "cpu"])
    model = str(checkpoints(smoke / "diffusion", "model")[-1])
    argv = ["evaluate", model, "--reference", "emoji", "--count", "12", "--steps", "1", "--metrics", "text", "--judge", str(tmp_path / "judge")]
    main([*argv, "--out", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    found = {f["name"]: f for f in report["figures"]}
    assert {"label as asked, by the judge", "style as asked, by the judge", "style as asked"} <= set(found)
    assert "of the reference pictures themselves" in found["style as asked, by the judge"]["how"]
    assert 0 <= found["style as asked, by the judge"]["value"] <= 1
