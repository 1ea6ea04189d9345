from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

import sfumato
from sfumato.data.augment import COLOURS, recolour
from sfumato.data.captions import meanings
from sfumato.data.emoji import STYLES, concepts, drawable, drawings
from sfumato.train import autoencoder, diffusion, text

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import bundled
import common
import judge as second

KEYS = {"name", "value", "unit", "goal", "holds"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 pixels and 12 concepts, trained for moments: it draws, but nothing that one could recognise."""
    runs = tmp_path_factory.mktemp("tiny")
    for part, module in (("codec", autoencoder), ("text", text)):
        recipe, loop = module.PRESETS["smoke"]()
        module.train(recipe, replace(loop, images=2 * loop.batch_size, device="cpu"), runs / part)
    recipe, loop = diffusion.PRESETS["smoke"]()
    loop = replace(loop, images=2 * loop.batch_size, device="cpu")
    diffusion.train(recipe, loop, runs / "diffusion", codec=runs / "codec", text=runs / "text")
    return runs / "diffusion"


@pytest.fixture(scope="session")
def atlas() -> bundled.Atlas:
    return bundled.make_atlas(tuple(c.index for c in drawable()[:12]), 32)


def ask(concept: int, style: str, **more: object) -> bundled.Ask:
    return bundled.Ask(concept, STYLES.index(style), "a thing", 0, **more)  # type: ignore[arg-type]


# --- the whole bench --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_measures_everything(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundled.main(["--quick", "--model", str(tiny), "--out", str(tmp_path / "pictures"), "--judges", str(tmp_path / "judges")])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "commit", "seed", "seconds", "claims", "details"}
    assert all(set(c) == KEYS for c in found["claims"])
    assert all((c["goal"] is None) == (c["holds"] is None) for c in found["claims"])
    names = [c["name"] for c in found["claims"]]
    assert len(names) == len(set(names))
    for wanted in (
        "codec: psnr",
        "ceiling",
        "seen pairs",
        "Chinese",
        "held-out pairs",
        "diversity",
        "colour words",
        "mixtures",
        "cold start",
        "--help",
    ):
        assert any(wanted in n for n in names), wanted
    assert not found["details"]["second_judge"]["meaningful"]
    assert all("not meaningful" in n for n in names if "classifier" in n)
    assert set(found["details"]["accuracy"]["names-en"]) == {"model", "ceiling", "moved_ceiling", "another_style", "nearest_training_drawing"}
    assert (tmp_path / "pictures" / "names-zh.png").exists()
    assert len((tmp_path / "pictures" / "names-zh.txt").read_text().splitlines()) == 6


def test_one_section_again_gives_the_same(tiny: Path, tmp_path: Path) -> None:
    options = bundled.Options(model=str(tiny), quick=True, only="codec,diversity", out=tmp_path / "pictures", judges=tmp_path / "judges")
    first, again = bundled.run(options), bundled.run(options)
    assert first["claims"] == again["claims"]
    assert not any("cold start" in c["name"] for c in first["claims"])


def test_what_is_wrong_is_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--model", "no-such-model"], ["--model", str(tiny), "--only", "kodec"]):
        with pytest.raises(SystemExit) as e:
            bundled.main(["--quick", *argv])
        assert e.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("bench: ")


def test_a_batch_of_prompts_is_what_each_draws_alone(tiny: Path) -> None:
    model = sfumato.load(tiny, device="cpu")
    prompts, styles, seeds = (
        ["a grinning face", "笑", "a very long prompt about a face with tears of joy"],
        ["noto", "openmoji:0.5,noto:0.5", "fluent"],
        [3, 1, 2],
    )
    together = common.draw(model, prompts, styles, seeds, steps=3)
    for image, p, s, k in zip(together, prompts, styles, seeds, strict=True):
        alone = model.generate(p, style=s, seed=k, steps=3)[0]
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1


# --- the judges -------------------------------------------------------------------------------------------------------------------------------


def test_real_drawings_judge_themselves_right(atlas: bundled.Atlas) -> None:
    asks = [bundled.Ask(int(c), int(s), "", 0) for c, s in zip(atlas.art.concept, atlas.art.style, strict=True)]
    assert torch.equal(atlas.rows_of(asks), torch.arange(len(asks)))
    found = bundled.measures(bundled.Lite0(atlas).look(atlas.pictures, asks), asks)
    assert all(v.all() for v in found.values())


def test_rank_counts_candidates_of_the_asked_styles_only(atlas: bundled.Atlas) -> None:
    a, b = atlas.known[:2]
    noto = atlas.features[atlas.row[a, STYLES.index("noto")]][None]
    asks = [ask(a, "noto"), ask(b, "noto"), ask(b, "noto", accepted=frozenset({a})), ask(b, "openmoji", among=(STYLES.index("openmoji"),))]
    verdict = bundled.nearest(atlas, noto.expand(len(asks), -1), asks)
    assert verdict.rank[0] == 0
    assert 1 <= verdict.rank[1] < len(atlas.known)
    assert verdict.rank[2] == 0
    assert verdict.rank[3] < len(atlas.known)
    assert (verdict.style == STYLES.index("noto")).all()


def test_measures_know_twins_and_the_five_best() -> None:
    asks = [ask(0, "fluent"), ask(0, "fluent"), ask(0, "noto")]
    style = np.array([STYLES.index(s) for s in ("fluent-flat", "fluent", "fluent")])
    found = bundled.measures(bundled.Verdict(np.array([0, 4, 5]), style), asks)
    assert found["rank1"].tolist() == [1, 0, 0]
    assert found["rank5"].tolist() == [1, 1, 0]
    assert found["style"].tolist() == [0, 1, 0]
    assert found["style_twins"].tolist() == [1, 1, 0]
    assert found["pair"].tolist() == [0, 1, 0]
    assert found["pair_twins"].tolist() == [1, 1, 0]


def test_a_word_of_more_than_three_concepts_accepts_them_all() -> None:
    table = meanings("en")
    wide = next(w for w, s in table.items() if len(s) == 4)
    narrow = next(w for w, s in table.items() if len(s) == 3)
    assert bundled.accepted(wide.upper(), "en") == table[wide]
    assert bundled.accepted(narrow, "en") == frozenset()
    assert bundled.accepted("no such word", "en") == frozenset()


def test_the_judge_is_kept(tmp_path: Path) -> None:
    loop = replace(second.QUICK, images=32)
    first = second.judge(second.QUICK_RECIPE, loop, tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    kept = second.judge(second.QUICK_RECIPE, replace(loop, threads=1), tmp_path)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    pictures = second.exact(second.art_of(kept.known, 128))[:8]
    assert all(torch.equal(a, b) for a, b in zip(first(pictures), kept(pictures), strict=True))
    assert [concepts()[c].name for c in kept.known] == kept.judge.labels
    assert not kept.meaningful
    assert second.folder_of(tmp_path, second.RECIPE, loop) != second.folder_of(tmp_path, second.QUICK_RECIPE, loop)


# --- arithmetic -------------------------------------------------------------------------------------------------------------------------------


def test_claims_hold_as_their_goals_say() -> None:
    assert common.claim("x", 26.0, "dB", ">= 26")["holds"] is True
    assert common.claim("x", 0.06, "", "<= 0.05")["holds"] is False
    assert common.claim("x", math.nan, "", "<= 0.05") == {"name": "x", "value": None, "unit": "", "goal": "<= 0.05", "holds": False}
    assert common.claim("x", 1.0)["holds"] is None
    assert json.loads(json.dumps(common.plain({"a": np.array([1.0, math.nan]), "b": (np.int64(2), None, "c")}))) == {
        "a": [1.0, None],
        "b": [2, None, "c"],
    }


def test_intervals_cover_the_mean_and_narrow() -> None:
    rng = np.random.default_rng(0)
    few, many = (rng.random(n) < 0.3 for n in (50, 5000))
    wide, narrow = (common.interval(common.mean, v.astype(float)) for v in (few, many))
    assert wide[0] < 0.3 < wide[1]
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert abs((narrow[1] - narrow[0]) - 2 * 1.96 * math.sqrt(0.3 * 0.7 / 5000)) < 0.003
    assert common.interval(common.ratio, many.astype(float), many.astype(float)) == [1.0, 1.0]
    assert math.isnan(common.ratio(np.ones(3), np.zeros(3)))
    assert math.isnan(common.interval(common.mean, np.array([]))[0])
    assert common.gap(np.array([0.0, 1.0]), np.array([1.0, 1.0])) == 0.5


def test_fidelity_is_skimage_s_and_crops() -> None:
    art = drawings(64, [concepts()[0]])
    real = second.exact(art)
    assert real.shape[-1] == 32
    same = bundled.fidelity(real, real)
    assert (same["psnr"] == 99).all()
    assert np.allclose(same["ssim"], 1)
    rough = (real + 0.1 * torch.rand(real.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = bundled.fidelity(real, rough)
    a, b = bundled.white_u8(real), bundled.white_u8(rough)
    assert np.allclose(found["psnr"], [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)])
    alpha = np.zeros((8, 8), dtype=np.uint8)
    alpha[2:5, 3] = 1
    assert bundled.border(alpha) == (slice(2, 5), slice(3, 4))
    assert bundled.border(alpha * 0) == (slice(None), slice(None))


def test_tinted_drawings_have_the_colour_of_their_tint() -> None:
    for i, colour in enumerate(COLOURS.values()):
        flat = torch.ones(1, 4, 8, 8) * 0.5
        flat[:, 3] = 1
        flat[:, :, :2] = 0
        tinted = recolour(flat, torch.tensor([colour]))
        np.testing.assert_allclose(bundled.mean_colour(tinted)[0], colour, atol=1e-5)
        assert bundled.named_colours(tinted)[0] == i
    assert (bundled.mean_colour(torch.zeros(1, 4, 8, 8)) == 1).all()


def test_spread_of_equal_opposite_and_orthogonal_pictures() -> None:
    e = torch.eye(3)
    vectors = torch.stack([torch.stack([e[0]] * 3), e, torch.stack([e[0], -e[0], e[1]])])
    np.testing.assert_allclose(bundled.spread(vectors), [0, 1, 4 / 3], atol=1e-6)


def test_curves_of_mixtures() -> None:
    assert bundled.step_back(np.array([0.0, 0.2, 0.2, 0.9])) == 0
    assert bundled.step_back(np.array([0.0, 0.3, 0.2, 0.9])) == pytest.approx(0.1)
    assert bundled.fall(np.array([0.9, 0.8, 0.6, 0.8, 0.7])) == pytest.approx(0.2)


def test_styles_come_by_turns() -> None:
    assert bundled.by_turns([(1, 0), (2, 0), (3, 1), (4, 0), (5, 1)]) == [(1, 0), (3, 1), (2, 0), (5, 1), (4, 0)]


def test_a_failing_command_is_named() -> None:
    seconds, memory = bundled.timed([sys.executable, "-c", "x = bytearray(2**25)"], 1)
    assert 0 < seconds < 20
    assert memory is None or 32 < memory < 200
    with pytest.raises(ValueError, match="ended with status 3: gone"):
        bundled.timed([sys.executable, "-c", "import sys; sys.stderr.write('gone'); sys.exit(3)"], 1)
