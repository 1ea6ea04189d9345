"""`sfumato sample`, `sfumato convert` and `sfumato doctor`: what a codec draws by itself, foreign checkpoints, and what is wrong with a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sfumato.apps.cli import OUT, say
from sfumato.apps.draw import check_targets
from sfumato.core.checkpoint import FileError, write_bytes
from sfumato.core.language import translated
from sfumato.core.runlog import read_log

if TYPE_CHECKING:
    from sfumato.codecs.autoencoder import Autoencoder


@dataclass(frozen=True)
class Sample:
    """Draws from a VAE (`sfumato train autoencoder --preset vae`), or goes from one picture to another in a codec's latents."""

    model: Annotated[str, tyro.conf.Positional]
    """A run folder or a model file with a codec."""
    count: int = 16
    """Pictures."""
    seed: int = 0
    """Picture i has seed + i."""
    prior: Literal["fitted", "normal"] = "fitted"
    """Where latents are drawn from: where pictures were encoded to, or N(0, I)."""
    between: tuple[Path, Path] | None = None
    """Two pictures: the way from the first to the second instead."""
    out: Path | None = None
    """The PNG to write; without it one in sfumato-out/."""
    force: bool = False
    """Overwrite a file that exists."""


@dataclass(frozen=True)
class Convert:
    """Reads a VQGAN, a VQModel or the autoencoder of a Stable Diffusion into a model of ours, or writes ours or a Stable Diffusion for others."""

    source: Annotated[Path, tyro.conf.Positional]
    """A .ckpt, .pt or .safetensors, a folder of a VQModel, or with --to a model of ours."""
    target: Annotated[Path, tyro.conf.Positional]
    """The file to write; with --to diffusers a folder."""
    to: Literal["sfumato", "taming", "diffusers", "single"] = "sfumato"
    """The layout to write."""
    half: bool = False
    """Of Stable Diffusion: numbers of 16 bits."""
    size: int | None = None
    """Of an autoencoder that becomes ours: the side of the pictures that models on it will draw."""
    prediction: Literal["auto", "eps", "v"] = "auto"
    """What a checkpoint of Stable Diffusion predicts, where its file does not say."""
    force: bool = False
    """Overwrite what exists."""


@dataclass(frozen=True)
class Doctor:
    """Says what is wrong with a run of train autoencoder or train gan, finished or still running, and what helps; writes a page to look at."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    out: Path | None = None
    """The HTML page; without it doctor.html in the run folder."""


def run_sample(asked: Sample) -> Iterator[str]:
    """Writes one sheet of pictures."""
    from sfumato.core.images import decode, grid, png_bytes
    from sfumato.pipelines.codec import load_codec

    if asked.count < 1:
        raise ValueError(f"count (={asked.count}) must be at least 1")
    out = asked.out or OUT / f"sample-{asked.seed}.png"
    check_targets([out], asked.force or asked.out is None)
    loaded = load_codec(asked.model)
    if asked.between:
        images = loaded.between(*(decode(p.read_bytes()) for p in asked.between), frames=asked.count)
    else:
        images = loaded.draw(asked.count, asked.seed, fitted=asked.prior == "fitted")
    told = {"model": loaded.hash, "seed": asked.seed, "count": asked.count, "prior": asked.prior, "between": [str(p) for p in asked.between or ()]}
    write_bytes(out, png_bytes(grid(images, columns=8), {"sfumato-sample": json.dumps(told)}))
    yield str(out)


def run_convert(asked: Convert) -> Iterator[str]:
    """Converts; says what was found."""
    if asked.target.exists() and not asked.force:
        raise FileError(f"{asked.target} exists: use --force to overwrite it, or name another")
    if asked.to == "diffusers" and asked.target.suffix:
        raise ValueError(f"target (={str(asked.target)!r}) must be a folder: name it without an ending")
    if asked.to in ("single", "diffusers") and _of_stable_diffusion(asked.source):
        yield from _convert_stable(asked)
        return
    if asked.to == "single":
        raise ValueError(f"source (={str(asked.source)!r}) must be a checkpoint of Stable Diffusion to be written as a single file")
    from sfumato.convert.taming import SecondStageError, read_model, read_vqgan, to_pack, whole_pack, write_vqgan
    from sfumato.core.pack import save_pack
    from sfumato.pipelines.codec import load_codec

    if asked.to == "sfumato" and _holds_kl(asked.source):
        codec, network = _kl_of(asked.source), None
        say("note: the autoencoder alone is taken, as a codec to train on; --to diffusers and --to single write whole checkpoints")
        save_pack(asked.target, *to_pack(codec, asked.size))
    elif asked.size is not None:
        raise ValueError(f"size (={asked.size}) must be left out: it is for the autoencoder of a Stable Diffusion")
    elif asked.to == "sfumato":
        try:
            codec, network = read_model(asked.source)
        except SecondStageError as e:
            say(f"warning: {e}; the codec alone is written")
            codec, network = read_vqgan(asked.source), None
        save_pack(asked.target, *(to_pack(codec) if network is None else whole_pack(codec, network)))
        if network is not None:
            classes = f"{network.config.labels:,} classes" if network.config.labels else "no classes"
            say(f"with a transformer over its codes, {classes}: sfumato generate --model {asked.target} draws")
    else:
        codec = load_codec(asked.source).codec
        if asked.to == "taming" and not asked.target.suffix:
            raise ValueError(f"target (={str(asked.target)!r}) must end in .ckpt or .safetensors")
        write_vqgan(codec, asked.target)
    c = codec.config
    size = sum(p.numel() for p in codec.parameters())
    codes = f"{codec.spec.codebook_size:,}"
    if c.discrete:
        say(f"a {c.bottleneck.kind} codec: f{c.convnet.factor}, {codes} codes of {c.bottleneck.channels}, {size / 1e6:.1f} M parameters")
    else:
        say(f"a kl codec: f{c.convnet.factor}, latents of {c.bottleneck.channels} channels, {size / 1e6:.1f} M parameters")
    yield str(asked.target)


def _holds_kl(source: Path) -> bool:
    """Whether a file or a folder is of Stable Diffusion, or its autoencoder alone."""
    from sfumato.convert.about import about
    from sfumato.convert.diffusers import read_json

    if source.is_dir():
        folder = source / "vae" if (source / "vae").is_dir() else source
        told = folder / "config.json"
        return told.exists() and read_json(told).get("_class_name") in ("AutoencoderKL", "AutoencoderTiny")
    return source.exists() and any(kind in about(source)["what"] for kind in ("of Stable Diffusion", "tiny autoencoder"))


def _kl_of(source: Path) -> Autoencoder:
    from sfumato.codecs.autoencoder import Autoencoder
    from sfumato.convert.stable import read_codec

    found = read_codec(source)
    if not isinstance(found, Autoencoder):
        raise FileError(f"{source} is a tiny autoencoder, which is no codec to train on: it draws with `sfumato generate --vae`")
    return found


def _of_stable_diffusion(source: Path) -> bool:
    from sfumato.convert.compvis import UNET
    from sfumato.convert.header import read_header

    if source.is_dir():
        return (source / "model_index.json").exists()
    if source.suffix == ".safetensors" and source.exists():
        return any(name.startswith(UNET) for name in read_header(source)[0])
    return source.suffix in (".ckpt", ".pt", ".pth")


def _convert_stable(asked: Convert) -> Iterator[str]:
    from sfumato.convert.stable import read_checkpoint, write_folder, write_single

    if asked.to == "single" and asked.target.suffix != ".safetensors":
        raise ValueError(f"target (={str(asked.target)!r}) must end in .safetensors")
    say(f"reading {asked.source}")
    found = read_checkpoint(asked.source, prediction=asked.prediction)
    for note in found.notes:
        say(f"note: {note}")
    say(f"writing {asked.target}")
    (write_single if asked.to == "single" else write_folder)(found, asked.target, half=asked.half)
    size = sum(p.numel() for p in found.unet.parameters()) / 1e6
    say(f"Stable Diffusion {found.version}, predicts {found.scheduler.prediction}, a UNet of {size:.0f} M parameters")
    yield str(asked.target)


# --- the doctor -----------------------------------------------------------------------------------------------------------------------------------

CURVES = (  # titles and the keys of a log that are drawn together
    ("Held-out pictures: PSNR", ("psnr", "train_psnr")),
    ("Held-out pictures: SSIM", ("ssim",)),
    ("Held-out pictures: distance of features, kernel distance", ("distance", "kernel")),
    ("Detail that copies keep", ("detail",)),
    ("Codes in use: share, and perplexity as a share", ("usage", "perplexity_share", "held_out_usage")),
    ("Bits a value (the bound on the likelihood)", ("bits",)),
    ("Latent channels that say something", ("live_channels",)),
    ("Loss", ("loss", "codec/loss", "discriminator/loss")),
    ("Discriminator: share of patches taken for what they are", ("discriminator/real_right", "discriminator/fake_right")),
    ("Adversarial weight: found on the last layer, and as used", ("codec/adaptive", "codec/adversarial_weight")),
    ("What is drawn: kernel distance, and diversity (of real pictures 1)", ("kid", "diversity")),
    ("Scores of training, held-out and drawn pictures", ("train_score", "held_out_score", "drawn_score")),
    ("Gradients", ("discriminator/grad_norm", "generator/grad_norm")),
    ("ADA's probability, and the weight of penalties", ("ada_p", "penalty_weight")),
    ("Pictures a second", ("images_per_s",)),
)


FEW_LOOKS = 3


def run_doctor(asked: Doctor) -> Iterator[str]:
    """The findings as lines, then where the page is."""
    from sfumato.train.doctor import diagnose, facts_of
    from sfumato.train.loop import begun_with

    run = asked.run / "codec" if (asked.run / "codec" / "log.jsonl").exists() else asked.run  # of train all
    log = run / "log.jsonl"
    if not log.exists():
        raise FileError(f"{run} holds no log.jsonl: name a run folder of `sfumato train autoencoder` or `sfumato train gan`")
    kind = (begun_with(run) or {}).get("kind", "autoencoder")
    if kind not in ("autoencoder", "gan"):
        raise ValueError(
            f"{run} is a run of `sfumato train {kind}`: the doctor knows those of train autoencoder and gan; "
            "of this one look at samples/ and at validation_loss in log.jsonl"
        )
    lines = read_log(log)
    findings = diagnose(lines, facts_of(run))
    for f in findings:
        yield f"{f.name}: {translated(f.says)}"
    if not findings:
        looks = sum("score" in line or "psnr" in line or "kid" in line for line in lines)
        early = f"too early to say: the log holds {looks} looks, and the doctor wants {FEW_LOOKS}"
        yield translated("nothing is wrong, as far as the log tells" if looks >= FEW_LOOKS else early)
    out = asked.out or run / "doctor.html"
    write_bytes(out, _page(run, kind, lines, [(f.name, f.sees, f.helps) for f in findings]).encode())
    yield str(out)


def _page(run: Path, kind: str, lines: list[dict[str, Any]], findings: list[tuple[str, str, str]]) -> str:
    import html

    from PIL import Image

    from sfumato.core.checkpoint import checkpoints
    from sfumato.core.report import Curve, Shot, facts, page, picture, svg

    parts = [f'<p class="remark"><b>{html.escape(n)}</b>: {html.escape(translated(f"{s}; what helps: {h}"))}</p>' for n, s, h in findings]
    parts = parts or [f'<p class="remark">{html.escape(translated("nothing is wrong, as far as the log tells"))}</p>']
    last = {k: v for line in lines for k, v in line.items() if not isinstance(v, str)}
    parts.append(
        facts(
            {
                k: last[k]
                for k in ("images", "psnr", "ssim", "distance", "kernel", "usage", "perplexity", "bits", "kid", "diversity", "skipped")
                if k in last
            }
        )
    )
    for title, keys in CURVES:
        drawn = {k: [(line["images"], line[k]) for line in lines if k in line and "images" in line] for k in keys}
        drawn = {k: v for k, v in drawn.items() if v}
        if drawn:
            parts.append(f"<h2>{html.escape(title)}</h2>{svg(Curve(title, 'images', '', drawn))}")
    samples = sorted((run / "samples").glob("*.png"))
    if samples:
        shown = "Held-out pictures, each with its copy" if kind == "autoencoder" else "What it draws"
        parts.append(f"<h2>{shown}</h2>{picture(Shot(samples[-1].stem, Image.open(samples[-1])))}")
    if kind == "autoencoder" and checkpoints(run, "model"):
        parts += _codebook(run)
    said = [f"{line['images']:,}: {translated(line['says'])}" + _acted(line) for line in lines if "says" in line]
    if said:
        parts.append("<h2>What was said on the way</h2><ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in said) + "</ul>")
    return page(f"{run.name}: doctor", parts)


def _acted(line: dict[str, Any]) -> str:
    """What a remedy did, where one did something that the words do not say themselves."""
    return f" → {translated(line['action'])}" if "finding" in line and "action" in line else ""


def _codebook(run: Path) -> list[str]:
    """The newest codec's codes as pictures, and how often each was chosen."""
    from sfumato.core.report import Curve, Shot, facts, picture, svg
    from sfumato.pipelines.codec import load_codec

    found = load_codec(run).codebook()
    if found is None:
        return []
    image, use, counts = found
    text = "every code as a patch of nothing else, the most used first"
    some = counts[:: max(1, len(counts) // 256)]
    curve = svg(Curve("use", "codes, the most used first", "times chosen in 512 pictures", {"": [(float(i), float(c)) for i, c in enumerate(some)]}))
    return ["<h2>Codebook</h2>", facts({k: round(v, 4) for k, v in use.items()}), picture(Shot("Codebook", image, text)), curve]
