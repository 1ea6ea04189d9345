"""Drawing with a checkpoint of Stable Diffusion: any size, prompts with weights, redrawing, two passes, and the noise of other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.codecs.tiny import TinyAutoencoder
from sfumato.core.images import flatten, to_pil, to_tensor
from sfumato.core.request import MOST_SIDE, GenerateRequest
from sfumato.core.rng import Philox
from sfumato.core.seams import Cond, Denoise, Predict
from sfumato.data.buckets import covering
from sfumato.diffusion.discrete import OPEN, ROUNDED, SchedulerConfig
from sfumato.diffusion.guidance import guided, inpaint
from sfumato.diffusion.precond import Precond
from sfumato.diffusion.unet import TIMES
from sfumato.nn.layers import slerp
from sfumato.nn.memory import hand_back
from sfumato.pipelines.generate import Begun, Picture, Progress, Row, begun_digest, between
from sfumato.pipelines.latent_diffusion import LatentDiffusion, Stream
from sfumato.text.prompts import Ear, heard

GUIDANCE = {"1": 7.5, "2": 7.5, "xl": 5.0}
NEARLY = 0.9995  # the cosine above which that program takes a straight line
MOST_PIXELS = 4 * 512 * 512  # of all pictures that a CPU draws together
TILE, OVERLAP = 64, 16  # latent cells of a tile in which large pictures are decoded, and how many of them two tiles share


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(LatentDiffusion):
    """See `Model`. Made by `sfumato.load` of a folder of diffusers or a single file."""

    ears: list[Ear] = field(default_factory=list)
    scheduler: SchedulerConfig
    inpaints: bool = False
    quiet: bool = False  # whether guidance leans on zeros where nothing negative is said
    sized: ClassVar[bool] = True

    @property
    def usual(self) -> dict[str, Any]:
        return {"guidance": GUIDANCE[self.meta["version"]], "sampler": self.scheduler.sampler}

    def complete(self, request: GenerateRequest) -> GenerateRequest:
        request = super().complete(request)
        return replace(request, schedule=request.schedule or self.scheduler.schedule_of(request.sampler))  # type: ignore[arg-type]

    @property
    def hears(self) -> bool:
        return True

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.denoiser} | {f"text_encoder{e}": ear.network for e, ear in zip(("", "_2"), self.ears, strict=False)}

    @property
    def changeable(self) -> dict[str, nn.Module]:
        """As other programs have it."""
        return self.networks

    @property
    def listeners(self) -> list[Any]:
        return list(self.ears)

    @property
    def sizes(self) -> list[int]:
        return [self.size]

    def together(self, request: GenerateRequest) -> int:
        height, width = (round(side * request.hires) for side in self.extent(request))
        return max(1, min(4, MOST_PIXELS // (height * width)))

    def unknown(self, prompt: str) -> list[tuple[str, list[str]]]:
        """CLIP knows a word for everything."""
        return []

    def people(self, prompt: str) -> str | None:
        return None

    def too_long(self, prompt: str) -> bool:
        """Prompts are heard in parts."""
        return False

    # --- what is asked for ------------------------------------------------------------------------------------------------------------------------

    def extent(self, request: GenerateRequest) -> tuple[int, int]:
        """Height and width: as asked for, or those of the init picture, made smaller where that is larger than what the model learned; with all
        that is drawn around it, where that is asked for.
        """
        factor = self.codec.spec.factor
        if (request.width is None) != (request.height is None) and request.init is not None:
            init, _ = self._pictures_of(request)  # the other side by its shape
            share = (request.width or request.height) / (init.width if request.width else init.height)  # type: ignore[operator]
            sides = (max(1, round(side * share / factor)) * factor for side in (init.height, init.width))
            height, width = (asked or side for asked, side in zip((request.height, request.width), sides, strict=True))
            return height, width
        if request.width is None and request.height is None and request.init is not None:
            init, _ = self._pictures_of(request)
            share = 1.0 if request.extend else min(1.0, (self.size**2 / (init.width * init.height)) ** 0.5)
            return tuple(max(1, round(side * share / factor)) * factor for side in (init.height, init.width))  # type: ignore[return-value]
        side = request.size or self.size
        return request.height or side, request.width or side

    def init_size(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height of the init picture's file."""
        init, _ = self._pictures_of(request)
        return init.width, init.height

    def check_way(self, request: GenerateRequest) -> None:
        """Raises ValueError for a size, sampler, schedule, or a mask that there is not."""
        super().check_way(request)
        factor = self.codec.spec.factor
        for name in ("width", "height", "size"):
            value = getattr(request, name)
            if value is not None and value % factor:
                raise ValueError(
                    f"{name} (={value}) must be a multiple of {factor}: the nearest are {value // factor * factor} and {-(-value // factor) * factor}"
                )
        most = min(e.most_skip for e in self.ears)
        if request.clip_skip is not None and request.clip_skip > most:
            raise ValueError(f"clip_skip (={request.clip_skip}) must be from 1 to {most}: the blocks of this text encoder")
        if self.inpaints and request.mask is None and request.extend is None:
            raise ValueError("mask (=None) is what this model draws by: it is for inpainting; name --init and --mask, or another model")
        if request.hires > 1 and request.init is not None:
            raise ValueError(f"hires (={request.hires}) is for pictures from noise: leave it or init out")
        if request.hires > 1 and (most := max(self._large(side, request) for side in self.extent(request))) > MOST_SIDE:
            raise ValueError(f"hires (={request.hires}) would make sides of {most:,} pixels, at most {MOST_SIDE:,} are allowed")

    def steps_taken(self, request: GenerateRequest, begun: Begun | None) -> int:
        if request.noise == "diffusers" and begun is not None:
            return max(1, int(self.steps_of(request) * request.strength))
        return super().steps_taken(request, begun)

    def times(self, request: GenerateRequest) -> Tensor:
        return self.scheduler.times(self.steps_of(request), request.sampler or self.scheduler.sampler, request.schedule)

    # --- what is heard ----------------------------------------------------------------------------------------------------------------------------

    def _sides(self, rows: list[Row]) -> tuple[Cond, Cond]:
        """What is asked for and what guidance leans on, of each row on its way towards another where there is one."""
        request = rows[0].request
        skip = request.clip_skip or 1
        cond = self._heard(rows, lambda r: r.request.prompt, skip)
        empty = self._heard(rows, lambda r: r.request.negative, 1 if request.noise == "diffusers" else skip)  # which skips nothing there
        empty = self._quieted(empty, [r.request.negative for r in rows])
        for ear in self.ears:
            hand_back(ear.network)
        size = self.extent(request)
        return self._with_size(cond, size), self._with_size(empty, size)

    def _with_size(self, cond: Cond, size: tuple[int, int]) -> Cond:
        """What is told beside the text, where the network hears it."""
        if not self.denoiser.config.pooled:  # type: ignore[union-attr]
            return replace(cond, pooled=None)
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
        return replace(cond, extra={TIMES: sizes.expand(len(cond.text), -1)})  # type: ignore[arg-type]

    def told(self, prompts: Sequence[str | None], size: tuple[int, int], styles: Sequence[Mapping[str, float]] = ()) -> Cond:
        """See `LatentDiffusion`; there are no styles."""
        return self._with_size(self._quieted(heard(self.ears, [p or "" for p in prompts]), prompts), size)

    def _quieted(self, cond: Cond, prompts: Sequence[str | None]) -> Cond:
        """Zeros where nothing is said, as a quiet model learned it."""
        if not self.quiet:
            return cond
        said = torch.tensor([p is not None for p in prompts], device=self.device)
        return replace(cond, text=cond.text * said[:, None, None], pooled=cond.pooled * said[:, None])  # type: ignore[operator, index]

    def _heard(self, rows: list[Row], said: Callable[[Row], str | None], skip: int) -> Cond:
        cond = heard(self.ears, [said(r) or "" for r in rows], skip)
        if all(r.toward is None for r in rows):
            return cond
        other = heard(self.ears, [said(r.toward or r) or "" for r in rows], skip)
        longer = max(cond.text.shape[1], other.text.shape[1])  # type: ignore[union-attr]
        return between(_filled_up(cond, longer), _filled_up(other, longer), torch.tensor([r.share for r in rows], device=self.device))

    # --- noise ------------------------------------------------------------------------------------------------------------------------------------

    def shape_of(self, request: GenerateRequest) -> tuple[int, int, int]:
        height, width = self.extent(request)
        factor = self.codec.spec.factor
        return self.codec.spec.latent_channels, height // factor, width // factor

    def _stream(self, row: Row, begun: Begun | None) -> Stream:
        if row.request.noise == "own":
            return super()._stream(row, begun)
        found = (self._of_a1111 if row.request.noise == "a1111" else self._of_diffusers)(row, begun)
        return found if row.toward is None else replace(found, first=slerp(found.first, self._stream(row.toward, begun).first, row.share))

    def _of_diffusers(self, row: Row, begun: Begun | None) -> Stream:
        one, shape = torch.Generator().manual_seed(row.seed), self._shape(row, begun)  # for all that a picture needs, in this order
        draw = lambda wanted: torch.randn((1, *shape), generator=one)[0] if wanted else None  # noqa: E731
        spread = not isinstance(self.codec, TinyAutoencoder)  # whose encodings are points
        of_init = draw(begun is not None and spread and not (self.inpaints and row.request.strength == 1))
        first = draw(True)
        return Stream(shape, one, one, first, of_init, draw(begun is not None and spread and begun.mask is not None))  # type: ignore[arg-type]

    def _of_a1111(self, row: Row, begun: Begun | None) -> Stream:
        """Numbers of CUDA's generator, which goes on in the steps of samplers; a variation's noise along an arc whose angle is taken over rows of the
        latents, as that program does, and of a batch it varies the other seed.
        """
        request, shape = row.request, self._shape(row, begun)
        numbers = Philox((request.seed or 0) if request.variation else row.seed)
        first = torch.from_numpy(numbers.normal(*shape))
        if request.variation:
            seed = (request.seed if request.variation_seed is None else request.variation_seed) or 0
            other = torch.from_numpy(Philox(seed + row.index).normal(*shape))
            dot = (F.normalize(first, dim=1) * F.normalize(other, dim=1)).sum(1, keepdim=True)
            angle, v = dot.clamp(-1, 1).acos(), request.variation
            arc = (((1 - v) * angle).sin() * first + (v * angle).sin() * other) / angle.sin()
            first = torch.lerp(first, other, v) if float(dot.mean()) > NEARLY else arc
        return Counted(shape, torch.Generator(), torch.Generator(), first, source=numbers)

    def _start(self, rows: list[Row], streams: list[Stream], ts: Tensor, begun: Begun | None) -> Tensor:
        request = rows[0].request
        asked = request.sampler or self.scheduler.sampler
        x = torch.stack([s.first for s in streams]).to(self.device)
        plain = x * self.scheduler.start(ts, asked, request.schedule)
        if begun is None or (isinstance(begun, Loose) and begun.mask is not None and request.strength == 1):
            return plain
        return self.path.mix(self._begun(begun, streams), x, ts[:1].expand(len(x)).to(x))

    def _begun(self, begun: Begun, streams: list[Stream]) -> Tensor:
        """Latents of the init picture for each row: their means, or with the noise that diffusers gives them."""
        if not isinstance(begun, Loose) or streams[0].of_init is None:
            return begun.z.expand(len(streams), -1, -1, -1)
        return begun.z + begun.std * torch.stack([s.of_init for s in streams]).to(begun.z)  # type: ignore[misc]

    # --- steps ------------------------------------------------------------------------------------------------------------------------------------

    def _denoise(self, rows: list[Row], begun: Begun | None, streams: list[Stream], ts: Tensor) -> Denoise:
        request = rows[0].request
        cond, empty = self._sides(rows)
        if self.inpaints and begun is not None:
            shown = self._shown(begun, streams)
            cond, empty = (replace(c, concat=shown) for c in (cond, empty))
        terms = self._terms(rows, cond, empty)
        post = [*self._changes(request, self.scheduler.prediction), *self._late(terms)]
        if begun is not None and begun.mask is not None and not self.inpaints:
            post.append(inpaint(self._begun(begun, streams), begun.redraw()))
        denoise = guided(terms, post)
        if isinstance(begun, Loose) and begun.mask is not None and not self.inpaints:
            start = self._start(rows, streams, ts, begun) if request.strength == 1 else None
            return self._beside(denoise, begun, streams, float(ts[0]), start)
        return denoise

    def _beside(self, denoise: Denoise, begun: Begun, streams: list[Stream], first: float, start: Tensor | None) -> Denoise:
        """What the network sees outside of the mask, as diffusers has it: the picture with the first noise, whatever the sampler adds; at the first
        time `start`, where that is noise alone.
        """
        known, noise, redraw = self._begun(begun, streams), torch.stack([s.first for s in streams]).to(self.device), begun.redraw()

        def seen(x: Tensor, t: Tensor) -> Tensor:
            outside = start if start is not None and float(t[0]) >= first - 1e-6 else self.path.mix(known, noise, t)
            return denoise(torch.lerp(outside.to(x), x, redraw.expand_as(x)), t)

        return seen

    @torch.no_grad()
    def latents(self, rows: list[Row], begun: Begun | None = None) -> Iterator[Tensor]:
        """See `LatentDiffusion`; as diffusers has it, what the mask does not show ends as it was, whatever is left of the noise elsewhere."""
        if not isinstance(begun, Loose) or begun.mask is None or self.inpaints:
            yield from super().latents(rows, begun)
            return
        known, redraw = self._begun(begun, [self._stream(r, begun) for r in rows]), begun.redraw()
        for x in super().latents(rows, begun):
            yield torch.lerp(known.to(x), x, redraw.expand_as(x))

    def predict(self, request: GenerateRequest) -> Predict:
        """See `LatentDiffusion`; the network hears whole steps only where diffusers has it so."""
        rounds = (self.scheduler.rounded and (request.sampler or self.scheduler.sampler) in OPEN) or request.schedule == ROUNDED
        network = self._network(request)
        steps = self.scheduler.path.num_betas
        rounding = lambda x, t, cond: network(x, (t * steps).round() / steps, cond)  # noqa: E731
        return Precond(rounding if rounds else network, self.scheduler.prediction, self.path, None if self.dtype == torch.float32 else self.dtype)

    def _shown(self, begun: Begun, streams: list[Stream]) -> Tensor:
        """What a model for inpainting sees beside x: the mask, and the latents of the picture without what is under it."""
        assert begun.mask is not None
        hidden = self.codec.encode(begun.x * (begun.mask < 0.5))
        z = hidden.mean.expand(len(streams), -1, -1, -1)  # type: ignore[union-attr]
        if isinstance(begun, Loose) and streams[0].of_shown is not None:
            z = z + hidden.std * torch.stack([s.of_shown for s in streams]).to(z)  # type: ignore[misc]
        mask = F.interpolate((begun.mask >= 0.5).float(), size=z.shape[2:])
        return torch.cat([mask.expand(len(streams), -1, -1, -1), z], dim=1)

    # --- pictures ---------------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, request: GenerateRequest) -> Begun | None:
        if request.init is None:
            return None
        init, mask = self._pictures_of(request)
        height, width = self.extent(request)
        x = to_tensor(covering(flatten(init), width, height), 3).to(self.device)
        found = self.codec.encode(x)
        assert found.mean is not None
        at = None if mask is None else to_tensor(covering(flatten(mask, (0, 0, 0)).convert("L"), width, height), 1).to(self.device) / 2 + 0.5
        if request.noise == "diffusers":
            return Loose(x, found.mean, at, begun_digest(request), std=found.std)
        return Begun(x, found.mean, at, begun_digest(request))

    def _pictures_of(self, request: GenerateRequest) -> tuple[Image.Image, Image.Image | None]:
        """The init picture and its mask; with `extend` on a larger sheet, the mask around it, and as a first guess its mirrored edges there."""
        init, mask = super()._pictures_of(request)
        if request.extend is None:
            return init, mask
        left, top, right, bottom = request.extend
        flat = np.pad(np.asarray(flatten(init)), ((top, bottom), (left, right), (0, 0)), mode="symmetric")
        around = np.full(flat.shape[:2], 255, dtype=np.uint8)
        around[top : top + init.height, left : left + init.width] = 0
        return Image.fromarray(flat), Image.fromarray(around)

    @contextmanager
    def changed(self, request: GenerateRequest) -> Iterator[None]:
        """See `LatentDiffusion`; where it is to be so, opposite edges fit together."""
        networks = [self.denoiser, self.codec, *([] if self.guide is None else [self.guide.denoiser])]
        with super().changed(request), seamless(networks, request.tiling):
            yield

    def _drawn(self, rows: list[Row], progress: Progress | None) -> Iterator[Picture]:
        yield from super()._drawn(rows, progress) if rows[0].request.hires == 1 else self._twice(rows, progress)

    def _twice(self, rows: list[Row], progress: Progress | None) -> Iterator[Any]:
        """At the asked size, then larger, and of that a share drawn anew."""
        request = rows[0].request
        height, width = self.extent(request)
        high = replace(request, hires=1.0, strength=request.hires_strength, height=self._large(height, request), width=self._large(width, request))
        n = self.together(request)
        done, chunks = 0, [rows[s : s + n] for s in range(0, len(rows), n)]
        total = len(chunks) * (self.steps_of(request) + max(1, round(self.steps_of(request) * high.strength)))
        last: Any = None
        for chunk in chunks:
            small = [replace(r, request=replace(r.request, hires=1.0)) for r in chunk]
            large = [replace(r, request=replace(high, prompt=r.request.prompt, negative=r.request.negative)) for r in chunk]
            begun: Begun | None = None
            for part in (small, large):
                if part is large:
                    x = F.interpolate(self.decode(last), size=(high.height, high.width), mode="bicubic", antialias=True).clamp(-1, 1)
                    z = torch.cat([self.codec.encode(p).mean for p in x.split(1)])  # type: ignore[misc]
                    begun = Begun(x, z, None, "")
                for last in self.latents(part, begun):  # noqa: B007
                    done += 1
                    if progress:
                        progress(done, total)
            for row, image in zip(chunk, to_pil(self.decode(last)), strict=True):
                yield self._picture(image, row, None)

    def _large(self, side: int, request: GenerateRequest) -> int:
        return round(side * request.hires / self.codec.spec.factor) * self.codec.spec.factor

    def _decoded(self, z: Tensor) -> Tensor:
        z, factor = z.float(), self.codec.spec.factor
        hand_back(self.denoiser)
        decode = self.engine.of(self.codec, "decode", dynamic=True)
        if max(z.shape[2:]) <= 2 * TILE:
            return decode(z)
        wrapping = around(self.codec)
        if not wrapping:
            return tiled(decode, z, factor)
        with seamless([self.codec], True, "zeros"):  # a tile ends at its edges, the picture goes on behind its own
            x = tiled(self.codec.decode, F.pad(z, (OVERLAP,) * 4, mode="circular"), factor)
        margin = OVERLAP * factor
        return x[..., margin:-margin, margin:-margin]

    def enlarge(self, x: Tensor, request: GenerateRequest) -> Tensor:
        return x


@dataclass(frozen=True)
class Counted(Stream):
    """Fresh noise of CUDA's generator."""

    source: Philox = field(default_factory=lambda: Philox(0))

    def fresh(self) -> Tensor:
        return torch.from_numpy(self.source.normal(*self.shape))


@dataclass(frozen=True)
class Loose(Begun):
    """As diffusers begins: latents with noise of their own, masks of whole cells, and nothing of the picture put back in the end."""

    std: Tensor | None = None

    def redraw(self) -> Tensor:
        assert self.mask is not None
        return F.interpolate((self.mask >= 0.5).float(), size=self.z.shape[2:])

    def keep(self, x: Tensor) -> Tensor:
        return x


def tiled(decode: Callable[[Tensor], Tensor], z: Tensor, factor: int, side: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """A large picture decoded in tiles that overlap, each weighed less towards its edges: memory of one tile, and no seams where they meet."""
    h, w = z.shape[2:]
    out = weight = None
    ramp = lambda n: torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).clamp_max(overlap * factor).float()  # noqa: E731
    for top in starts(h, side, overlap):
        for left in starts(w, side, overlap):
            x = decode(z[:, :, top : top + side, left : left + side])
            if out is None or weight is None:
                out, weight = x.new_zeros(*x.shape[:2], h * factor, w * factor), x.new_zeros(1, 1, h * factor, w * factor)
            share = (ramp(x.shape[2])[:, None] * ramp(x.shape[3])).to(x)
            at = (..., slice(top * factor, top * factor + x.shape[2]), slice(left * factor, left * factor + x.shape[3]))
            out[at] += x * share
            weight[at] += share
    assert out is not None
    assert weight is not None
    return out / weight


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where tiles begin, evenly, sharing at least `overlap`."""
    if length <= side:
        return [0]
    count = -(-(length - overlap) // (side - overlap))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def around(network: nn.Module) -> list[nn.Conv2d]:
    """Its convolutions that see what is beyond an edge at the edge across from it."""
    return [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.padding_mode == "circular"]


@contextmanager
def seamless(networks: list[nn.Module], on: bool, mode: Literal["circular", "zeros"] = "circular") -> Iterator[None]:
    """Convolutions that see what is beyond an edge at the edge across from it, so that pictures fit side by side; "zeros": that see nothing."""
    other = "zeros" if mode == "circular" else "circular"
    wanted = [n for n in networks if on]
    convolutions = [m for n in wanted for m in n.modules() if isinstance(m, nn.Conv2d) and m.padding_mode == other and any(m.padding)]  # type: ignore[arg-type]
    for m in convolutions:
        m.padding_mode = mode
    try:
        yield
    finally:
        for m in convolutions:
            m.padding_mode = other


def _filled_up(cond: Cond, n: int) -> Cond:
    """With text of `n` tokens, what is added unheard."""
    assert cond.text is not None
    more = n - cond.text.shape[1]
    if not more:
        return cond
    mask = cond.text.new_ones(cond.text.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask
    return replace(cond, text=F.pad(cond.text, (0, 0, 0, more)), mask=F.pad(mask, (0, more)))
