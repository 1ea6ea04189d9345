"""What fine-tuning needs, whatever is learned: a model that draws, one's own pictures as its codec sees them, and what is said of each.

Pictures are encoded once; captions are heard once, where the text encoder does not learn. With prior preservation (DreamBooth, arXiv 2208.12242,
section 3.2) every other picture of a batch is one of what the model drew before, so that it does not forget what else there is of the kind.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sfumato.core.checkpoint import hash_tensors, write_json
from sfumato.core.images import flatten, grid, save_png, to_tensor
from sfumato.core.language import translated
from sfumato.core.request import GenerateRequest, style_weights
from sfumato.core.rng import derive, numpy_rng, shuffled, torch_rng
from sfumato.core.seams import Cond
from sfumato.data.augment import Variety, draw_scene, render
from sfumato.data.buckets import BatchOrder, Size, bucket_sizes, fitted, nearest_size
from sfumato.data.folder import Entry, Scan, evenly, open_picture, same_pictures, scan, split, square
from sfumato.data.latents import cached_latents
from sfumato.data.shards import are_shards
from sfumato.diffusion.dit import DiTBlock
from sfumato.diffusion.objective import ObjectiveConfig, draw_t, loss
from sfumato.diffusion.unet import ResnetBlock, SpatialTransformer
from sfumato.metrics.features import style_statistics
from sfumato.nn.backbones import over
from sfumato.nn.conditions import concat_conds
from sfumato.nn.layers import checkpointed
from sfumato.pipelines.find import BUNDLED
from sfumato.pipelines.generate import Model
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.pipelines.load import load
from sfumato.train.loop import Batch, LoopConfig, Trainer, begun_with, main_first, settled, starting

FEW = 40  # pictures below which none is kept apart: each is needed
LOOKS = 16  # times at which the validation loss looks, at least
MOST_LOOKED_AT = 64  # pictures of the validation loss
MOST_HEARD = 4096  # captions whose states are kept
COMPARED = 10  # pictures by which a style is chosen
PREVIEW_SIZE = 4  # pictures of a sample grid, at least
MOVED = Variety(place=0.9, scale=(0.85, 1.1), angle=8.0, flip=0.0, recolour=0.0, count=0.0, pair=0.0, scene=0.0)
AT_ONCE = 128 * 64 * 64  # pixels that the codec sees together


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a recipe says of the model that is tuned, and of the pictures."""

    base: str = BUNDLED
    """The model: one of ours that draws by diffusion, or a checkpoint of Stable Diffusion."""
    data: str = ""
    """A folder or zip of pictures, with captions or without."""
    prompt: str = ""
    """Said of pictures without a caption; with {} in it of all, their captions in that place."""
    size: int = 0
    """Side of squares, 0 as the model has it. Pictures of other shapes go into sizes with as many pixels."""
    bucket: int = 64
    """Their sides are multiples of this; 0: squares only. Our own models have one size."""
    flip: bool = False
    """Learn mirrored pictures, too."""
    each: int = 1
    """Of models of one size: so many versions of a picture, moved, scaled and turned a little."""
    drop: float = 0.1
    """Share of the captions that are withheld, for guidance to lean on."""
    prior_prompt: str = ""
    """What pictures are of ("a dog" for those of one's own dog): others of it are learned beside them, so that it is not forgotten."""
    prior: int = 100
    """How many of those the model draws before."""
    prior_data: str = ""
    """A folder of them, instead of drawn ones."""
    prior_weight: float = 1.0
    """How much they count."""
    min_snr_gamma: float | None = None
    """Weighs times by their noise (arXiv 2303.09556, where it is 5)."""
    offset_noise: float = 0.0
    """So much noise that is the same all over a channel: 0.05 to 0.1 gives darker and brighter pictures."""
    checkpointing: bool = False
    """Keep less for the backward pass and compute it again: less memory, slower."""
    style: str = "any"
    """Of models with styles: what is learned is a change of that one ("noto", or shares of several). auto: the one in which the model already draws
    most like the pictures; any: all of them."""
    previews: tuple[str, ...] = ()
    """Prompts of the sample grids; the first captions without any."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop (={self.drop}) must be between 0 and 1: how often nothing is said of a picture")
        if self.each < 1:
            raise ValueError(f"each (={self.each}) must be at least 1: versions of a picture")
        if self.size < 0 or self.bucket < 0 or self.prior < 1:
            raise ValueError(f"size (={self.size}) and bucket (={self.bucket}) must be at least 0, prior (={self.prior}) at least 1")
        if not self.prior_weight > 0:
            raise ValueError(f"prior_weight (={self.prior_weight}) must be above 0: leave prior_prompt out to learn without prior pictures")
        if not 0 <= self.offset_noise <= 1:
            raise ValueError(f"offset_noise (={self.offset_noise}) must be between 0 and 1: 0.05 to 0.1 is usual, 0 is none")
        if self.prior_data and not self.prior_prompt:
            raise ValueError(f"prior_data (={self.prior_data!r}) needs prior_prompt: what those pictures show")
        ObjectiveConfig(min_snr_gamma=self.min_snr_gamma)


@dataclass(frozen=True)
class Item:
    """A picture to learn from."""

    open: Callable[[], Image.Image]
    caption: str
    size: Size
    prior: bool = False


def _rgb(image: Image.Image) -> Tensor:
    """In [0, 1], over white."""
    return to_tensor(flatten(image), 3) / 2 + 0.5


class Tuning(ABC):
    """See `sfumato.train.loop.Task`. Kinds of it say what is learned: `networks`, `phases` and `used`."""

    kind: ClassVar[str]
    networks: dict[str, nn.Module]
    until: float = 1.0  # the latest time that is learned
    hears_anew: bool = False  # whether captions are heard in every step, because what hears them learns

    def __init__(self, recipe: Tuned, seed: int, batch: int, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        self.recipe, self.seed, self.device = recipe, seed, torch.device(device)
        if recipe.prior_prompt and batch % 2:
            raise ValueError(
                f"batch_size (={batch}) must be even with prior_prompt, every other picture is one of the prior: --loop.batch-size {batch + 1}"
            )
        self.model = self._base(bf16 and self.device.type == "cuda")
        self._same_base(run)
        self._say_what_is_idle()
        found, of_prior = self._scanned(run)
        if recipe.prompt and "{}" not in recipe.prompt and all(e.caption for e in found.entries):
            print(
                translated("note: every picture has a caption, so the prompt is not said of any: with {} in it, it is said of all"), file=sys.stderr
            )
        held = {e.name for e in split(found.entries)[1]} if len(found.entries) >= FEW else set()
        own = [self._item(found, e) for e in found.entries if e.name not in held]
        apart = [self._item(found, e) for e in found.entries if e.name in held]
        before = self._prior_items(of_prior, [i.size for i in own], run)
        self.items = own + apart + before
        self.sizes = sorted({i.size for i in self.items})
        rows = {size: [r for r, i in enumerate(self.items) if i.size == size] for size in self.sizes}
        self.place = {r: k for of_size in rows.values() for k, r in enumerate(of_size)}  # of a row among those of its size
        self.latents = {size: self._encoded(size, rows[size], run) for size in self.sizes}
        sizes = sorted({i.size for i in own})
        step = batch // 2 if before else batch
        self.order = BatchOrder([np.array([r for r, i in enumerate(own) if i.size == size]) for size in sizes], step, seed)
        first = len(own) + len(apart)
        self.befores = [np.array([first + r for r, i in enumerate(before) if i.size == size]) for size in sizes] if before else []
        self.shown = [len(own) + r for r in range(len(apart))] or list(range(len(own)))
        self.previews = list(recipe.previews) or list(dict.fromkeys(self.items[r].caption for r in evenly(len(own), 8)))
        self._heard: dict[tuple[str | None, Size], Cond] = {}
        alive = (self.model.codec.latent_std > 0).to(self.device)
        self.live = None if bool(alive.all()) else alive
        spread = {"P_mean": 0.0, "P_std": 1.2} if self.model.path.kind == "rf" else {"t_sampling": "uniform"}
        self.objective = ObjectiveConfig(prediction=self.model.meta["prediction"], min_snr_gamma=recipe.min_snr_gamma, **spread)  # type: ignore[arg-type]
        self.style = self._chosen_style(run / "style.json")
        if recipe.checkpointing:
            checkpointed(self.model.denoiser, (DiTBlock, ResnetBlock, SpatialTransformer))
        torch.manual_seed(seed)

    # --- the model and the pictures ---------------------------------------------------------------------------------------------------------------

    def _base(self, bf16: bool) -> LatentDiffusion:
        model: Model = load(self.recipe.base, device=self.device.type, dtype="bf16" if bf16 else "fp32", engine="eager")  # type: ignore[arg-type]
        if not isinstance(model, LatentDiffusion):
            raise ValueError(f"base (={self.recipe.base!r}) must draw by diffusion: {model.way} models are trained with sfumato train")
        if getattr(model, "inpaints", False):
            raise ValueError(f"base (={self.recipe.base!r}) is for inpainting: tune the model that it was made from")
        if not model.hears:
            raise ValueError(f"base (={self.recipe.base!r}) was trained without captions: go on with sfumato train diffusion --init")
        return model

    def _same_base(self, run: Path) -> None:
        """Raises ValueError where the run was begun with another model: its files are too large to be copied into every run."""
        path, now = run / "base.json", {"base": self.recipe.base, "hash": self.model.meta["hash"]}
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("hash") != now["hash"]:
            if begun_with(run):
                raise ValueError(f"base (={self.recipe.base!r}) has changed since {run} was begun: put it back as it was, or name another --out")
            (run / "style.json").unlink(missing_ok=True)  # what another base chose
        write_json(path, now)

    def _say_what_is_idle(self) -> None:
        """Settings that change nothing here."""
        r = self.recipe
        if r.style not in ("any", "auto") and not self.model.styles:
            print(translated("warning: style has no effect: this model has no styles"), file=sys.stderr)
        if getattr(r, "along", 1.0) != 1 and getattr(r, "until", 1.0) == 1:
            print(translated("warning: along has no effect without until"), file=sys.stderr)
        if getattr(r, "decoder", 1) == 0 and r.decoder_from != type(r).decoder_from:  # type: ignore[attr-defined]
            print(translated("warning: decoder_from has no effect without decoder"), file=sys.stderr)
        if not r.prior_prompt and (r.prior, r.prior_weight) != (Tuned.prior, Tuned.prior_weight):
            print(translated("warning: prior and prior_weight have no effect without prior_prompt"), file=sys.stderr)

    def _scanned(self, run: Path) -> tuple[Scan, Scan | None]:
        for name in ("data", "prior_data"):
            where = getattr(self.recipe, name)
            if (name == "data" and not where) or (where and are_shards(where)):
                raise ValueError(f"{name} (={where!r}) must be a folder or a zip of pictures")
        found = scan(self.recipe.data)
        if not self.recipe.prompt and any(not e.caption for e in found.entries):
            unsaid = next(e.name for e in found.entries if not e.caption)
            raise ValueError(f"prompt (='') must say what pictures without a caption show: {unsaid} of {self.recipe.data} has none")
        same_pictures(run, found, words=True)
        if not self.recipe.prior_data:
            return found, None
        of_prior = scan(self.recipe.prior_data)
        same_pictures(run / "prior", of_prior)
        return found, of_prior

    def _item(self, found: Scan, entry: Entry) -> Item:
        return Item(partial(open_picture, found, entry), self._caption(entry), self._size_of(entry))

    def _caption(self, entry: Entry) -> str:
        said = self.recipe.prompt
        if "{}" in said:
            return said.replace("{}", entry.caption or "").strip(" ,")
        return entry.caption or said

    @property
    def side(self) -> int:
        return self.recipe.size or self.model.size

    def _size_of(self, entry: Entry) -> Size:
        """Of the bucket that a picture goes into. Raises ValueError for sizes that the model does not have."""
        factor = self.model.codec.spec.factor
        if not self.model.sized:
            if self.side != self.model.size:
                raise ValueError(f"size (={self.recipe.size}) must be {self.model.size}, or 0: the side of what this model draws")
            return self.side, self.side
        if self.side % factor or self.recipe.bucket % factor:
            raise ValueError(f"size (={self.side}) and bucket (={self.recipe.bucket}) must be multiples of {factor}")
        if not self.recipe.bucket:
            return self.side, self.side
        return nearest_size(entry.width, entry.height, bucket_sizes(self.side, self.recipe.bucket))

    def _prior_items(self, found: Scan | None, sizes: Sequence[Size], run: Path) -> list[Item]:
        """Pictures of the prior, of sizes as often as those that are learned."""
        recipe = self.recipe
        if not recipe.prior_prompt:
            return []
        self._same_prior(run)
        count = max(len(found.entries) if found else recipe.prior, len(set(sizes)))
        each = sorted(sizes)
        wanted = [each[i * len(each) // count] for i in range(count)]
        if found:
            opened = [partial(open_picture, found, found.entries[i % len(found.entries)]) for i in range(count)]
        else:
            opened = [partial(Image.open, path) for path in self._drawn_before(wanted, run)]
        return [Item(o, recipe.prior_prompt, size, prior=True) for o, size in zip(opened, wanted, strict=True)]

    def _same_prior(self, run: Path) -> None:
        """Drops what was drawn and encoded of another prior, where a start was stopped before it had a state; later its settings are compared."""
        recipe, told = self.recipe, run / "prior" / "drawn.json"
        now = {"prompt": recipe.prior_prompt, "data": recipe.prior_data, "base": self.model.meta["hash"], "seed": self.seed}
        if any(run.glob("state-*")):
            return
        if told.exists() and json.loads(told.read_text(encoding="utf-8")) != now:
            for path in (*told.parent.glob("[0-9][0-9][0-9][0-9].png"), *run.glob("latents-*")):
                path.unlink(missing_ok=True)
        write_json(told, now)

    def _drawn_before(self, sizes: list[Size], run: Path) -> list[Path]:
        """What the model draws of the prior's prompt; drawn once, and gone on with where it was stopped."""
        paths = [run / "prior" / f"{i:04d}.png" for i in range(len(sizes))]
        missing = [i for i, p in enumerate(paths) if not p.exists()]
        for i in tqdm(missing, desc=translated("drawing the prior"), unit=" pictures", leave=False):
            request = GenerateRequest(prompt=self.recipe.prior_prompt, seed=derive(self.seed, "prior", i) >> 1, **self._extent(sizes[i]))
            save_png(paths[i], next(self.model.pictures(request)).image)
        return paths

    def _extent(self, size: Size) -> dict[str, int]:
        return {"height": size[0], "width": size[1]} if self.model.sized else {"size": self.model.size}

    def _encoded(self, size: Size, rows: list[int], run: Path) -> Tensor:
        """Latents of the pictures of one size, each mirrored after itself where that is wanted."""
        if self.recipe.each > 1 and self.model.sized:
            raise ValueError(f"each (={self.recipe.each}) must be 1: versions are made for models whose pictures have one size")
        variants = self.variants

        def encode(indices: np.ndarray) -> Tensor:
            pictures = [self.pixels(self.items[rows[i // variants]], int(i % variants)) for i in indices]
            return self.model.codec.encode(torch.cat(pictures).to(self.device)).mean  # type: ignore[union-attr, return-value]

        of = {"size": list(size), "flip": self.recipe.flip, "each": self.recipe.each, "seed": self.seed, "rows": len(rows)}
        words = {"codec": self._codec_hash} | of
        at_once = max(1, AT_ONCE // (size[0] * size[1]))
        return cached_latents(run / f"latents-{size[1]}x{size[0]}.npy", encode, len(rows) * variants, words, batch=at_once)

    @cached_property
    def _codec_hash(self) -> str:
        return hash_tensors(self.model.codec.state_dict())

    @property
    def variants(self) -> int:
        """Latents of one picture."""
        return self.recipe.each * (1 + self.recipe.flip)

    def pixels(self, item: Item, variant: int = 0) -> Tensor:
        """A picture "1 c h w" as the codec takes it; of its variants the first is the picture as it is, every other one mirrored with `flip`."""
        channels = self.model.codec.spec.image_channels
        version, mirrored = divmod(variant, 1 + self.recipe.flip)
        if version:
            side = item.size[0]
            scene = draw_scene(numpy_rng(self.seed, "train/version", version), MOVED, 0, False)
            rgba = render(torch.from_numpy(square(item.open(), 2 * side))[None], [scene], side)
            x = (over(rgba) if channels == 3 else rgba) * 2 - 1
        else:
            image = fitted(item.open(), item.size)
            x = to_tensor(image if channels == 4 else flatten(image), channels)
        return x.flip(3) if mirrored else x

    # --- batches ------------------------------------------------------------------------------------------------------------------------------------

    def batch(self, positions: np.ndarray) -> Batch:
        """Latents, noise, times and what is said, at positions of one batch; `versions`: (position, row, version) of each."""
        rows = self._rows(positions)
        size = self.items[rows[0]].size
        variants = self.variants
        x0, noise, u, captions, styles, versions = [], [], [], [], [], []
        for position, row in zip(positions, rows, strict=True):
            rng = numpy_rng(self.seed, "train/said", int(position))
            draws = rng.random(5)
            u.append(draws[:2])
            versions.append((int(position), row, int(draws[2] * variants)))
            x0.append(self.latents[size][self.place[row] * variants + versions[-1][2]].float())
            noise.append(self._noise(size, "train/noise", int(position)))
            captions.append(None if draws[3] < self.recipe.drop else self.items[row].caption)
            styles.append({} if draws[4] < self.recipe.drop else self._style(int(position)))
        at = torch.tensor(np.array(u), dtype=torch.float32)
        weight = [self.recipe.prior_weight if self.items[r].prior else 1.0 for r in rows]
        return {
            "x0": torch.stack(x0), "noise": torch.stack(noise), "t": self._times(at[:, 0].clamp(1e-6, 1 - 1e-6), at[:, 1]),
            "captions": captions, "styles": styles, "weight": torch.tensor(weight), "versions": versions,
        }  # fmt: skip

    def _rows(self, positions: np.ndarray) -> list[int]:
        if not self.befores:
            return self.order.rows(positions).tolist()
        own = self.order.rows(np.unique(positions // 2))
        group = self.order.group(int(positions[0]) // 2)
        members = self.befores[group]
        before = members[shuffled(len(members), self.seed, f"order/prior/{group}", positions // 2)]
        first = int(positions[0]) // 2
        return [int(before[i] if p % 2 else own[p // 2 - first]) for i, p in enumerate(positions)]

    def _chosen_style(self, told: Path) -> dict[str, float] | None:
        """Of which style a change is learned; None: of any. With "auto" that whose pictures of the same things are drawn most like those that are to
        be learned, by the statistics of early feature maps; `told` keeps it.
        """
        names, asked = self.model.styles, self.recipe.style
        if not names or asked == "any":
            return None
        if asked != "auto":
            return style_weights(asked, names)
        if told.exists():
            return dict(json.loads(told.read_text(encoding="utf-8")))
        rows = [self.shown[i] for i in evenly(len(self.shown), COMPARED)]
        wanted = style_statistics(torch.cat([_rgb(fitted(self.items[r].open(), self.items[r].size)) for r in rows]))
        of_each = {}
        for name in tqdm(names, desc=translated("choosing a style"), leave=False):
            requests = [GenerateRequest(prompt=self.items[r].caption, seed=r, style=name, size=self.model.size, steps=10) for r in rows]
            of_each[name] = style_statistics(torch.cat([_rgb(p.image) for p in self.model.draw(requests)]))
        spread = torch.cat([wanted, *of_each.values()]).std(0) + 1e-6
        apart = {name: float(((found.mean(0) - wanted.mean(0)) / spread).square().mean()) for name, found in of_each.items()}
        chosen = {min(apart, key=lambda name: apart[name]): 1.0}
        write_json(told, chosen)
        return chosen

    def _style(self, position: int) -> dict[str, float]:
        """The chosen one, or one as pictures are drawn in where none is asked for."""
        if self.style is not None:
            return self.style
        return self.model._style_of(GenerateRequest(), derive(self.seed, "train/style", position)) or {}

    def _noise(self, size: Size, purpose: str, index: int) -> Tensor:
        rng = torch_rng(self.seed, purpose, index)
        noise = torch.randn(self.latents[size].shape[1:], generator=rng)
        return noise + self.recipe.offset_noise * torch.randn(len(noise), 1, 1, generator=rng) if self.recipe.offset_noise else noise

    def _times(self, u: Tensor, choose: Tensor) -> Tensor:
        """Of discrete models one of their steps."""
        t = draw_t(self.objective, u, choose) if self.until == 1 else u * self.until
        steps = getattr(self.model.denoiser.config, "steps", 0)
        return (t * steps).floor().add(1).clamp_max(steps) / steps if steps else t  # type: ignore[operator]

    def told(self, captions: Sequence[str | None], size: Size, styles: Sequence[dict[str, float]], model: LatentDiffusion | None = None) -> Cond:
        """What the denoiser is told; captions are heard once unless what hears them learns, then by `model`."""
        shares = torch.tensor([[s.get(name, 0.0) for name in self.model.styles] for s in styles], device=self.device)
        if self.hears_anew:
            cond = (model or self.model).told(captions, size)
        else:
            if len(self._heard) > MOST_HEARD:
                self._heard.clear()
            with torch.no_grad():
                for said in dict.fromkeys(c for c in captions if (c, size) not in self._heard):
                    self._heard[said, size] = self.model.told([said], size)
            cond = concat_conds([self._heard[c, size] for c in captions], 1)
        return replace(cond, style=shares if self.model.styles else None)

    def loss_of(self, denoiser: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = (side * self.model.codec.spec.factor for side in batch["x0"].shape[2:])  # type: ignore[union-attr]
        cond = self.told(batch["captions"], (height, width), batch["styles"])
        return loss(denoiser, batch["x0"], batch["noise"], batch["t"], cond, self.model.path, self.objective, batch["weight"], self.live)

    # --- looks --------------------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def used(self, networks: dict[str, nn.Module]) -> LatentDiffusion:
        """The model as it draws with these networks."""

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """The loss of pictures kept apart, or, of few, of those that are learned, at fixed times with fixed noise."""
        validation = self.validation(self.used(networks), self.style or {})
        return {"validation_loss": validation, "score": -validation}

    def validation(self, model: LatentDiffusion, style: dict[str, float]) -> float:
        rows = [self.shown[i] for i in evenly(len(self.shown), MOST_LOOKED_AT)]
        rows *= -(-LOOKS // len(rows))
        total = 0.0
        for i, row in enumerate(rows):
            item = self.items[row]
            x0 = self.latents[item.size][self.place[row] * self.variants].float()[None].to(self.device)
            noise = self._noise(item.size, "validation/noise", i)[None].to(self.device)
            t = self._times(torch.tensor([((i * 0.6180339887) % 1) * 0.998 + 0.001]), torch.ones(1)).to(self.device)
            cond = self.told([item.caption], item.size, [style], model)
            total += float(loss(model.denoiser, x0, noise, t, cond, model.path, self.objective, live=self.live)[0])
        return total / len(rows)

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image:
        """The preview prompts with fixed seeds."""
        style = ",".join(f"{k}:{v:g}" for k, v in self.style.items()) if self.style else None
        return self.drawn(self.used(networks), style=style)

    def drawn(self, model: LatentDiffusion, **more: Any) -> Image.Image:
        return grid([p.image for r in self.looks(**more) for p in model.pictures(r)])

    def looks(self, **more: Any) -> list[GenerateRequest]:
        """What a sample grid asks for."""
        prompts = self.previews if self.recipe.previews else self.previews * -(-PREVIEW_SIZE // len(self.previews))
        return [GenerateRequest(prompt=p, seed=i, **self._extent((self.side, self.side)), **more) for i, p in enumerate(prompts)]

    def about(self) -> dict[str, Any]:
        """What a file of what was learned says of itself."""
        said = {"base": self.recipe.base, "base_hash": self.model.meta["hash"], "prompt": self.recipe.prompt}
        return said | ({"style": self.style} if self.style else {})


def tune(kind: type[Tuning], recipe: Tuned, loop: LoopConfig, out: Path, stop_at: int | None) -> Trainer:
    """Trains, or goes on with, what is learned in the run folder `out`."""
    loop = settled(loop, out)
    with starting(out):
        task = main_first(loop, lambda device: kind(recipe, loop.seed, loop.batch_size, Path(out), device, loop.dtype == "bf16"))
        trainer = Trainer(task, loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
