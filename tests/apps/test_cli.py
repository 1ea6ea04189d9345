"""The command line as a user meets it: real processes, real files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.apps.cli import main
from sfumato.core.images import save_png
from sfumato.core.request import METADATA_KEY, SEVERAL_KEY
from sfumato.pipelines.find import bundled
from sfumato.text.words import of_people


@pytest.fixture(scope="module")
def packed(smoke: Path) -> str:
    main(["pack", str(smoke / "diffusion"), "--out", str(smoke / "packed.safetensors")])
    return str(smoke / "packed.safetensors")


def sfumato(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sfumato.apps.cli", *argv], capture_output=True, text=True, cwd=cwd, timeout=300, env=os.environ)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """main() in this process: (exit status, stdout, stderr)."""
    status = 0
    try:
        main(list(argv))
    except SystemExit as e:
        status = int(e.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_as_a_user_would(packed: str, tmp_path: Path) -> None:
    done = sfumato("generate", "一只猫", "--model", packed, "--seed", "3", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.strip().splitlines()[-1]
    assert path.name == "一只猫-3.png"
    with Image.open(path) as image:
        assert image.mode == "RGBA"
        record = json.loads(image.info[METADATA_KEY])
        assert image.info["parameters"].startswith("一只猫\nSteps: 2")
    assert record["request"]["prompt"] == "一只猫"
    assert "cpu" in done.stderr


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys\nfrom sfumato.apps.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "False"
    assert "generate" in done.stdout


def test_questions_load_no_torch(packed: str) -> None:
    for argv in (["styles"], ["concepts", "grin"], ["info"]):
        full = [*argv, packed] if argv == ["info"] else [*argv, "--model", packed]
        code = f"import sys\nfrom sfumato.apps.cli import main\nmain({full!r})\nprint('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip().splitlines()[-1] == "False", done.stderr


def test_several_pictures_and_from(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat.png"
    status, said, _ = run(capsys, "generate", "a cat", "--model", packed, "--seed", "7", "--count", "4", "--steps", "3", "--out", str(out))
    assert status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat-1.png", "cat-2.png", "cat-3.png", "cat-4.png", "cat-grid.png"]
    assert said.strip().endswith("cat-grid.png")
    again = tmp_path / "again.png"
    status, _, err = run(capsys, "generate", "--from", str(tmp_path / "cat-3.png"), "--model", packed, "--out", str(again))
    assert status == 0, err
    assert again.read_bytes() == (tmp_path / "cat-3.png").read_bytes()
    status, _, _ = run(capsys, "generate", "--from", str(again), "--seed", "8", "--model", packed, "--out", str(tmp_path / "next.png"))
    assert status == 0
    assert (np.asarray(Image.open(tmp_path / "next.png")) != np.asarray(Image.open(again))).any()


def test_a_variation_is_of_the_picture_that_is_named(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "generate", "a cat", "--model", packed, "--seed", "7", "--count", "3", "--steps", "2", "--out", str(tmp_path / "cat.png"))
    argv = ["generate", "--from", str(tmp_path / "cat-3.png"), "--guidance", "5", "--model", packed, "--out", str(tmp_path / "more.png")]
    status, _, err = run(capsys, *argv)
    assert status == 0, err
    with Image.open(tmp_path / "more.png") as image:
        record = json.loads(image.info[METADATA_KEY])
    assert record["seed"] == 9
    assert record["request"]["guidance"] == 5
    assert record["request"]["prompt"] == "a cat"
    status, _, err = run(capsys, "generate", "--from", str(tmp_path / "cat-grid.png"), "--model", packed)
    assert status == 2
    assert "several pictures" in err
    for crafted in ("5", "[]", "{", '[{"request": {}, "seed": Infinity}]'):
        save_png(tmp_path / "crafted.png", Image.new("RGBA", (8, 8)), {SEVERAL_KEY: crafted})
        status, _, err = run(capsys, "info", str(tmp_path / "crafted.png"))
        assert (status, err.count("\n")) == (2, 1)
    assert "seeds: [7, 8, 9]" in run(capsys, "info", str(tmp_path / "cat-grid.png"))[1]


def test_another_models_picture_is_not_passed_off_as_the_same(packed: str, smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat.png"
    run(capsys, "generate", "a cat", "--model", packed, "--seed", "7", "--steps", "2", "--out", str(out))
    again = ["generate", "--from", str(out), "--model", str(smoke / "diffusion"), "--out", str(tmp_path / "x.png")]
    status, _, err = run(capsys, *again)
    assert status == 2
    assert "drawn by the model packed" in err
    assert run(capsys, *again, "a cat")[0] == 0


def test_format_and_threads_come_from_the_record(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat.png"
    run(capsys, "generate", "a cat", "--model", packed, "--seed", "7", "--steps", "2", "--dtype", "bf16", "--threads", "1", "--out", str(out))
    run(capsys, "generate", "--from", str(out), "--model", packed, "--threads", "0", "--out", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes() == out.read_bytes()


def test_pictures_of_one_call_do_not_overwrite_each_other(
    packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "generate", "a cat", "a cat!", "A CAT?", "--style", "noto", "--seed", "7", "--steps", "1", "--model", packed)
    assert status == 0, err
    assert len([p for p in (tmp_path / "sfumato-out").iterdir() if "grid" not in p.name]) == 3


def test_foreign_folders_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": []}')
    status, _, err = run(capsys, "info", str(tmp_path))
    assert status == 2
    assert "not the config of a run" in err
    from sfumato.core.images import save_png

    save_png(tmp_path / "odd.png", Image.new("RGBA", (4, 4)), {METADATA_KEY: '{"request": {"prompt": "a"}}'})
    for argv in (["info", str(tmp_path / "odd.png")], ["generate", "--from", str(tmp_path / "odd.png")]):
        status, _, err = run(capsys, *argv)
        assert status == 2
        assert "metadata cannot be read" in err
        assert err.count("\n") == 1


def test_sheet(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    argv = ["generate", "a cat", "一只狐狸", "--style", "all", "--sheet", str(sheet), "--model", packed, "--steps", "1", "--seed", "1"]
    status, said, err = run(capsys, *argv)
    assert status == 0, err
    assert said.strip() == str(sheet)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(sheet) as image:
        assert image.width > 6 * 128
        assert image.height > 2 * 128


BAD: list[tuple[list[str], str]] = [
    (["a cat", "--style", "notto"], "did you mean 'noto'"),
    (["a cat", "--stile", "noto"], "did you mean --style"),
    (["a cat", "--sampler", "eulr"], "did you mean 'euler'"),
    (["a cat", "--size", "100"], "size (=100)"),
    (["a cat", "--size", "big"], "--size"),
    ([""], "prompt is empty"),
    (["x" * 100_000], "100,000 characters"),
    (["a cat", "--steps", "0"], "steps (=0)"),
    (["a cat", "--count", "0"], "count (=0)"),
    (["a cat", "--guidance", "nan"], "guidance"),
    (["a cat", "--seed", "-1"], "seed (=-1)"),
    (["a cat", "--threads", "-1"], "threads (=-1)"),
    (["a cat", "--out", "cat.jpg"], "ends in .png"),
    (["a cat", "--out", "/dev/null/cat.png"], "cannot write"),
    (["a cat", "--dtype", "fp16", "--device", "cpu"], "fp16"),
    (["--from", "/dev/null"], "/dev/null"),
]


@pytest.mark.parametrize(("argv", "named"), BAD, ids=[n for _, n in BAD])
def test_bad_input_is_one_line_and_status_2(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str) -> None:
    out = [] if "--out" in argv else ["--out", str(tmp_path / "x.png")]
    status, said, err = run(capsys, "generate", *argv, "--model", packed, *out)
    assert status == 2
    assert said == ""
    assert named in err
    assert err.startswith("sfumato: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "model.safetensors"
    text.write_text("this is not a model")
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for path, named in (
        (text, "is no safetensors file, or was cut off"),
        (empty, "is no safetensors file, or was cut off"),
        (tmp_path / "gone", "must be a file"),
        (tmp_path, "folder"),
    ):
        status, _, err = run(capsys, "generate", "a cat", "--model", str(path))
        assert status == 2
        assert named in err
        assert err.count("\n") == 1


def test_nothing_is_overwritten_without_force(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat.png"
    out.write_bytes(b"precious")
    argv = ["generate", "a cat", "--model", packed, "--seed", "1", "--steps", "1", "--out", str(out)]
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert "--force" in err
    assert out.read_bytes() == b"precious"
    assert run(capsys, *argv, "--force")[0] == 0
    assert out.read_bytes() != b"precious"


def test_options_without_effect_are_warned_about(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "generate",
        "a cat",
        "--model",
        packed,
        "--steps",
        "1",
        "--out",
        str(tmp_path / "x.png"),
        "--eta",
        "0.5",
        "--negative",
        "dog",
        "--guidance",
        "1",
    ]
    status, _, err = run(capsys, *argv)
    assert status == 0
    assert "warning: eta" in err
    assert "warning: negative" in err


def test_unknown_words_are_named_and_it_draws(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "generate", "a grining face", "--model", packed, "--steps", "1", "--out", str(tmp_path / "x.png"))
    assert status == 0
    assert "'grining' is not a word this model knows; near: grin" in err
    assert (tmp_path / "x.png").exists()


def test_questions(packed: str, smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "styles", "--model", packed)[1].split() == ["twemoji", "noto", "fluent", "fluent-flat", "openmoji", "emojione"]
    assert "😀\tgrinning face\t嘿嘿" in run(capsys, "concepts", "grinning face", "--model", packed)[1]
    status, out, err = run(capsys, "concepts", "grining", "--model", packed)
    assert "grinning face" in out
    assert "nothing is called" in err
    assert "model (latent-diffusion)" in run(capsys, "info", packed)[1]
    assert "training run (diffusion)" in run(capsys, "info", str(smoke / "diffusion"))[1]
    assert "training state" in run(capsys, "info", str(next((smoke / "text").glob("state-*"))))[1]
    status, _, err = run(capsys, "info", str(tmp_path / "gone"))
    assert status == 2
    assert "there is no file" in err
    shown = [line.split("\t") for line in run(capsys, "models")[1].splitlines()]
    assert [(name, Path(file).exists()) for name, _, _, file in shown] == [(name, True) for name in bundled()]


def test_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[0] == 2
    assert run(capsys, "--version")[1].startswith("sfumato 0.")
    status, _, err = run(capsys, "generat")
    assert status == 2
    assert "did you mean 'generate'" in err
    status, out, _ = run(capsys, "generate", "--help")
    assert status == 0
    assert "--style" in out


def test_train_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "codec"
    argv = ["train", "autoencoder", "--preset", "smoke", "--out", str(run_folder), "--loop.images", "160", "--recipe.kl", "0.002"]
    status, out, err = run(capsys, *argv)
    assert status == 0, err
    assert out.strip() == str(run_folder)
    assert json.loads((run_folder / "config.json").read_text())["config"]["kl"] == 0.002
    status, _, err = run(capsys, *argv[:-1], "0.003")
    assert status == 2
    assert "kl in config" in err
    status, out, err = run(capsys, *argv, "--plan")
    assert status == 0, err
    plan = json.loads(out)
    assert plan["recipe"]["kl"] == 0.002
    assert plan["plan"]["hours"] >= 0
    assert plan["plan"]["images_per_s"] > 0
    status, out, err = run(capsys, *argv[:-4], "--loop.images", "16", "--plan")  # shorter than what is timed
    assert status == 0, err
    for bad, named in (
        (["train", "autoencodr"], "did you mean 'autoencoder'"),
        (["train", "text", "--preset", "smok"], "did you mean 'smoke'"),
        (["train", "autoencoder", "--preset", "smoke", "--data", "photos"], "there is no folder or zip photos"),
        (["train", "text", "--preset", "smoke", "--data", "photos", "--recipe.limit", "0"], "there is no folder or zip photos"),
        (["train", "autoencoder", "--preset", "smoke", "--loop.lr", "-1"], "lr"),
    ):
        status, _, err = run(capsys, *bad)
        assert status == 2
        assert named in err
        assert err.count("\n") == 1


def test_pack_refuses_to_overwrite(packed: str, smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "pack", str(smoke / "diffusion"), "--out", packed)
    assert status == 2
    assert "--force" in err


def test_a_plan_counts_all_that_a_run_would_train(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though it is timed with a few concepts only."""
    from sfumato.data.emoji import drawable
    from sfumato.diffusion.dit import DiT
    from sfumato.train.diffusion import preset_smoke

    argv = ["train", "diffusion", "--preset", "smoke", "--codec", str(smoke / "codec"), "--text", str(smoke / "text"), "--plan"]
    status, out, err = run(capsys, *argv, "--recipe.limit", "0", "--recipe.memory")
    assert status == 0, err
    whole = DiT(replace(preset_smoke()[0].denoiser, memory=len(drawable())))
    assert json.loads(out)["plan"]["parameters"] == {"denoiser": sum(p.numel() for p in whole.parameters())}


def test_prompts_from_a_file_and_events_for_programs(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n 一只狐狸 \n", encoding="utf-8-sig")
    argv = [
        "generate",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--model",
        packed,
        "--steps",
        "2",
        "--seed",
        "5",
        "--out",
        str(tmp_path / "p.png"),
    ]
    status, out, err = run(capsys, *argv, "--json")
    assert status == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["begin", "step", "step", "picture", "step", "step", "picture", "end"]
    assert events[0]["prompts"] == ["a cat", "一只狐狸"]
    assert [(e["prompt"], e["seed"]) for e in events if e["event"] == "picture"] == [("a cat", 5), ("一只狐狸", 5)]
    assert all(Path(e["file"]).exists() for e in events if e["event"] == "picture")
    assert [e["done"] for e in events if e["event"] == "step"] == [1, 2, 3, 4]
    assert events[-1]["result"] == str(tmp_path / "p-grid.png")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "gbk.txt").write_bytes("一只猫和一只狗".encode("gb18030"))
    for name, message in (("empty.txt", "holds no prompt"), ("gbk.txt", "is not UTF-8"), ("gone.txt", "cannot be read: No such file")):
        status, _, err = run(capsys, "generate", "--prompts", str(tmp_path / name), "--model", packed)
        assert status == 2
        assert message in err


def test_credits_of_a_model_and_of_a_picture(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sfumato.data.emoji import sources

    lines = run(capsys, "credits", packed)[1].splitlines()
    assert [line.split("\t") for line in lines] == [[s["attribution"], s["licence"], s["home"]] for s in sources().values()]
    cat = tmp_path / "cat.png"
    run(capsys, "generate", "a cat", "--model", packed, "--steps", "1", "--count", "2", "--out", str(cat))
    for name in ("cat-1.png", "cat-grid.png"):
        said = run(capsys, "credits", str(tmp_path / name))[1]
        assert "OpenMoji" in said
        assert "CC-BY-SA-4.0" in said
    save_png(tmp_path / "other.png", Image.new("RGB", (8, 8)))
    status, _, err = run(capsys, "credits", str(tmp_path / "other.png"))
    assert status == 2
    assert "does not say where it comes from" in err


def test_paths_are_told_and_what_is_kept_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "emoji-v1-abc-64.safetensors").write_bytes(b"\0" * 2_000_000)
    (tmp_path / "kept" / "thesis.pdf").write_bytes(b"mine")
    lines = run(capsys, "paths")[1].splitlines()
    assert lines[0] == f"cache\t2.0 MB\t{tmp_path / 'kept'}"
    assert run(capsys, "paths", "--clean")[1].startswith("removed\t2.0 MB\t1 files")
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["thesis.pdf"], "what is not ours stays"


def test_a_changed_init_picture_is_not_passed_off_as_the_same(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doodle, out = tmp_path / "doodle.png", tmp_path / "cat.png"
    Image.new("RGB", (20, 20), "red").save(doodle)
    status, _, err = run(capsys, "generate", "a cat", "--init", str(doodle), "--strength", "0.5", "--model", packed, "--seed", "1", "--out", str(out))
    assert status == 0, err
    assert "Denoising strength: 0.5" in Image.open(out).info["parameters"]
    again = ["generate", "--from", str(out), "--model", packed, "--out", str(tmp_path / "again.png"), "--force"]
    assert run(capsys, *again)[0] == 0
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()
    Image.new("RGB", (20, 20), "blue").save(doodle)
    status, _, err = run(capsys, *again)
    assert status == 2
    assert "it has changed" in err


@pytest.mark.parametrize("name", ["m.webp", "m.gif", "m.png"])
def test_an_animation(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = tmp_path / name
    argv = ["generate", "a cat", "--morph", "a dog", "--morph-style", "noto", "--frames", "4", "--fps", "10", "--steps", "1", "--seed", "1"]
    status, said, err = run(capsys, *argv, "--style", "openmoji", "--model", packed, "--out", str(out))
    assert status == 0, err
    assert said.strip() == str(out)
    with Image.open(out) as image:
        assert image.n_frames == 6  # there and back again, the ends once
        image.seek(1)
        image.load()
        assert image.info["duration"] == 100
    again = tmp_path / f"again-{name}"
    status, _, err = run(capsys, "generate", "--from", str(out), "--model", packed, "--out", str(again))
    assert status == 0, err
    assert again.read_bytes() == out.read_bytes()
    assert {"until prompt: a dog", "until style: noto", "frames: 4", "fps: 10.0"} <= set(run(capsys, "info", str(out))[1].splitlines())
    assert "drawn by the model" in run(capsys, "credits", str(out))[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "x.mp4"], "must end in one of .webp, .gif"),
        (["--frames", "1"], "frames (=1)"),
        (["--fps", "0"], "fps (=0)"),
        (["--morph-style", ""], "morph_style is empty"),
        (["a bird"], "give one prompt"),
    ],
)
def test_an_animation_that_cannot_be(packed: str, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    status, _, err = run(capsys, "generate", "a cat", *more, "--morph", "a dog", "--model", packed)
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        (["--frames", "9"], "frames has no effect without --morph"),
        (["--native", "--size", "16"], "size has no effect together with native"),
        (["--morph", "a dog", "--count", "2", "--frames", "2"], "count has no effect with morph"),
    ],
)
def test_flags_without_effect_are_named(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], warned: str) -> None:
    out = tmp_path / ("m.webp" if "--morph" in more else "a.png")
    status, _, err = run(capsys, "generate", "a cat", "--seed", "1", "--steps", "1", "--model", packed, "--out", str(out), *more)
    assert (status, warned in err) == (0, True), err


def test_every_picture_is_named_and_one_of_another_size_has_a_name_of_its_own(
    packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "a cat", "--seed", "1", "--steps", "1", "--model", packed]
    said = run(capsys, *argv, "--count", "2")[1].split()
    assert run(capsys, *argv, "--count", "2", "--native")[1].split()[-1] == "sfumato-out/a-cat-1-16-grid.png"
    assert said == [f"sfumato-out/a-cat-{n}.png" for n in ("1", "2", "1-grid")]
    assert run(capsys, *argv, "--native", "--force")[1].split() == ["sfumato-out/a-cat-1-16.png"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "a cat", "--seed", "abc"], "--seed (='abc') must be a whole number"),
        (["generate", "a cat", "--threads", "1.5"], "--threads (='1.5') must be a whole number"),
        (["generate", "a cat", "--guidance", "x"], "--guidance (='x') must be a number"),
        (["train", "all", "--data", "x", "--effort", "x"], "--effort (='x') must be a number"),
    ],
)
def test_a_number_that_is_none_is_named(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert said in run(capsys, *argv)[2]


def test_a_folder_of_train_all_is_a_model(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(packed, tmp_path / "model.safetensors")
    (tmp_path / "report.json").write_text("{}")
    out = tmp_path / "a.png"
    assert run(capsys, "generate", "a cat", "--seed", "1", "--steps", "1", "--model", str(tmp_path), "--out", str(out))[0] == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a happy Woman", "woman"),
        ("两个女孩", "女孩"),
        ("a baby with a baby chick", "baby"),
        ("a cat", None),
        ("a childish womanly mango", None),
        ("a baby chick in a woman's hat", None),
        ("a king penguin", None),
    ],
)
def test_prompts_of_people_are_told(prompt: str, named: str | None) -> None:
    assert of_people(prompt, ["baby chick", "woman's hat", "baby", "cat"]) == named


def test_a_variation_of_an_animation_changes_what_is_named_only(packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = tmp_path / "m.webp", tmp_path / "n.webp"
    argv = ["generate", "a cat", "--morph", "a dog", "--frames", "2", "--steps", "1", "--seed", "7", "--style", "noto"]
    assert run(capsys, *argv, "--model", packed, "--out", str(first))[0] == 0
    assert run(capsys, "generate", "--from", str(first), "--seed", "5", "--style", "openmoji", "--model", packed, "--out", str(other))[0] == 0
    told = set(run(capsys, "info", str(other))[1].splitlines())
    assert {"prompt: a cat", "seed: 5", "until prompt: a dog", "until style: openmoji", "until seed: 5", "frames: 2"} <= told


def test_pictures_of_other_programs_hold_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (8, 8), "red")
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + '{"a": 1}'.encode("utf-16-be")}
    image.save(tmp_path / "a.webp", exif=exif)
    image.save(tmp_path / "b.webp", exif=b"Exif\0\0broken")
    image.save(tmp_path / "c.gif", comment=b'by me\n{"a": 1}')
    for name in ("a.webp", "b.webp", "c.gif"):
        assert run(capsys, "info", str(tmp_path / name))[0] == 0
        assert "holds no request of sfumato" in run(capsys, "generate", "--from", str(tmp_path / name))[2]
        assert "does not say where it comes from" in run(capsys, "credits", str(tmp_path / name))[2]
