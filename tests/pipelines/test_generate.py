from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.core.checkpoint import FileError, load_tensors
from sfumato.core.images import to_pil
from sfumato.core.pack import save_pack
from sfumato.core.request import GenerateRequest, style_weights
from sfumato.nn.layers import slerp
from sfumato.pipelines.generate import CHUNK, Row
from sfumato.pipelines.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def model(smoke: Path) -> LatentDiffusion:
    return sfumato.load(smoke / "diffusion", device="cpu")


def pixels(images: list) -> np.ndarray:
    return np.stack([np.asarray(i) for i in images]).astype(int)


def test_pictures(model: LatentDiffusion) -> None:
    images = model.generate("a cat", style="noto", seed=7, count=2, steps=4)
    assert [i.mode for i in images] == ["RGBA", "RGBA"]
    assert images[0].size == (model.size, model.size)


def test_an_emoji_draws_what_its_name_draws(model: LatentDiffusion) -> None:
    entry = next(iter(model.meta["words"].values()))
    emoji, name, other = entry["emoji"][0], entry["en"][0], list(model.meta["words"].values())[5]["en"][0]
    a, b, c = (pixels(model.generate(prompt, seed=7, style="noto", steps=4)) for prompt in (emoji, name, other))
    assert (a == b).all()
    assert (a != c).any()


def test_the_same_request_gives_the_same_bytes(model: LatentDiffusion) -> None:
    a, b = (model.generate("a cat", seed=7, count=3, steps=4) for _ in range(2))
    assert (pixels(a) == pixels(b)).all()


def test_a_picture_is_the_same_alone_and_in_company(model: LatentDiffusion) -> None:
    together = pixels(model.generate("a cat", seed=7, count=5, steps=4))
    alone = np.concatenate([pixels(model.generate("a cat", seed=7 + i, steps=4)) for i in range(5)])
    assert np.abs(together - alone).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_fresh_noise_is_of_the_picture_not_of_the_batch(model: LatentDiffusion, name: str) -> None:
    options = {"sampler": name, "steps": 4, "style": "noto"} | ({"eta": 0.5} if name == "ddim" else {})
    together = pixels(model.generate("a cat", seed=3, count=3, **options))
    assert np.abs(together[2:] - pixels(model.generate("a cat", seed=5, **options))).max() <= 1


def test_one_picture_of_a_request_is_byte_equal(model: LatentDiffusion) -> None:
    request = GenerateRequest(prompt="a cat", seed=1, count=CHUNK + 3, steps=2)
    every = list(model.pictures(request))
    (one,) = model.pictures(request, only=CHUNK + 1)
    assert one.index == CHUNK + 1
    assert (pixels([one.image]) == pixels([every[CHUNK + 1].image])).all()


def test_conditions_matter(model: LatentDiffusion) -> None:
    def drawn(**change: object) -> torch.Tensor:
        request = GenerateRequest(**({"prompt": "grinning face", "style": "noto", "seed": 1, "steps": 6} | change))  # type: ignore[arg-type]
        return list(model.latents([Row(request, 0, 1, style_weights(str(request.style)))]))[-1]

    base = drawn()
    assert torch.equal(drawn(), base)
    changes = ({"prompt": "clown"}, {"style": "openmoji"}, {"guidance": 8.0}, {"negative": "a clown"}, {"style_guidance": 6.0}, {"prompt": None})
    for change in (*changes, {"guidance_interval": (0.2, 0.6)}, {"steps": 7}, {"sampler": "heun"}):
        assert float((drawn(**change) - base).abs().max()) > 1e-4, change


def test_guidance_one_is_one_call_a_step(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = type(model.denoiser).forward
    monkeypatch.setattr(type(model.denoiser), "forward", lambda self, x, t, cond: (rows.append(len(x)), forward(self, x, t, cond))[1])
    model.generate("a cat", seed=1, steps=5, guidance=1.0)
    assert rows == [1] * 5
    rows.clear()
    model.generate("a cat", seed=1, steps=5, guidance=3.0)
    assert rows == [2] * 5


def test_without_a_style_each_seed_has_its_own_mixture(model: LatentDiffusion) -> None:
    records = [p.record["style"] for p in model.pictures(GenerateRequest(prompt="a cat", seed=0, count=8, steps=1))]
    assert len({str(r) for r in records}) > 4
    assert all(sum(r.values()) == pytest.approx(1) for r in records)


def test_progress(model: LatentDiffusion) -> None:
    seen: list[tuple[int, int]] = []
    model.generate("a cat", seed=0, count=2, steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "named"),
    [({"style": "notto"}, "did you mean 'noto'"), ({"size": 100}, r"size \(=100\)"), ({"sampler": "hoin"}, "sampler"), ({"label": "x"}, "no labels")],
)
def test_what_the_model_cannot_do_is_named(model: LatentDiffusion, options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model.generate("a cat", **options)


def test_unknown_words(model: LatentDiffusion) -> None:
    assert model.unknown("grinning face") == []
    word, near = model.unknown("a grining face")[0]
    assert word == "grining"
    assert any("grin" in n for n in near)


def broken(smoke: Path, target: Path, change: object) -> Path:
    tensors, meta = load_tensors(sorted((smoke / "diffusion").glob("model-*k.safetensors"))[-1])
    change(tensors, meta)  # type: ignore[operator]
    save_pack(target, tensors, {k: v for k, v in meta.items() if k != "hash"})
    return target


def test_drawn_together_is_drawn_alone(model: LatentDiffusion) -> None:
    """Prompts, styles and seeds may differ within one batch."""
    requests = [
        GenerateRequest(prompt=p, style=s, seed=n, steps=3) for p, s, n in (("clown", "noto", 1), (None, "openmoji", 2), ("一个嘿嘿", "noto", 3))
    ]
    together = pixels([p.image for p in model.draw(requests)])
    alone = np.concatenate([pixels([p.image for p in model.pictures(r)]) for r in requests])
    assert np.abs(together - alone).max() <= 1
    with pytest.raises(ValueError, match="same steps"):
        list(model.draw([requests[0], GenerateRequest(prompt="x", steps=4)]))


def test_broken_models_are_refused_in_one_line(smoke: Path, tmp_path: Path) -> None:
    def nan(tensors: dict, meta: dict) -> None:
        tensors["denoiser.stem.weight"][0, 0] = float("nan")

    def missing(tensors: dict, meta: dict) -> None:
        del tensors["denoiser.stem.weight"]

    def unknown_field(tensors: dict, meta: dict) -> None:
        meta["denoiser"]["wdth"] = 3

    def wrong_kind(tensors: dict, meta: dict) -> None:
        meta["denoiser"]["kind"] = "unet9"

    def no_codec(tensors: dict, meta: dict) -> None:
        del meta["codec"]

    def foreign(tensors: dict, meta: dict) -> None:
        tensors["upscaler.weight"] = torch.zeros(1)

    for change, named in (
        (no_codec, "lacks codec"),
        (foreign, "upscaler.weight"),
        (nan, "not finite"),
        (missing, "do not fit"),
        (unknown_field, "did you mean 'width'"),
        (wrong_kind, "unet9"),
    ):
        path = broken(smoke, tmp_path / f"{change.__name__}.safetensors", change)
        with pytest.raises(ValueError, match=named) as error:
            sfumato.load(path)
        assert "\n" not in str(error.value)


def test_parts_do_not_draw_by_themselves(smoke: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not draw"):
        sfumato.load(smoke / "codec")
    with pytest.raises(FileError, match="must be a file"):
        sfumato.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="without a model"):
        sfumato.load(tmp_path)


def test_devices_and_formats_are_checked(smoke: Path) -> None:
    with pytest.raises(ValueError, match="fp16"):
        sfumato.load(smoke / "diffusion", device="cpu", dtype="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            sfumato.load(smoke / "diffusion", device="cuda")


def test_bf16_draws_about_the_same(smoke: Path, model: LatentDiffusion) -> None:
    half = sfumato.load(smoke / "diffusion", device="cpu", dtype="bf16")
    a, b = (pixels(m.generate("a cat", style="noto", seed=7, steps=8)) for m in (model, half))
    assert np.abs(a - b).mean() < 4


def test_channels_that_the_codec_does_not_use_stay_out_of_it(smoke: Path) -> None:
    """What the denoiser says of a dead channel, which no loss ever taught it, does not change the picture."""
    model = sfumato.load(smoke / "diffusion", device="cpu")
    model.codec.latent_std[1] = 0
    before = pixels(model.generate("a cat", seed=1, steps=4))
    rows = model.denoiser.last.bias.view(model.codec.spec.latent_channels, -1)
    rows.data[1] += 3
    assert (pixels(model.generate("a cat", seed=1, steps=4)) == before).all()
    rows.data[0] += 3
    assert (pixels(model.generate("a cat", seed=1, steps=4)) != before).any()


# --- from a picture ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def doodle(model: LatentDiffusion, tmp_path: Path) -> Path:
    """A red square on nothing, at the model's own size."""
    image = Image.new("RGBA", (model.size, model.size))
    image.paste((220, 30, 30, 255), (3, 3, model.size - 3, model.size - 3))
    image.save(tmp_path / "doodle.png")
    return tmp_path / "doodle.png"


def test_strength_says_how_far_it_goes_from_the_picture(model: LatentDiffusion, doodle: Path) -> None:
    """A little noise leaves nearly the codec's copy, strength 1 begins from noise alone."""
    options = {"seed": 3, "steps": 20, "style": "noto", "init": str(doodle)}
    begun = model.begin(GenerateRequest(**options))
    assert begun is not None
    copy = pixels(to_pil(model.decode(begun.z)))
    near, far, all_new = (pixels(model.generate("a cat", strength=s, **options)) for s in (0.05, 0.5, 1.0))
    apart = [np.abs(p - copy).mean() for p in (near, far, all_new)]
    assert apart[0] < apart[1] < apart[2]
    without = {k: v for k, v in options.items() if k != "init"}
    assert np.abs(all_new - pixels(model.generate("a cat", **without))).max() <= 1


@pytest.mark.parametrize("kind", ["grey", "painted"])
def test_what_the_mask_leaves_black_stays_to_the_pixel(model: LatentDiffusion, doodle: Path, tmp_path: Path, kind: str) -> None:
    mask = Image.new("L", (model.size, model.size))
    mask.paste(255, (0, 0, model.size // 2, model.size))
    if kind == "painted":  # white where it is redrawn, nothing elsewhere: what a brush on an empty layer gives
        white = Image.new("RGBA", mask.size, (255, 255, 255, 0))
        white.putalpha(mask)
        mask = white
    mask.save(tmp_path / "mask.png")
    drawn = pixels(model.generate("a cat", seed=3, steps=6, style="noto", init=str(doodle), mask=str(tmp_path / "mask.png"), strength=1.0))[0]
    before = np.asarray(Image.open(doodle)).astype(int)
    half = model.size // 2
    assert (drawn[:, half:] == before[:, half:]).all()
    assert (drawn[:, :half] != before[:, :half]).any()


def test_an_init_picture_of_any_size_and_kind(model: LatentDiffusion, tmp_path: Path) -> None:
    Image.new("RGB", (90, 50), "blue").save(tmp_path / "wide.jpg")
    Image.new("L", (90, 50), 255).save(tmp_path / "mask.png")
    image = model.generate("a cat", seed=1, steps=4, init=str(tmp_path / "wide.jpg"), mask=str(tmp_path / "mask.png"))[0]
    assert image.size == (model.size, model.size)


def test_steps_are_counted_as_they_are_taken(model: LatentDiffusion, doodle: Path) -> None:
    seen: list[tuple[int, int]] = []
    model.generate("a cat", seed=1, steps=10, init=str(doodle), strength=0.3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "/gone.png"}, r"init \(='/gone\.png'\) cannot be read: No such file"),
        ({"init": __file__}, "is not a picture"),
        ({"init": "DOODLE", "mask": "OTHER"}, "must be as large as the init picture: it has 5 x 5 pixels and init 16 x 16"),
    ],
)
def test_init_pictures_that_cannot_be_used_are_named(model: LatentDiffusion, doodle: Path, tmp_path: Path, fields: dict, message: str) -> None:
    Image.new("L", (5, 5)).save(tmp_path / "other.png")
    paths = {"DOODLE": str(doodle), "OTHER": str(tmp_path / "other.png")}
    with pytest.raises(ValueError, match=message):
        model.generate("a cat", steps=2, **{k: paths.get(v, v) for k, v in fields.items()})


# --- from one picture to another ------------------------------------------------------------------------------------------------------------------


def test_a_morph_begins_and_ends_with_the_pictures_themselves(model: LatentDiffusion) -> None:
    a = GenerateRequest(prompt="a cat", style="noto", seed=3, steps=4)
    b = GenerateRequest(prompt="a rather long caption of a dog", style="openmoji", seed=8, steps=4)
    frames = pixels([p.image for p in model.morph(a, b, 5)])
    first, last = (pixels([next(model.pictures(r)).image])[0] for r in (a, b))
    assert np.abs(frames[0] - first).max() <= 1
    assert np.abs(frames[-1] - last).max() <= 1
    steps = [np.abs(x - y).mean() for x, y in zip(frames[1:], frames[:-1], strict=True)]
    assert all(s > 0 for s in steps)
    with pytest.raises(ValueError, match=r"frames \(=1\)"):
        list(model.morph(a, b, 1))


def test_noise_between_two_seeds_is_noise() -> None:
    a, b = (torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for share in (0.0, 0.3, 0.5, 1.0):
        assert float(slerp(a, b, share).std()) == pytest.approx(1.0, abs=0.05)
    assert float(torch.lerp(a, b, 0.5).std()) < 0.8, "what lerp would have done"
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.4), a)
