"""`sfumato lora`: what one is, a model with them merged, one of how two models differ."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfumato.apps.cli import main
from sfumato.convert.kohya import Lora, write_lora
from sfumato.nn.lora import Delta, chosen, difference
from sfumato.pipelines.load import load


@pytest.fixture(params=["own", "stable"])
def base(request: pytest.FixtureRequest, smoke: Path, stable: Path) -> Path:
    return smoke / "diffusion" if request.param == "own" else stable / "sd15.safetensors"


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    """Of rank 2, of all attention and of the text encoder."""
    g, changes = torch.Generator().manual_seed(0), {}
    for name, network in load(base, device="cpu").networks.items():  # type: ignore[attr-defined]
        shapes = {n: m.weight.shape for n, m in chosen(network, "attention").items()}
        changes[name] = {n: Delta(0.3 * torch.randn(2, s[1], generator=g), 0.3 * torch.randn(s[0], 2, generator=g), 2.0) for n, s in shapes.items()}
    write_lora(Lora(changes, {}), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def drawn(model: Path, **more: object) -> np.ndarray:
    found = load(model, device="cpu")
    sized = {"width": 64, "height": 64} if found.sized else {"size": found.size}
    return np.asarray(found.generate("a fox", seed=1, steps=2, **sized, **more)[0]).astype(int)


def test_a_merged_model_draws_as_the_model_with_its_lora(base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged.safetensors"
    assert main(["lora", "merge", str(base), f"{lora}:0.7", "--out", str(out)]) in (None, 0)
    assert capsys.readouterr().out.strip() == str(out)
    expected = drawn(base, lora=(f"{lora}:0.7",))
    assert np.abs(expected - drawn(base)).max() > 1
    assert np.abs(drawn(out) - expected).max() <= 1
    main(["lora", "merge", str(base), f"{lora}:0.7", "--out", str(tmp_path / "half.safetensors"), "--half"])
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * out.stat().st_size
    assert np.abs(drawn(tmp_path / "half.safetensors") - expected).max() <= 32


def test_what_was_merged_is_extracted_again(base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["lora", "merge", str(base), str(lora), "--out", str(tmp_path / "merged.safetensors")])
    capsys.readouterr()
    main(
        [
            "lora",
            "extract",
            str(tmp_path / "merged.safetensors"),
            str(base),
            "--rank",
            "2",
            "--layers",
            "attention",
            "--out",
            str(tmp_path / "b.safetensors"),
        ]
    )
    said = capsys.readouterr().out
    assert "100.0% of how they differ is in it" in said
    assert np.abs(drawn(base, lora=(str(tmp_path / "b.safetensors"),)) - drawn(base, lora=(str(lora),))).max() <= 1


def test_what_a_lora_is(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["lora", "info", str(lora)])
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert (told["what"], told["rank"]) == ("LoRA", "2")
    assert int(told["layers"]) > 3


def test_the_nearest_change_of_a_rank_is_that_of_the_singular_values() -> None:
    base, tuned = nn.ModuleDict({"a": nn.Linear(6, 5)}), nn.ModuleDict({"a": nn.Linear(6, 5)})
    found, (whole, left) = difference(tuned, base, "linear", 2)
    change = (tuned["a"].weight - base["a"].weight).detach().double()
    s = torch.linalg.svdvals(change)
    assert whole == pytest.approx(float(change.square().sum()))
    assert left == pytest.approx(float(s[2:].square().sum()))
    assert float((change - found["a"].whole()).square().sum()) == pytest.approx(left, rel=1e-5)
    same, _ = difference(base, base, "linear", 2)
    assert same == {}


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["lora"], "lora what? (='') must be one of info, merge, extract"),
        (["lora", "mrge"], "did you mean 'merge'"),
        (["lora", "info", "{photo}"], "cannot be read as a checkpoint"),
        (["lora", "merge", "{base}", "{photo}", "--out", "x.safetensors"], "photo.png"),
        (["lora", "merge", "{base}", "--out", "x.safetensors"], "must be named"),
        (["lora", "merge", "{base}", "{lora}", "--out", "{base}"], "exists: use --force to overwrite it"),
        (["lora", "extract", "{base}", "{base}", "--out", "x.safetensors"], "does not differ from"),
        (["lora", "extract", "{base}", "emoji", "--out", "x.safetensors"], "must be models of the same kind"),
        (["lora", "extract", "{base}", "{base}", "--rank", "0", "--out", "x.safetensors"], "rank (=0)"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], why: str, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"base": stable / "sd15.safetensors", "lora": stable / "style.safetensors", "photo": stable / "photo.png"}
    try:
        code = main([a.format(**names) for a in argv])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err
    assert code == 2
    assert why in said
    assert "Traceback" not in said
    assert not (tmp_path / "x.safetensors").exists()


def test_a_whole_model_is_no_lora(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though its layers are called as parts of LoRAs are."""
    with pytest.raises(SystemExit):
        main(["lora", "info", str(smoke / "diffusion")])
    assert "is no LoRA but latent-diffusion" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "embedding", "finetune"])
def test_a_training_says_how_to_draw_with_what_it_made(
    kind: str, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that it ends with draws, and knows the words that were learned; the plan before it says what samples take."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 90, 0)).save(tmp_path / "photos" / f"{i}.png")
    base, run = str(smoke / "diffusion"), f"runs/my {kind}"
    loop = ["--loop.images", "8", "--loop.batch-size", "4", "--loop.warmup", "0", "--loop.decay", "0", "--recipe.each", "1", "--device", "cpu"]
    word = ["--word", "zkq", "--prompt", "a zkq"] if kind == "embedding" else ["--prompt", "a zkq"]
    argv = ["train", kind, "--base", base, "--data", "photos", "--out", run, *loop, *word]
    if kind == "lora":
        argv += ["--recipe.style", "any", "--recipe.rank", "2"]
    main([*argv, "--plan"])
    assert "samples_minutes" in json.loads(capsys.readouterr().out)["plan"]
    main(argv)
    err = capsys.readouterr().err
    command = shlex.split(next(line for line in err.splitlines() if line.startswith("draw with it: ")).removeprefix("draw with it: "))
    assert command[:3] == ["sfumato", "generate", "a zkq"]
    main([*command[1:], "--steps", "2", "--seed", "1", "--out", "a.png"])
    err = capsys.readouterr().err
    assert (tmp_path / "a.png").exists()
    assert ("is not a word this model knows" in err) == (kind == "finetune"), "what all weights have learned, nobody has written down"
    assert (f"my {kind} on cpu" in err) == (kind == "finetune")
