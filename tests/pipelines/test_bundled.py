"""The model that comes with the package, as it is shipped."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import sfumato
from sfumato.apps.cli import main
from sfumato.pipelines.find import bundled
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.text.words import spell_emoji

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return sfumato.load(device="cpu")


def recalled(model: LatentDiffusion, prompts: list[str]) -> list[list[str]]:
    """The English names of the five things whose memory each prompt recalls most."""
    names = [entry["en"][0] for entry in model.meta["words"].values()]
    assert model.text is not None
    pooled = model.text.encode([spell_emoji(p, model.emoji) for p in prompts])[2]
    nearness = F.normalize(pooled, dim=-1) @ F.normalize(model.denoiser.memory.keys, dim=-1).T  # type: ignore[union-attr, arg-type]
    return [[names[i] for i in row] for row in nearness.topk(5).indices.tolist()]


def test_the_files_are_small_enough_to_be_cloned() -> None:
    sizes = [p.stat().st_size for p in bundled().values()]
    assert sizes
    assert max(sizes) <= 24_000_000
    assert sum(sizes) <= 40_000_000


def test_the_model_card_is_of_this_file(model: LatentDiffusion) -> None:
    card = (ROOT / "sfumato" / "bundled" / "MODEL_CARD.md").read_text()
    assert model.meta["hash"] in card
    assert str(model.upscaler_hash) in card
    assert all(c["licence"] in card for c in model.meta["credits"])


def test_words_for_one_thing_recall_one_thing(model: LatentDiffusion) -> None:
    for first, *_ in recalled(model, ["a cat", "kitty", "猫", "一只猫", "🐱", "🐈"]):
        assert first in ("cat", "cat face")
    for first, *_ in recalled(model, ["a fox", "狐狸", "一只狐狸在花园里", "a blue fox in the snow", "🦊"]):
        assert first == "fox"


@pytest.mark.parametrize("what", ["en", "zh", "zh-hant", "emoji"])
def test_every_thing_is_found_by_its_names_and_its_emoji(model: LatentDiffusion, what: str) -> None:
    entries = list(model.meta["words"].values())
    found = recalled(model, [e[what][0] or e["en"][0] for e in entries])
    first = np.mean([f[0] == e["en"][0] for f, e in zip(found, entries, strict=True)])
    assert first > 0.93, f"{first:.3f} at rank 1"


def mean_colour(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image).astype(float)
    return (rgba[..., :3] * rgba[..., 3:]).sum((0, 1)) / rgba[..., 3].sum()


def test_it_draws_stickers_in_the_colours_of_things(model: LatentDiffusion) -> None:
    prompts = {"a red apple": 0, "a frog": 1, "一只青蛙": 1, "a blue whale": 2}
    for prompt, channel in prompts.items():
        images = model.generate(prompt, seed=1, count=4, style="noto")
        assert all(i.size == (256, 256) and i.mode == "RGBA" for i in images)
        corners = [i.getpixel(at)[3] for i in images for at in ((0, 0), (255, 0))]  # type: ignore[index]
        assert np.mean(corners) < 64, "a sticker has transparency around it"
        assert np.mean([mean_colour(i) for i in images], axis=0).argmax() == channel, prompt


def test_the_enlargement_is_of_the_same_picture_and_may_be_left_out(model: LatentDiffusion) -> None:
    large, small = (model.generate("a red apple", seed=1, style="noto", size=size)[0] for size in (None, 64))
    assert (large.size, small.size) == ((256, 256), (64, 64))
    again = np.asarray(large.convert("RGBa").resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert np.sqrt(np.square(again - np.asarray(small.convert("RGBa"), dtype=float)).mean()) < 8


def test_scenes_are_opaque(model: LatentDiffusion) -> None:
    image = model.generate("a cat in the snow", seed=2, style="twemoji")[0]
    assert np.asarray(image)[..., 3].mean() > 240


def test_another_batch_size_gives_the_same_pictures(model: LatentDiffusion) -> None:
    together = model.generate("a cat", seed=7, count=3, style="noto", steps=8)
    alone = model.generate("a cat", seed=9, style="noto", steps=8)
    assert np.abs(np.asarray(together[2]).astype(int) - np.asarray(alone[0])).max() <= 1


def test_what_make_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The line of the Makefile, word for word."""
    makefile = (ROOT / "Makefile").read_text()
    sheet = re.search(r"^SHEET = (.*)$", makefile, re.MULTILINE)
    line = re.search(r"^demo:.*\n\t@\.venv/bin/sfumato (generate .*)$", makefile, re.MULTILINE)
    assert sheet is not None
    assert line is not None
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    main(shlex.split(line[1].replace("$(SHEET)", sheet[1])))
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.strip() == sheet[1]
    with Image.open(tmp_path / sheet[1]) as image:
        assert image.width > 6 * 128
        assert image.height > 4 * 128
