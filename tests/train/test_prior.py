"""Training a prior over codes, and drawing with it: exact resume, other codecs refused, masks, seeds, conditions, what has no effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sfumato.apps.cli import main
from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.lfq import LFQConfig
from sfumato.codecs.bottlenecks.residual import ResidualConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.core.checkpoint import checkpoints, load_tensors
from sfumato.core.config import from_json, to_json
from sfumato.core.request import GenerateRequest
from sfumato.core.runlog import read_log
from sfumato.pipelines.codes import CodesModel, feathered
from sfumato.pipelines.generate import NotFinite
from sfumato.pipelines.load import load
from sfumato.train import autoencoder
from sfumato.train.conditioned import CLOSE
from sfumato.train.prior import PRESETS, PriorRecipe, PriorTask, preset_smoke, train

NET = ConvnetConfig(image_channels=4, patch=2, widths=(16, 32), encoder_blocks=(1, 0), decoder_blocks=(0, 1))
RECIPE, LOOP = preset_smoke()
LOOP = replace(LOOP, device="cpu", images=320, save_every=160, sample_every=160)


def codec_run(out: Path, bottleneck: object, channels: int = 4, data: str = "emoji") -> Path:
    net = AutoencoderConfig(convnet=replace(NET, image_channels=channels), bottleneck=bottleneck)  # type: ignore[arg-type]
    recipe = autoencoder.AutoencoderRecipe(codec=net, size=16, perceptual=0.0, limit=12 if data == "emoji" else 0, data=data)
    loop = replace(autoencoder.preset_smoke()[1], device="cpu", images=320, save_every=320, sample_every=320)
    autoencoder.train(recipe, loop, out)
    return out


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return codec_run(tmp_path_factory.mktemp("codec"), VQConfig(size=32, channels=4))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return codec_run(tmp_path_factory.mktemp("other"), VQConfig(size=32, channels=4, cosine=False))


@pytest.fixture(scope="module", params=["gpt", "maskgit"])
def run(request: pytest.FixtureRequest, codec: Path, smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    train(of(request.param, memory=True), LOOP, out, codec=codec, text=smoke / "text")
    return out


@pytest.fixture
def model(run: Path) -> CodesModel:
    return load(run)  # type: ignore[return-value]


def of(way: str, **more: object) -> PriorRecipe:
    return replace(RECIPE, prior=replace(RECIPE.prior, way=way), **more)  # type: ignore[arg-type]


def same_states(a: Path, b: Path) -> None:
    one, two = (load_tensors(checkpoints(p, "state")[-1])[0] for p in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


# --- training -------------------------------------------------------------------------------------------------------------------------------------


def test_it_learns_and_shows(run: Path) -> None:
    log = read_log(run / "log.jsonl")
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0]
    assert {"validation_loss", "validation_right"} <= log[-1].keys() | log[-2].keys()
    assert sorted((run / "samples").glob("*.png"))


@pytest.mark.parametrize("way", ["gpt", "maskgit"])
def test_a_stop_and_a_resume_change_nothing(way: str, codec: Path, smoke: Path, tmp_path: Path) -> None:
    """With dropout, which is on."""
    assert RECIPE.prior.dropout > 0
    loop = replace(LOOP, images=96, save_every=32, sample_every=96)
    train(of(way), loop, tmp_path / "whole", codec=codec, text=smoke / "text")
    for stop in (32, 64, None):
        train(of(way), loop, tmp_path / "parts", codec=codec, text=smoke / "text", stop_at=stop)
    same_states(tmp_path / "whole", tmp_path / "parts")


def test_batches_are_a_pure_function_of_the_position(codec: Path, smoke: Path, tmp_path: Path) -> None:
    task = PriorTask(of("maskgit"), 0, codec, smoke / "text", tmp_path)
    whole, parts = task.batch(np.arange(24)), [task.batch(np.arange(s, s + 6)) for s in range(0, 24, 6)]
    for key in ("tokens", "lost", "style", "no_text"):
        assert torch.equal(whole[key], torch.cat([p[key] for p in parts]))
    tokens = task.tokens(task.pictures(np.arange(5)))
    assert torch.equal(task.codes[:5].long(), tokens), "the cache holds the codes of those pictures"
    assert torch.equal(task.codec.decode_indices(task.vocabulary.indices(tokens)), task.codec(task.pictures(np.arange(5)))[0])


def test_it_begins_from_another_prior(run: Path, codec: Path, other: Path, smoke: Path, own_folder: Path, tmp_path: Path) -> None:
    """All of it over the same codes; over those of another codec what is not of the codes, and with the drawings nothing."""
    model = load(run)
    assert isinstance(model, CodesModel)
    theirs = model.prior.state_dict()
    recipe = of(model.way, memory=True, init=str(run))
    task = PriorTask(recipe, 0, codec, smoke / "text", tmp_path / "same")
    assert all(torch.equal(v, theirs[k]) for k, v in task.networks["prior"].state_dict().items())
    with pytest.raises(ValueError, match="learned the codes of another codec"):
        PriorTask(recipe, 0, other, smoke / "text", tmp_path / "other")
    task = PriorTask(replace(recipe, data=str(own_folder), limit=0), 0, other, smoke / "text", tmp_path / "own")
    ours = task.networks["prior"].state_dict()
    equal = {k for k, v in ours.items() if v.shape == theirs[k].shape and torch.equal(v, theirs[k])}
    assert {"place", "blocks.0.mlp.up.weight"} <= equal
    assert not {"tokens.weight", "heads.0.weight"} & equal


def test_another_codec_is_refused(run: Path, other: Path, smoke: Path) -> None:
    with pytest.raises(ValueError, match="was begun with another codec"):
        train(of(load(run).way, memory=True), LOOP, run, codec=other, text=smoke / "text")


def test_a_codec_without_codes_is_refused(smoke: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a kl codec, without codes: name a run of --preset vqvae or vqgan"):
        train(of("gpt"), LOOP, tmp_path, codec=smoke / "codec", text=smoke / "text")


@pytest.mark.parametrize(
    "bottleneck",
    [ResidualConfig(levels=2, code=VQConfig(size=16, channels=4, cosine=False, gradient="straight-through")), LFQConfig(channels=17)],
    ids=["residual", "lfq"],
)
def test_levels_and_large_codebooks(bottleneck: object, smoke: Path, tmp_path: Path) -> None:
    codec = codec_run(tmp_path / "codec", bottleneck, channels=3)
    loop = replace(LOOP, images=64, save_every=64, sample_every=64)
    for way in ("gpt", "maskgit"):
        train(of(way), loop, tmp_path / way, codec=codec, text=smoke / "text")
        drawn = load(tmp_path / way)
        assert isinstance(drawn, CodesModel)
        assert drawn.vocabulary.slots == ((16, 16) if isinstance(bottleneck, ResidualConfig) else (256, 512))
        assert drawn.generate("a cat", seed=1)[0].mode == "RGB", "over white, as the codec has no alpha"


def test_ones_own_pictures_by_class(own_folder: Path, smoke: Path, tmp_path: Path) -> None:
    codec = codec_run(tmp_path / "codec", VQConfig(size=32, channels=4), data=str(own_folder))
    own = replace(of("maskgit"), data=str(own_folder), limit=0, labels="auto", variety=CLOSE)
    train(own, replace(LOOP, images=64), tmp_path / "run", codec=codec, text=smoke / "text")
    drawn = load(tmp_path / "run")
    assert drawn.meta["labels"] == ["circle", "square"]
    a, b = (drawn.generate("a red square", label=label, seed=3)[0] for label in ("circle", "square"))
    assert a.tobytes() != b.tobytes()


def test_recipes_go_through_json() -> None:
    for name, preset in PRESETS.items():
        recipe, _ = preset()
        assert from_json(PriorRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe, name


# --- drawing --------------------------------------------------------------------------------------------------------------------------------------


def test_the_same_request_is_the_same_picture(model: CodesModel) -> None:
    a, b = (next(model.pictures(GenerateRequest(prompt="a cat", seed=5, style="noto"))) for _ in range(2))
    assert a.png() == b.png()
    assert a.record["model"]["hash"] == model.meta["hash"]
    assert next(model.pictures(GenerateRequest(prompt="a cat", seed=6, style="noto"))).image.tobytes() != a.image.tobytes()


def test_a_picture_of_several_is_drawn_again_alone(model: CodesModel) -> None:
    request = GenerateRequest(prompt="a cat", seed=5, count=3, style="noto")
    pictures = list(model.pictures(request))
    assert next(model.pictures(request, only=2)).png() == pictures[2].png()
    alone = next(model.pictures(replace(request, seed=7, count=1)))
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(pictures[2].image)).max() <= 1


def test_large_vocabularies_are_drawn_fewer_together(model: CodesModel, monkeypatch: pytest.MonkeyPatch) -> None:
    request = GenerateRequest(prompt="a cat", seed=5, count=5, style="noto")
    assert model.together(request) == 16
    pictures = [p.image for p in model.pictures(request)]
    monkeypatch.setattr("sfumato.pipelines.codes.MOST_LOGITS", 2 * model.vocabulary.codes * (1 if model.way == "gpt" else model.vocabulary.length))
    assert model.together(request) == 2
    for a, b in zip(pictures, model.pictures(request), strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b.image)).max() <= 1


def test_progress_counts_the_steps(model: CodesModel) -> None:
    told: list[tuple[int, int]] = []
    list(model.pictures(GenerateRequest(prompt="a cat", seed=0, count=2), progress=lambda done, total: told.append((done, total))))
    expected = 16 if model.way == "gpt" else 10
    assert told == [(i + 1, expected) for i in range(expected)]


def test_what_is_asked_for_matters(model: CodesModel) -> None:
    base = GenerateRequest(prompt="a cat", seed=1, count=6, style="noto", guidance=9.0)
    drawn = lambda **change: b"".join(p.image.tobytes() for p in model.pictures(replace(base, **change)))  # type: ignore[arg-type]  # noqa: E731
    usual = drawn()
    told = ({"prompt": "a guitar"}, {"style": "twemoji"}, {"guidance": 1.0}, {"negative": "red"}, {"style_guidance": 30.0})
    for change in (*told, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert drawn(**change) != usual, change
    if model.way == "gpt":
        assert drawn(seed=1, temperature=0.0) == drawn(seed=2, temperature=0.0), "the likeliest codes are not drawn by chance"


def test_a_way_from_one_picture_to_another(model: CodesModel) -> None:
    a, b = (GenerateRequest(prompt=p, seed=s, style="noto") for p, s in (("a cat", 1), ("a dog", 2)))
    frames = [p.image.tobytes() for p in model.morph(a, b, 3)]
    ends = [next(model.pictures(r)).image for r in (a, b)]
    for frame, end in ((frames[0], ends[0]), (frames[2], ends[1])):
        assert np.abs(np.frombuffer(frame, np.uint8).astype(int) - np.frombuffer(end.tobytes(), np.uint8)).max() <= 1


def test_a_mask_redraws_a_part_and_keeps_the_rest(model: CodesModel, tmp_path: Path) -> None:
    picture = next(model.pictures(GenerateRequest(prompt="a cat", seed=5, style="noto"))).image.convert("RGB")
    picture.save(tmp_path / "cat.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    request = GenerateRequest(prompt="a dog", seed=9, style="noto", init=str(tmp_path / "cat.png"), mask=str(tmp_path / "mask.png"), strength=1.0)
    if model.way == "gpt":
        with pytest.raises(ValueError, match="writes codes from the upper left on; one of --kind maskgit redraws"):
            list(model.pictures(request))
        return
    told: list[tuple[int, int]] = []
    drawn = np.asarray(next(model.pictures(request, progress=lambda *n: told.append(n))).image).astype(int)  # type: ignore[arg-type]
    assert told == [(i + 1, 4) for i in range(4)], "as many steps as there are cells under the mask"
    before = np.asarray(picture.convert("RGBA")).astype(int)
    assert np.array_equal(drawn[mask == 0], before[mask == 0]), "to the pixel"
    assert not np.array_equal(drawn[mask > 0], before[mask > 0])
    Image.new("L", (16, 16), 0).save(tmp_path / "nothing.png")
    same = next(model.pictures(replace(request, mask=str(tmp_path / "nothing.png"))))
    assert np.array_equal(np.asarray(same.image), before), "nothing is redrawn under a black mask"
    some = next(model.pictures(replace(request, mask=None, strength=0.3)))
    assert np.asarray(some.image).shape == before.shape


def test_a_feathered_mask_rises_inside_of_its_edge_only() -> None:
    mask = torch.zeros(1, 1, 12, 12)
    mask[:, :, 3:, :] = 1
    soft = feathered(mask, 3)[0, 0]
    assert soft[:3].abs().max() == 0
    assert soft[3:8, 6].tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert soft[6:, 0].tolist() == [1.0] * 6, "the border of the picture is no edge of the mask"
    assert F.max_pool2d(soft[None, None], 12).item() == 1
    thin = torch.zeros(1, 1, 12, 12)
    thin[:, :, 5:8] = 1
    assert feathered(thin, 4)[0, 0, :, 6].tolist() == [0] * 5 + [0.5, 1, 0.5] + [0] * 4, "what is thin is redrawn too, in its middle"


def test_in_bf16_it_draws_nearly_the_same_and_keeps_its_places(run: Path) -> None:
    model = load(run, dtype="bf16")
    assert isinstance(model, CodesModel)
    assert model.prior.norm.scale.dtype == torch.bfloat16  # type: ignore[union-attr]
    angles, exact = (m.prior._angles(0, slice(0, 16)) for m in (model, load(run)))  # type: ignore[union-attr, operator]
    assert torch.equal(angles, exact), "angles are not rounded"
    assert model.generate("a cat", seed=1)[0].size == (16, 16)


def test_logits_that_are_no_numbers_are_an_error(model: CodesModel) -> None:
    model.prior.heads[0].weight.fill_(float("nan"))  # type: ignore[index, union-attr, operator]
    with pytest.raises(NotFinite, match="not finite"):
        model.generate("a cat", seed=1)


# --- the command line -----------------------------------------------------------------------------------------------------------------------------


def test_from_codec_to_picture_by_commands(
    codec: Path, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--preset", "smoke", "--codec", str(codec), "--text", str(smoke / "text"), "--loop.images", "64", "--device", "cpu"]
    main(["train", "prior", "--kind", "maskgit", *small, "--out", "runs/p"])
    assert json.loads((tmp_path / "runs/p/config.json").read_text())["config"]["prior"]["way"] == "maskgit"
    main(["pack", "runs/p"])
    capsys.readouterr()
    main(["generate", "a cat", "--model", "runs/p/packed.safetensors", "--seed", "3", "--out", "cat.png", "--eta", "0.5", "--sampler", "ddim"])
    found = capsys.readouterr()
    assert "sampler has no effect: it is for models that draw by diffusion" in found.err
    assert "eta has no effect" in found.err
    main(["generate", "--model", "runs/p/packed.safetensors", "--from", "cat.png", "--out", "again.png"])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "cat.png").read_bytes()
    main(["train", "prior", *small, "--plan"])
    plan = json.loads(capsys.readouterr().out.rpartition("again.png\n")[2])
    assert plan["plan"]["parameters"]["prior"] > 10_000
    assert plan["recipe"]["prior"]["way"] == "gpt"


def test_a_prior_is_no_vae(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(run)])
    assert "has no prior: it does not draw by itself" in capsys.readouterr().err


def test_the_cache_of_codes_says_what_it_is_of(run: Path) -> None:
    told = json.loads((run / "codes.json").read_text())
    assert {"codec", "seed", "variety", "each", "drawings"} == told.keys()
