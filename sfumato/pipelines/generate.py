"""What a pack that draws can do with a request, whatever its generator is: rows, conditions, pictures with their record."""

from __future__ import annotations

import hashlib
import platform
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path as Files
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

import sfumato
from sfumato.codecs.autoencoder import Autoencoder
from sfumato.codecs.upscaler import Upscaler
from sfumato.core.config import nearest
from sfumato.core.images import Unreadable, decode, flatten, png_bytes, to_pil, to_tensor
from sfumato.core.request import METADATA_KEY, SOURCE_KEY, GenerateRequest, metadata_text, parameters_text, source_text, style_weights
from sfumato.core.rng import numpy_rng
from sfumato.core.seams import Cond
from sfumato.data.folder import framed
from sfumato.nn.conditions import without_style, without_text
from sfumato.nn.engine import EAGER, Engine
from sfumato.text.encoder import TextEncoder
from sfumato.text.words import normalise, of_people, spell_emoji, unknown_words

CHUNK = 16  # pictures drawn together, at most
USUAL_GUIDANCE = 3.0
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Progress = Callable[[int, int], None]
OF_SIZED = ("width", "height", "clip_skip", "tiling", "hires", "noise", "extend")


class NotFinite(ValueError):
    """A network drew what is no number."""

    def __init__(self, said: str = "the model drew values that are not finite: use --dtype fp32, or fewer extremes of guidance and steps") -> None:
        super().__init__(said)


@dataclass(frozen=True)
class Picture:
    """One drawn picture with everything needed to draw it again."""

    image: Image.Image
    request: GenerateRequest
    index: int
    record: dict[str, Any]
    parameters: str
    source: str

    @property
    def seed(self) -> int:
        return self.record["seed"]

    def png(self) -> bytes:
        """The picture as PNG with its request inside."""
        return png_bytes(self.image, {METADATA_KEY: metadata_text(self.record), "parameters": self.parameters, SOURCE_KEY: self.source})


@dataclass(frozen=True)
class Row:
    """One picture to draw: the `index`-th of its request, with its own seed and shares of styles (None: the model has no styles).

    `toward` another row it is drawn by the `share`: noise by slerp, what the generator is told by lerp.
    """

    request: GenerateRequest
    index: int
    seed: int
    style: dict[str, float] | None
    toward: Row | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Begun:
    """What a picture begins from: `x` "1 c h w" in [-1, 1], its latents `z` and `indices`, and where it is redrawn, `mask` "1 1 h w" in [0, 1] or
    everywhere.

    `digest` tells other files of the same names apart.
    """

    x: Tensor
    z: Tensor
    mask: Tensor | None
    digest: str
    indices: Tensor | None = None

    def redraw(self) -> Tensor:
        """The mask in latent cells "1 1 h/f w/f": 1 where any pixel of the cell is redrawn."""
        assert self.mask is not None
        factor = self.x.shape[-1] // self.z.shape[-1]
        return (nn.functional.max_pool2d(self.mask, factor) > 0).float()

    def keep(self, x: Tensor) -> Tensor:
        """Pictures with what the mask does not redraw put back as it was."""
        return x if self.mask is None else torch.lerp(self.x, x, self.mask.expand_as(x))


@dataclass(frozen=True, kw_only=True)
class Model(ABC):
    """Codec, text encoder and a generator of one pack: what draws. Made by `sfumato.load`. How it draws, its kinds say (`latents`)."""

    codec: Autoencoder | None
    text: TextEncoder | None
    meta: dict[str, Any]
    name: str
    device: torch.device
    dtype: torch.dtype
    engine: Engine = EAGER
    upscaler: Upscaler | None = None
    upscaler_hash: str | None = None
    way: ClassVar[str]  # how it draws
    part: ClassVar[str]  # what the generator is called in a pack
    needs_label: ClassVar[bool] = False
    sized: ClassVar[bool] = False  # whether pictures can have any width and height
    adapts: ClassVar[bool] = False  # whether it takes LoRAs and learned words

    @property
    def usual(self) -> dict[str, Any]:
        """What a request is drawn with that does not say it."""
        return (
            {"guidance": USUAL_GUIDANCE, "sampler": "dpmpp_2m"}
            if self.way == "diffusion"
            else {}
            if self.way == "gan"
            else {"guidance": USUAL_GUIDANCE}
        )

    @property
    def styles(self) -> list[str]:
        return self.meta["styles"]

    @property
    def size(self) -> int:
        return self.meta["size"]

    @property
    def sizes(self) -> list[int]:
        """Sides that pictures can have: what the generator draws, and what the enlargement makes of it, the usual one last."""
        return [self.size] if self.upscaler is None else [self.size, self.size * self.upscaler.config.factor]

    def side(self, request: GenerateRequest) -> int:
        """The side of a request's pictures."""
        return request.size or self.sizes[-1]

    @property
    def hears(self) -> bool:
        """Whether it takes prompts."""
        return self.text is not None

    def extent(self, request: GenerateRequest) -> tuple[int, int]:
        """Height and width of a request's pictures."""
        return (self.side(request),) * 2

    @cached_property
    def words(self) -> set[str]:
        """Every word that some concept of this model is known by, those kept out of its training among them."""
        entries = (w for entry in self.meta["words"].values() for key, words in entry.items() if key != "group" for w in words)
        return {normalise(w) for w in entries} - {""}

    @cached_property
    def emoji(self) -> dict[str, dict[str, str]]:
        """What each emoji of this model's concepts is called, in English and in Chinese."""
        entries = self.meta["words"].values()
        return {normalise(e["emoji"][0]): {"en": e["en"][0], "zh": e["zh"][0] or e["en"][0]} for e in entries if e["emoji"][0]}

    def together(self, request: GenerateRequest) -> int:
        """Pictures of a request that are drawn at once."""
        return CHUNK

    def unknown(self, prompt: str) -> list[tuple[str, list[str]]]:
        """Words of a prompt that nothing this model draws is known by, each with the nearest that something is."""
        return unknown_words(prompt, self.words, filler=self.meta["filler"])

    def people(self, prompt: str) -> str | None:
        """The first word of a prompt that is of people, where the model's concepts are of groups without them."""
        groups = {g for e in self.meta["words"].values() for g in e.get("group", [])}
        return of_people(prompt, self.words) if groups and "people-body" not in groups else None

    def too_long(self, prompt: str) -> bool:
        """Whether the end of a prompt is not heard, because it has more tokens than the text encoder takes."""
        return self.text is not None and len(self.text.tokenizer.encode(normalise(prompt)).ids) >= self.text.config.tokens

    def check(self, request: GenerateRequest) -> None:
        """Raises ValueError for what this model cannot do."""
        if request.style is not None:
            if not self.styles:
                raise ValueError(f"style (={request.style!r}) must be left out: this model has no styles")
            style_weights(request.style, self.styles)
        labels = self.meta["labels"]
        if request.label is not None and request.label not in labels:
            allowed = f"one of {', '.join(labels)}{nearest(request.label, labels)}" if labels else "left out: this model has no labels"
            raise ValueError(f"label (={request.label!r}) must be {allowed}")
        self._check_plain(request)
        if not self.sized and request.size not in (None, *self.sizes):
            raise ValueError(f"size (={request.size}) must be {' or '.join(map(str, self.sizes))}: the sides of what this model draws")
        self.check_way(request)
        if request.init is not None:
            self._pictures_of(request)
        if not self.hears and (request.prompt or request.negative):
            raise ValueError(f"prompt (={request.prompt or request.negative!r}) must be left out: this model was trained without captions")

    def _check_plain(self, request: GenerateRequest) -> None:
        """Raises ValueError for what only models of any size, or those that draw by diffusion, have."""
        plain = GenerateRequest()
        for name in () if self.sized else OF_SIZED:
            if getattr(request, name) != getattr(plain, name):
                raise ValueError(f"{name} (={getattr(request, name)!r}) must be left out: it is for checkpoints of Stable Diffusion")
        for name in () if self.adapts else ("lora", "embedding", "fast", "cache_interval"):
            if getattr(request, name):
                raise ValueError(f"{name} (={getattr(request, name)!r}) must be left out: it is for models that draw by diffusion")

    def generate(self, prompt: str | None = None, *, progress: Progress | None = None, **options: Any) -> list[Image.Image]:
        """PIL images for a prompt and the fields of GenerateRequest as options; RGBA where the model draws transparency."""
        known = [f.name for f in fields(GenerateRequest)]
        for name in options:
            if name not in known:
                raise ValueError(f"{name} (={options[name]!r}) is no option: they are {', '.join(known)}{nearest(name, known)}")
        return [p.image for p in self.pictures(GenerateRequest(prompt=prompt, **options), progress=progress)]

    def pictures(self, request: GenerateRequest, *, progress: Progress | None = None, only: int | None = None) -> Iterator[Picture]:
        """Draws a request, some (`together`) at a time. `only` gives one picture of it, drawn in the same company, so byte for byte the same.

        progress(done, total) counts network steps.
        """
        if only is None:
            yield from self.draw([request], progress=progress)
            return
        rows = self._rows(request)
        n = self.together(rows[0].request)
        start = only // n * n
        yield from (p for p in self._draw_rows(rows[start : start + n], progress) if p.index == only)

    def draw(self, requests: Sequence[GenerateRequest], *, progress: Progress | None = None) -> Iterator[Picture]:
        """Draws several requests together, in order; they may differ in prompt, negative, style, label, seed and count only."""
        same = {replace(r, prompt=None, negative=None, style=None, label=None, seed=None, count=1) for r in requests}
        if len(same) > 1:
            raise ValueError("requests drawn together must have the same steps, guidance, sampler and size")
        yield from self._draw_rows([row for r in requests for row in self._rows(r)], progress)

    def morph(self, a: GenerateRequest, b: GenerateRequest, frames: int, *, progress: Progress | None = None) -> Iterator[Picture]:
        """`frames` pictures from the first of `a` to the first of `b`, both included; everything but prompt, style, label and seed is as in `a`."""
        if frames < 2:
            raise ValueError(f"frames (={frames}) must be at least 2: the first and the last")
        start, end = (self._rows(r)[0] for r in (a, b))
        yield from self._draw_rows([replace(start, index=i, toward=end, share=i / (frames - 1)) for i in range(frames)], progress)

    def complete(self, request: GenerateRequest) -> GenerateRequest:
        """With what is usual where it says nothing."""
        request = replace(request, **{k: v for k, v in self.usual.items() if getattr(request, k) is None})
        if self.way in ("gpt", "gan"):  # whose steps are its codes, or one
            return request
        return replace(request, steps=self.steps_of(request))

    def _rows(self, request: GenerateRequest) -> list[Row]:
        self.check(request)
        if request.seed is None:
            request = replace(request, seed=secrets.randbelow(2**31))
        if request.variation and request.variation_seed is None:
            request = replace(request, variation_seed=secrets.randbelow(2**31))
        request = self.complete(request)
        seeds = [request.seed + i for i in range(request.count)]  # type: ignore[operator]
        return [Row(request, i, seed, self._style_of(request, seed)) for i, seed in enumerate(seeds)]

    def _draw_rows(self, rows: list[Row], progress: Progress | None) -> Iterator[Picture]:
        if not rows:
            return
        n, begun = self.together(rows[0].request), self.begin(rows[0].request)
        chunks = [rows[s : s + n] for s in range(0, len(rows), n)]
        total, done = sum(self.steps_taken(row[0].request, begun) for row in chunks), 0
        for chunk in chunks:
            for x in self.latents(chunk, begun):
                last, done = x, done + 1
                if progress:
                    progress(done, total)
            drawn = self.enlarge(self.decode(last), chunk[0].request)
            for row, image in zip(chunk, to_pil(drawn if begun is None else begun.keep(drawn)), strict=True):
                yield self._picture(image, row, begun)

    # --- the way to latents --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, request: GenerateRequest) -> Begun | None:
        """The init picture of a request with its mask, at the side of what is drawn; None where it has none."""
        if request.init is None:
            return None
        init, mask = self._pictures_of(request)
        assert self.codec is not None
        whole = init.mode == "RGBA"
        side, channels = self.side(request), self.codec.spec.image_channels
        small = to_tensor(framed(init, self.size), channels).to(self.device)
        found = self.codec.encode(small)
        assert found.mean is not None
        x = small if side == self.size else to_tensor(framed(init, side), channels).to(self.device)
        at = None if mask is None else to_tensor(framed(flatten(mask, (0, 0, 0)).convert("L"), side, whole), 1).to(self.device) / 2 + 0.5
        return Begun(x, found.mean, at, begun_digest(request), found.indices)

    def _pictures_of(self, request: GenerateRequest) -> tuple[Image.Image, Image.Image | None]:
        init, mask = (None if f is None else _open(name, f) for name, f in (("init", request.init), ("mask", request.mask)))
        assert init is not None
        if mask is not None and mask.size != init.size:
            sizes = f"{mask.width} x {mask.height} pixels and init {init.width} x {init.height}"
            raise ValueError(f"mask (={request.mask!r}) must be as large as the init picture: it has {sizes}")
        return init, mask

    @abstractmethod
    def latents(self, rows: list[Row], begun: Begun | None = None) -> Iterator[Tensor]:
        """What `decode` takes, after each step, for rows that share steps, guidance and what they begin from."""

    @property
    def network(self) -> nn.Module:
        """The network that draws."""
        return getattr(self, self.part)

    @abstractmethod
    def steps_of(self, request: GenerateRequest) -> int:
        """Steps of a whole way to a picture."""

    def steps_taken(self, request: GenerateRequest, begun: Begun | None) -> int:
        """Steps that are really taken: with an init picture the last `strength` of them, at least one."""
        steps = self.steps_of(request)
        return steps if begun is None else max(1, round(request.strength * steps))

    @abstractmethod
    def check_way(self, request: GenerateRequest) -> None:
        """Raises ValueError for a way of drawing that this model does not have."""

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images "b c h w" in [-1, 1]."""
        x = self._decoded(z)
        if not bool(torch.isfinite(x).all()):
            raise NotFinite
        return x

    def _decoded(self, z: Tensor) -> Tensor:
        assert self.codec is not None
        return self.engine.of(self.codec, "decode", dynamic=True)(z.float())

    @torch.no_grad()
    def enlarge(self, x: Tensor, request: GenerateRequest) -> Tensor:
        """What was decoded, at the side that the request asks for."""
        if self.side(request) == self.size:
            return x
        assert self.upscaler is not None
        return self.upscaler(x.clamp(-1, 1))

    def _sides(self, rows: list[Row]) -> tuple[Cond, Cond]:
        """What is asked for, and what guidance leans on."""
        asked = self._told(rows, lambda r: r.request.prompt, lambda r: r.request.label)
        return asked, self._told(rows, lambda r: r.request.negative, lambda r: None)

    def _neither(self, rows: list[Row], empty: Cond) -> Cond:
        """What guidance of the style leans on."""
        return without_style(empty, torch.ones(len(rows), dtype=torch.bool, device=self.device))

    def _told(self, rows: list[Row], prompt: Callable[[Row], str | None], label: Callable[[Row], str | None]) -> Cond:
        """What the generator is told of each row, on its way towards another where there is one."""
        if all(r.toward is None for r in rows):
            return self._cond(rows, [prompt(r) for r in rows], [label(r) for r in rows])
        both = [*rows, *(r.toward or r for r in rows)]
        cond = self._cond(both, [prompt(r) for r in both], [label(r) for r in both])
        return between(cond[: len(rows)], cond[len(rows) :], torch.tensor([r.share for r in rows], device=self.device))

    def _cond(self, rows: list[Row], prompts: list[str | None], labels: list[str | None]) -> Cond:
        """What the generator is told: a prompt of None is silence, as it was in training."""
        weights = torch.tensor([[(r.style or {}).get(name, 0.0) for name in self.styles] for r in rows]).to(self.device)
        cond = Cond(style=weights if self.styles else None)
        names = self.meta["labels"]
        if names:
            cond = replace(cond, label=torch.tensor([names.index(n) if n else -1 for n in labels], device=self.device))
        if self.text is not None:
            states, mask, pooled = self.text.encode([spell_emoji(p or "", self.emoji) for p in prompts])
            cond = replace(cond, text=states, mask=mask, pooled=pooled)
        return without_text(cond, torch.tensor([p is None for p in prompts], device=self.device))

    def _style_of(self, request: GenerateRequest, seed: int) -> dict[str, float] | None:
        """The asked style, or a mixture drawn from the seed: mostly one style, sometimes two or three."""
        if not self.styles:
            return None
        if request.style is not None:
            return style_weights(request.style, self.styles)
        shares = numpy_rng(seed, "generate/style").dirichlet([0.25] * len(self.styles)).round(2)
        return style_weights(",".join(f"{n}:{w}" for n, w in zip(self.styles, shares, strict=True) if w > 0.05), self.styles)

    def _picture(self, image: Image.Image, row: Row, begun: Begun | None) -> Picture:
        record = {
            "version": sfumato.__version__,
            "request": row.request,
            "index": row.index,
            "seed": row.seed,
            "style": row.style,
            "model": {"name": self.name, "hash": self.meta["hash"]},
            "engine": self.engine.used,
            "device": self.device.type,
            "dtype": DTYPES[self.dtype],
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        if self.side(row.request) != self.size:
            record |= {"side": self.side(row.request), "upscaler": self.upscaler_hash}
        if begun is not None:
            record["init_sha256"] = begun.digest
        if self.meta.get("with"):
            record["with"] = self.meta["with"]
        model, digest = self.name, self.meta["hash"]
        parameters = parameters_text(
            row.request, seed=row.seed, size=(image.width, image.height), model=model, model_hash=digest, version=sfumato.__version__, way=self.way
        )
        return Picture(image, row.request, row.index, record, parameters, source_text(model, self.meta.get("credits", [])))


def between(a: Cond, b: Cond, share: Tensor) -> Cond:
    """Conditions of the same rows mixed, the `share` "n" of each from b: vectors by lerp, labels from the nearer one, tokens of both attended to."""

    def mix(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.lerp(x, y, share.to(x).reshape(-1, *[1] * (x.ndim - 1)))

    label = None if a.label is None or b.label is None else torch.where(share < 0.5, a.label, b.label)
    at, heard = (
        share[:, None],
        [c.mask if c.mask is not None or c.text is None else torch.ones_like(c.text[..., 0], dtype=torch.bool) for c in (a, b)],
    )
    mask = None if a.mask is None and b.mask is None else (heard[0] & (at < 1)) | (heard[1] & (at > 0))  # type: ignore[operator]
    return Cond(text=mix(a.text, b.text), mask=mask, pooled=mix(a.pooled, b.pooled), style=mix(a.style, b.style), label=label)


def begun_digest(request: GenerateRequest) -> str:
    """sha256 of the init picture's file and of its mask's."""
    given = [(name, file) for name, file in (("init", request.init), ("mask", request.mask)) if file is not None]
    return hashlib.sha256(b"".join(hashlib.sha256(_bytes(name, file)).digest() for name, file in given)).hexdigest()


def _open(name: str, file: str) -> Image.Image:
    """A picture named by a request. Raises ValueError with the field's name."""
    try:
        return decode(_bytes(name, file))
    except Unreadable as e:
        raise ValueError(f"{name} (={file!r}) {e}") from None


def _bytes(name: str, file: str) -> bytes:
    try:
        return Files(file).read_bytes()
    except OSError as e:
        raise ValueError(f"{name} (={file!r}) cannot be read: {e.strerror or e}") from None
