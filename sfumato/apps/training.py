"""`sfumato train` and `sfumato pack`: recipes from flags, plans, and the small file at the end."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from sfumato.core.checkpoint import FileError, load_tensors
from sfumato.core.config import nearest, to_json

WHAT = ("autoencoder", "text", "diffusion")
PLAN_LIMIT = 24  # concepts that are read to time a few steps


def train(argv: list[str]) -> None:
    """`sfumato train WHAT --preset NAME --data emoji --out RUN [--plan] [--recipe.X ...] [--loop.Y ...]`."""
    if not argv or argv[0] not in WHAT:
        if argv and argv[0] in ("-h", "--help"):
            print(f"usage: sfumato train {{{','.join(WHAT)}}} --preset NAME --out RUN ...")
            return
        given = argv[0] if argv else ""
        raise ValueError(f"train what? (={given!r}) must be one of {', '.join(WHAT)}{nearest(given, WHAT)}")
    from sfumato.apps.cli import parse

    what = argv[0]
    presets = _presets(what)
    name = _preset_name(argv, presets)
    recipe, loop = presets[name]()
    asked = parse(tyro, _arguments(what, recipe, loop, presets, name), argv[1:], f"train {what}")
    if asked.data != "emoji":
        raise ValueError(f"data (={asked.data!r}) must be emoji: the embedded drawings")
    if asked.plan:
        print(json.dumps(plan(what, asked), indent=2, ensure_ascii=False))
        return
    trainer = _run(what, asked.recipe, asked.loop, asked.out, asked)
    if not trainer.accelerator.is_main_process:
        return
    print(f"{asked.out}: {trainer.counters['images']:,} images, {trainer.counters['skipped']} steps skipped", file=sys.stderr)
    print(asked.out)


def _presets(what: str) -> dict[str, Callable[[], tuple[Any, Any]]]:
    match what:
        case "autoencoder":
            from sfumato.train.autoencoder import PRESETS
        case "text":
            from sfumato.train.text import PRESETS
        case _:
            from sfumato.train.diffusion import PRESETS
    return PRESETS


def _preset_name(argv: list[str], presets: dict[str, Any]) -> str:
    """The preset decides the defaults of all other flags, so it is looked for first."""
    name = "bundled"
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
    if name not in presets:
        raise ValueError(f"preset (={name!r}) must be one of {', '.join(presets)}{nearest(name, presets)}")
    return name


def _arguments(what: str, recipe: Any, loop: Any, presets: dict[str, Any], name: str) -> type:
    """The flags of one kind of training, with the preset's values as defaults."""
    parts: list[Any] = []
    if what == "diffusion":
        parts = [("codec", Path, field(default=Path("runs/codec"))), ("text", Path, field(default=Path("runs/text")))]
    made = make_dataclass(
        "Train",
        [
            ("preset", str, field(default=name)),
            ("data", str, field(default="emoji")),
            ("out", Path, field(default=Path("runs") / what)),
            ("plan", bool, field(default=False)),
            *parts,
            ("recipe", type(recipe), field(default=recipe)),
            ("loop", type(loop), field(default=loop)),
        ],
        frozen=True,
    )
    first_line = (presets[name].__doc__ or "").splitlines()[0]
    made.__doc__ = f"Trains: {first_line} Rerunning the same command goes on where it stopped; --plan only says what it would take."
    return made


def _run(what: str, recipe: Any, loop: Any, out: Path, asked: Any, stop_at: int | None = None) -> Any:
    match what:
        case "autoencoder":
            from sfumato.train.autoencoder import train as go
        case "text":
            from sfumato.train.text import train as go  # type: ignore[assignment]
        case _:
            from sfumato.train.diffusion import train as diffusion

            return diffusion(recipe, loop, out, codec=asked.codec, text=asked.text, stop_at=stop_at)
    return go(recipe, loop, out, stop_at=stop_at)


def plan(what: str, asked: Any) -> dict[str, Any]:
    """The resolved settings, and hours, memory, disk and parameters measured on a few steps with little data in a temporary folder."""
    import resource

    recipe, loop = replace(asked.recipe, limit=PLAN_LIMIT), asked.loop
    if what == "diffusion":
        recipe = replace(recipe, each=1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        _run(what, recipe, replace(loop, log_every=loop.batch_size), run, asked, stop_at=2 * loop.batch_size)
        (run / "log.jsonl").unlink()
        trainer = _run(what, recipe, replace(loop, log_every=loop.batch_size), run, asked, stop_at=6 * loop.batch_size)
        speed = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["images_per_s"]
        disk = sum(f.stat().st_size for f in run.glob("*k.safetensors")) / max(len(list(run.glob("state-*"))), 1) * (loop.keep + 1)
    free = shutil.disk_usage(next(p for p in (asked.out, *asked.out.resolve().parents) if p.exists())).free
    facts = {
        "parameters": {n: sum(p.numel() for p in net.parameters()) for n, net in trainer.task.networks.items()},
        "images_per_s": speed,
        "hours": round(loop.images / speed / 3600, 2),
        "memory_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "disk_GB": round(disk / 1e9, 3),
        "free_disk_GB": round(free / 1e9, 1),
        "device": str(trainer.device),
    }
    return {"plan": facts, "recipe": to_json(asked.recipe), "loop": to_json(loop)}


@dataclass(frozen=True)
class Pack:
    """Makes one small file that draws from a finished run."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder of `sfumato train diffusion`."""
    out: Path | None = None
    """The file to write; RUN/packed.safetensors without it."""
    int8: tuple[str, ...] = ("codec.", "text.", "denoiser.")
    """Parts whose matrices are stored as int8 rows; the others are fp16."""
    force: bool = False
    """Overwrite a file that exists."""


def pack_run(asked: Pack) -> Path:
    """Compresses a run's newest pack; returns the file."""
    from sfumato.core.pack import compress, save_pack
    from sfumato.pipelines.find import find

    source = find(asked.run)
    out = asked.out or (asked.run if asked.run.is_dir() else asked.run.parent) / "packed.safetensors"
    if out.exists() and not asked.force:
        raise FileError(f"{out} exists: use --force to overwrite it, or another --out")
    tensors, meta = load_tensors(source)
    small = compress(tensors, int8=asked.int8)
    save_pack(out, small, {k: v for k, v in meta.items() if k != "hash"})
    print(f"{out.stat().st_size / 1e6:.1f} MB from {source.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return out
