"""`sfumato train` and `sfumato pack`: recipes from flags, plans, and the small file at the end."""

from __future__ import annotations

import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from sfumato.apps.cli import say
from sfumato.core.checkpoint import FileError, checkpoints, free_bytes
from sfumato.core.config import from_json, nearest, to_json
from sfumato.core.language import translated
from sfumato.core.request import Device
from sfumato.core.runlog import read_log
from sfumato.pipelines.find import BUNDLED

WHAT = ("all", "autoencoder", "text", "diffusion", "prior", "gan", "upscaler", "judge", "lora", "embedding", "finetune")
TUNED = ("lora", "embedding", "finetune")  # of models that are there
PARTS = {"diffusion": ("codec", "text"), "prior": ("codec", "text"), "gan": ("text",), "upscaler": ("codec",)}  # frozen ones that training needs
GENERATORS = ("diffusion", "prior")  # over the latents or codes of a codec
LARGE = 24_000_000  # bytes that a bundled file may have
EMOJI = "emoji"  # the embedded drawings, as --data
LOOP_FLAGS = ("device", "dtype", "threads", "patience")  # of a loop's fields, those that have a short flag as well
HELPS = {
    "data": "emoji (the embedded drawings), or a folder or zip of pictures.",
    "out": "The run folder: the log, samples, checkpoints, and what is made.",
    "plan": "Only say what it would take.",
    "device": "Where it computes; --loop.device says the same.",
    "dtype": "auto: what this machine is faster in; --loop.dtype says the same.",
    "threads": "Of the CPU; --loop.threads says the same.",
    "patience": "End after so many looks without a better score; 0: never.",
    "codec": "A run of train autoencoder, or its file.",
    "text": "A run of train text, or its file.",
    "init": "A run or file to begin with.",
    "word": "The new word, as prompts will say it.",
    "like": "What it begins as: words that are known.",
    "kind": "How codes are guessed: gpt one by one, maskgit many at once.",
}
OF_TUNED = {
    "data": "A folder or zip of pictures, with captions (x.txt beside x.png) or without.",
    "base": "The model that is tuned: one of ours that draws by diffusion, or a checkpoint of Stable Diffusion; the bundled one without it.",
    "prompt": "Said of pictures without a caption; with braces ({}) in it of all, their captions in that place.",
}
USAGE = """usage: sfumato train WHAT [--preset NAME] [--data DIR] [--out RUN] [--plan] ...

From pictures to a model that draws (emoji, the embedded drawings, or a folder of one's own):
  all          everything at once: a tokenizer and a generator on it
  autoencoder  a tokenizer: VQGAN or KL-VAE
  text         a text encoder for prompts in English and Chinese
  diffusion    a generator over the latents of a KL-VAE
  prior        a transformer over the codes of a VQGAN
  gan          a generator and a discriminator against each other
  upscaler     the enlargement of what a model draws
  judge        a classifier that says what pictures show

With a model that is there (the bundled one, your own, Stable Diffusion):
  lora         a style or a subject, from ten pictures, as a small file
  embedding    a new word for prompts
  finetune     all of its weights, on many pictures

sfumato train WHAT --help says more."""
MOST_TIMED = 32  # steps
PLAN_LIMIT = 24  # concepts that are read to time a few steps


def train(argv: list[str]) -> None:
    """`sfumato train WHAT --preset NAME --data emoji --out RUN [--plan] [--recipe.X ...] [--loop.Y ...]`."""
    from sfumato.apps.cli import asked_how, parse

    if asked_how("train", WHAT, argv, USAGE):
        return
    what = argv[0]
    if what == "all":
        return _all(parse, argv[1:])
    presets = _presets(what)
    name = _preset_name(what, argv, presets)
    recipe, loop = presets[name]()
    asked = parse(tyro, _arguments(what, recipe, loop, presets, name), argv[1:], f"train {what}")
    if asked.data != EMOJI and what == "upscaler":
        raise ValueError(f"data (={asked.data!r}) must be emoji: an enlargement is learned from drawings that are there at any size")
    if what in TUNED:
        asked = replace(asked, recipe=replace(asked.recipe, **_said_of(asked, ("base", "data", "prompt", "word", "like"))))
    elif asked.data != EMOJI:
        asked = replace(asked, recipe=replace(asked.recipe, data=asked.data, limit=0))
    if what == "prior" and asked.kind is not None:
        asked = replace(asked, recipe=replace(asked.recipe, prior=replace(asked.recipe.prior, way=asked.kind)))
    loop, begun = replace(asked.loop, **_said_of(asked, LOOP_FLAGS)), _said_of(asked, ("init",))
    asked = replace(asked, loop=loop, recipe=replace(asked.recipe, **begun))
    from_json(type(asked.recipe), to_json(asked.recipe), "recipe")  # kinds are not flags to choose from
    if asked.plan:
        print(json.dumps(plan(what, asked), indent=2, ensure_ascii=False))
        return
    trainer = _run(what, asked.recipe, asked.loop, asked.out, asked)
    if not trainer.accelerator.is_main_process:
        return
    say(f"{asked.out}: {trainer.counters['images']:,} images, {trainer.counters['skipped']} steps skipped")
    if (command := _next(what, asked, trainer.task)) is not None:
        say(f"draw with it: {command}")
    print(asked.out)


def _next(what: str, asked: Any, task: Any) -> str | None:
    """The command that draws with what was trained, where that can."""
    if what not in (*TUNED, *GENERATORS, "gan"):
        return None
    recipe, prompt = asked.recipe, "PROMPT"
    if what in TUNED and (said := " ".join(recipe.prompt.replace("{}", prompt).split())):
        prompt = said
    elif what == "embedding":
        prompt = f"PROMPT {recipe.word}"
    flag = f"--{what}" if what in ("lora", "embedding") else "--model"
    beside = ["--model", recipe.base] if flag != "--model" and recipe.base != BUNDLED else []
    told = [prompt] if what in TUNED or task.text is not None else []
    return shlex.join(["sfumato", "generate", *told, *beside, flag, str(asked.out)])


def _all(parse: Callable[..., Any], argv: list[str]) -> None:
    from sfumato.apps import together

    done = together.run(parse(tyro, together.All, argv, "train all"))
    print(json.dumps(done, indent=2, ensure_ascii=False) if isinstance(done, dict) else done)


def _presets(what: str) -> dict[str, Callable[[], tuple[Any, Any]]]:
    return import_module(f"sfumato.train.{what}").PRESETS  # type: ignore[no-any-return]


def _said_of(asked: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of some short flags that were given."""
    return {name: value for name in names if (value := getattr(asked, name, None)) is not None}


def _preset_name(what: str, argv: list[str], presets: dict[str, Any]) -> str:
    """The preset decides the defaults of all other flags, so it is looked for first."""
    name = _flag(argv, "--preset") or _usual_preset(what, argv, presets)
    if name not in presets:
        raise ValueError(f"preset (={name!r}) must be one of {', '.join(presets)}{nearest(name, presets)}")
    return name


def _usual_preset(what: str, argv: list[str], presets: dict[str, Any]) -> str:
    """ "own" for one's own pictures, "bundled" for the embedded drawings; of what is tuned "stable" for checkpoints of Stable Diffusion, else the
    first.
    """
    if what not in TUNED:
        return "own" if "own" in presets and _flag(argv, "--data") not in (None, EMOJI) else "bundled"
    from sfumato.pipelines.find import find
    from sfumato.pipelines.load import is_stable

    base = _flag(argv, "--base")
    return "stable" if base and is_stable(find(base, "base")) else next(iter(presets))


def _flag(argv: list[str], flag: str) -> str | None:
    """The last value of a flag, as `--flag value` or `--flag=value`."""
    found = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found


def _arguments(what: str, recipe: Any, loop: Any, presets: dict[str, Any], name: str) -> type:
    """The flags of one kind of training, with the preset's values as defaults."""
    usual = {"codec": Path("runs/vqgan" if what == "prior" else "runs/codec"), "text": Path("runs/text")}
    parts: list[Any] = [(name, Path, field(default=usual[name])) for name in PARTS.get(what, ())]
    if hasattr(recipe, "init"):
        parts.append(("init", str | None, field(default=None)))
    if what in TUNED:
        parts += [(name, str | None, field(default=None)) for name in ("base", "prompt")]
    if what == "embedding":
        parts += [(name, str | None, field(default=None)) for name in ("word", "like")]
    if what == "prior":
        parts.append(("kind", Literal["gpt", "maskgit"] | None, field(default=None)))
    made = make_dataclass(
        "Train",
        [
            ("preset", str, field(default=name)),
            ("data", str | None if what in TUNED else str, field(default=None if what in TUNED else EMOJI)),
            ("out", Path, field(default=Path("runs") / what)),
            ("plan", bool, field(default=False)),
            ("device", Device | None, field(default=None)),
            ("dtype", Literal["auto", "fp32", "bf16"] | None, field(default=None)),
            ("threads", int | None, field(default=None)),
            ("patience", int | None, field(default=None)),
            *parts,
            ("recipe", type(recipe), field(default=recipe)),
            ("loop", type(loop), field(default=loop)),
        ],
        frozen=True,
    )
    first_line = (presets[name].__doc__ or "").splitlines()[0]
    made.__doc__ = f"Trains: {translated(first_line)} Rerunning the same command goes on where it stopped; --plan only says what it would take."
    made.helps = HELPS | {"preset": f"Where all other flags begin: {', '.join(presets)}."} | (OF_TUNED if what in TUNED else {})  # type: ignore[attr-defined]
    return made


def _run(what: str, recipe: Any, loop: Any, out: Path, asked: Any, stop_at: int | None = None) -> Any:
    parts = {name: getattr(asked, name) for name in PARTS.get(what, ())}
    return import_module(f"sfumato.train.{what}").train(recipe, loop, out, stop_at=stop_at, **parts)


def plan(what: str, asked: Any) -> dict[str, Any]:
    """The resolved settings, and what they would take: a few steps are timed in a temporary folder, with little of the embedded drawings or with
    all of one's own pictures, which are decoded for the purpose.

    Memory is this process's peak (host memory; a GPU's is not measured) plus the data that a real run holds.
    """
    own = getattr(asked.recipe, "data", EMOJI) != EMOJI
    recipe, loop = asked.recipe if own else replace(asked.recipe, limit=PLAN_LIMIT), asked.loop
    if what in GENERATORS:
        recipe = replace(recipe, each=1)
    speed, trainer, disk = _timed(what, recipe, loop, asked)
    seconds = loop.images / speed
    if (share := _slower_from(what, recipe)) < 1:
        later, _, _ = _timed(what, _whole(recipe), loop, asked)
        seconds = loop.images * (share / speed + (1 - share) / later)
    data = _data_bytes(what, asked.recipe, trainer)
    encoding = _encoding_seconds(trainer.task, asked.recipe) if what in GENERATORS else 0.0
    looking = _looking_seconds(trainer) * -(-loop.images // loop.sample_every) if what in TUNED else 0.0
    facts = {
        "parameters": _parameters(what, asked.recipe, trainer.task),
        "images_per_s": speed,
        "encoding_minutes": round(encoding / 60, 1),
        **({"samples_minutes": round(looking / 60, 1)} if looking else {}),
        "hours": round((seconds + encoding + looking) / 3600, 2),
        "memory_GB": round((_peak_bytes() + data["memory"]) / 1e9, 2),
        "disk_GB": round((disk * (loop.keep + 1) + data["disk"]) / 1e9, 3),
        "free_disk_GB": round(free_bytes(asked.out) / 1e9, 1),
        "device": str(trainer.device),
        "dtype": trainer.loop.dtype,
    }
    return {"plan": facts, "recipe": to_json(asked.recipe), "loop": to_json(loop)}


def _slower_from(what: str, recipe: Any) -> float:
    """The share of a training from which on its steps have all their parts; 1 where they have them from the start."""
    if what == "lora" and recipe.decoder:
        return recipe.decoder_from  # type: ignore[no-any-return]
    return recipe.perceptual_from if what in ("autoencoder", "upscaler") and recipe.perceptual else 1.0


def _whole(recipe: Any) -> Any:
    """The recipe with all of its parts from the first step on, as the last ones are."""
    if getattr(recipe, "decoder_from", None) is not None:
        return replace(recipe, decoder_from=0.0)
    if getattr(recipe, "adversary", None) is not None:
        recipe = replace(recipe, adversary=replace(recipe.adversary, begins=0.0, joins=0.0, ramp=0.0))
    return replace(recipe, perceptual_from=0.0)


def _timed(what: str, recipe: Any, loop: Any, asked: Any) -> tuple[float, Any, int]:
    """Images per second (not compiled: compiling would be timed too) after two steps of warming up, the trainer, and the bytes of one checkpoint. So
    many steps are timed that what comes every few steps comes as often as in a real run.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        images = max(loop.images, (MOST_TIMED + 4) * loop.batch_size)  # so that these steps are not the end of it
        loop = replace(loop, images=images, compile=False, log_every=loop.batch_size, save_every=images, sample_every=2 * images)
        begun = _run(what, recipe, loop, run, asked, stop_at=2 * loop.batch_size)
        period = min(math.lcm(*(p.every for p in begun.task.phases)), MOST_TIMED)
        steps = period * -(-4 // period)
        trainer = _run(what, recipe, loop, run, asked, stop_at=(2 + steps) * loop.batch_size)
        speed = [line["images_per_s"] for line in read_log(run / "log.jsonl") if "images_per_s" in line][-1]
        newest = [checkpoints(run, kind)[-1] for kind in ("state", "model")]
        return speed, trainer, sum(f.stat().st_size for f in newest)


def _encoding_seconds(task: Any, recipe: Any) -> float:
    """What turning all pictures into latents takes, from the time of some."""
    from sfumato.data.emoji import drawable, pairs

    n = min(64, len(task.shown.pixels))
    whole = len(pairs(drawable())) if recipe.data == EMOJI and not recipe.limit else len(task.shown.pixels)
    began = time.perf_counter()
    task.encode(np.arange(n)).cpu()  # what a GPU has been asked for is waited for
    return (time.perf_counter() - began) / n * whole * recipe.each


def _looking_seconds(trainer: Any) -> float:
    """What a sample grid takes, from the time of one of its pictures."""
    first, *others = trainer.task.looks()
    began = time.perf_counter()
    next(trainer.task.model.pictures(first))
    return (time.perf_counter() - began) * (1 + len(others))


def _parameters(what: str, recipe: Any, task: Any) -> dict[str, int]:
    """Of each network. What was timed knew a few concepts only; what grows with their number is counted for all."""
    import torch

    from sfumato import zoo
    from sfumato.data.emoji import concepts, drawable
    from sfumato.nn.layers import Unfilled
    from sfumato.train.text import IMAGE_WIDTH, Heads

    networks = dict(task.networks)
    with torch.device("meta"), Unfilled():
        if what in GENERATORS and not recipe.limit and recipe.data == EMOJI:
            things = len(drawable())
            labels = things if recipe.labels == "concept" else task.net.labels
            networks |= {k: zoo.make(to_json(replace(task.net, memory=things if recipe.memory else 0, labels=labels))) for k in networks}
        if what == "text" and not recipe.limit and recipe.data == EMOJI:
            networks["heads"] = Heads(recipe.text.width, min(IMAGE_WIDTH, len(concepts()) - 1))
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def _data_bytes(what: str, recipe: Any, trainer: Any) -> dict[str, int]:
    """What a real run's data takes beyond the few drawings of the plan: rasterised drawings, and latents where there are any."""
    from sfumato.data.emoji import concepts, drawable, is_held_out, pairs
    from sfumato.data.shards import are_shards

    if what in TUNED:
        return {"memory": 0, "disk": sum(v.numel() * v.element_size() for v in trainer.task.latents.values())}
    if what == "autoencoder" and are_shards(recipe.data):
        return {"memory": 0, "disk": 0}
    if what == "autoencoder" and recipe.data != EMOJI:
        return {"memory": 0, "disk": (len(trainer.task.train) + len(trainer.task.exact)) * 4 * (2 * recipe.size) ** 2}
    if what in ("judge", "gan") and recipe.data != EMOJI:
        return {"memory": 0, "disk": 0 if are_shards(recipe.data) else trainer.task.shown.pixels.numel()}
    if what in GENERATORS and recipe.data != EMOJI:
        pixels = trainer.task.shown.pixels
        latents = len(pixels) * recipe.each * _bytes_of(trainer.task)
        return {"memory": 0, "disk": latents + (0 if are_shards(recipe.data) else pixels.numel())}
    if recipe.limit or what == "text":
        return {"memory": 0, "disk": 0}
    if what == "upscaler":
        decoded = trainer.task.small[0].numel() * 2 * recipe.each
        large = trainer.task.train.pixels[0].numel()
        return {"memory": len(pairs(drawable())) * (decoded + large), "disk": len(pairs(drawable())) * decoded}
    side = 2 * (recipe.size if what == "autoencoder" else trainer.task.size)
    rasters = len(pairs(concepts())) * 4 * side * side
    if what in ("autoencoder", "judge", "gan"):
        return {"memory": rasters, "disk": rasters}
    trained = sum(not is_held_out(c.hexcode, s) for c, s in pairs(drawable()))
    latents = trained * recipe.each * _bytes_of(trainer.task)
    return {"memory": rasters + latents, "disk": rasters + latents}


def _bytes_of(task: Any) -> int:
    """What one encoded picture takes."""
    encoded = task.latents if hasattr(task, "latents") else task.codes
    return encoded[0].numel() * encoded.element_size()


def _peak_bytes() -> int:
    """The most memory this process ever held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Pack:
    """Makes one small file that draws from a finished run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder of `sfumato train diffusion`, prior or gan."""
    out: Path | None = None
    """The file to write; RUN/packed.safetensors without it."""
    int8: tuple[str, ...] = ("codec.", "text.", "denoiser.", "prior.", "generator.")
    """Parts whose matrices are stored as int8 rows; the others are fp16."""
    force: bool = False
    """Overwrite a file that exists."""


def pack_run(asked: Pack) -> Path:
    """Compresses a run's newest pack; returns the file."""
    from sfumato.core.pack import compress, load_pack, save_pack
    from sfumato.pipelines.find import find

    source = find(asked.run)
    out = asked.out or (asked.run if asked.run.is_dir() else asked.run.parent) / "packed.safetensors"
    if out.exists() and not asked.force:
        raise FileError(f"{out} exists: use --force to overwrite it, or another --out")
    tensors, meta = load_pack(source)
    needless = "discriminator"  # of what draws
    small = compress({k: v for k, v in tensors.items() if not k.startswith(f"{needless}.")}, int8=asked.int8)
    save_pack(out, small, {k: v for k, v in meta.items() if k not in ("hash", needless)})
    if out.stat().st_size > LARGE:
        say(f"warning: {out} is larger than {LARGE / 1e6:.0f} MB: more parts in --int8 make it smaller")
    say(f"{out.stat().st_size / 1e6:.1f} MB from {source.stat().st_size / 1e6:.1f} MB")
    return out
