"""What a user asks for: one frozen dataclass behind the CLI flags, the Python call, and the metadata inside a PNG."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sfumato.core.config import from_json, nearest, to_json

Device = Literal["auto", "cpu", "cuda", "mps"]
LONGEST_PROMPT = 2_000
MOST_STEPS, MOST_IMAGES, MOST_CODES, MOST_SIDE = 1_000, 10_000, 65_536, 8_192
NoiseMode = Literal["own", "diffusers", "a1111"]
SEEDS = 2**63
SOURCE_KEY = "Source"  # PNG's own word for where a picture comes from
TAG = re.compile(r"<lora:([^:<>]+)(?::([+-]?(?:\d+\.?\d*|\.\d+)))?[^<>]*>")  # in prompts of AUTOMATIC1111's: a LoRA and its strength, no words
METADATA_KEY = "sfumato"
SEVERAL_KEY = "sfumato-several"  # a list of records, in a grid or a sheet
RECORD = {"version": str, "index": int, "seed": int, "engine": str, "device": str, "dtype": str, "threads": int}  # what every record holds


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A request for `count` pictures; picture i has the seed `seed + i`.

    prompt: None draws without text. style: a name, or "noto:0.5,twemoji:0.5"; None lets each seed draw its own mixture.
    guidance: 1 is none; guidance_interval (low, high) in t limits it (arXiv 2404.07724); style_guidance: a strength of its own for the style.
    steps: None is what the model usually takes. eta: fresh noise of the sampler ddim. truncation: how far a GAN strays from what is usual (1: as
    learned, less is more alike). temperature (0 takes the likeliest), top_k (0: all) and top_p
    (1: all) say how codes are drawn, where the model draws codes. seed None: a random one is chosen. size: None is the largest that the model has.
    guidance and sampler None: what the model usually takes.
    Of models whose pictures have any size: width and height in pixels, schedule (when the network is asked), clip_skip (the text encoder's block
    from the end that is heard, 1 the last), guidance_rescale (0 to 1, arXiv 2305.08891), tiling (edges fit together), variation (0 to 1: how much of
    the noise is of variation_seed instead), hires (times the size in a second pass, of which hires_strength is drawn anew), and noise: streams of our
    "own", or those of "diffusers" and of "a1111" (AUTOMATIC1111's interface with a GPU). extend: pixels to draw to the left, above,
    to the right and below of the init picture. lora: files with strengths, "a.safetensors:0.8"; embedding: files of learned words.
    fast: quicker and a little different: cache_interval 3 of models with a UNet, guidance_interval (0.2, 1) of others, where they are not given;
    cache_interval: at every how many-th step the whole UNet is asked (arXiv 2312.00858).
    apg: how much of the guidance along the picture counts, of any diffusion model (arXiv 2410.02416, eta); None is plain guidance.
    init: a picture to begin from, of which `strength` (0 little, 1 all) is drawn anew (SDEdit, arXiv 2108.01073). mask: a picture of the same
    size, white where init is to be redrawn; what is black there stays as it is, to the pixel.
    """

    prompt: str | None = None
    negative: str | None = None
    style: str | None = None
    label: str | None = None
    seed: int | None = None
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    style_guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    eta: float = 0.0
    truncation: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    size: int | None = None
    init: str | None = None
    mask: str | None = None
    strength: float = 0.6
    width: int | None = None
    height: int | None = None
    schedule: str | None = None
    clip_skip: int | None = None
    guidance_rescale: float = 0.0
    tiling: bool = False
    variation: float = 0.0
    variation_seed: int | None = None
    hires: float = 1.0
    hires_strength: float = 0.5
    noise: NoiseMode = "own"
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    extend: tuple[int, int, int, int] | None = None
    apg: float | None = None
    fast: bool = False
    cache_interval: int | None = None

    def __post_init__(self) -> None:
        self._told_otherwise()
        for name in ("prompt", "negative", "style", "label", "init", "mask"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be a text")
        for name in ("prompt", "negative"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ValueError(f"{name} is empty: say what to draw, or leave it out")
            if text is not None and any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"{name} holds bytes that are no text: give it in UTF-8")
            if text is not None and len(text) > LONGEST_PROMPT:
                raise ValueError(f"{name} has {len(text):,} characters, at most {LONGEST_PROMPT:,} are allowed: shorten it")
        whole = (("count", 1, MOST_IMAGES), ("steps", 1, MOST_STEPS), ("top_k", 0, MOST_CODES), ("clip_skip", 1, 100), ("cache_interval", 1, 100),
                 ("width", 8, MOST_SIDE), ("height", 8, MOST_SIDE))  # fmt: skip
        for name, low, high in whole:
            if name not in ("count", "top_k") and getattr(self, name) is None:
                continue
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be a whole number")
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} (={getattr(self, name)}) must be between {low} and {high:,}")
        if self.seed is not None and type(self.seed) is not int:
            raise ValueError(f"seed (={self.seed!r}) must be a whole number")
        if self.seed is not None and not 0 <= self.seed < SEEDS - self.count:
            raise ValueError(f"seed (={self.seed}) must be between 0 and 2^63 - count")
        for name, low, high in (
            ("guidance", 0, 100),
            ("style_guidance", 0, 100),
            ("eta", 0, 1),
            ("truncation", 0, 2),
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("guidance_rescale", 0, 1),
            ("variation", 0, 1),
            ("hires", 1, 8),
        ):
            value = getattr(self, name)
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{name} (={value!r}) must be a number")
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} (={value}) must be between {low} and {high}")
        if self.top_p == 0:
            raise ValueError("top_p (=0) must be above 0: the share of probability that codes are drawn from, 1 is all")
        for name, of in (("strength", "the init picture"), ("hires_strength", "the first pass")):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= 1:
                raise ValueError(f"{name} (={value!r}) must be above 0 and at most 1: how much of {of} is drawn anew")
        if self.noise not in get_args(NoiseMode):
            raise ValueError(
                f"noise (={self.noise!r}) must be one of {', '.join(get_args(NoiseMode))}{nearest(str(self.noise), get_args(NoiseMode))}"
            )
        if self.variation_seed is not None and not (type(self.variation_seed) is int and 0 <= self.variation_seed < SEEDS):
            raise ValueError(f"variation_seed (={self.variation_seed!r}) must be a whole number between 0 and 2^63")
        if self.mask is not None and self.init is None:
            raise ValueError(f"mask (={self.mask!r}) says where to redraw the init picture: name one with --init")
        if self.apg is not None and not (type(self.apg) in (int, float) and 0 <= self.apg <= 1):
            raise ValueError(f"apg (={self.apg!r}) must be between 0 and 1: how much of the guidance along the picture counts, 1 is plain guidance")
        if self.extend is not None:
            if self.init is None:
                raise ValueError(f"extend (={self.extend}) says how much to draw around the init picture: name one with --init")
            if self.mask is not None or min(self.extend) < 0 or not 0 < max(self.extend) <= MOST_SIDE:
                raise ValueError(
                    f"extend (={self.extend}) must be four numbers of pixels from 0 to {MOST_SIDE:,}, one at least above 0, without a mask"
                )
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval (={self.guidance_interval}) must be two rising times between 0 and 1")
        if self.style is not None:
            style_weights(self.style)

    def _told_otherwise(self) -> None:
        """Lists and single files as tuples, and the names that AUTOMATIC1111's interface has for samplers and schedules as ours."""
        changed: dict[str, Any] = {}
        for name in ("lora", "embedding", "extend", "guidance_interval"):
            value = getattr(self, name)
            if isinstance(value, list | str):
                changed[name] = (value,) if isinstance(value, str) else tuple(value)
        for name in ("lora", "embedding"):
            if not all(isinstance(v, str) for v in changed.get(name, getattr(self, name))):
                raise ValueError(f"{name} (={getattr(self, name)!r}) must be names of files")
        if isinstance(self.sampler, str):
            sampler, schedule = theirs_of(self.sampler)
            changed |= {"sampler": sampler} | ({"schedule": schedule} if schedule and self.schedule is None else {})
        if isinstance(self.schedule, str):
            changed["schedule"] = THEIR_SCHEDULES.get(self.schedule) or OTHER_NAMES.get(self.schedule.lower(), self.schedule)
        for name, value in changed.items():
            object.__setattr__(self, name, value)


def theirs_of(sampler: str) -> tuple[str, str | None]:
    """Our names of a sampler and of the schedule that AUTOMATIC1111's interface once wrote behind it; what it does not know stays."""
    known = {k.lower(): v for k, v in THEIR_SAMPLERS.items()} | OTHER_NAMES
    named, _, schedule = sampler.rpartition(" ")
    if named.lower() in known and schedule in THEIR_SCHEDULES:
        return known[named.lower()], THEIR_SCHEDULES[schedule]
    return known.get(sampler.lower(), sampler), None


def style_weights(style: str, known: list[str] | None = None) -> dict[str, float]:
    """ "noto" -> {"noto": 1.0}; "noto:1,twemoji:3" (full-width, too) -> {"noto": 0.25, "twemoji": 0.75}. `known` limits the names."""
    weights: dict[str, float] = {}
    for part in unicodedata.normalize("NFKC", style).replace("、", ",").split(","):
        name, colon, number = part.strip().partition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"style (={style!r}) must be a name, or names with shares such as 'noto:0.5,twemoji:0.5'")
        if known is not None and name not in known:
            raise ValueError(f"style (={name!r}) must be one of {', '.join(known)}{nearest(name, known)}")
        weights[name] = weights.get(name, 0.0) + weight
    total = sum(weights.values())
    if not 0 < total < math.inf:
        raise ValueError(f"style (={style!r}) must have finite shares, and one above 0")
    return {k: v / total for k, v in weights.items()}


def metadata_text(record: dict[str, Any]) -> str:
    """Our JSON for a PNG; `record` holds a GenerateRequest under "request"."""
    return json.dumps({k: to_json(v) for k, v in record.items()}, ensure_ascii=False)


def parse_metadata(text: str) -> dict[str, Any]:
    """The inverse of `metadata_text`. Raises ValueError where the text is not ours."""
    try:
        record = json.loads(text)
        request = from_json(GenerateRequest, record["request"], "request")
        whole = {k: kind(record[k]) for k, kind in RECORD.items()} | {"model": {k: str(record["model"][k]) for k in ("name", "hash")}}
        until = {"until": from_json(GenerateRequest, record["until"], "until")} if "until" in record else {}  # of an animation
        if until and not (type(record["frames"]) is int and type(record["fps"]) in (int, float)):
            raise TypeError("frames and fps must be numbers")
        if not all(isinstance(v, str | bool) for v in record.get("with", {}).values()):
            raise TypeError("with must hold names and switches")
        return record | whole | {"request": request} | until
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise ValueError(f"the picture's metadata cannot be read: {e!r}") from None


def source_text(model: str, credits: list[dict[str, str]]) -> str:
    """What a picture's PNG says of where it comes from: the model, and whose works it learned from."""
    learned = "; ".join(f"{c['attribution']} ({c['licence']})" for c in credits)
    return f"drawn by the model {model} of sfumato" + (f", which learned from {learned}" if learned else "")


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,\n:]", text) else text


def parameters_text(
    request: GenerateRequest, *, seed: int, size: tuple[int, int], model: str, model_hash: str, version: str, way: str = "diffusion"
) -> str:
    """The `parameters` chunk that other programs read: prompt, negative prompt, and one line of "Name: value" pairs."""
    lines, names = [(request.prompt or "").replace("\n", " ")], {v: k for k, v in THEIR_SAMPLERS.items()}
    if request.negative:
        lines.append(f"Negative prompt: {request.negative}")
    values: dict[str, object] = {
        **({} if request.steps is None else {"Steps": request.steps}),
        "Sampler": names.get(request.sampler or "", request.sampler) if way == "diffusion" else way,
        "CFG scale": request.guidance,
        "Seed": seed,
        "Size": "{}x{}".format(*(round(side / request.hires / 8) * 8 if request.hires > 1 else side for side in size)),
    }
    values |= {"Model hash": model_hash[:10], "Model": model}
    if way == "gan":
        del values["CFG scale"]
        values["Truncation"] = request.truncation
    elif way != "diffusion":
        values |= {"Temperature": request.temperature, "Top K": request.top_k, "Top P": request.top_p}
    if request.schedule:
        values["Schedule type"] = {v: k for k, v in THEIR_SCHEDULES.items()}.get(request.schedule, request.schedule)
    if request.clip_skip is not None:
        values["Clip skip"] = request.clip_skip
    if request.variation:
        values |= {"Variation seed": request.variation_seed, "Variation seed strength": request.variation}
    if request.tiling:
        values["Tiling"] = True
    if request.hires > 1:
        values |= {"Hires upscale": request.hires, "Denoising strength": request.hires_strength}
    if request.init is not None:
        values["Denoising strength"] = request.strength
    if request.style:
        values["Style"] = request.style
    values["Version"] = f"sfumato {version}"
    return "\n".join([*lines, ", ".join(f"{k}: {_quoted(v)}" for k, v in values.items())])


# --- what other programs say ----------------------------------------------------------------------------------------------------------------------

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
THEIR_SAMPLERS = {
    "Euler": "euler", "Euler a": "ancestral", "Heun": "heun", "LMS": "lms", "DDIM": "ddim", "PLMS": "plms", "UniPC": "unipc", "LCM": "lcm",
    "DPM++ 2M": "dpmpp_2m", "DPM++ SDE": "dpmpp_sde", "DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ 3M SDE": "dpmpp_3m_sde",
}  # fmt: skip
THEIR_SCHEDULES = {
    "Karras": "karras", "Exponential": "lambda", "Uniform": "linspace-exact", "SGM Uniform": "trailing", "Align Your Steps": "ays",
}  # fmt: skip
OTHER_NAMES = {"euler_a": "ancestral", "exponential": "lambda", "sgm_uniform": "trailing", "sgm uniform": "trailing"}
BY_STEPS = ("DDIM", "PLMS")  # their samplers that ask at every so many steps
# schedules of their own, where theirs is Automatic
AUTOMATIC = {"DPM++ 2M": "karras", "DPM++ SDE": "karras", "DPM++ 2M SDE": "lambda", "DPM++ 3M SDE": "lambda"}
HEARD = (
    "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "Variation seed", "Variation seed strength", "Hires upscale",
    "Denoising strength", "RNG", "Tiling", "Model", "Model hash", "Version", "VAE", "VAE hash", "Hashes", "Lora hashes", "TI hashes",
)  # fmt: skip
NOISES = {"CPU": "diffusers"}  # by what they call RNG; everything else is that of a GPU


def parse_parameters(text: str, sampler: str | None = None) -> tuple[GenerateRequest, dict[str, str]]:
    """A request from the `parameters` that AUTOMATIC1111's interface writes, and all that stands there by name; what is not among `HEARD` was
    not taken. `sampler` instead of one that may not be here. Raises ValueError.
    """
    lines = text.strip().split("\n")
    found = {k: _unquoted(v) for k, v in PAIR.findall(lines[-1])}
    if len(found) < 3:
        raise ValueError("the picture's parameters cannot be read: their last line should say Steps, Sampler, Seed and so on")
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines) - 1)
    prompt, negative = ("\n".join(part).strip() for part in (lines[:start], lines[start:-1]))
    named, _, schedule = found.get("Sampler", "").rpartition(" ")
    if schedule not in THEIR_SCHEDULES:
        named, schedule = found.get("Sampler", ""), found.get("Schedule type", "")
    if named not in THEIR_SAMPLERS and sampler is None:
        raise ValueError(
            f"Sampler (={named!r}) must be one of {', '.join(THEIR_SAMPLERS)}: others are not here; name one with --sampler and the prompt"
        )
    size = re.fullmatch(r"(\d+)x(\d+)", found.get("Size", ""))
    twice = "Hires upscale" in found
    usual = "leading" if named in BY_STEPS else AUTOMATIC.get(named, "linspace-exact") if schedule == "Automatic" else "linspace-exact"
    try:
        strength = float(found.get("Denoising strength", 0)) or 0.5
        request = GenerateRequest(
            prompt=prompt or None, negative=negative.removeprefix("Negative prompt:").strip() or None, steps=int(found["Steps"]),
            guidance=float(found["CFG scale"]), seed=int(found["Seed"]), sampler=sampler or THEIR_SAMPLERS[named],
            schedule=THEIR_SCHEDULES.get(schedule, usual), tiling=found.get("Tiling") == "True",
            width=int(size[1]) if size else None, height=int(size[2]) if size else None,
            clip_skip=int(found["Clip skip"]) if "Clip skip" in found else None, variation=float(found.get("Variation seed strength", 0)),
            variation_seed=int(found["Variation seed"]) if "Variation seed" in found else None, hires=float(found.get("Hires upscale", 1)),
            hires_strength=strength if twice else 0.5, strength=0.6 if twice or "Denoising strength" not in found else strength,
            noise=NOISES.get(found.get("RNG", ""), "a1111"),
        )  # fmt: skip
    except KeyError as e:
        raise ValueError(f"the picture's parameters lack {e.args[0]}") from None
    except ValueError as e:
        raise ValueError(f"the picture's parameters cannot be read: {e}") from None
    return request, found


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value
