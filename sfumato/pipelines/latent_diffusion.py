"""Drawing from noise: a denoiser over the latents of a codec."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path as Files
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.convert.kohya import Lora, read_embedding, read_lora, style_of_lora, until_of_lora
from sfumato.core.request import GenerateRequest, style_weights
from sfumato.core.rng import torch_rng
from sfumato.core.seams import Cond, Denoise, Predict
from sfumato.diffusion.deepcache import DeepCache
from sfumato.diffusion.guidance import Post, Term, along, apg, autoguidance, cfg, guided, inpaint, rescale, text_style
from sfumato.diffusion.path import Path, timesteps
from sfumato.diffusion.precond import Precond, Prediction
from sfumato.diffusion.samplers import sample_ddim, sampler
from sfumato.diffusion.unet import UNet
from sfumato.nn.layers import slerp
from sfumato.nn.lora import Attached, attach, merge
from sfumato.pipelines.find import named_file, strength_of
from sfumato.pipelines.generate import Begun, Model, Picture, Progress, Row

USUAL_STEPS = 20
EXACT = 1e-6  # of times in fp32
FAST_EVERY, FAST_GUIDANCE = 3, (0.2, 1.0)  # of a request that is to be fast
Watch = Callable[[int, Tensor], None]  # the step, and the latents "b c h w" of the denoised pictures


@dataclass(frozen=True)
class Stream:
    """The noise of one picture: the `first`, and more of it for samplers that take `fresh` noise in their steps."""

    shape: tuple[int, ...]
    begins: torch.Generator
    steps: torch.Generator
    first: Tensor = field(default=None)  # type: ignore[assignment]
    of_init: Tensor | None = None  # of the latents of an init picture, and of what a model for inpainting is shown of it
    of_shown: Tensor | None = None

    def __post_init__(self) -> None:
        if self.first is None:
            object.__setattr__(self, "first", torch.randn(self.shape, generator=self.begins))

    def fresh(self) -> Tensor:
        return torch.randn(self.shape, generator=self.steps)


@lru_cache(maxsize=64)
def _digest(file: Files, *stamp: int) -> str:
    """sha256 of a file, read once for all pictures that are drawn with it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _hash_of(file: Files) -> str:
    return _digest(file, file.stat().st_mtime_ns, file.stat().st_size)


@dataclass
class Late:
    """A LoRA that is at work from the time `until` on: pictures go `strength` times along what it changes of what is predicted (of the weights more
    than once would break what they hold together).
    """

    until: float
    strength: float
    at_work: bool = False

    def on(self, predict: Predict) -> Predict:
        """`predict` with it at work."""

        def predicted(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            self.at_work = True
            try:
                return predict(x_t, t, cond)
            finally:
                self.at_work = False

        return predicted

    def weight(self, t: float) -> float:
        return self.strength if t <= self.until + EXACT else 0.0


@dataclass(frozen=True, kw_only=True)
class LatentDiffusion(Model):
    """See `Model`."""

    denoiser: nn.Module
    path: Path
    watchers: list[Watch] = field(default_factory=list)  # are told after each step what the picture would be
    late: list[Late] = field(default_factory=list)  # LoRAs of the request that is drawn
    guide: LatentDiffusion | None = None  # a weaker model of the same latents that guidance leans on
    way: ClassVar[str] = "diffusion"
    part: ClassVar[str] = "denoiser"
    adapts: ClassVar[bool] = True

    def complete(self, request: GenerateRequest) -> GenerateRequest:
        """See `Model`; in the style that a LoRA is a change of, where no other is asked for and it is at work all the time."""
        request = super().complete(request)
        if request.fast:
            if isinstance(self.denoiser, UNet):
                request = replace(request, cache_interval=request.cache_interval or FAST_EVERY)
            else:
                request = replace(request, guidance_interval=request.guidance_interval or FAST_GUIDANCE)
        found = None if request.style else self._style_of_lora(request)
        return replace(request, style=found[0]) if found and found[1] == 1 else request

    def _style_of_lora(self, request: GenerateRequest) -> tuple[str, float] | None:
        """The style that a request's LoRA is a change of, and the time from which on that is at work."""
        files = [strength_of(told)[0] for told in request.lora] if self.styles else []
        return next(((style, until_of_lora(file)) for file in files if (style := style_of_lora(file))), None)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What draws, by the names that files of LoRAs have for it."""
        return {"denoiser": self.denoiser} | ({} if self.text is None else {"text": self.text})

    @property
    def changeable(self) -> dict[str, nn.Module]:
        """What a LoRA may change: what draws, and what paints it."""
        return self.networks | {"decoder": self.codec.decoder}  # type: ignore[dict-item]

    @property
    def listeners(self) -> list[Any]:
        """What hears prompts, each with a dict of `learned` vectors and their width."""
        return [] if self.text is None else [self.text]

    def told(self, prompts: Sequence[str | None], size: tuple[int, int], styles: Sequence[Mapping[str, float]] = ()) -> Cond:
        """What the denoiser is told of prompts (None: nothing is said) for pictures of this height and width, with shares of styles."""
        none: dict[str, float] = {}
        rows = [Row(GenerateRequest(), i, 0, dict(styles[i]) if styles else none) for i in range(len(prompts))]
        return self._cond(rows, list(prompts), [None] * len(rows))

    @contextmanager
    def changed(self, request: GenerateRequest) -> Iterator[None]:
        """With a request's LoRAs merged into the networks and its learned words known; afterwards all is as it was, to the bit."""
        networks = self.changeable
        loras = [(read_lora(path, networks), strength) for path, strength in (strength_of(f, request.prompt) for f in request.lora)]
        merged, known, late = [], [dict(e.learned) for e in self.listeners], []
        try:
            for name, network in networks.items() if loras else ():
                merged.append(merge(network, [(lora.changes.get(name, {}), s) for lora, s in loras if lora.until == 1]))
            for lora, strength in loras:
                if lora.until < 1:
                    late.append(Late(lora.until, strength * lora.along))
                    self.late.append(late[-1])
                    merged += self._from_a_time_on(lora, strength, late[-1])
            self._learn(request)
            yield
        finally:
            self.late[:] = [one for one in self.late if all(one is not mine for mine in late)]  # others may be drawing
            for part in merged:
                part.eject()
            for listener, before in zip(self.listeners, known, strict=True):
                listener.learned = before

    def _from_a_time_on(self, lora: Lora, strength: float, late: Late) -> list[Attached]:
        """A LoRA whose changes of the denoiser wait until they are asked for; what hears and what paints it changes in all."""
        told = {name: (lambda: float(late.at_work)) if network is self.denoiser else strength for name, network in self.changeable.items()}
        return [attach(network, lora.changes.get(name, {}), told[name]) for name, network in self.changeable.items()]

    def _learn(self, request: GenerateRequest) -> None:
        """Raises ValueError for vectors that are not of these text encoders."""
        for file in request.embedding:
            for name, vectors in read_embedding(named_file(file)).items():
                widths, wanted = [v.shape[1] for v in vectors], [e.width for e in self.listeners]
                if widths != wanted:
                    raise ValueError(
                        f"embedding (={file!r}) has vectors of {widths} numbers, and this model's text encoders of {wanted}: it is of another model"
                    )
                for listener, of_listener in zip(self.listeners, vectors, strict=True):
                    listener.learned[name] = of_listener

    def _draw_rows(self, rows: list[Row], progress: Progress | None) -> Iterator[Picture]:
        if rows:
            with self.changed(rows[0].request):
                yield from self._drawn(rows, progress)

    def _drawn(self, rows: list[Row], progress: Progress | None) -> Iterator[Picture]:
        yield from super()._draw_rows(rows, progress)

    def _picture(self, image: Image.Image, row: Row, begun: Begun | None) -> Picture:
        picture = super()._picture(image, row, begun)
        if named := [*(strength_of(told)[0] for told in row.request.lora), *map(named_file, row.request.embedding)]:
            picture.record["files_sha256"] = {str(file): _hash_of(file) for file in named}
        return picture

    def steps_of(self, request: GenerateRequest) -> int:
        return request.steps or USUAL_STEPS

    def check_way(self, request: GenerateRequest) -> None:
        """Raises ValueError for a sampler or a schedule that there is not."""
        if request.sampler is not None:
            sampler(request.sampler)
        if (request.cache_interval or 1) > 1 and not isinstance(self.denoiser, UNet):
            raise ValueError(f"cache_interval (={request.cache_interval}) must be left out: it is for models with a UNet, whose blocks are nested")
        self.times(replace(request, sampler=request.sampler or self.usual["sampler"]))

    def times(self, request: GenerateRequest) -> Tensor:
        """Falling times of a whole way, one more than steps."""
        return timesteps(self.path, self.steps_of(request), schedule=request.schedule or "uniform")  # type: ignore[arg-type]

    @torch.no_grad()
    def latents(self, rows: list[Row], begun: Begun | None = None) -> Iterator[Tensor]:
        """The latents after each step, for rows that share steps, sampler, guidance and what they begin from."""
        request = rows[0].request
        streams = [self._stream(r, begun) for r in rows]
        ts = self.times(request)[-self.steps_taken(request, begun) - 1 :]
        x = self._start(rows, streams, ts, begun)

        def noise(_: int) -> Tensor:
            return torch.stack([s.fresh() for s in streams]).to(self.device)

        function = sampler(request.sampler or self.usual["sampler"]).function
        extra = {"eta": request.eta} if function is sample_ddim and request.eta else {}
        for step in function(self._denoise(rows, begun, streams, ts), x, ts, self.path, noise=noise, **extra):
            for watch in self.watchers:
                watch(step.i, step.x0)
            yield step.x

    def _start(self, rows: list[Row], streams: list[Stream], ts: Tensor, begun: Begun | None) -> Tensor:
        """x at the first time."""
        x = torch.stack([s.first for s in streams]).to(self.device)
        return x if begun is None else self.path.mix(begun.z.expand_as(x), x, ts[:1].expand(len(x)).to(x))

    def shape_of(self, request: GenerateRequest) -> tuple[int, int, int]:
        """Of the latents of one picture."""
        side = self.size // self.codec.spec.factor
        return self.codec.spec.latent_channels, side, side

    def _shape(self, row: Row, begun: Begun | None) -> tuple[int, ...]:
        """As what is begun from has it, whose file is not opened again for that."""
        return self.shape_of(row.request) if begun is None else tuple(begun.z.shape[1:])

    def _stream(self, row: Row, begun: Begun | None) -> Stream:
        own = Stream(self._shape(row, begun), torch_rng(row.seed, "generate/noise"), torch_rng(row.seed, "generate/steps"))
        request = row.request
        if request.variation:
            seed = request.seed if request.variation_seed is None else request.variation_seed
            other = torch.randn(own.shape, generator=torch_rng((seed or 0) + row.index, "generate/noise"))
            own = replace(own, first=slerp(own.first, other, request.variation))
        return own if row.toward is None else replace(own, first=slerp(own.first, self._stream(row.toward, begun).first, row.share))

    def _denoise(self, rows: list[Row], begun: Begun | None, streams: list[Stream], ts: Tensor) -> Denoise:
        """Where a LoRA is at work from a time on, its style is, too: what is drawn is decided before, in the style that is asked for."""
        before, late = self._denoise_in(rows, begun), self._style_of_lora(rows[0].request)
        if late is None or late[1] == 1:
            return before
        style, until = style_weights(late[0], self.styles), late[1]
        after = self._denoise_in([replace(r, style=style, toward=r.toward and replace(r.toward, style=style)) for r in rows], begun)
        return lambda x, t: (after if float(t.max()) <= until + EXACT else before)(x, t)

    def _denoise_in(self, rows: list[Row], begun: Begun | None) -> Denoise:
        request = rows[0].request
        cond, empty = self._sides(rows)
        if request.style_guidance is None or self.guide is not None:
            terms = self._terms(rows, cond, empty)
        else:
            terms = text_style(self.predict(request), cond, empty, self._neither(rows, empty), self._scale(request), request.style_guidance)
        post = [*self._changes(request, self.meta["prediction"]), *self._late(terms)]
        if bool((self.codec.latent_std == 0).any()):
            post = [self._without_dead, *post, *([self._without_dead] if self.late else [])]
        if begun is not None and begun.mask is not None:
            post.append(inpaint(begun.z, begun.redraw()))
        return guided(terms, post)

    def _late(self, terms: list[Term]) -> list[Post]:
        """What LoRAs add that are at work from a time on."""
        return [along(late.on(terms[0][0]), terms[0], late.weight) for late in self.late]

    def _scale(self, request: GenerateRequest) -> float:
        return self.usual["guidance"] if request.guidance is None else request.guidance

    def _terms(self, rows: list[Row], cond: Cond, empty: Cond) -> list[Term]:
        """Guidance away from what is not asked for, or from what a weaker model draws of the same."""
        request = rows[0].request
        predict, scale, interval = self.predict(request), self._scale(request), request.guidance_interval
        if self.guide is None:
            return cfg(predict, cond, empty, scale, interval)
        its, _ = self.guide._sides(rows)
        return autoguidance(predict, cond, self.guide.predict(request), replace(its, concat=cond.concat), scale, interval)

    def predict(self, request: GenerateRequest) -> Predict:
        """The network as one that says what is clean."""
        return Precond(self._network(request), self.meta["prediction"], self.path, None if self.dtype == torch.float32 else self.dtype)

    def _network(self, request: GenerateRequest) -> Callable[[Tensor, Tensor, Cond], Tensor]:
        """What computes the denoiser: whole at every step, or at some of them."""
        if not isinstance(self.denoiser, UNet):
            return self.engine.of(self.denoiser)
        every = request.cache_interval or 1
        whole = self.engine.of(self.denoiser, "whole", dynamic=True)  # one graph for both ways, right for any shape
        if every == 1:
            return self.denoiser if self.engine.name == "eager" else lambda *args: whole(*args)[0]
        return DeepCache(whole, self.engine.of(self.denoiser, "shallow", dynamic=True), every)

    def _changes(self, request: GenerateRequest, prediction: Prediction) -> list[Post]:
        """What a request does to guidance."""
        projected = [] if request.apg is None else [apg(request.apg)]
        return projected + ([rescale(request.guidance_rescale, prediction, self.path)] if request.guidance_rescale else [])

    def _without_dead(self, x0: Tensor, *_: Any) -> Tensor:
        """Channels that the codec does not use stay 0, as training had them: nobody taught the denoiser what to say of them."""
        return x0 * (self.codec.latent_std > 0)[:, None, None]
