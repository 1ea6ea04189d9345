from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.core.checkpoint import FileError, load_tensors
from sfumato.core.config import from_json, to_json
from sfumato.core.runlog import read_log
from sfumato.data.emoji import STYLES, concepts, credits, is_held_out
from sfumato.diffusion.dit import DiTConfig
from sfumato.pipelines.load import load
from sfumato.train.conditioned import CLOSE
from sfumato.train.diffusion import PRESETS, DiffusionRecipe, DiffusionTask, preset_smoke, train
from sfumato.train.loop import LoopConfig, checkpoints


@pytest.fixture(scope="module")
def task(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> DiffusionTask:
    return DiffusionTask(preset_smoke()[0], 0, smoke / "codec", smoke / "text", tmp_path_factory.mktemp("run"))


def test_no_held_out_pair_is_ever_encoded(task: DiffusionTask) -> None:
    for c, s in zip(task.shown.art.concept, task.shown.art.style, strict=True):
        assert not is_held_out(concepts()[c].hexcode, STYLES[s])
    used = {i.drawing for n in range(len(task.latents)) for i in task.scene(n).items}
    assert max(used) < len(task.shown.pixels)


def test_latents_are_standardised(task: DiffusionTask) -> None:
    live = task.latents.float()[:, torch.tensor(task.codec.spec.std) > 0]
    assert abs(float(live.mean())) < 0.2
    assert 0.8 < float(live.std()) < 1.2


def test_batches_are_a_pure_function_of_the_position(task: DiffusionTask) -> None:
    whole = task.batch(np.arange(24))
    parts = [task.batch(np.arange(s, s + 6)) for s in range(0, 24, 6)]
    for key in ("x0", "noise", "style", "t", "no_text", "no_style"):
        assert torch.equal(whole[key], torch.cat([p[key] for p in parts]))


def test_styles_are_balanced(task: DiffusionTask) -> None:
    style = task.batch(np.arange(60))["style"]
    assert style.sum(0).tolist() == [10.0] * 6


def test_latent_style_and_caption_belong_together(task: DiffusionTask) -> None:
    """The latents of a batch are those of a drawing in the style that the batch names."""
    batch = task.batch(np.arange(30))
    for x0, style in zip(batch["x0"], batch["style"], strict=True):
        index = next(i for i, z in enumerate(task.latents) if torch.equal(z.float(), x0))
        assert int(style.argmax()) == task.shown.style[index // task.recipe.each]


def test_conditions_are_dropped_as_often_as_asked(task: DiffusionTask) -> None:
    batch = task.batch(np.arange(3000))
    text, style = batch["no_text"].float(), batch["no_style"].float()
    assert abs(float(text.mean()) - 0.127) < 0.025
    assert abs(float((text * style).mean()) - (0.03 + 0.97 * 0.01)) < 0.015


def test_training_learns_and_shows(smoke: Path) -> None:
    log = read_log(smoke / "diffusion" / "log.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert any("validation_loss" in line for line in log)
    pictures = sorted((smoke / "diffusion" / "samples").glob("*.png"))
    assert len(pictures) == 2
    assert Image.open(pictures[-1]).getbbox() is not None


def test_resume_is_exact_and_the_run_can_be_moved(smoke: Path, tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    parts = {"codec": smoke / "codec", "text": smoke / "text"}
    train(recipe, loop, tmp_path / "parts", **parts, stop_at=320)
    shutil.move(tmp_path / "parts", tmp_path / "moved")
    nowhere = dict.fromkeys(parts, tmp_path / "nowhere")
    train(recipe, loop, tmp_path / "moved", **nowhere)
    whole, moved = (load_tensors(checkpoints(r, "state")[-1])[0] for r in (smoke / "diffusion", tmp_path / "moved"))
    assert whole.keys() == moved.keys()
    assert all(torch.equal(whole[k], moved[k]) for k in whole)


def test_parts_that_do_not_fit_are_refused(smoke: Path, tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    wide = replace(recipe, denoiser=replace(recipe.denoiser, channels=8))
    with pytest.raises(ValueError, match=r"channels \(=8\)"):
        train(wide, loop, tmp_path / "a", codec=smoke / "codec", text=smoke / "text")
    with pytest.raises(ValueError, match=r"text_width \(=16\)"):
        train(replace(recipe, denoiser=replace(recipe.denoiser, text_width=16)), loop, tmp_path / "b", codec=smoke / "codec", text=smoke / "text")
    with pytest.raises(FileError, match="no codec"):
        train(recipe, loop, tmp_path / "c", codec=smoke / "text", text=smoke / "text")
    with pytest.raises(FileError, match="no model"):
        train(recipe, loop, tmp_path / "d", codec=tmp_path, text=smoke / "text")


def test_recipes_round_trip() -> None:
    for preset in PRESETS.values():
        assert from_json(DiffusionRecipe, to_json(preset()[0])) == preset()[0]
    assert isinstance(preset_smoke()[0].denoiser, DiTConfig)


def test_labels_instead_of_captions(smoke: Path, tmp_path: Path) -> None:
    """A model without captions: no text encoder in its pack, drawn by label or by nothing at all."""
    import sfumato

    recipe, loop = preset_smoke()
    recipe = replace(recipe, labels="concept", denoiser=replace(recipe.denoiser, text_width=0))
    train(recipe, loop, tmp_path, codec=smoke / "codec", text=tmp_path / "nowhere")
    model = sfumato.load(tmp_path, device="cpu")
    assert model.text is None
    assert len(model.meta["labels"]) == 12
    a, b = (np.asarray(model.generate(label=lab, style="noto", seed=1, guidance=8.0)[0]).astype(int) for lab in (model.meta["labels"][0], None))
    assert np.abs(a - b).max() >= 1
    with pytest.raises(ValueError, match="without captions"):
        model.generate("a cat")
    with pytest.raises(ValueError, match="did you mean 'grinning face'"):
        model.generate(label="grining face")


def test_the_codec_is_measured_once(smoke: Path, task: DiffusionTask, tmp_path: Path) -> None:
    """The run's copy of the codec carries the statistics, so that a resume on another machine does not measure others."""
    recipe, _ = preset_smoke()
    first = DiffusionTask(recipe, 0, smoke / "codec", smoke / "text", tmp_path)
    again = DiffusionTask(recipe, 0, tmp_path / "nowhere", tmp_path / "nowhere", tmp_path)
    assert torch.equal(first.codec.latent_std, again.codec.latent_std)
    assert load_tensors(tmp_path / "parts" / "codec.safetensors")[1]["measured"] is True
    assert torch.equal(first.latents, again.latents)


def test_a_run_refuses_another_codec_than_it_was_begun_with(smoke: Path, tmp_path: Path) -> None:
    from sfumato.train import autoencoder

    recipe, loop = preset_smoke()
    train(recipe, loop, tmp_path / "run", codec=smoke / "codec", text=smoke / "text", stop_at=320)
    other, its_loop = autoencoder.preset_smoke()
    autoencoder.train(other, replace(its_loop, seed=1, images=320), tmp_path / "codec")
    with pytest.raises(ValueError, match="begun with another codec"):
        train(recipe, loop, tmp_path / "run", codec=tmp_path / "codec", text=smoke / "text")
    train(recipe, loop, tmp_path / "run", codec=tmp_path / "run" / "parts" / "codec.safetensors", text=smoke / "text")


def test_packed_files_serve_as_parts(smoke: Path, tmp_path: Path) -> None:
    from sfumato.apps.cli import main

    main(["pack", str(smoke / "diffusion"), "--out", str(tmp_path / "packed.safetensors")])
    recipe, loop = preset_smoke()
    both = {"codec": tmp_path / "packed.safetensors", "text": tmp_path / "packed.safetensors"}
    train(recipe, replace(loop, images=64, sample_every=64, save_every=64), tmp_path / "run", **both)
    assert checkpoints(tmp_path / "run", "model")


def test_a_memory_starts_at_the_names_and_is_packed(smoke: Path, tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    trainer = train(replace(recipe, memory=True), replace(loop, images=64), tmp_path / "run", codec=smoke / "codec", text=smoke / "text")
    assert trainer.task.net.memory == len(trainer.task.shown.known) == 12
    tensors, meta = load_tensors(checkpoints(tmp_path / "run", "model")[-1])
    assert meta["denoiser"]["memory"] == 12
    names = trainer.task.text.encode([c.names["zh"] for c in trainer.task.shown.known])[2]
    near = torch.nn.functional.cosine_similarity(tensors["denoiser.memory.keys"], names)
    assert float(near.min()) > 0.5
    model = load(checkpoints(tmp_path / "run", "model")[-1])
    assert len(model.generate("猫", steps=2, seed=0)) == 1


def test_a_memory_needs_captions() -> None:
    with pytest.raises(ValueError, match=r"memory .*text_width"):
        DiffusionRecipe(denoiser=DiTConfig(text_width=0), memory=True)


def test_a_denoiser_may_begin_from_another(smoke: Path, tmp_path: Path) -> None:
    """It begins where the other ended, every weight may learn, and another shape is refused."""
    recipe, loop = preset_smoke()
    pack = checkpoints(smoke / "diffusion", "model")[-1]
    begun = replace(recipe, init=str(smoke / "diffusion"))
    network = DiffusionTask(begun, 0, smoke / "codec", smoke / "text", tmp_path / "a").networks["denoiser"]
    weights = load_tensors(pack)[0]
    assert all(torch.equal(weights[f"denoiser.{k}"], v) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())
    trainer = train(begun, replace(loop, images=64), tmp_path / "b", codec=smoke / "codec", text=smoke / "text")
    assert any(not torch.equal(weights[f"denoiser.{k}"], v) for k, v in trainer.task.networks["denoiser"].state_dict().items())
    wider = replace(begun, denoiser=replace(recipe.denoiser, depth=3))
    with pytest.raises(ValueError, match="must hold a denoiser of the recipe's shape"):
        DiffusionTask(wider, 0, smoke / "codec", smoke / "text", tmp_path / "c")


# --- one's own pictures ---------------------------------------------------------------------------------------------------------------------------


def own(folder: Path, **more: object) -> tuple[DiffusionRecipe, LoopConfig]:
    recipe, loop = preset_smoke()
    return replace(recipe, data=str(folder), limit=0, labels="auto", variety=CLOSE, **more), replace(loop, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["own_folder", "own_shards"])
def test_a_denoiser_of_ones_own_pictures_learns_and_goes_on_bit_for_bit(
    where: str, request: pytest.FixtureRequest, smoke: Path, tmp_path: Path
) -> None:
    recipe, loop = own(request.getfixturevalue(where), memory=True)
    parts = {"codec": smoke / "codec", "text": smoke / "text"}
    trainer = train(recipe, loop, tmp_path / "whole", **parts)
    train(recipe, loop, tmp_path / "halves", stop_at=320, **parts)
    train(recipe, loop, tmp_path / "halves", **parts)
    a, b = (load_tensors(checkpoints(tmp_path / name, "state")[-1])[0] for name in ("whole", "halves"))
    assert all(torch.equal(a[k], v) for k, v in b.items())
    scores = [line["validation_loss"] for line in read_log(tmp_path / "whole" / "log.jsonl") if "validation_loss" in line]
    assert scores[-1] < scores[0]
    assert (trainer.task.net.styles, trainer.task.net.labels) == (0, 2)
    said = trainer.task.shown.source.words
    assert trainer.task.net.memory == len({said(i)[0] for i in range(trainer.task.shown.source.count)})
    model = load(tmp_path / "whole")
    assert model.meta["labels"] == ["circle", "square"]
    assert model.unknown("a red square") == []
    assert [w for w, _ in model.unknown("a red zebra")] == ["zebra"]
    assert len(model.generate("a red square", label="square", steps=2, count=2)) == 2


def test_without_captions_it_draws_with_no_prompt(own_folder: Path, smoke: Path, tmp_path: Path) -> None:
    for text in own_folder.rglob("*.txt"):
        text.unlink()
    recipe, loop = own(own_folder)
    train(recipe, replace(loop, images=64, sample_every=64, save_every=64), tmp_path / "run", codec=smoke / "codec", text=tmp_path / "nowhere")
    task = DiffusionTask(recipe, 0, smoke / "codec", tmp_path / "nowhere", tmp_path / "run")
    network = task.networks["denoiser"]
    for p in network.parameters():
        p.data += torch.randn_like(p) * 0.02 * (not p.any())  # what starts at zero lets no gradient through
    loss, _ = task.loss(task.networks, task.batch(np.arange(64)), 0.0)
    loss.backward()
    assert bool((network.label.weight.grad.abs().sum(1) > 0).all()), "each class, and none, is learned"
    model = load(tmp_path / "run")
    assert model.text is None
    assert len(model.generate(label="circle", steps=2)) == 1
    with pytest.raises(ValueError, match="trained without captions"):
        model.generate("a circle", steps=2)


def test_own_pictures_begin_with_every_weight_that_fits(own_folder: Path, smoke: Path, tmp_path: Path) -> None:
    begun, _ = own(own_folder, init=str(smoke / "diffusion"))
    task = DiffusionTask(begun, 0, smoke / "codec", smoke / "text", tmp_path / "a")
    weights = load_tensors(checkpoints(smoke / "diffusion", "model")[-1])[0]
    network = task.networks["denoiser"].state_dict()
    same = {k for k, v in network.items() if f"denoiser.{k}" in weights and torch.equal(weights[f"denoiser.{k}"], v)}
    assert set(network) - same == {"label.weight"}
    assert all(p.requires_grad for p in task.networks["denoiser"].parameters())
    inherited = {c["attribution"] for c in task.pack(task.networks)[1]["credits"]}
    assert len(inherited) == 1 + len({c["attribution"] for c in credits()})
    wider = replace(begun, denoiser=replace(begun.denoiser, width=48))
    with pytest.raises(ValueError, match="must hold a denoiser of the recipe's shape"):
        DiffusionTask(wider, 0, smoke / "codec", smoke / "text", tmp_path / "b")


def test_captions_that_changed_are_noticed(own_folder: Path, smoke: Path, tmp_path: Path) -> None:
    recipe, loop = own(own_folder)
    train(recipe, loop, tmp_path / "run", codec=smoke / "codec", text=smoke / "text", stop_at=32)
    for text in own_folder.rglob("*.txt"):
        text.write_text("a thing")
    with pytest.raises(ValueError, match=r"captions or labels of .* have changed since"):
        train(recipe, loop, tmp_path / "run", codec=smoke / "codec", text=smoke / "text")
