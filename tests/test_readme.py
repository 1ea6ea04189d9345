"""The README must not lie: its commands and its Python run, its paths exist, and both languages say the same."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.apps.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
NEEDS_MODEL = ("generate", "styles", "concepts")
REGISTRIES = ("pypi.org", "pythonhosted.org", "download.pytorch.org", "npmjs", "anaconda.org", "conda.io", "huggingface.co", "hf.co", "docker.io")


class ParsedError(Exception):
    """Training was asked for, and all of its flags were understood."""


def blocks(name: str) -> Iterator[tuple[str, list[str]]]:
    """The code blocks of a README, as (language, lines): fenced ones, and indented ones, which have none."""
    language, lines = None, []
    for line in [*(ROOT / name).read_text().splitlines(), "end"]:
        if line.startswith("```"):
            if lines:
                yield language or "", lines
            language, lines = (line[3:].strip() if language is None else None), []
        elif language is not None:
            lines.append(line)
        elif line.startswith("    "):
            lines.append(line[4:])
        elif lines and line.strip():
            yield "", lines
            lines = []


def shell(name: str) -> list[list[str]]:
    """The words of every command line, comments aside. The tree of files is no command."""
    lines = [line for language, lines in blocks(name) if language in ("", "sh", "bash") and lines[0] != "sfumato/" for line in lines]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def commands(name: str) -> list[list[str]]:
    """What follows `sfumato` in the lines to be typed as they stand."""
    return [words[1:] for words in shell(name) if words[0] == "sfumato" and "·" not in words]


def python(name: str) -> list[str]:
    return ["\n".join(lines) for language, lines in blocks(name) if language == "python"]


def tree(name: str) -> list[Path]:
    """The paths of the tree of files: the first column, two spaces of indentation a folder."""
    parents: list[str] = []
    found = []
    for line in next(lines for _, lines in blocks(name) if lines[0] == "sfumato/"):
        depth = (len(line) - len(line.lstrip())) // 2
        for entry in re.split(r"\s{2,}", line.strip())[0].split():
            parents[depth:] = [entry]
            found.append(Path(*parents))
    return found


def inline_flags(name: str) -> set[str]:
    """The flags in the prose, as in `--recipe.kl 0.002`; those of other programs aside."""
    quoted = re.findall(r"`([^`\n]+)`", (ROOT / name).read_text())
    return {word for words in map(str.split, quoted) if words[0].startswith("--") for word in words if word.startswith("--")}


@pytest.fixture(scope="module")
def packed(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("readme") / "packed.safetensors"
    main(["pack", str(smoke / "diffusion"), "--out", str(out)])
    return str(out)


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny runs and a tiny checkpoint for what a reader has by then."""
    from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
    from sfumato.codecs.bottlenecks.kl import KLConfig
    from sfumato.codecs.bottlenecks.vq import VQConfig
    from sfumato.codecs.convnets import ConvnetConfig
    from sfumato.codecs.resnets import ResnetConfig
    from sfumato.convert.taming import write_vqgan
    from sfumato.train.autoencoder import AutoencoderRecipe, train
    from sfumato.train.loop import LoopConfig

    out = tmp_path_factory.mktemp("codecs")
    net = ConvnetConfig(image_channels=3, widths=(16,), encoder_blocks=(0,), decoder_blocks=(0,))
    base = AutoencoderRecipe(codec=AutoencoderConfig(convnet=net, bottleneck=VQConfig(size=8, channels=4)), size=8, perceptual=0.0, limit=12)
    vae = replace(base, codec=AutoencoderConfig(convnet=replace(net, vector=4), bottleneck=KLConfig(channels=4)), likelihood=True)
    for name, recipe in (("doctor", base), ("sample", vae)):
        train(recipe, LoopConfig(images=16, batch_size=8, warmup=8, save_every=16, sample_every=16, device="cpu"), out / name)
    small = ResnetConfig(width=32, multipliers=(1, 1), blocks=1, attention=(), resolution=16, z_channels=4)
    codec = Autoencoder(AutoencoderConfig(convnet=small, bottleneck=VQConfig(size=8, channels=4, cosine=False)))
    write_vqgan(codec, out / "convert" / "last.ckpt")
    return {name: out / name for name in ("doctor", "sample", "convert")}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of the trainers, which end before they begin."""
    from sfumato.apps import together
    from sfumato.train import autoencoder, diffusion, embedding, finetune, gan, judge, lora, prior, text, upscaler

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def train(*args: Any, **options: Any) -> None:
        calls.append((args, options))
        raise ParsedError

    for module in (autoencoder, text, diffusion, prior, gan, upscaler, judge, lora, embedding, finetune):
        monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(together, "run", train)
    return calls


def write_learned(model: Path, run: Path) -> None:
    """A LoRA of this model, where a run of `train lora` has one."""
    from sfumato.convert.kohya import Lora, write_lora
    from sfumato.nn.lora import Delta, chosen
    from sfumato.pipelines.load import load

    networks = load(model, device="cpu").networks  # type: ignore[attr-defined]
    name, layers = next((n, chosen(m, "attention")) for n, m in networks.items())
    shapes = {n: m.weight.shape for n, m in layers.items()}
    run.mkdir(parents=True, exist_ok=True)
    changes = {n: Delta(torch.ones(1, s[1]) * 0.01, torch.ones(s[0], 1)) for n, s in shapes.items()}
    write_lora(Lora({name: changes}, {}), run / "model-000001k.safetensors")


def runnable(argv: list[str], packed: str, folder: Path) -> list[str]:
    """The same command with a tiny model, and one step where it does not say how many; --from has the steps of its picture.

    What is measured is that model, or a folder for the two that a reader has, and a few pictures instead of thousands.
    """
    if argv[0] == "evaluate":
        own = {"samples": str(folder), "DIR": str(folder)}
        subject, *more = argv[1:]
        few = ["--count", "12", "--steps", "1", "--repeats", "2", "--metrics", "pairwise,distribution,diversity,memorisation,text"]
        return ["evaluate", packed if subject == "emoji" else own[subject], *(own.get(a, a) for a in more), *few]
    steps = argv[0] == "generate" and "--steps" not in argv and "--from" not in argv
    mine = argv[0] in NEEDS_MODEL and "sd15.safetensors" not in argv
    return [*argv, *(["--model", packed] if mine else []), *(["--steps", "1"] if steps else [])]


# --- what can be run --------------------------------------------------------------------------------------------------------------------------


def test_there_is_something_to_check() -> None:
    for name in READMES:
        kinds = [argv[0] for argv in commands(name)]
        assert kinds.count("generate") >= 4
        assert kinds.count("train") >= 3
        assert "pack" in kinds
        assert len(python(name)) == 1
        assert len(tree(name)) > 15
        assert {"--style", "--from", "--plan", "--recipe.kl"} <= inline_flags(name)


@pytest.mark.parametrize("name", READMES)
def test_commands_run_in_order(
    name: str,
    packed: str,
    codecs: dict[str, Path],
    smoke: Path,
    stable: Path,
    own_folder: Path,
    tmp_path: Path,
    no_training: list[tuple[tuple[Any, ...], dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (16, 16), 255).save("mask.png")
    made: set[str] = {"emoji"}  # what is bundled, and the run folders that earlier lines make
    for argv in commands(name):
        if any(word.startswith(("sd15.", "style.")) for word in argv):
            shutil.copytree(stable, tmp_path, dirs_exist_ok=True)
        before = {p for p in tmp_path.rglob("*") if p.is_file()}
        if argv[0] == "train":
            with pytest.raises(ParsedError):
                main(argv)
            args, options = no_training[-1]
            assert {str(v) for k, v in options.items() if k in ("codec", "text")} <= made
            made |= {str(a) for a in args if isinstance(a, Path)}
            continue
        if argv[0] in ("doctor", "sample"):
            assert argv[1] in made
            shutil.copytree(codecs[argv[0]], tmp_path / argv[1], dirs_exist_ok=True)
        if learned := next((word.partition(":")[0] for word in argv if word.startswith("runs/my-")), None):
            assert learned in made
            write_learned(Path("sd15.safetensors") if "sd15.safetensors" in argv else Path(packed), tmp_path / learned)
        if argv[0] == "convert" and argv[1].endswith("last.ckpt"):
            shutil.copy(codecs["convert"] / "last.ckpt", tmp_path)
        if argv[0] == "pack":
            assert argv[1] in made
            shutil.copytree(smoke / "diffusion", tmp_path / argv[1])
        try:
            main(runnable(argv, packed, own_folder))
        except SystemExit as e:
            raise AssertionError(f"sfumato {shlex.join(argv)}: {capsys.readouterr().err}") from e
        result = capsys.readouterr().out.strip().splitlines()[-1]
        if argv[0] == "generate":
            with Image.open(result) as image:
                assert image.size > (0, 0)
            assert {p for p in tmp_path.rglob("*") if p.is_file()} > before
        if "--from" in argv and "webui.png" not in argv:
            assert Path(result).read_bytes() == Path(argv[argv.index("--from") + 1]).read_bytes(), "not the identical picture"


@pytest.mark.parametrize("name", READMES)
def test_every_command_and_flag_that_is_named_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lists = [" ".join(words[1:]) for words in shell(name) if words[0] == "sfumato" and "·" in words]
    named = {part.split()[0] for line in lists for part in line.split("·")} | {argv[0] for argv in commands(name)}
    assert named == set(COMMANDS)
    known: set[str] = set()
    for argv in (
        ["generate"],
        ["pack"],
        ["evaluate"],
        ["sample"],
        ["convert"],
        ["train", "autoencoder", "--preset", "vqgan", "recipe.codec.bottleneck:vq-config"],
        *(["train", what] for what in ("all", "autoencoder", "text", "diffusion", "prior", "gan", "lora", "embedding")),
    ):
        with pytest.raises(SystemExit) as done:
            main([*argv, "--help"])
        assert not done.value.code
        known |= set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out.replace("_", "-")))
    assert {flag.replace("_", "-") for flag in inline_flags(name)} <= known


@pytest.mark.parametrize("name", READMES)
def test_python_runs(name: str, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.pipelines.load import load

    monkeypatch.setitem(vars(sfumato), "load", lambda: load(packed))
    names: dict[str, Any] = {}
    for code in python(name):
        exec(compile(code, name, "exec"), names)
    assert len(names["images"]) == 4
    assert all(isinstance(image, Image.Image) and image.mode == "RGBA" for image in names["images"])


# --- what can be looked up --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name: str) -> None:
    assert [str(path) for path in tree(name) if not (ROOT / path).exists()] == []
    folders = {p.name for p in (ROOT / "sfumato").iterdir() if p.is_dir() and not p.name.startswith("_")}
    assert folders <= {path.name for path in tree(name)}, "a folder is missing in the tree"
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_make_and_pip_lines_name_what_there_is(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in shell(name) if words[0] == "make"]
    assert targets
    assert [t for t in targets if f"\n{t}:" not in makefile] == []
    for words in (words for words in shell(name) if words[0] == "pip"):
        assert all((ROOT / words[i + 1]).exists() for i, w in enumerate(words) if w in ("-c", "-r", "-e"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", (ROOT / name).read_text())) <= set(extras)


@pytest.mark.parametrize("name", READMES)
def test_no_line_names_a_registry(name: str) -> None:
    text = (ROOT / name).read_text()
    assert [line for line in text.splitlines() if any(host in line for host in REGISTRIES)] == []
    assert "index-url" not in text


def test_both_languages_have_the_same_commands() -> None:
    ours, theirs = ([[w for w in words if "·" not in words or w in COMMANDS] for words in shell(name)] for name in READMES)
    assert ours == theirs
    code, code2 = (re.sub(r'"[^"]*"|#.*', "", "\n".join(python(name))) for name in READMES)  # the prompt is in the reader's language
    assert code == code2
    assert tree(READMES[0]) == tree(READMES[1])
    assert inline_flags(READMES[0]) == inline_flags(READMES[1])
