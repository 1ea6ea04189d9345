"""`sfumato train all`: a folder becomes a model that draws; the same command goes on; nothing is begun that cannot be ended."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sfumato.apps import together
from sfumato.apps.cli import main
from sfumato.apps.together import All, honestly, stages_for
from sfumato.data.folder import Entry, Scan, scan
from sfumato.pipelines.load import load

TINY = 0.001


def entries(n: int, caption: str | None = None) -> Scan:
    known = [
        Entry(f"{i}.png", f"{i:064x}"[::-1], 64, 64, False, (0, 0), "0" * 70, caption=None if caption is None else f"{caption} {i}") for i in range(n)
    ]
    return Scan(Path("own"), tuple(known), (), {})


@pytest.mark.parametrize(("n", "images"), [(50, 100_000), (500, 300_000), (5_000, 1_000_000)])
def test_settings_follow_the_number_of_pictures(n: int, images: int) -> None:
    asked = All(data=Path("own"), size=64)
    codec, denoiser = stages_for(asked, entries(n))
    assert abs(denoiser.loop.images - images) < 128
    assert (codec.what, denoiser.what) == ("autoencoder", "diffusion")
    assert (denoiser.recipe.denoiser.text_width, denoiser.recipe.memory) == (0, False), "nothing is said of them"
    _, denoiser = stages_for(asked, entries(n, "a cat"))
    assert (denoiser.recipe.denoiser.text_width, denoiser.recipe.memory) == (256, True)
    longer = stages_for(replace(asked, effort=2), entries(n))
    assert abs(longer[1].loop.images - 2 * images) < 256


def test_from_nothing_it_learns_the_words_too() -> None:
    stages = stages_for(All(data=Path("own"), size=64, init="none"), entries(50, "a cat"))
    assert [s.what for s in stages] == ["autoencoder", "text", "diffusion"]
    assert [s.recipe.init for s in stages if s.what != "text"] == ["", ""]


def test_a_folder_becomes_a_model_and_again_costs_nothing(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "SAMPLES", 8)
    out = tmp_path / "我的 模型"
    argv = ["train", "all", "--data", str(own_folder), "--out", str(out), "--effort", str(TINY), "--device", "cpu"]
    main(argv)
    said = capsys.readouterr()
    assert said.out.strip() == str(out / "model.safetensors")
    assert "40 pictures, 40 with captions; 4 are kept apart" in said.err
    report = json.loads((out / "report.json").read_text())
    assert {"pictures", "unseen", "codec_psnr_of_unseen", "samples", "distance", "distance of emoji", "nearest", "copies"} <= report.keys()
    assert report["codec_psnr_of_unseen"] > 15
    for name in ("samples", "nearest"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width == 8 * 66 - 2
    model = load(out / "model.safetensors")
    assert (model.size, model.meta["labels"]) == (64, ["circle", "square"])
    assert len(model.generate("a red square", steps=2)) == 1
    main(argv)
    assert "all is done already" in capsys.readouterr().err
    for more, named in ((["--seed", "1"], "seed (=1) must be 0"), (["--size", "32"], "size (=32) must be 64")):
        with pytest.raises(SystemExit):
            main([*argv, *more])
        assert named in capsys.readouterr().err
    (out / "report.json").unlink()
    main(argv)
    assert capsys.readouterr().err.count(": done already") == 2
    assert json.loads((out / "report.json").read_text()) == report


def test_a_plan_says_hours_and_a_full_disk_is_refused_at_once(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", "all", "--data", str(own_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    main([*argv, "--plan"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["pictures"] == 40
    assert 0 < plan["first_samples_after_minutes"] < 60 * plan["hours"]
    assert plan["disk_GB"] > 0.5
    assert not (tmp_path / "out").exists()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**8, 10**8))
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    for more in ([], ["--plan"]):
        with pytest.raises(SystemExit) as stopped:
            main([*argv, *more])
        assert stopped.value.code == 2
        assert "0.1 GB are free there: make room, or name another --out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"), [(["--effort", "0"], "effort (=0.0)"), (["--size", "40"], "size (=40)"), (["--init", "nowhere"], "nowhere")]
)
def test_mistakes_are_named(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "all", "--data", str(own_folder), "--out", str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_strict_refuses_a_bad_file(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_folder / "empty.png").write_bytes(b"")
    assert len(scan(own_folder).bad) == 1
    with pytest.raises(SystemExit):
        main(["train", "all", "--data", str(own_folder), "--out", str(tmp_path / "out"), "--strict"])
    assert "1 files of" in capsys.readouterr().err


def test_it_says_honestly_what_few_pictures_give() -> None:
    assert "learned by heart" in honestly(50, 0.9)
    assert "90% of the samples are copies" in honestly(50, 0.9)
    assert honestly(500, 0) != honestly(5000, 0)
