"""Trains a denoiser over a codec's latents, conditioned on text, style or label (arXiv 2112.10752 on the rectified flow of 2209.03003).

Latents are encoded once, several augmented pictures per drawing, and captions are made anew each time from what those pictures show.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder, measure_latents
from sfumato.core.checkpoint import FileError, hash_tensors, read_metadata
from sfumato.core.config import to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.language import translated
from sfumato.core.pack import load_pack, save_pack
from sfumato.core.rng import derive, numpy_rng, shuffled, torch_rng
from sfumato.core.seams import Cond
from sfumato.data.augment import Scene, Variety, render
from sfumato.data.latents import cached_latents
from sfumato.data.shards import same_source
from sfumato.data.subjects import EMOJI, Labels, subjects
from sfumato.diffusion.dit import DiT, DiTConfig
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.objective import ObjectiveConfig, draw_t, loss
from sfumato.diffusion.path import PathConfig, make_path, timesteps
from sfumato.diffusion.precond import Precond, check_prediction
from sfumato.diffusion.samplers import sample_heun
from sfumato.nn.conditions import silent, without_style, without_text
from sfumato.pipelines.find import find
from sfumato.text.encoder import TextEncoder
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, settled

GENTLE = Variety(place=0.25, scale=(0.75, 1.0), angle=10.0, recolour=0.12, count=0.02, pair=0.02, scene=0.04)
STEADY = replace(GENTLE, place=0.08, flip=0.06, recolour=0.08, count=0.01, pair=0.01, scene=0.03)
CLOSE = Variety(place=0.5, scale=(1.0, 1.1), angle=0.0, flip=0.0, recolour=0.0)  # what a generator of one's own pictures may learn besides
MOST_THINGS = 4096  # different captions that a memory keeps


@dataclass(frozen=True, kw_only=True)
class Drop:
    """How often a condition is withheld, so that guidance has something to lean on."""

    text: float = 0.10
    style: float = 0.10
    both: float = 0.03

    def __post_init__(self) -> None:
        for name in ("text", "style", "both"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"drop.{name} (={getattr(self, name)}) must be between 0 and 1: it is a rate")


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """What decides what a denoiser learns. `each` augmented pictures per drawing are encoded; `limit` takes the first concepts only.

    `data` is "emoji", the embedded drawings, or a folder or zip of one's own pictures; `init` is a pack or run whose denoiser it begins from.
    `memory` gives the denoiser a place to keep what each concept, or caption, looks like (`sfumato.nn.embeddings.Memory`).
    `labels` teaches a class beside (or, with `denoiser.text_width` 0, instead of) captions: the group of a concept ("food-drink") or its name;
    of one's own pictures, "auto", the sub-folder.
    """

    kind: str = "train-diffusion"
    data: str = EMOJI
    denoiser: DiTConfig = field(default_factory=DiTConfig)
    path: PathConfig = field(default_factory=PathConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    drop: Drop = field(default_factory=Drop)
    variety: Variety = GENTLE
    each: int = 12
    labels: Labels = "none"
    limit: int = 0
    memory: bool = False
    init: str = ""

    def __post_init__(self) -> None:
        check_prediction(self.objective.prediction, make_path(self.path))
        if self.each < 1 or self.limit < 0:
            raise ValueError(
                f"each (={self.each}) must be at least 1 and limit (={self.limit}) at least 0: pictures per drawing, and concepts (0: all)"
            )
        if self.data != EMOJI and self.limit:
            raise ValueError(f"limit (={self.limit}) is of the embedded drawings: leave it out for {self.data}")
        if self.memory and not self.denoiser.text_width:
            raise ValueError("memory (=True) compares captions: it needs denoiser.text_width > 0, or must be False")


def preset_bundled() -> tuple[DiffusionRecipe, LoopConfig]:
    """The denoiser of the bundled model: a DiT (arXiv 2212.09748) of 11.8 M parameters over 16 tokens, with a memory of 518 concepts.

    On two cores with AVX512-bf16 some 300 images/s, after three minutes of encoding.

    `sfumato train diffusion --preset bundled --codec runs/codec --text runs/text --out runs/diffusion --loop.compile`
    """
    denoiser = DiTConfig(width=320, heads=5, modulation="block")
    return DiffusionRecipe(denoiser=denoiser, objective=ObjectiveConfig(P_mean=0.6), memory=True), LoopConfig(
        images=1_000_000, batch_size=128, lr=6e-4, warmup=20_000, dtype="auto", log_every=25_600, save_every=100_096, sample_every=100_096
    )  # fmt: skip


def preset_sharpen() -> tuple[DiffusionRecipe, LoopConfig]:
    """The second part of the bundled denoiser's training, from the run of `--preset bundled` on: more of the clean times, where details are drawn.

    `sfumato train diffusion --preset sharpen --codec runs/codec --text runs/text --out runs/sharp --loop.compile`
    """
    recipe, loop = preset_bundled()
    objective = ObjectiveConfig(P_mean=-0.2, P_std=1.2)
    return replace(recipe, objective=objective, init="runs/diffusion"), replace(loop, images=400_000, lr=4e-4, warmup=5_000, decay=1.0)


def preset_settle() -> tuple[DiffusionRecipe, LoopConfig]:
    """The third part of the bundled denoiser's training, from the run of `--preset sharpen` on: mostly the drawings as they are.

    `sfumato train diffusion --preset settle --codec runs/codec --text runs/text --out runs/settle --loop.compile`
    """
    recipe, loop = preset_sharpen()
    recipe = replace(recipe, objective=ObjectiveConfig(P_mean=0.0, P_std=1.2), variety=STEADY, init="runs/sharp")
    return recipe, replace(loop, images=1_400_000, lr=5e-4)


def preset_own() -> tuple[DiffusionRecipe, LoopConfig]:
    """A denoiser of one's own pictures, begun from the bundled one.

    `sfumato train diffusion --preset own --data DIR --codec runs/own-codec --text emoji --out runs/own`
    """
    recipe, loop = preset_bundled()
    recipe = replace(recipe, objective=ObjectiveConfig(P_mean=0.0, P_std=1.2), variety=CLOSE, each=8, labels="auto", init="emoji")
    return recipe, replace(loop, images=60_000, lr=4e-4, warmup=3_000, decay=0.5, log_every=6_400, save_every=15_360, sample_every=15_360)


def preset_smoke() -> tuple[DiffusionRecipe, LoopConfig]:
    """A denoiser that trains in seconds, to try the tools."""
    denoiser = DiTConfig(channels=4, patch=2, width=32, depth=2, heads=2, text_width=32)
    return DiffusionRecipe(denoiser=denoiser, each=2, limit=12), LoopConfig(
        images=640, batch_size=32, warmup=64, save_every=320, sample_every=320, log_every=64
    )  # fmt: skip


def check_init(recipe: DiffusionRecipe, denoiser: DiTConfig) -> None:
    """Raises ValueError where `recipe.init` has no denoiser of this shape.

    For one's own pictures other styles, labels, words and things are no hindrance, other widths are.
    """
    pack = find(recipe.init)
    meta = read_metadata(pack)
    found = meta.get("denoiser")
    apart = ("text_width", "styles", "labels", "memory") if recipe.data != EMOJI else ()
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in to_json(denoiser).items() if k not in apart):
        raise ValueError(f"init (={recipe.init!r}) must hold a denoiser of the recipe's shape: {pack} has {found or 'none'}")
    if missing := [k for k in ("styles", "labels", "words", "filler") if k not in meta]:
        raise FileError(f"{pack} lacks {', '.join(missing)} in its metadata: it was not written whole, or not by sfumato")


PRESETS = {"bundled": preset_bundled, "sharpen": preset_sharpen, "settle": preset_settle, "own": preset_own, "smoke": preset_smoke}


def frozen_part(source: Path, run: Path, name: str) -> Path:
    """Copies a pack, or the newest one of another run, into this run folder, so that it can be moved; returns the copy.

    Raises ValueError where the run was begun with another one than `source` holds now.
    """
    kept = run / "parts" / f"{name}.safetensors"
    if source.resolve() == kept.resolve():
        return kept
    try:
        pack = find(source)
    except FileError:
        pack = None
    if pack is None and not kept.exists():
        raise FileError(f"{source} has no model-*.safetensors to take the {name} from")
    if pack is not None and not kept.exists():
        tensors, meta = load_pack(pack)
        save_pack(kept, tensors, meta | {"source": meta["hash"]})
    elif pack is not None and read_metadata(pack).get("hash") != read_metadata(kept)["source"]:
        raise ValueError(f"{run} was begun with another {name} than {pack}: name another --out, or {kept} to go on with the old one")
    return kept


class DiffusionTask:
    """See `sfumato.train.loop.Task`."""

    kind = "diffusion"

    def __init__(
        self, recipe: DiffusionRecipe, seed: int, codec: Path, text: Path, run: Path, device: torch.device | str = "cpu", bf16: bool = False
    ) -> None:
        self.recipe, self.seed, self.device, self.bf16 = recipe, seed, torch.device(device), bf16
        part = frozen_part(codec, run, "codec")
        self.codec, self.codec_meta = self._load_codec(part)
        self.size = int(self.codec_meta["size"])
        self.shown = subjects(recipe.data, self.size, limit=recipe.limit, labels=recipe.labels)
        self.styles = self.shown.styles if recipe.denoiser.styles else []
        self.denoiser = self._denoiser()
        self.text, self.text_meta = self._load_text(frozen_part(text, run, "text")) if self.denoiser.text_width else (None, {})
        own = recipe.data != EMOJI  # drawn as often as they come, whatever their styles; of the drawings every style is drawn as often as another
        self.groups = [np.arange(len(self.shown.style))] if own else [np.flatnonzero(self.shown.style == s) for s in range(len(self.shown.styles))]
        self.groups = [g for g in self.groups if len(g)]
        self._measure(part)
        alive = (self.codec.latent_std > 0).to(self.device)
        self.live = None if bool(alive.all()) else alive
        self.path = make_path(recipe.path)
        self.latents = self._latents(run)
        self._held_out = self._validation()
        torch.manual_seed(seed)
        network = DiT(self.denoiser)
        if network.memory is not None:
            network.memory.keys.data.copy_(self._names())
        if recipe.init:
            self._begin_from(network)
        self.networks: dict[str, nn.Module] = {"denoiser": network}
        self.phases = [Phase("denoiser", ("denoiser",), self.loss)]

    def _denoiser(self) -> DiTConfig:
        """The recipe's, with as many styles, labels and things to remember as there are; without text where nothing is said."""
        r, shown = self.recipe, self.shown
        things = len(shown.names()) if r.memory and shown.captioned else 0
        if things > MOST_THINGS:
            tqdm.write(
                translated(f"memory has no effect: {things:,} different captions are more than the {MOST_THINGS:,} that it keeps"), file=sys.stderr
            )
        return replace(
            r.denoiser,
            text_width=r.denoiser.text_width if shown.captioned else 0,
            styles=len(self.styles),
            labels=len(shown.labels),
            memory=things if things <= MOST_THINGS else 0,
        )

    def _begin_from(self, network: DiT) -> None:
        """Takes the weights of the denoiser in `recipe.init`: all of them, or, for one's own pictures, all that have the same name and shape.

        Raises ValueError where it is of another shape.
        """
        check_init(self.recipe, self.denoiser)
        tensors, meta = load_pack(find(self.recipe.init))
        if self.recipe.data == EMOJI:
            zoo.load_into(network, tensors, "denoiser.").train().requires_grad_(True)
            return
        own, said = network.state_dict(), self.shown.about()
        named = {"style": meta["styles"] == self.styles, "label": meta["labels"] == self.shown.labels, "memory": meta["words"] == said["words"]}
        fits = lambda k: named.get(k.partition(".")[0].partition("_")[0], True)  # noqa: E731  # a row of another thing is worth nothing
        taken = {k: v for k, v in own.items() if (t := tensors.get(f"denoiser.{k}")) is not None and t.shape == v.shape and fits(k)}
        network.load_state_dict(own | {k: tensors[f"denoiser.{k}"].to(v) for k, v in taken.items()})

    # --- frozen parts and data ----------------------------------------------------------------------------------------------------------------

    def _load_codec(self, pack: Path) -> tuple[Autoencoder, dict[str, Any]]:
        tensors, meta = load_pack(pack)
        if "codec" not in meta:
            raise FileError(f"{pack} holds no codec: name a run of `sfumato train autoencoder`")
        codec = zoo.load_into(zoo.make(meta["codec"]), tensors, "codec.").to(memory_format=torch.channels_last)  # type: ignore[arg-type, call-overload]
        if codec.spec.latent_channels != self.recipe.denoiser.channels:
            raise ValueError(
                f"denoiser.channels (={self.recipe.denoiser.channels}) must be the codec's latent channels (={codec.spec.latent_channels})"
            )
        if codec.spec.image_channels != 4:
            raise ValueError(f"{pack} has a codec of {codec.spec.image_channels} image channels: the drawings need 4, with alpha")
        return codec.to(self.device), meta

    def _load_text(self, pack: Path) -> tuple[TextEncoder, dict[str, Any]]:
        tensors, meta = load_pack(pack)
        if "text" not in meta:
            raise FileError(f"{pack} holds no text encoder: name a run of `sfumato train text`")
        text = zoo.load_into(zoo.make(meta["text"], meta["tokenizer"]), tensors, "text.")  # type: ignore[arg-type]
        if text.config.width != self.recipe.denoiser.text_width:
            raise ValueError(f"denoiser.text_width (={self.recipe.denoiser.text_width}) must be the text encoder's width (={text.config.width})")
        return text.to(self.device), meta

    def _names(self) -> Tensor:
        """The pooled text of each thing to remember: the mean direction of its names in all languages."""
        names = self.shown.names()
        each = [F.normalize(self.text.encode(list(column))[2], dim=-1) for column in zip(*names, strict=True)]  # type: ignore[union-attr]
        return torch.stack(each).mean(0).cpu()

    def scene(self, index: int) -> Scene:
        """What the index-th encoded picture shows. Picture i is of row i // each."""
        return self.shown.scene(index // self.recipe.each, self.recipe.variety, numpy_rng(self.seed, "latents/scene", index))

    def pictures(self, indices: np.ndarray) -> Tensor:
        """Augmented pictures "b 4 size size" in [-1, 1]."""
        x = render(self.shown.pixels, [self.scene(int(i)) for i in indices], self.size) * 2 - 1
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, indices: np.ndarray) -> Tensor:
        """Latents "b c h w" of augmented pictures."""
        mean = self.codec.encode(self.pictures(indices)).mean
        assert mean is not None
        return mean

    def _measure(self, part: Path) -> None:
        """Standardises the codec's latents over augmented pictures of this run's own data, once: the run's copy of the codec keeps the result."""
        if self.codec_meta.get("measured"):
            return
        count = len(self.shown.pixels) * self.recipe.each
        n = min(2048, count)
        every = np.linspace(0, count - 1, n).astype(int)
        measure_latents(self.codec, (self.pictures(every[i : i + 64]) for i in range(0, n, 64)))
        meta = {k: v for k, v in self.codec_meta.items() if k != "hash"} | {"measured": True}
        save_pack(part, {f"codec.{k}": v for k, v in self.codec.state_dict().items()}, meta)

    def _latents(self, run: Path) -> Tensor:
        r = self.recipe
        made_from = {
            "codec": hash_tensors(self.codec.state_dict()),
            "seed": self.seed,
            "variety": to_json(r.variety),
            "each": r.each,
            "drawings": self.shown.digest,
        }
        return cached_latents(run / "latents.npy", self.encode, len(self.shown.pixels) * r.each, made_from)

    def _validation(self) -> dict[str, Any]:
        """Pictures that no training sees, as they are, with fixed times and noise: a deterministic validation loss."""
        exact = self.shown.validation()
        with torch.no_grad():
            parts = [self.codec.encode((p * 2 - 1).to(self.device)).mean.cpu() for p in exact.pixels.split(64)]  # type: ignore[union-attr]
        x0, n = torch.cat(parts), len(exact.pixels)
        noise = torch.stack([torch.randn(x0.shape[1:], generator=torch_rng(self.seed, "validation/noise", i)) for i in range(n)])
        t = (torch.arange(n) + 0.5) / n
        t = t[torch.randperm(n, generator=torch_rng(self.seed, "validation/t"))]
        label = torch.from_numpy(exact.label)
        return {"x0": x0, "noise": noise, "t": t, "captions": exact.captions, "style": self._hot(exact.style), "label": label}

    def _hot(self, style: np.ndarray) -> Tensor:
        """Style indices "b" as weights "b styles"; all zero where there is none."""
        at = torch.from_numpy(np.asarray(style))
        return F.one_hot(at.clamp_min(0), max(len(self.styles), 1))[:, : len(self.styles)].float() * (at >= 0)[:, None]

    # --- training -----------------------------------------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray) -> Batch:
        """As many positions in a row as there are styles hold each style once; within a style the pictures come in shuffled epochs."""
        rows = self._rows(positions)
        indices, texts, draws = [], [], []
        for position, row in zip(positions, rows, strict=True):
            rng = numpy_rng(self.seed, "train/caption", int(position))
            indices.append(int(row) * self.recipe.each + int(rng.integers(self.recipe.each)))
            texts.append(self.shown.caption(self.scene(indices[-1]), rng) if self.text else None)
            draws.append(rng.random(5))
        n = len(positions)
        ids, mask = self.text.tokenize([t or "" for t in texts]) if self.text else (torch.zeros(n, 1), torch.ones(n, 1, dtype=torch.bool))
        x0 = self.latents[torch.tensor(indices)].float()
        u = torch.tensor(np.array(draws), dtype=torch.float32)
        drop = self.recipe.drop
        both = u[:, 4] < drop.both
        return {
            "x0": x0,
            "noise": torch.stack([torch.randn(x0.shape[1:], generator=torch_rng(self.seed, "train/noise", int(p))) for p in positions]),
            "t": draw_t(self.recipe.objective, u[:, 0].clamp(1e-6, 1 - 1e-6), u[:, 1]),
            "ids": ids,
            "mask": mask,
            "style": self._hot(self.shown.style[rows]),
            "label": torch.from_numpy(self.shown.label[rows]),
            "unsaid": torch.tensor([t is None for t in texts]),
            "no_text": (u[:, 2] < drop.text) | both,
            "no_style": (u[:, 3] < drop.style) | both,
        }

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        """Which picture stands at each position."""
        n, rows = len(self.groups), np.empty(len(positions), dtype=np.int64)
        which = shuffled(n, self.seed, "order/style", positions)
        for group in np.unique(which):
            here, members = which == group, self.groups[group]
            rows[here] = members[shuffled(len(members), self.seed, f"order/{group}", positions[here] // n)]
        return rows

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        cond = Cond(style=batch["style"], label=batch["label"])
        if self.text:
            kind = batch["x0"].device.type
            with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
                states, pooled = self.text(batch["ids"], batch["mask"])
            cond = replace(cond, text=states.float(), mask=batch["mask"], pooled=pooled.float())
        cond = without_style(without_text(silent(cond, batch["no_text"]), batch["unsaid"]), batch["no_style"])
        return loss(networks["denoiser"], batch["x0"], batch["noise"], batch["t"], cond, self.path, self.recipe.objective, live=self.live)

    def cond(self, texts: Sequence[str | None], style: Tensor, label: Tensor) -> Cond:
        cond = Cond(style=style.to(self.device), label=label.to(self.device))
        if self.text is None:
            return cond
        states, mask, pooled = self.text.encode([t or "" for t in texts])
        return without_text(replace(cond, text=states, mask=mask, pooled=pooled), torch.tensor([t is None for t in texts], device=self.device))

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The preview prompts in fixed styles with fixed noise, two of each."""
        net = networks["denoiser"]
        asked = [a for a in self.shown.preview() for _ in range(2)]
        captions, styles, labels = zip(*asked, strict=True)
        cond = self.cond(captions, self._hot(np.array(styles)), torch.tensor(labels))
        everything = torch.ones(len(asked), dtype=torch.bool, device=self.device)
        denoise = guided(cfg(Precond(net, self.recipe.objective.prediction, self.path), cond, silent(cond, everything), 3.0))
        noise = torch.stack(
            [torch.randn(self.latents.shape[1:], generator=torch_rng(derive(self.seed, "preview"), "noise", i)) for i in range(len(asked))]
        )
        z = [s.x for s in sample_heun(denoise, noise.to(self.device), timesteps(self.path, 12), self.path)][-1]
        return grid(to_pil(self.codec.decode(z)), columns=8)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        v, net = self._held_out, networks["denoiser"]
        total = 0.0
        for start in range(0, len(v["x0"]), 128):
            rows = slice(start, start + 128)
            x0, noise, t = (v[k][rows].to(self.device) for k in ("x0", "noise", "t"))
            cond = self.cond(v["captions"][rows], v["style"][rows], v["label"][rows])
            value, _ = loss(net, x0, noise, t, cond, self.path, self.recipe.objective, live=self.live)
            total += float(value) * len(x0)
        validation = total / len(v["x0"])
        return {"validation_loss": validation, "score": -validation}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {"codec": self.codec, "denoiser": networks["denoiser"]} | ({"text": self.text} if self.text else {})
        tensors = {f"{part}.{k}": v for part, net in parts.items() for k, v in net.state_dict().items()}
        meta = {
            "kind": "latent-diffusion",
            "codec": self.codec_meta["codec"],
            "denoiser": to_json(self.denoiser),
            "path": to_json(self.recipe.path),
            "prediction": self.recipe.objective.prediction,
            "size": self.size,
            "styles": self.styles,
            "labels": self.shown.labels,
        }
        meta |= self.shown.about()
        meta["credits"] += [c for c in self._inherited() if c not in meta["credits"]]
        return tensors, meta | ({"text": self.text_meta["text"], "tokenizer": self.text_meta["tokenizer"]} if self.text else {})

    def _inherited(self) -> list[dict[str, str]]:
        """Whose works the weights that this denoiser began from had learned from."""
        return list(read_metadata(find(self.recipe.init)).get("credits") or []) if self.recipe.init else []  # type: ignore[call-overload]


def train(recipe: DiffusionRecipe, loop: LoopConfig, out: Path, *, codec: Path, text: Path, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the denoiser in the run folder `out`; `codec` and `text` are runs or packs, copied in on the first start."""
    loop = settled(loop, out)
    if recipe.data != EMOJI:
        same_source(Path(out), recipe.data)
    task = main_first(loop, lambda device: DiffusionTask(recipe, loop.seed, Path(codec), Path(text), Path(out), device, loop.dtype == "bf16"))
    trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
