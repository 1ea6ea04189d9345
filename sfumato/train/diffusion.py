"""Trains a denoiser over a codec's latents, conditioned on text, style or label (arXiv 2112.10752 on the rectified flow of 2209.03003).

Latents are encoded once, several augmented pictures per drawing, and captions are made anew each time from what those pictures show.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder, measure_latents
from sfumato.core.checkpoint import FileError, hash_tensors, read_metadata
from sfumato.core.config import to_json
from sfumato.core.images import grid, to_pil
from sfumato.core.pack import load_pack, save_pack
from sfumato.core.rng import derive, numpy_rng, shuffled, torch_rng
from sfumato.core.seams import Cond
from sfumato.data.augment import Scene, Variety, draw_scene, render
from sfumato.data.captions import FILLER, any_caption
from sfumato.data.emoji import LANGUAGES, STYLES, Concept, Drawings, art_digest, concepts, credits, drawable, drawings
from sfumato.data.latents import cached_latents
from sfumato.diffusion.dit import DiT, DiTConfig, silent, without_style
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.objective import ObjectiveConfig, draw_t, loss
from sfumato.diffusion.path import PathConfig, make_path, timesteps
from sfumato.diffusion.precond import Precond, check_prediction
from sfumato.diffusion.samplers import sample_heun
from sfumato.pipelines.find import find
from sfumato.text.encoder import TextEncoder
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, checkpoints, main_first, settled

GENTLE = Variety(place=0.25, scale=(0.75, 1.0), angle=10.0, recolour=0.12, count=0.02, pair=0.02, scene=0.04)
PREVIEW = (("a cat", 1), ("a red apple", 0), ("一只狐狸", 2), ("蓝色的鲸鱼", 3), ("a rocket", 4), ("a frog", 5), ("sunflower", 0), ("汉堡", 1),
           ("a purple dog", 0), ("guitar", 2), ("两只猫", 1), ("a penguin in the snow", 0))  # fmt: skip


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

    `init` is a pack or run whose denoiser it begins from. `memory` gives the denoiser a place to keep what each concept looks like
    (`sfumato.diffusion.dit.Memory`).
    `labels` teaches a class beside (or, with `denoiser.text_width` 0, instead of) captions: the group of a concept ("food-drink") or its name.
    """

    kind: str = "train-diffusion"
    denoiser: DiTConfig = field(default_factory=DiTConfig)
    path: PathConfig = field(default_factory=PathConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    drop: Drop = field(default_factory=Drop)
    variety: Variety = GENTLE
    each: int = 12
    labels: Literal["none", "group", "concept"] = "none"
    limit: int = 0
    memory: bool = False
    init: str = ""

    def __post_init__(self) -> None:
        check_prediction(self.objective.prediction, make_path(self.path))
        if self.each < 1 or self.limit < 0:
            raise ValueError(
                f"each (={self.each}) must be at least 1 and limit (={self.limit}) at least 0: pictures per drawing, and concepts (0: all)"
            )
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


def preset_smoke() -> tuple[DiffusionRecipe, LoopConfig]:
    """A denoiser that trains in seconds, to try the tools."""
    denoiser = DiTConfig(channels=4, patch=2, width=32, depth=2, heads=2, text_width=32)
    return DiffusionRecipe(denoiser=denoiser, each=2, limit=12), LoopConfig(
        images=640, batch_size=32, warmup=64, save_every=320, sample_every=320, log_every=64
    )  # fmt: skip


PRESETS = {"bundled": preset_bundled, "sharpen": preset_sharpen, "smoke": preset_smoke}


def frozen_part(source: Path, run: Path, name: str) -> Path:
    """Copies a pack, or the newest one of another run, into this run folder, so that it can be moved; returns the copy.

    Raises ValueError where the run was begun with another one than `source` holds now.
    """
    kept = run / "parts" / f"{name}.safetensors"
    if source.resolve() == kept.resolve():
        return kept
    packs = checkpoints(source, "model") if source.is_dir() else [p for p in [source] if p.exists()]
    if not packs and not kept.exists():
        raise FileError(f"{source} has no model-*.safetensors to take the {name} from")
    if not kept.exists():
        tensors, meta = load_pack(packs[-1])
        save_pack(kept, tensors, meta | {"source": meta["hash"]})
    elif packs and read_metadata(packs[-1]).get("hash") != read_metadata(kept)["source"]:
        raise ValueError(f"{run} was begun with another {name} than {packs[-1]}: name another --out, or {kept} to go on with the old one")
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
        self.text, self.text_meta = self._load_text(frozen_part(text, run, "text")) if recipe.denoiser.text_width else (None, {})
        self.size = int(self.codec_meta["size"])
        self.art = self._drawings()
        self.flips, self.recolours = self.art.may_flip, self.art.may_recolour
        self.of_style = [np.flatnonzero(self.art.style == s) for s in range(len(STYLES))]
        self.labels, self.label_of = self._labels()
        self._measure(part)
        alive = (self.codec.latent_std > 0).to(self.device)
        self.live = None if bool(alive.all()) else alive
        self.path = make_path(recipe.path)
        self.latents = self._latents(run)
        self._held_out = self._validation()
        torch.manual_seed(seed)
        self.denoiser = replace(recipe.denoiser, labels=len(self.labels), memory=len(self.known()) if recipe.memory else 0)
        network = DiT(self.denoiser)
        if recipe.init:
            self._begin_from(network)
        elif network.memory is not None:
            network.memory.keys.data.copy_(self._names())
        self.networks: dict[str, nn.Module] = {"denoiser": network}
        self.phases = [Phase("denoiser", ("denoiser",), self.loss)]

    def _begin_from(self, network: DiT) -> None:
        """Takes the weights of the denoiser in `recipe.init`. Raises ValueError where it is of another shape."""
        pack = find(self.recipe.init)
        tensors, meta = load_pack(pack)
        if meta.get("denoiser") != to_json(self.denoiser):
            raise ValueError(f"init (={self.recipe.init!r}) must hold a denoiser of the recipe's shape: {pack} has {meta.get('denoiser', 'none')}")
        zoo.load_into(network, tensors, "denoiser.").train().requires_grad_(True)

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

    def _drawings(self) -> Drawings:
        """Only what the run may draw; the rows held out stay apart for validation."""
        art = drawings(2 * self.size, self.known() if self.recipe.limit else None)
        wanted = {c.index for c in self.known()}
        art = art.rows(np.array([c in wanted for c in art.concept]))
        self.kept_apart = art.rows(art.held_out)
        return art.rows(~art.held_out)

    def _labels(self) -> tuple[list[str], np.ndarray]:
        """The names of the labels, and the label of each concept (by its index)."""
        known = concepts()
        match self.recipe.labels:
            case "none":
                return [], np.full(len(known), -1)
            case "group":
                names = sorted({known[c].group for c in self.art.concept})
                return names, np.array([names.index(c.group) if c.group in names else -1 for c in known])
            case "concept":
                there = sorted(set(self.art.concept.tolist()))
                return [known[c].name for c in there], np.array([there.index(i) if i in there else -1 for i in range(len(known))])

    def known(self) -> tuple[Concept, ...]:
        """The concepts that this run learns to draw."""
        return concepts()[: self.recipe.limit] if self.recipe.limit else drawable()

    def _names(self) -> Tensor:
        """The pooled text of each known concept: the mean direction of its names in all languages."""
        each = [F.normalize(self.text.encode([c.names[t] for c in self.known()])[2], dim=-1) for t in LANGUAGES]  # type: ignore[union-attr]
        return torch.stack(each).mean(0).cpu()

    def scene(self, index: int) -> tuple[Scene, tuple[int, ...]]:
        """What the index-th encoded picture shows, and the concepts of its items. Picture i is of drawing i // each."""
        row = index // self.recipe.each
        rng = numpy_rng(self.seed, "latents/scene", index)
        others = self.of_style[self.art.style[row]]
        friend = int(rng.choice(others[self.art.concept[others] != self.art.concept[row]]))
        partners = [(friend, bool(self.flips[friend]))]
        scene = draw_scene(rng, self.recipe.variety, row, bool(self.flips[row]), partners, bool(self.recolours[row]))
        return scene, tuple(int(self.art.concept[i.drawing]) for i in scene.items)

    def pictures(self, indices: np.ndarray) -> Tensor:
        """Augmented pictures "b 4 size size" in [-1, 1]."""
        x = render(self.art.pixels, [self.scene(int(i))[0] for i in indices], self.size) * 2 - 1
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    def _measure(self, part: Path) -> None:
        """Standardises the codec's latents over augmented pictures of this run's own data, once: the run's copy of the codec keeps the result."""
        if self.codec_meta.get("measured"):
            return
        n = min(2048, len(self.art) * self.recipe.each)
        every = np.linspace(0, len(self.art) * self.recipe.each - 1, n).astype(int)
        measure_latents(self.codec, (self.pictures(every[i : i + 64]) for i in range(0, n, 64)))
        meta = {k: v for k, v in self.codec_meta.items() if k != "hash"} | {"measured": True}
        save_pack(part, {f"codec.{k}": v for k, v in self.codec.state_dict().items()}, meta)

    def _latents(self, run: Path) -> Tensor:
        r = self.recipe
        shown = hashlib.sha256(f"{art_digest()} {self.art.concept.tolist()} {self.art.style.tolist()}".encode()).hexdigest()[:12]
        made_from = {
            "codec": hash_tensors(self.codec.state_dict()),
            "seed": self.seed,
            "variety": to_json(r.variety),
            "each": r.each,
            "drawings": shown,
        }
        encode = lambda i: self.codec.encode(self.pictures(i)).mean  # noqa: E731
        return cached_latents(run / "latents.safetensors", encode, len(self.art) * r.each, made_from)

    def _validation(self) -> dict[str, Any]:
        """Held-out pairs as drawn, with fixed times and noise: a deterministic validation loss."""
        exact = F.avg_pool2d(self.kept_apart.pixels.float() / 255, 2) * 2 - 1
        x0 = self.latents[:: self.recipe.each][:8].float()
        if len(exact):
            with torch.no_grad():
                x0 = torch.cat([self.codec.encode(p.to(self.device)).mean.cpu() for p in exact.split(64)])  # type: ignore[union-attr]
        n = len(x0)
        of = self.kept_apart if len(exact) else self.art
        names = [concepts()[c].names["en" if i % 2 else "zh"] for i, c in enumerate(of.concept[:n])]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=torch_rng(self.seed, "validation/noise", i)) for i in range(n)])
        t = (torch.arange(n) + 0.5) / n
        t = t[torch.randperm(n, generator=torch_rng(self.seed, "validation/t"))]
        style = F.one_hot(torch.from_numpy(of.style[:n]), len(STYLES)).float()
        return {"x0": x0, "noise": noise, "t": t, "names": names, "style": style, "label": torch.from_numpy(self.label_of[of.concept[:n]])}

    # --- training -----------------------------------------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray) -> Batch:
        """Every six positions hold each style once; within a style the drawings come in shuffled epochs."""
        indices, texts, labels, draws = [], [], [], []
        styles = shuffled(len(STYLES), self.seed, "order/style", positions)
        for position, style in zip(positions, styles, strict=True):
            rows = self.of_style[style]
            row = int(rows[shuffled(len(rows), self.seed, f"order/{style}", np.array([position // len(STYLES)]))[0]])
            rng = numpy_rng(self.seed, "train/caption", int(position))
            index = row * self.recipe.each + int(rng.integers(self.recipe.each))
            scene, shown = self.scene(index)
            indices.append(index)
            texts.append(any_caption(scene, shown, rng)[0])
            labels.append(self.label_of[shown[0]])
            draws.append(rng.random(5))
        ids, mask = self.text.tokenize(texts) if self.text else (torch.zeros(len(texts), 1), torch.ones(len(texts), 1, dtype=torch.bool))
        x0 = self.latents[torch.tensor(indices)].float()
        shown_style = torch.from_numpy(self.art.style[np.array(indices) // self.recipe.each])
        u = torch.tensor(np.array(draws), dtype=torch.float32)
        drop = self.recipe.drop
        both = u[:, 4] < drop.both
        return {
            "x0": x0,
            "noise": torch.stack([torch.randn(x0.shape[1:], generator=torch_rng(self.seed, "train/noise", int(p))) for p in positions]),
            "t": draw_t(self.recipe.objective, u[:, 0].clamp(1e-6, 1 - 1e-6), u[:, 1]),
            "ids": ids,
            "mask": mask,
            "style": F.one_hot(shown_style, len(STYLES)).float(),
            "label": torch.tensor(np.array(labels)),
            "no_text": (u[:, 2] < drop.text) | both,
            "no_style": (u[:, 3] < drop.style) | both,
        }

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        cond = Cond(style=batch["style"], label=batch["label"])
        if self.text:
            kind = batch["x0"].device.type
            with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
                states, pooled = self.text(batch["ids"], batch["mask"])
            cond = replace(cond, text=states.float(), mask=batch["mask"], pooled=pooled.float())
        cond = without_style(silent(cond, batch["no_text"]), batch["no_style"])
        return loss(networks["denoiser"], batch["x0"], batch["noise"], batch["t"], cond, self.path, self.recipe.objective, live=self.live)

    def cond(self, texts: list[str], style: Tensor, label: Tensor | None = None) -> Cond:
        cond = Cond(style=style.to(self.device), label=None if label is None else label.to(self.device))
        if self.text is None:
            return cond
        states, mask, pooled = self.text.encode(texts)
        return replace(cond, text=states, mask=mask, pooled=pooled)

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The preview prompts in fixed styles with fixed noise, two of each."""
        net = networks["denoiser"]
        prompts = [p for p in PREVIEW for _ in range(2)]
        style = F.one_hot(torch.tensor([s for _, s in prompts]), len(STYLES)).float()
        label = torch.arange(len(prompts)) // 2 % len(self.labels) if self.labels else None
        cond = self.cond([t for t, _ in prompts], style, label)
        everything = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        denoise = guided(cfg(Precond(net, self.recipe.objective.prediction, self.path), cond, silent(cond, everything), 3.0))
        noise = torch.stack(
            [torch.randn(self.latents.shape[1:], generator=torch_rng(derive(self.seed, "preview"), "noise", i)) for i in range(len(prompts))]
        )
        z = [s.x for s in sample_heun(denoise, noise.to(self.device), timesteps(self.path, 12), self.path)][-1]
        return grid(to_pil(self.codec.decode(z)), columns=8)

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        v, net = self._held_out, networks["denoiser"]
        total = 0.0
        for start in range(0, len(v["x0"]), 128):
            rows = slice(start, start + 128)
            x0, noise, t = (v[k][rows].to(self.device) for k in ("x0", "noise", "t"))
            cond = self.cond(v["names"][rows], v["style"][rows], v["label"][rows])
            value, _ = loss(net, x0, noise, t, cond, self.path, self.recipe.objective, live=self.live)
            total += float(value) * len(x0)
        validation = total / len(v["x0"])
        return {"validation_loss": validation, "score": -validation}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts = {"codec": self.codec, "denoiser": networks["denoiser"]} | ({"text": self.text} if self.text else {})
        tensors = {f"{part}.{k}": v for part, net in parts.items() for k, v in net.state_dict().items()}
        words = {c.hexcode: {t: [c.names[t], *c.keywords[t]] for t in LANGUAGES} | {"emoji": [c.emoji], "group": [c.group]} for c in self.known()}
        meta = {
            "kind": "latent-diffusion",
            "codec": self.codec_meta["codec"],
            "denoiser": to_json(self.denoiser),
            "path": to_json(self.recipe.path),
            "prediction": self.recipe.objective.prediction,
            "size": self.size,
            "styles": list(STYLES),
            "labels": self.labels,
            "words": words,
            "filler": FILLER,
            "credits": credits(),
        }
        return tensors, meta | ({"text": self.text_meta["text"], "tokenizer": self.text_meta["tokenizer"]} if self.text else {})


def train(recipe: DiffusionRecipe, loop: LoopConfig, out: Path, *, codec: Path, text: Path, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the denoiser in the run folder `out`; `codec` and `text` are runs or packs, copied in on the first start."""
    loop = settled(loop, out)
    task = main_first(loop, lambda device: DiffusionTask(recipe, loop.seed, Path(codec), Path(text), Path(out), device, loop.dtype == "bf16"))
    trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
