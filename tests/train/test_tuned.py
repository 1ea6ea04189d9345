"""Fine-tuning: LoRA, learned words, all weights; of our own models and of checkpoints of Stable Diffusion."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.apps.cli import main
from sfumato.convert.header import read_header
from sfumato.convert.kohya import read_embedding, read_lora
from sfumato.core.checkpoint import FileError, read_metadata, thousands
from sfumato.core.config import from_json, to_json
from sfumato.core.images import grid
from sfumato.core.request import GenerateRequest
from sfumato.core.runlog import read_log
from sfumato.nn.lora import merge
from sfumato.pipelines.find import named_file
from sfumato.pipelines.generate import Row
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.pipelines.load import load
from sfumato.train import embedding, finetune, lora
from sfumato.train.loop import LoopConfig
from sfumato.train.tuned import Tuned

LOOP = LoopConfig(images=16, batch_size=4, warmup=0, lr=1e-3, decay=0.0, save_every=8, sample_every=16, log_every=4, weight_decay=0.0, device="cpu")
KINDS: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "lora": (lora.train, lora.LoraRecipe, {"rank": 2, "layers": "all", "text": True}),
    "embedding": (embedding.train, embedding.EmbeddingRecipe, {"word": "zkq", "like": "a cat", "prompt": "{} zkq", "vectors": 2}),
    "finetune": (finetune.train, finetune.FinetuneRecipe, {"text": True}),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of two shapes with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        rng = np.random.default_rng(i)
        size = (48, 80) if i % 2 else (64, 64)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).resize((size[0] * 2, size[1] * 2)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"thing {i}", encoding="utf-8")
    return folder


@pytest.fixture(params=["own", "stable"])
def base(request: pytest.FixtureRequest, smoke: Path, stable: Path) -> dict[str, Any]:
    """What a recipe says of each kind of model."""
    return {"base": str(smoke / "diffusion")} if request.param == "own" else {"base": str(stable / "sd15.safetensors"), "size": 64, "bucket": 32}


def fit(kind: str, base: dict[str, Any], photos: Path, out: Path, loop: LoopConfig = LOOP, stop_at: int | None = None, **more: Any) -> Any:
    go, recipe, usual = KINDS[kind]
    return go(recipe(**usual | {"data": str(photos), "previews": ("thing zkq",)} | base | more), loop, out, stop_at=stop_at)


def drawn(base: dict[str, Any], model: str | Path | None = None, **more: Any) -> np.ndarray:
    found = load(model or base["base"], device="cpu")
    sized = {"width": 64, "height": 64} if found.sized else {"size": found.size}
    return np.asarray(found.generate("thing zkq", seed=1, steps=2, **sized, **more)[0]).astype(int)


# --- what is learned ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_changes_nothing(kind: str, base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    """20 steps == 10 + resume + 10, bit for bit; and what is learned is not what was there before."""
    fit(kind, base, photos, tmp_path / "whole")
    fit(kind, base, photos, tmp_path / "halves", stop_at=8)
    fit(kind, base, photos, tmp_path / "halves")
    whole, halves = (load_file(tmp_path / n / "state-000000.016k.safetensors") for n in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    first = load_file(tmp_path / "whole" / "state-000000.008k.safetensors")
    assert any(not torch.equal(whole[k], first[k]) for k in whole if k.startswith("raw."))
    assert (tmp_path / "whole" / "samples" / "000000.016k.png").exists()
    log = [line for line in read_log(tmp_path / "whole" / "log.jsonl") if "validation_loss" in line]
    assert len(log) == 1
    assert np.isfinite(log[0]["validation_loss"])


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_what_is_learned_is_one_file_that_a_request_names(kind: str, base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    trainer = fit(kind, base, photos, tmp_path / "run", replace(LOOP, lr=0.05))
    more = {"lora" if kind == "lora" else "embedding": (str(tmp_path / "run"),)}
    before, after = drawn(base), drawn(base, **more)
    assert np.abs(before - after).max() > 1
    assert np.array_equal(drawn(base), before), "and the model is as it was"
    model = trainer.task.used(trainer.averages)  # as the training itself draws with it
    sized = {"width": 64, "height": 64} if model.sized else {"size": model.size}
    live = np.asarray(model.generate("thing zkq", seed=1, steps=2, **sized)[0]).astype(int)
    assert np.abs(live - after).max() <= 1


def test_a_lora_has_the_names_and_ranks_that_were_asked_for(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    fit("lora", base, photos, tmp_path / "run", rank=3, alpha=6.0, layers="attention", text=False)
    found = read_lora(tmp_path / "run" / "model-000000.016k.safetensors", load(base["base"], device="cpu").networks)  # type: ignore[attr-defined]
    (network,) = found.changes
    assert network in ("unet", "denoiser")
    assert found.rank == 3
    assert {d.scale for d in found.changes[network].values()} == {2.0}
    assert all("attn" in k or "attention" in k or "cross" in k for k in found.changes[network])
    said = read_metadata(tmp_path / "run" / "model-000000.016k.safetensors")
    assert (said["kind"], said["base"], said["ss_network_dim"]) == ("lora", base["base"], 3)


def test_a_word_begins_as_what_it_is_like(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    trainer = fit("embedding", base, photos, tmp_path / "run", stop_at=4)
    listener = trainer.task.model.listeners[0]
    table, ids = listener.known("a cat")
    wanted = table[torch.tensor([ids[i % len(ids)] for i in range(2)])]
    assert float((trainer.task.networks["word"].vectors[0].detach() - wanted).abs().max()) <= 1.1e-3, "one step of Adam at most"
    assert list(read_embedding(tmp_path / "run" / "model-000000.004k.safetensors")) == ["zkq"]


def test_a_model_of_which_all_is_learned_draws(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    trainer = fit("finetune", base, photos, tmp_path / "run", replace(LOOP, lr=0.01))
    before, after = drawn(base), drawn(base, tmp_path / "run")
    assert np.abs(before - after).max() > 1
    model = trainer.task.used(trainer.averages)
    sized = {"width": 64, "height": 64} if model.sized else {"size": model.size}
    live = np.asarray(model.generate("thing zkq", seed=1, steps=2, **sized)[0]).astype(int)
    assert np.abs(live - after).max() <= 1


def test_the_loss_falls(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    fit("lora", base, photos, tmp_path / "run", replace(LOOP, images=240, batch_size=8, lr=5e-3, sample_every=240, save_every=240), rank=8)
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])


# --- pictures and what is said of them ------------------------------------------------------------------------------------------------------------


def task(photos: Path, out: Path, base: dict[str, Any], batch: int = 4, **more: Any) -> lora.LoraTask:
    return lora.LoraTask(lora.LoraRecipe(**{"data": str(photos), "rank": 2} | base | more), 0, batch, out)


def test_batches_are_of_one_size_and_a_pure_function_of_the_position(stable: Path, photos: Path, tmp_path: Path) -> None:
    made = task(photos, tmp_path, {"base": str(stable / "sd15.safetensors"), "size": 64, "bucket": 16}, flip=True)
    assert len(made.sizes) == 2
    shapes = set()
    for k in range(10):
        whole = made.batch(np.arange(4 * k, 4 * k + 4))
        parts = [made.batch(np.arange(4 * k + i, 4 * k + i + 1)) for i in range(4)]
        for name in ("x0", "noise", "t", "weight"):
            assert torch.equal(whole[name], torch.cat([p[name] for p in parts]))
        shapes.add(tuple(whole["x0"].shape[2:]))
    assert len(shapes) == len(made.sizes)
    steps = whole["t"] * 1000
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_every_other_picture_is_of_the_prior(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    made = task(photos, tmp_path / "drawn", base, prior_prompt="a thing", prior=3, prior_weight=0.5)
    batch = made.batch(np.arange(8, 12))
    assert batch["weight"].tolist() == [1.0, 0.5, 1.0, 0.5]
    assert [c for c in batch["captions"][1::2] if c] == ["a thing"] * sum(c is not None for c in batch["captions"][1::2])
    assert len(list((tmp_path / "drawn" / "prior").glob("*.png"))) == max(3, len({i.size for i in made.items}))
    shutil.copytree(tmp_path / "drawn" / "prior", tmp_path / "before")
    given = task(photos, tmp_path / "given", base, prior_prompt="a thing", prior_data=str(tmp_path / "before"))
    assert sum(i.prior for i in given.items) == sum(i.prior for i in made.items)
    shutil.copy(photos / "0.png", tmp_path / "before" / "more.png")
    with pytest.raises(ValueError, match="has changed since"):
        task(photos, tmp_path / "given", base, prior_prompt="a thing", prior_data=str(tmp_path / "before"))


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "thing 3"), ("a photo", "thing 3"), ("{}, in oil", "thing 3, in oil"), ("oil of {}", "oil of thing 3")]
)
def test_what_is_said_of_a_picture(prompt: str, said: str, smoke: Path, photos: Path, tmp_path: Path) -> None:
    made = task(photos, tmp_path, {"base": str(smoke / "diffusion")}, prompt=prompt)
    assert made.items[3].caption == said


def test_pictures_without_captions_need_a_prompt(smoke: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(photos, folder, ignore=shutil.ignore_patterns("2.txt"))
    with pytest.raises(ValueError, match=r"prompt \(=''\) must say what pictures without a caption show: 2.png"):
        task(folder, tmp_path / "run", {"base": str(smoke / "diffusion")})
    made = task(folder, tmp_path / "other", {"base": str(smoke / "diffusion")}, prompt="a zkq")
    assert [i.caption for i in made.items] == ["thing 0", "thing 1", "a zkq", "thing 3", "thing 4"]


def test_a_near_style_is_chosen_once_and_drawn_in(smoke: Path, photos: Path, tmp_path: Path) -> None:
    """And a request with the LoRA draws in it, unless it names another."""
    own = {"base": str(smoke / "diffusion")}
    trainer = fit("lora", own, photos, tmp_path / "run", replace(LOOP, images=8), style="auto", text=False)
    (chosen,) = trainer.task.style
    assert json.loads((tmp_path / "run" / "style.json").read_text()) == {chosen: 1.0}
    assert trainer.task.batch(np.arange(4))["styles"].count({chosen: 1.0}) >= 2
    model = load(own["base"], device="cpu")
    asked = GenerateRequest(prompt="thing 3", seed=1, steps=1, size=model.size, lora=(str(tmp_path / "run"),))
    assert next(model.pictures(asked)).record["style"] == {chosen: 1.0}
    other = next(s for s in model.styles if s != chosen)
    assert next(model.pictures(replace(asked, style=other))).record["style"] == {other: 1.0}
    assert task(photos, tmp_path / "named", own, style=f"{other}:1").style == {other: 1.0}
    with pytest.raises(ValueError, match="style"):
        task(photos, tmp_path / "none", own, style="nowhere")


def test_a_lora_from_a_time_on_is_at_work_below_it(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    """Before, pictures are what they are without it; from then on they go along what it changes of what is said of the prompt."""
    fit("lora", base, photos, tmp_path / "run", replace(LOOP, lr=0.05), until=0.4, along=1.5, text=False)
    model = load(base["base"], device="cpu")
    assert isinstance(model, LatentDiffusion)
    sized = {"width": 64, "height": 64} if model.sized else {}
    (row,) = model._rows(GenerateRequest(prompt="thing 3", seed=1, style="noto" if model.styles else None, **sized))  # type: ignore[arg-type]
    told = replace(row.request, lora=(f"{tmp_path / 'run'}:0.8",))
    x = torch.randn(1, model.codec.spec.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    changes = read_lora(named_file(tmp_path / "run"), model.networks)
    assert (changes.until, changes.along) == (0.4, 1.5)

    def says(row: Row, t: float) -> Tensor:
        with torch.no_grad():
            return model._denoise([row], None, [], torch.tensor([1.0, 0.0]))(x, torch.tensor([t]))  # type: ignore[union-attr]

    alone = replace(row, request=replace(row.request, guidance=1.0))
    plain, bare = ([says(r, t) for t in (0.8, 0.3)] for r in (row, alone))
    merged = merge(model.denoiser, [(changes.changes["unet" if model.sized else "denoiser"], 1.0)])
    whole = says(alone, 0.3)
    merged.eject()
    with model.changed(told):
        found = [says(replace(row, request=told), t) for t in (0.8, 0.3)]
    torch.testing.assert_close(found[0], plain[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], plain[1] + 0.8 * 1.5 * (whole - bare[1]), atol=1e-4, rtol=0)
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    assert torch.equal(says(row, 0.3), plain[1])


def test_late_loras_of_generators_that_end_crosswise_are_their_own(photos: Path, smoke: Path, tmp_path: Path) -> None:
    fit("lora", {"base": str(smoke / "diffusion")}, photos, tmp_path / "run", replace(LOOP, lr=0.05), until=0.6, along=2.0, text=False)
    model = load(smoke / "diffusion", device="cpu")
    assert isinstance(model, LatentDiffusion)
    asked = GenerateRequest(prompt="thing 3", seed=1, steps=2, size=model.size, count=20, lora=(str(tmp_path / "run"),))
    whole = [p.png() for p in model.pictures(asked)]
    first, second = model.pictures(replace(asked, count=17)), model.pictures(asked)
    next(first)
    drawn = [next(second).png()]
    first.close()  # type: ignore[attr-defined]
    drawn += [p.png() for p in second]
    assert drawn[17:] == whole[17:], "what began while another drew and went on after it"
    assert model.late == []


@pytest.mark.parametrize("until", [0.6, 1.0])
def test_a_decoder_learns_to_paint_what_the_lora_draws(
    until: float, smoke: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop changes nothing; one file draws as the training does, and without its part for the decoder the same is painted in another way."""
    monkeypatch.setattr(lora, "EVERY", 1)
    own, run = {"base": str(smoke / "diffusion")}, tmp_path / "whole"
    more = {"decoder": 2, "until": until, "text": False}
    loop = replace(LOOP, lr=0.05)
    trainer = fit("lora", own, photos, run, loop, **more)
    fit("lora", own, photos, tmp_path / "halves", loop, stop_at=12, **more)
    fit("lora", own, photos, tmp_path / "halves", loop, **more)
    whole, halves = (load_file(p / "state-000000.016k.safetensors") for p in (run, tmp_path / "halves"))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[k], halves[k]) for k in whole)
    model = load(own["base"], device="cpu")
    assert isinstance(model, LatentDiffusion)
    file = run / "model-000000.016k.safetensors"
    assert set(read_lora(file, model.changeable).changes) == {"denoiser", "decoder"}
    assert trainer.task.complete_from == 0.4
    tensors = {k: torch.zeros_like(v) if k.startswith("lora_decoder_") and "lora_up" in k else v for k, v in load_file(file).items()}
    save_file(tensors, tmp_path / "unpainted.safetensors", read_header(file)[1])
    latents: list[Tensor] = []
    decode = LatentDiffusion.decode
    monkeypatch.setattr(LatentDiffusion, "decode", lambda self, z: (latents.append(z), decode(self, z))[1])
    before, after, unpainted = (drawn(own, **m) for m in ({}, {"lora": (str(run),)}, {"lora": (str(tmp_path / "unpainted.safetensors"),)}))
    monkeypatch.undo()
    assert np.abs(before - after).max() > 1
    assert np.abs(unpainted - after).max() > 1
    assert torch.equal(latents[1], latents[2])
    assert not torch.equal(latents[0], latents[1])
    assert np.array_equal(drawn(own), before), "and the model is as it was"
    with Image.open(run / "samples" / f"{thousands(16)}.png") as sample:
        image = model.generate("thing zkq", seed=0, size=model.size, lora=(str(run),))[0]
        assert np.abs(np.asarray(sample.convert("RGB")).astype(int) - np.asarray(grid([image]).convert("RGB"))).max() <= 1
    assert trainer.task.model.late == []
    if until == 1:
        main(["lora", "merge", own["base"], str(run), "--out", str(tmp_path / "merged.safetensors")])
        assert np.abs(drawn(own, tmp_path / "merged.safetensors") - after).max() <= 1


def test_the_decoder_comes_nearer_to_the_pictures_and_nothing_else_learns_from_that(smoke: Path, photos: Path, tmp_path: Path) -> None:
    made = task(photos, tmp_path, {"base": str(smoke / "diffusion")}, decoder=4, until=0.5, prior_prompt="a thing", prior=2)
    batch = made.batch(np.arange(4))
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    (whole, _), *parts = (made.painted(made.networks, b, 1.0) for b in (batch, *halves))
    torch.testing.assert_close(sum(p for p, _ in parts) / 2, whole, msg="parts of a batch say together what it says")
    optimiser, losses = torch.optim.Adam(made.networks["decoder"].parameters(), lr=1e-2), []
    for _ in range(40):
        loss, _ = made.painted(made.networks, batch, 1.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for p in made.networks["lora"].parameters())
    assert all(p.grad is None for p in made.model.codec.parameters())
    x = made.model.codec.decode(batch["x0"])
    torch.testing.assert_close(x, load(str(smoke / "diffusion"), device="cpu").codec.decode(batch["x0"]), msg="its own changes rest")  # type: ignore[union-attr]


def test_samples_of_a_lora_from_a_time_on_are_what_it_draws(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    fit("lora", base, photos, tmp_path / "run", replace(LOOP, lr=0.05), until=0.6, along=2.0, text=False)
    model = load(base["base"], device="cpu")
    sized = {"width": 64, "height": 64} if model.sized else {"size": model.size}
    (image,) = model.generate("thing zkq", seed=0, lora=(str(tmp_path / "run"),), **sized)
    (plain,) = model.generate("thing zkq", seed=0, **sized)
    with Image.open(tmp_path / "run" / "samples" / f"{thousands(16)}.png") as sample:
        assert np.array_equal(np.asarray(sample.convert("RGBA")), np.asarray(grid([image]).convert("RGBA")))
        assert not np.array_equal(np.asarray(sample.convert("RGBA")), np.asarray(grid([plain]).convert("RGBA")))


def test_offset_noise_is_the_same_all_over_a_channel(smoke: Path, photos: Path, tmp_path: Path) -> None:
    plain = task(photos, tmp_path / "a", {"base": str(smoke / "diffusion")}).batch(np.arange(4))["noise"]
    offset = task(photos, tmp_path / "b", {"base": str(smoke / "diffusion")}, offset_noise=0.5).batch(np.arange(4))["noise"]
    between = offset - plain
    torch.testing.assert_close(between, between.mean((2, 3), keepdim=True).expand_as(between), atol=1e-5, rtol=0)
    assert float(between.abs().max()) > 0.1


def test_the_validation_loss_is_the_same_every_time(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    made = task(photos, tmp_path, base)
    with torch.no_grad():
        assert made.evaluate(made.networks) == made.evaluate(made.networks)


def test_what_the_model_says_of_a_caption_is_what_a_request_hears(base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    made = task(photos, tmp_path, base)
    model = made.model
    rows = model._rows(GenerateRequest(prompt="thing 3", seed=1, **({"width": 64, "height": 64} if model.sized else {})))
    heard, _ = model._sides(rows)
    told = made.told(["thing 3"], (64, 64), [rows[0].style or {}])
    for name in ("text", "pooled", "style"):
        a, b = getattr(heard, name), getattr(told, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# --- what cannot be -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"drop": 2.0}, r"drop \(=2.0\) must be between 0 and 1"),
        ({"prior_weight": 0.0}, r"prior_weight \(=0.0\) must be above 0"),
        ({"offset_noise": -1.0}, r"offset_noise \(=-1.0\)"),
        ({"prior_data": "x"}, r"prior_data \(='x'\) needs prior_prompt"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma"),
        ({"size": -1}, r"size \(=-1\)"),
        ({"each": 0}, r"each \(=0\)"),
    ],
)
def test_settings_that_mean_nothing(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Tuned(**more)


def test_bad_input_is_named(smoke: Path, stable: Path, photos: Path, tmp_path: Path) -> None:
    own = {"base": str(smoke / "diffusion")}
    with pytest.raises(ValueError, match=r"data \(=''\) must be a folder or a zip of pictures"):
        lora.LoraTask(lora.LoraRecipe(**own), 0, 4, tmp_path / "a")
    with pytest.raises(ValueError, match=r"size \(=32\) must be 16, or 0"):
        task(photos, tmp_path / "b", own, size=32)
    with pytest.raises(ValueError, match=r"bucket \(=20\) must be multiples of 8"):
        task(photos, tmp_path / "c", {"base": str(stable / "sd15.safetensors"), "size": 64, "bucket": 20})
    with pytest.raises(ValueError, match=r"layers \(='nowhere'\) finds no layer"):
        task(photos, tmp_path / "d", own, layers="nowhere")
    with pytest.raises(ValueError, match=r"word \(=''\) must name"):
        fit("embedding", own, photos, tmp_path / "e", word="")
    with pytest.raises(ValueError, match=r"word \(='zkq'\) must be in every caption, and is not in 'thing 0'"):
        fit("embedding", own, photos, tmp_path / "f", prompt="")
    with pytest.raises(FileError, match=r"base|model"):
        task(photos, tmp_path / "g", {"base": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"batch_size \(=3\) must be even"):
        task(photos, tmp_path / "h", own, batch=3, prior_prompt="a thing", prior=2)
    with pytest.raises(ValueError, match=r"decoder \(=2\) must be 0 for checkpoints of Stable Diffusion"):
        task(photos, tmp_path / "i", {"base": str(stable / "sd15.safetensors"), "size": 64, "bucket": 16}, decoder=2)
    for name, wrong in (("rank", 0), ("decoder", -1), ("decoder_from", 1.0)):
        with pytest.raises(ValueError, match=rf"{name} \(={wrong}\)"):
            lora.LoraRecipe(**{name: wrong})  # type: ignore[arg-type]


def test_another_model_of_the_same_name_is_not_gone_on_with(smoke: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke / "diffusion", tmp_path / "base")
    own = {"base": str(tmp_path / "base")}
    fit("lora", own, photos, tmp_path / "run", stop_at=8)
    packs = sorted((tmp_path / "base").glob("model-*k.safetensors"))
    assert len(packs) > 1
    packs[-1].unlink()
    with pytest.raises(ValueError, match="has changed since"):
        fit("lora", own, photos, tmp_path / "run")


def test_a_start_that_fails_leaves_nothing(smoke: Path, photos: Path, tmp_path: Path) -> None:
    own, run = {"base": str(smoke / "diffusion")}, tmp_path / "run"
    with pytest.raises(ValueError, match=r"word \(='zkq'\) must be in every caption"):
        fit("embedding", own, photos, run, prompt="")
    assert not [p for p in run.rglob("*") if p.is_file()]
    with pytest.raises(ValueError, match=r"shard \(=True\) is for full fine-tuning"):  # seen late, when pictures are encoded
        fit("lora", own, photos, run, replace(LOOP, shard=True))
    assert not [p for p in run.rglob("*") if p.is_file()]
    fit("lora", own, photos, run, stop_at=8)
    for path in run.glob("latents-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"shard \(=True\)"):
        fit("lora", own, photos, run, replace(LOOP, shard=True))
    kept = {p for p in run.rglob("*") if p.is_file()}
    assert [p for p in kept if p.name.startswith("latents-")]  # of a run that was begun
    (tmp_path / "other").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "other")
    with pytest.raises(ValueError, match="has changed since"):
        fit("lora", own, tmp_path / "other", run, prompt="a thing")
    assert {p for p in run.rglob("*") if p.is_file()} == kept


def test_a_prior_of_another_prompt_is_drawn_anew(smoke: Path, photos: Path, tmp_path: Path) -> None:
    """Where a start was stopped before its run was begun, and said something else."""
    own, first = {"base": str(smoke / "diffusion")}, tmp_path / "run" / "prior" / "0000.png"
    seen = []
    for prompt in ("a dgo", "a dgo", "a dog"):
        made = task(photos, tmp_path / "run", own, prior_prompt=prompt, prior=2)
        seen.append((first.stat().st_mtime_ns, first.read_bytes()))
    assert seen[0] == seen[1]
    assert seen[1] != seen[2]
    row = next(r for r, item in enumerate(made.items) if item.prior)  # and what is learned is what was drawn
    with torch.no_grad():
        fresh = made.model.codec.encode(made.pixels(made.items[row])).mean
    kept = made.latents[made.items[row].size][made.place[row] * made.variants][None].float()
    torch.testing.assert_close(kept, fresh, atol=2e-3, rtol=2e-3)
    (tmp_path / "run" / "state-000000.008k.safetensors").touch()  # of a run that was begun nothing is dropped
    task(photos, tmp_path / "run", own, prior_prompt="a cow", prior=2)
    assert (first.stat().st_mtime_ns, first.read_bytes()) == seen[2]


def test_recipes_are_json() -> None:
    for presets, kind in (
        (lora.PRESETS, lora.LoraRecipe),
        (embedding.PRESETS, embedding.EmbeddingRecipe),
        (finetune.PRESETS, finetune.FinetuneRecipe),
    ):
        for preset in presets.values():
            assert from_json(kind, to_json(preset()[0])) == preset()[0]


# --- several processes ----------------------------------------------------------------------------------------------------------------------------


def together(photos: Path, base: Path, out: Path, *flags: str, kind: str = "finetune") -> None:
    """A fine-tuning of two processes, as torchrun starts it."""
    argv = ["train", kind, "--data", str(photos), "--base", str(base), "--out", str(out), "--device", "cpu", *flags]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sfumato.apps.cli", *argv]
    env = [os.environ | world | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    both = [subprocess.Popen(command, env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for e in env]
    said = [process.communicate(timeout=240)[0][-2000:] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


@pytest.mark.parametrize("shard", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["own", pytest.param("stable", marks=pytest.mark.slow)], indirect=True)
def test_two_processes_are_one(shard: bool, base: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    """Each with a part of the weights, or with all of them: weights, averages and what the optimiser remembers, 1e-5; and they go on from what one
    process left.
    """
    loop = replace(LOOP, images=12, save_every=4, sample_every=12)
    more = {"previews": ("thing 3",), "text": False}
    fit("finetune", base, photos, tmp_path / "one", loop, **more)
    fit("finetune", base, photos, tmp_path / "two", loop, stop_at=4, **more)
    said = ("images", "batch_size", "warmup", "lr", "decay", "save_every", "sample_every", "log_every", "weight_decay", "ema")
    flags = [f"--loop.{k.replace('_', '-')}={to_json(loop)[k]}" for k in said] + [f"--recipe.{k}={v}" for k, v in base.items() if k != "base"]
    flags += ["--preset", "own", "--recipe.no-flip", "--recipe.previews", "thing 3"]
    together(photos, Path(base["base"]), tmp_path / "two", *flags, *(["--loop.shard"] if shard else []))
    one, two = (load_file(tmp_path / n / "state-000000.012k.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        network, _, name = key.partition(".")[2].partition(".")
        squares = one.get(f"optimiser.denoiser.{network}.{name}#exp_avg_sq")
        felt = torch.ones_like(value, dtype=torch.bool) if squares is None else squares > 1e-12  # others have gradients of rounding alone
        assert float(((value.float() - two[key].float()).abs() * felt).max()) <= 1e-5, key
    packs = [load_file(tmp_path / n / "model-000000.012k.safetensors") for n in ("one", "two")]
    assert packs[0].keys() == packs[1].keys()
    assert (tmp_path / "two" / "samples" / "000000.012k.png").exists()
    fit("finetune", base, photos, tmp_path / "two", replace(loop, images=12), **more)  # what they left one process reads


@pytest.mark.slow
def test_two_processes_learn_one_decoder(smoke: Path, photos: Path, tmp_path: Path) -> None:
    """Though one of them has no picture that is painted."""
    more = {"rank": 2, "decoder": 2, "decoder_from": 0.25, "until": 0.6, "layers": "attention"}
    loop = replace(LOOP, lr=1e-2)
    fit("lora", {"base": str(smoke / "diffusion")}, photos, tmp_path / "one", loop, text=False, **more)
    said = ("images", "batch_size", "warmup", "lr", "decay", "save_every", "sample_every", "log_every", "weight_decay", "ema")
    flags = [f"--loop.{k.replace('_', '-')}={to_json(loop)[k]}" for k in said] + [f"--recipe.{k.replace('_', '-')}={v}" for k, v in more.items()]
    flags += ["--recipe.each=1", "--recipe.no-flip", "--recipe.style=any", "--recipe.along=1", "--recipe.previews", "thing zkq"]
    together(photos, smoke / "diffusion", tmp_path / "two", *flags, kind="lora")
    one, two = (load_file(tmp_path / n / "model-000000.016k.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert any(float(v.abs().max()) > 0 for k, v in one.items() if k.startswith("lora_decoder_") and "lora_up" in k)
    assert max(float((one[k] - two[k]).abs().max()) for k in one) <= 1e-4


def test_networks_that_must_be_whole_are_not_cut_up(smoke: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shard \(=True\) is for full fine-tuning of diffusion networks: the networks of lora must be whole"):
        fit("lora", {"base": str(smoke / "diffusion")}, photos, tmp_path / "run", replace(LOOP, shard=True))
    with pytest.raises(ValueError, match=r"dtype \(='bf16'\) must be fp32 with shard"):
        fit("finetune", {"base": str(smoke / "diffusion")}, photos, tmp_path / "bf16", replace(LOOP, shard=True, dtype="bf16"), text=False)
