"""`sfumato train all`: from a folder of one's own pictures to a model that draws, in one command that goes on where it stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from sfumato.apps.cli import say
from sfumato.apps.training import GENERATORS, Pack, _run, pack_run, plan
from sfumato.core.checkpoint import FileError, cache_folder, checkpoints, disk_of, free_bytes, read_metadata, sweep, write_bytes, write_json
from sfumato.core.config import to_json
from sfumato.core.images import png_bytes
from sfumato.core.request import LONGEST_PROMPT, Device, GenerateRequest
from sfumato.data.folder import Entry, Scan, evenly, near_duplicates, passed_over, pixels_of, pixels_path, same_pictures, scan, split
from sfumato.data.shards import are_shards
from sfumato.data.subjects import classes_in
from sfumato.pipelines.find import find
from sfumato.text.words import strange_words

BUNDLED = "bundled"
SETTINGS = "settings.json"  # in OUT: what it was begun with
SAMPLES = 64
COMPARED = 20_000  # pictures that samples are compared with
MOST_COMPARED = 20_000  # pictures that near-duplicates are looked for among, when a training begins
STRANGE = 0.5  # of the captions' words
FEWEST = 8
COUNTS = (  # pictures below this number: images for codec and denoiser, begun from the bundled model; encoded pictures of each
    (200, 12_000, 100_000, 16),
    (2_000, 30_000, 300_000, 8),
    (20_000, 100_000, 1_000_000, 4),
    (10**12, 400_000, 4_000_000, 2),
)


@dataclass(frozen=True)
class All:
    """Trains everything on a folder or zip of your own pictures: codec, text (where there are captions), generator; packs it, and says how it went.

    Settings are chosen by the number of pictures and the device. Giving the same command again goes on where it stopped.
    """

    data: Path
    """The folder or zip."""
    out: Path = Path("runs/own")
    """Where everything goes; OUT/model.safetensors draws."""
    preset: Literal["auto"] = "auto"
    """auto: chosen by count, size and device."""
    init: str = BUNDLED
    """What to begin from: "bundled", another model file or run folder, or "none" (from nothing; diffusion takes three times as long)."""
    via: Literal["diffusion", "codes"] = "diffusion"
    """What the generator draws: latents, by diffusion, or the codes of a VQGAN, which it fills in (begun from nothing but the text encoder)."""
    size: int = 0
    """Pixels of a side, a multiple of 16; 0 takes 64 on a CPU and 128 on a GPU."""
    effort: float = 1.0
    """How long to train, as a factor."""
    strict: bool = False
    """Refuse where any file is bad."""
    plan: bool = False
    """Only say what it would take."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """One training: what, its settings, and where."""

    what: str
    recipe: Any
    loop: Any
    out: Path


def run(asked: All) -> Path | dict[str, Any]:
    """The packed model; with `plan`, what it would take."""
    from sfumato.nn.backbones import efficientnet_lite0

    if asked.effort <= 0:
        raise ValueError(f"effort (={asked.effort}) must be above 0: 1 is the usual length, 0.5 half of it")
    if asked.size % 16:
        raise ValueError(f"size (={asked.size}) must be a multiple of 16, or 0")
    if are_shards(asked.data):
        data = str(asked.data)
        raise ValueError(
            f"data (={data!r}) is of shards, on which parts are trained one by one: `sfumato train autoencoder`, `text`, `diffusion` or `prior`"
        )
    found = scan(asked.data, strict=asked.strict)
    if (different := len({e.digest for e in found.entries})) < FEWEST:
        raise ValueError(f"{asked.data} holds {different} different pictures: {FEWEST} at least are needed to learn anything and to measure it")
    efficientnet_lite0()  # codec and report need it: better missed now than in the middle
    asked = replace(asked, size=asked.size or _begun(asked.out).get("size") or _usual_size(asked.device))
    stages = stages_for(asked, found)
    _check_init(asked, stages)
    settings = _settings(asked)
    _tell_of(found, asked)
    if asked.plan:
        return whole_plan(asked, stages, found)
    model, done = asked.out / "model.safetensors", [_finished(s) for s in stages]
    _room(asked, [s for s, finished in zip(stages, done, strict=True) if not finished], found)
    _same_command(asked.out, found, settings)
    if all(done) and model.exists() and (asked.out / "report.json").exists():
        say(f"all is done already: its figures are in {asked.out / 'report.json'}")
        return model
    for stage, finished in zip(stages, done, strict=True):
        if finished:
            say(f"{stage.what}: done already")
            continue
        say(f"{stage.what}: {stage.loop.images:,} images, in {stage.out}")
        _run(stage.what, stage.recipe, stage.loop, stage.out, _parts(asked, stages))
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes the first one ends it
        pack_run(Pack(run=stages[-1].out, out=model, force=True))
        say(f"measuring: {SAMPLES} samples beside the pictures")
        report(asked, found, stages, model)
    return model


def _same_command(out: Path, found: Scan, settings: dict[str, Any]) -> None:
    """Notes in OUT what it is of, or raises ValueError where it was begun with other pictures or words: its parts would not fit."""
    if int(os.environ.get("RANK", "0")):
        return  # the first process of several looks and notes
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    same_pictures(out, found, words=True)
    write_json(out / SETTINGS, settings)


def _settings(asked: All) -> dict[str, Any]:
    """The settings that decide what comes out. Raises ValueError where OUT was begun with others."""
    now = {"init": asked.init, "size": asked.size, "seed": asked.seed, "effort": asked.effort, "via": asked.via}
    before = {"via": "diffusion"} | (_begun(asked.out) or now)
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"{name} (={value!r}) must be {before.get(name)!r}, with which {asked.out} was begun: or name another --out")
    return now


def _begun(out: Path) -> dict[str, Any]:
    """The settings that OUT was begun with; nothing where it was not."""
    path = out / SETTINGS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("size"), int):
        raise FileError(f"{path} cannot be read: name another --out, or remove it to begin again")
    return found


def _begun_from(asked: All) -> str:
    """The model that everything begins from; "" for nothing."""
    return {"none": "", BUNDLED: "emoji"}.get(asked.init, asked.init)


def stages_for(asked: All, found: Scan) -> list[Stage]:
    """What is to be trained, in its order."""
    from sfumato.train import autoencoder, diffusion, prior, text

    codec_images, images, each = next(c[1:] for c in COUNTS if len(found.entries) < c[0])
    init = _begun_from(asked)
    scratch = not init
    data = str(asked.data)
    longer = (3 if scratch else 1) * asked.effort
    stages = []

    if asked.via == "codes":  # for which nothing is bundled to begin from
        recipe, loop = autoencoder.preset_vqgan()
        recipe = autoencoder.of_few(replace(recipe, data=data, size=asked.size), len(split(found.entries)[0]))
        stages.append(_stage(asked, "autoencoder", recipe, loop, 3 * codec_images * asked.effort, "codec"))
    else:
        recipe, loop = autoencoder.preset_own()
        loop = replace(loop, lr=1e-3) if scratch else loop
        stages.append(_stage(asked, "autoencoder", replace(recipe, data=data, init=init, size=asked.size), loop, codec_images * longer, "codec"))
    captions = {e.caption for e in split(found.entries)[0] if e.caption}
    if scratch and len(captions) > 1:
        words, loop = text.preset_own()
        stages.append(_stage(asked, "text", replace(words, data=data), loop, loop.images * asked.effort, "text"))
    mute = not captions or (scratch and len(captions) < 2)
    if asked.via == "codes":
        written, loop = prior.preset_own()
        written = replace(written, data=data, each=each)
        if mute:
            written = replace(written, prior=replace(written.prior, text_width=0), memory=False)
        stages.append(_stage(asked, "prior", written, loop, images * asked.effort, "prior"))
        return stages
    drawn, loop = diffusion.preset_own()
    drawn = replace(drawn, data=data, init=init, each=each)
    if mute:
        drawn = replace(drawn, denoiser=replace(drawn.denoiser, text_width=0), memory=False)
    stages.append(_stage(asked, "diffusion", drawn, loop, images * longer, "diffusion"))
    return stages


def _stage(asked: All, what: str, recipe: Any, loop: Any, images: float, name: str) -> Stage:
    batch = loop.batch_size
    images = max(int(images) // batch, 4) * batch
    every = max(images // 4 // batch, 1) * batch
    changed = {"images": images, "save_every": every, "sample_every": every, "warmup": min(loop.warmup, images // 10)}
    changed |= {"device": asked.device, "threads": asked.threads, "seed": asked.seed}
    return Stage(what, recipe, replace(loop, **changed), asked.out / name)


def _usual_size(device: Device) -> int:
    from sfumato.pipelines.load import choose_device

    return 128 if choose_device(device).type == "cuda" else 64


def _parts(asked: All, stages: list[Stage]) -> SimpleNamespace:
    """Codec and text encoder for the denoiser: those of this run, or what it begins from."""
    own = {s.what: s.out for s in stages}
    begun = Path(_begun_from(asked) or "emoji")
    return SimpleNamespace(codec=own["autoencoder"], text=own.get("text", begun))


def _finished(stage: Stage) -> bool:
    states = checkpoints(stage.out, "state")
    try:
        return bool(states) and read_metadata(states[-1])["counters"]["images"] >= stage.loop.images  # type: ignore[index, call-overload]
    except FileError:  # the training itself goes on from the one before
        return False


# --- before it begins ---------------------------------------------------------------------------------------------------------------------------


def _check_init(asked: All, stages: list[Stage]) -> None:
    """Raises ValueError for an `init` that would end a later stage, as it holds other networks."""
    from sfumato.train import autoencoder
    from sfumato.train.conditioned import check_begun

    for s in stages:
        if s.what == "autoencoder" and s.recipe.init:
            autoencoder.check_init(s.recipe)
        if s.what == "diffusion" and s.recipe.init:
            check_begun(s.recipe, s.recipe.denoiser)
        init = _begun_from(asked)
        if s.what in GENERATORS and init:
            text: Any = read_metadata(find(init)).get("text") or {}
            if getattr(s.recipe, s.recipe.part).text_width not in (0, text.get("width")):
                raise ValueError(f"init (={asked.init!r}) must hold a text encoder of the usual width, for there are captions: name another, or none")


def _tell_of(found: Scan, asked: All) -> None:
    """What a user should know of the pictures before time is spent on them."""
    size = asked.size
    train, unseen = split(found.entries)
    captions = sum(e.caption is not None for e in found.entries)
    say(f"{len(found.entries):,} pictures, {captions:,} with captions; {len(unseen)} are kept apart to measure with; {len(found.bad)} files are bad")
    for b in found.bad[:5]:
        say(f"warning: {b.name} {b.reason}")
    if len(found.bad) > 5:
        say(f"warning: {len(found.bad) - 5} more: sfumato data check {found.root}")
    if found.others:
        say(f"warning: passed over, as they cannot be read here: {passed_over(found)}")
    _tell_of_words(train, asked)
    small = sum(min(e.width, e.height) < size for e in found.entries)
    soft = sum(any("enlarged" in n for n in e.notes) for e in found.entries)
    if small or soft:
        say(f"warning: {small} pictures are smaller than {size} pixels, {soft} look enlarged: what they lack cannot be learned")
    twins = near_duplicates(train, unseen) if len(found.entries) <= MOST_COMPARED else []
    if len(found.entries) > MOST_COMPARED:
        say(f"note: near-duplicates are not looked for here among more than {MOST_COMPARED:,}: sfumato data check {found.root}")
    if twins:
        a, b = twins[0]
        say(f"warning: {len(twins)} pictures kept apart have near-duplicates that are trained on, such as {b.name} and {a.name}: scores flatter")


def _tell_of_words(train: list[Entry], asked: All) -> None:
    """What can be asked for afterwards: styles, classes, captions; and whether the text encoder knows their words.

    Raises ValueError for styles that cannot be named.
    """
    styles, column, classes = classes_in(train)
    if styles:
        say(f"styles: {', '.join(styles[:6])}{', ...' if len(styles) > 6 else ''}")
    if classes:
        by = "the sub-folders" if column == "folder" else f"the column {column!r}"
        say(f"classes by {by}: {len(classes)}: {', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}")
    captions = [e.caption for e in train if e.caption]
    if captions and len(captions) < len(train) / 2:
        say(f"warning: {len(captions)} of {len(train)} pictures have captions: words will reach little beyond what those show")
    init = _begun_from(asked)
    if not captions or not init:
        return
    share, examples = _strange_words(captions, find(init))
    if share > STRANGE:
        such = ", ".join(examples)
        say(f"warning: {share:.0%} of the captions' words, such as {such}, are not known to the text encoder begun from: --init none learns your own")


def _strange_words(captions: list[str], pack: Path) -> tuple[float, list[str]]:
    """The share of the letters of the captions' different words that are in words which a model was not taught; and some of them."""
    meta: Any = read_metadata(pack)
    known = {w for row in meta["words"].values() for tongue in ("en", "zh", "zh-hant", "emoji") for w in row[tongue] if w}
    some = "\n".join(captions[i] for i in evenly(len(captions), 500))
    strange = strange_words(some, known, filler=meta["filler"])
    return len("".join(strange)) / max(len("".join(strange_words(some, ()))), 1), strange[:3]


def disk_needed(stages: list[Stage], size: int, found: Scan) -> int:
    """Bytes that the checkpoints and latents of stages take at most."""
    import torch

    from sfumato import zoo
    from sfumato.nn.layers import Unfilled

    total, of = 0, {"autoencoder": "codec", "diffusion": "denoiser", "prior": "prior"}
    for s in stages:
        with torch.device("meta"), Unfilled():
            net = zoo.make(to_json(getattr(s.recipe, of[s.what]))) if s.what in of else None
        weights = 4 * sum(p.numel() for p in net.parameters()) if net is not None else 20_000_000
        total += (s.loop.keep + 1) * 5 * weights  # raw, averaged, two moments; and the pack
    latents = sum(s.recipe.each * 16 * (size // 8) ** 2 * 2 for s in stages if s.what in GENERATORS)
    return total + len(found.entries) * latents


def pixels_needed(size: int, pictures: int) -> int:
    """Bytes of so many decoded pictures in the cache folder."""
    return pictures * 4 * (2 * size) ** 2


def _room(asked: All, stages: list[Stage], found: Scan) -> None:
    """Raises FileError where there is too little room for what these stages have yet to write."""
    written = sum(p.stat().st_size for s in stages for p in s.out.rglob("*") if p.is_file())
    missing = sum(len(part) for part in split(found.entries) if stages and not pixels_path(part, 2 * asked.size).exists())
    wanted = {asked.out: disk_needed(stages, asked.size, found) - written, cache_folder(): pixels_needed(asked.size, missing)}
    if disk_of(asked.out) == disk_of(cache_folder()):
        wanted = {asked.out: sum(max(needed, 0) for needed in wanted.values())}
    for place, needed in wanted.items():
        if free_bytes(place) < needed:
            free = free_bytes(place) / 1e9
            raise FileError(f"{place} needs {needed / 1e9:.1f} GB, {free:.1f} GB are free there: make room, or name another --out or SFUMATO_CACHE")


def whole_plan(asked: All, stages: list[Stage], found: Scan) -> dict[str, Any]:
    """Hours, memory and disk of all stages, and when there is something to look at. A few steps of each are timed."""
    _room(asked, stages, found)
    needed = disk_needed(stages, asked.size, found) + pixels_needed(asked.size, len(found.entries))
    facts: dict[str, Any] = {}
    hours, first, memory = 0.0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        parts = _stand_ins(asked, stages, Path(folder))
        for s in stages:
            say(f"timing a few steps of {s.what}")
            with contextlib.redirect_stderr(io.StringIO()):  # their own bars would be of six steps
                facts[s.what] = plan(s.what, SimpleNamespace(recipe=s.recipe, loop=s.loop, out=s.out, **vars(parts)))["plan"]
            if s.what in GENERATORS:
                first = hours + facts[s.what]["encoding_minutes"] / 60 + s.loop.sample_every / facts[s.what]["images_per_s"] / 3600
            hours += facts[s.what]["hours"]
            memory = max(memory, facts[s.what]["memory_GB"])
    say(f"some {hours * 60:.0f} minutes, something to look at after {first * 60:.0f}; {memory:.1f} GB of memory, {needed / 1e9:.1f} GB of disk")
    whole = {"pictures": len(found.entries), "size": asked.size, "hours": round(hours, 2), "first_samples_after_minutes": round(first * 60, 1)}
    whole |= {"memory_GB": memory, "disk_GB": round(needed / 1e9, 2), "device": facts[stages[-1].what]["device"]}
    return {"plan": whole, "stages": {k: {n: v for n, v in f.items() if n not in ("free_disk_GB", "disk_GB")} for k, f in facts.items()}}


def _stand_ins(asked: All, stages: list[Stage], folder: Path) -> SimpleNamespace:
    """A codec and a text encoder of the right size to time with, before there are others."""
    from sfumato.codecs.autoencoder import Autoencoder
    from sfumato.core.pack import load_pack, save_pack
    from sfumato.pipelines.find import find

    tensors, meta = load_pack(find("emoji"))
    if asked.via == "codes":
        shape = stages[0].recipe.codec
        tensors = {f"codec.{k}": v for k, v in Autoencoder(shape).state_dict().items()}
        meta = {"kind": "codec", "codec": to_json(shape)}
    save_pack(folder / "codec.safetensors", {k: v for k, v in tensors.items() if k.startswith("codec.")}, meta | {"size": asked.size})
    return SimpleNamespace(codec=folder / "codec.safetensors", text=Path("emoji"))


# --- after it -----------------------------------------------------------------------------------------------------------------------------------


def report(asked: All, found: Scan, stages: list[Stage], model: Path) -> dict[str, Any]:
    """Says how it went, in OUT/report.json, samples.png and nearest.png: what was drawn, and whether it is new."""
    from sfumato.core.runlog import read_log
    from sfumato.pipelines.find import bundled
    from sfumato.pipelines.likeness import likeness
    from sfumato.pipelines.load import load

    drawing = load(model, device=asked.device, threads=asked.threads)
    train, unseen = split(found.entries)
    once = list({e.digest: e for e in train}.values())  # copies would hide that samples are copies
    sides = [pixels_of(found, [part[i] for i in evenly(len(part), COMPARED)], 2 * asked.size).pixels for part in (once, unseen)]
    requests = [_like(e, drawing, asked.seed + i) for i, e in enumerate(once[i * len(once) // SAMPLES] for i in range(SAMPLES))]
    rival = load("emoji", device=asked.device) if "emoji" in bundled() else None
    result = likeness(drawing, *sides, requests, rival)
    psnr = [line["psnr"] for line in read_log(stages[0].out / "log.jsonl") if "psnr" in line]
    figures = {"pictures": len(found.entries), "unseen": len(unseen), "codec_psnr_of_unseen": psnr[-1] if psnr else None, **result.figures}
    write_json(asked.out / "report.json", figures)
    for name, picture in (("samples", result.samples), ("nearest", result.nearest)):
        write_bytes(asked.out / f"{name}.png", png_bytes(picture))
    say(json.dumps(figures))
    say(honestly(len(found.entries), figures["copies"]))
    return figures


def _like(entry: Entry, model: Any, seed: int) -> GenerateRequest:
    """What to ask for, to get a picture such as this one."""
    prompt = entry.caption[:LONGEST_PROMPT] if entry.caption and model.text is not None else None
    label = next((v for v in entry.labels.values() if v in model.meta["labels"]), None)
    style = entry.labels.get("style") if entry.labels.get("style") in model.styles else None
    return GenerateRequest(prompt=prompt, label=label, style=style, seed=seed, size=model.size)


def honestly(count: int, copies: float) -> str:
    """What that number of pictures can give."""
    if count < 200:
        kind = "so few pictures are learned by heart: expect their looks and close copies of them, not new things"
    elif count < 2_000:
        kind = "hundreds of pictures give their style and mixtures of them; much of what is drawn is still near to one of them"
    else:
        kind = "thousands of pictures are no longer learned by heart; whether what is new can be recognised depends on how long it trains (--effort)"
    return f"{kind}. {copies:.0%} of the samples are copies of a training picture, or nearly: see nearest.png (sample, nearest training picture)"
