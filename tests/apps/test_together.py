"""`sfumato train all`: a folder becomes a model that draws; the same command goes on; nothing is begun that cannot be ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.apps import together
from sfumato.apps.cli import main
from sfumato.apps.together import All, honestly, stages_for
from sfumato.core.checkpoint import read_metadata
from sfumato.core.pack import load_pack, save_pack
from sfumato.data.folder import Entry, Scan, scan
from sfumato.pipelines.find import find
from sfumato.pipelines.load import load
from sfumato.train.conditioned import frozen_part
from sfumato.train.loop import Trainer

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
    model = load(out)
    assert frozen_part(out, tmp_path / "next", "codec").exists(), "a folder of train all may be begun from"
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
    said = capsys.readouterr()
    plan = json.loads(said.out)["plan"]
    assert re.search(r"some \d+ minutes, something to look at after \d+; ", said.err)
    assert "images/s" not in said.err, "bars of six steps tell nothing"
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


def lives(data: Path, out: Path, killed: bool) -> None:
    """`train all`, killed in its first stage, between two, in its last one, and before it has measured; then left to end. Or only that."""
    import torch

    torch.set_num_threads(1)
    tempfile.tempdir = str(out.parent / "nowhere")  # not there, unless PyTorch makes it for its compiler's cache
    steps, go = Trainer.step, together._run

    def at_step(kind: str) -> None:
        def step(self: Trainer, batches: list[dict[str, Any]]) -> dict[str, float]:
            if self.task.kind == kind and self.counters["images"] >= self.loop.images // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return steps(self, batches)

        Trainer.step = step  # type: ignore[method-assign, assignment]

    def at_stage(what: str, *rest: Any) -> Any:
        if what == "diffusion":
            os.kill(os.getpid(), signal.SIGKILL)
        return go(what, *rest)

    def dies(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    traps = (lambda: at_step("autoencoder"), lambda: setattr(together, "_run", at_stage), lambda: at_step("diffusion"))
    for trap in (*traps, lambda: setattr(together, "report", dies), lambda: None) if killed else (lambda: None,):
        child = os.fork()
        if child == 0:
            try:
                together.report = lambda *_: None  # type: ignore[assignment]  # how it went is not what this is about
                trap()
                together.run(All(data=data, out=out, size=16, effort=TINY, device="cpu", threads=1))
                os._exit(0)
            finally:
                os._exit(1)
        print(os.waitpid(child, 0)[1], flush=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are copied are of Unix")
@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_if_it_never_was(own_folder: Path, tmp_path: Path) -> None:
    ends = [
        subprocess.run([sys.executable, __file__, str(own_folder), str(tmp_path / name), killed], capture_output=True, text=True, timeout=300)
        for name, killed in (("out", "killed"), ("whole", ""))
    ]
    assert [e.stdout.split() for e in ends] == [[str(int(signal.SIGKILL))] * 4 + ["0"], ["0"]], [e.stderr for e in ends]
    hashes = [read_metadata(folder / "model.safetensors")["hash"] for folder in (tmp_path / "out", tmp_path / "whole")]
    assert hashes[0] == hashes[1]
    assert list((tmp_path / "out").rglob("*.part")) == []
    assert [p for p in (tmp_path / "nowhere").rglob("*") if p.is_file()] == [], "something was written to the folder for temporary files"


@pytest.mark.slow
def test_by_way_of_codes(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A VQGAN and a prior instead of a codec and a denoiser: planned, trained, packed, measured, drawn with."""
    out = tmp_path / "out"
    argv = ["train", "all", "--via", "codes", "--data", str(own_folder), "--out", str(out), "--size", "16", "--effort", str(TINY), "--device", "cpu"]
    main([*argv, "--plan"])
    found = json.loads(capsys.readouterr().out)
    assert found["stages"]["prior"]["parameters"]["prior"] > 1_000_000
    main(argv)
    assert read_metadata(out / "model.safetensors")["kind"] == "codes"
    assert (out / "samples.png").exists()
    main(["generate", "a red square", "--model", str(out), "--seed", "1", "--out", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit):
        main([*argv[:2], *argv[4:]])
    assert "via (='diffusion') must be 'codes'" in capsys.readouterr().err


def test_what_would_end_a_later_stage_is_refused_before_the_first(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"file_name": f"{('square', 'circle')[i % 2]}/{i:02}.png", "style": ("ink:wet", "oil")[i % 3 == 0]} for i in range(40)]
    (own_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    argv = ["train", "all", "--data", str(own_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "style (='ink:wet') must be plain letters" in capsys.readouterr().err
    (own_folder / "metadata.jsonl").unlink()
    tensors, meta = load_pack(find("emoji"))
    codec = tmp_path / "codec.safetensors"
    save_pack(codec, {k: v for k, v in tensors.items() if k.startswith("codec.")}, {k: meta[k] for k in ("kind", "codec", "size")})
    with pytest.raises(SystemExit):
        main([*argv, "--init", str(codec)])
    assert "must hold a denoiser of the recipe's shape" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    save_pack(other, tensors, {k: v for k, v in meta.items() if k not in ("words", "hash")})
    with pytest.raises(SystemExit):
        main([*argv, "--init", str(other)])
    assert "lacks words in its metadata" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_words_that_the_text_encoder_never_learned_are_named(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scan(own_folder)
    together._tell_of(found, All(data=own_folder, size=32))
    said = capsys.readouterr().err
    assert "classes by the sub-folders: 2: circle, square" in said
    assert "--init none" not in said, "a red square: these are words that it knows"
    german = replace(found, entries=tuple(replace(e, caption=f"ein roter Kreis, {e.name} gezeichnet") for e in found.entries))
    together._tell_of(german, All(data=own_folder, size=32))
    assert "are not known to the text encoder begun from: --init none learns your own" in capsys.readouterr().err
    few = replace(found, entries=tuple(replace(e, caption=None if i % 5 else e.caption) for i, e in enumerate(found.entries)))
    together._tell_of(few, All(data=own_folder, size=32))
    assert "pictures have captions: words will reach little beyond" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"), [(["--effort", "0"], "effort (=0.0)"), (["--size", "40"], "size (=40)"), (["--init", "nowhere"], "nowhere")]
)
def test_mistakes_are_named(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "all", "--data", str(own_folder), "--out", str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_copies_of_one_picture_are_too_few(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = next(own_folder.rglob("*.png")).read_bytes()
    for path in own_folder.rglob("*.png"):
        path.write_bytes(one)
    with pytest.raises(SystemExit):
        main(["train", "all", "--data", str(own_folder), "--out", str(tmp_path / "out")])
    assert "holds 1 different pictures: 8 at least" in capsys.readouterr().err


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


if __name__ == "__main__":
    lives(Path(sys.argv[1]), Path(sys.argv[2]), bool(sys.argv[3]))
