"""What training a generator needs, whatever the generator is: pictures, and what is said of each; and over a frozen codec, as the codec sees them.

For a codec pictures are encoded once, several augmented ones per drawing; captions are made anew each time from what those pictures show.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sfumato import zoo
from sfumato.codecs.autoencoder import Autoencoder, measure_latents
from sfumato.core.checkpoint import FileError, hash_tensors, read_metadata
from sfumato.core.config import to_json
from sfumato.core.language import translated
from sfumato.core.pack import load_pack, save_pack
from sfumato.core.rng import numpy_rng, shuffled
from sfumato.core.seams import Cond
from sfumato.data.augment import Scene, Variety, render
from sfumato.data.subjects import EMOJI, Labels, subjects
from sfumato.nn.backbones import over
from sfumato.nn.conditions import silent, without_style, without_text
from sfumato.pipelines.find import find
from sfumato.text.encoder import TextEncoder
from sfumato.train.loop import Batch

GENTLE = Variety(place=0.25, scale=(0.75, 1.0), angle=10.0, recolour=0.12, count=0.02, pair=0.02, scene=0.04)
STEADY = replace(GENTLE, place=0.08, flip=0.06, recolour=0.08, count=0.01, pair=0.01, scene=0.03)
CLOSE = Variety(place=0.5, scale=(1.0, 1.1), angle=0.0, flip=0.0, recolour=0.0)  # what a generator of one's own pictures may learn besides
MOST_THINGS = 4096  # different captions that a memory keeps
OF_DATA = ("text_width", "styles", "labels", "memory")  # of a network: as many as the data has
Net = TypeVar("Net", bound=Any)


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


def begun_from(init: str) -> Path:
    """The pack of a run or file that a training begins from. Raises FileError that names the flag."""
    try:
        return find(init)
    except FileError:
        raise FileError(f"init (={init!r}) must be a run folder or a model file to begin from") from None


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


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a recipe says of the pictures that a generator is taught, whatever the generator is.

    `data` is "emoji", the embedded drawings, or a folder or zip of one's own pictures; `each` augmented pictures per drawing are encoded; `limit`
    takes the first concepts only; `init` is a pack or run whose generator it begins from. `memory` gives the generator a place to keep what each
    concept, or caption, looks like (`sfumato.nn.embeddings.Memory`). `labels` teaches a class beside (or, with the generator's `text_width` 0,
    instead of) captions: the group of a concept ("food-drink") or its name; of one's own pictures, "auto", the sub-folder.
    """

    part: ClassVar[str]  # the field that holds the generator's config, and what the generator is called in a pack
    data: str = EMOJI
    drop: Drop = field(default_factory=Drop)
    variety: Variety = GENTLE
    each: int = 12
    labels: Labels = "none"
    limit: int = 0
    memory: bool = False
    init: str = ""

    def __post_init__(self) -> None:
        if self.each < 1 or self.limit < 0:
            raise ValueError(
                f"each (={self.each}) must be at least 1 and limit (={self.limit}) at least 0: pictures per drawing, and concepts (0: all)"
            )
        if self.data != EMOJI and self.limit:
            raise ValueError(f"limit (={self.limit}) is of the embedded drawings: leave it out for {self.data}")
        if self.memory and not getattr(self, self.part).text_width:
            raise ValueError(f"memory (=True) compares captions: it needs {self.part}.text_width > 0, or must be False")


class Lessons:
    """Pictures of one size, what is said of them, and a frozen text encoder. `net` is the recipe's config of the generator, as the data has it."""

    codec: Autoencoder | None = None
    of_codes: tuple[str, ...] = ()  # parts of the generator that mean the codes of one codec

    def __init__(self, recipe: Taught, seed: int, size: int, text: Path, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        self.recipe, self.seed, self.size, self.device, self.bf16 = recipe, seed, size, torch.device(device), bf16
        net = getattr(recipe, recipe.part)
        self.shown = subjects(recipe.data, size, limit=recipe.limit, labels=recipe.labels)
        self.styles = self.shown.styles if getattr(net, "styles", 0) else []  # a UNet is told none
        self.net = self._of_data(net)
        self.text, self.text_meta = self._load_text(frozen_part(text, run, "text")) if self.net.text_width else (None, {})
        own = recipe.data != EMOJI  # drawn as often as they come, whatever their styles; of the drawings every style is drawn as often as another
        self.groups = [np.arange(len(self.shown.style))] if own else [np.flatnonzero(self.shown.style == s) for s in range(len(self.shown.styles))]
        self.groups = [g for g in self.groups if len(g)]

    @property
    def image_channels(self) -> int:
        """3: pictures are seen over white; 4: with alpha."""
        return self.net.image_channels  # type: ignore[no-any-return]

    def _of_data(self, net: Net) -> Net:
        """The recipe's, with as many styles, labels and things to remember as there are; without text where nothing is said."""
        shown = self.shown
        things = len(shown.names()) if self.recipe.memory and shown.captioned else 0
        if things > MOST_THINGS:
            tqdm.write(
                translated(f"memory has no effect: {things:,} different captions are more than the {MOST_THINGS:,} that it keeps"), file=sys.stderr
            )
        if not hasattr(net, "styles"):
            if not shown.captioned:
                raise ValueError(f"{self.recipe.part} (={net.kind}) learns from captions, and {self.recipe.data} has none: write some, or take a dit")
            return net
        text_width = net.text_width if shown.captioned else 0
        memory = {"memory": things if things <= MOST_THINGS else 0} if hasattr(net, "memory") else {}
        return replace(net, text_width=text_width, styles=len(self.styles), labels=len(shown.labels), **memory)

    def begun(self, network: nn.Module, part: str = "") -> nn.Module:
        """The network with a memory of the names of things, and with the weights of the one in `recipe.init`: all of them, or, for one's own
        pictures, all that have the same name, shape and meaning. Raises ValueError where it is of another shape or of another codec's codes.
        """
        if getattr(network, "memory", None) is not None:
            network.memory.keys.data.copy_(self._names())  # type: ignore[union-attr, operator]
        if not self.recipe.init:
            return network
        part = part or self.recipe.part
        check_begun(self.recipe, network.config, part)
        tensors, meta = load_pack(begun_from(self.recipe.init))
        codec = {k.removeprefix("codec."): v for k, v in tensors.items() if k.startswith("codec.")}
        same = not self.of_codes or hash_tensors(codec) == hash_tensors(self.codec.state_dict())  # type: ignore[union-attr]
        if self.recipe.data == EMOJI:
            if not same:
                raise ValueError(f"init (={self.recipe.init!r}) learned the codes of another codec: name that codec with --codec, or leave init out")
            return zoo.load_into(network, tensors, f"{part}.").train().requires_grad_(True)
        own, said = network.state_dict(), self.shown.about()
        named = {"style": meta["styles"] == self.styles, "label": meta["labels"] == self.shown.labels, "memory": meta["words"] == said["words"]}
        named |= dict.fromkeys(self.of_codes, same)
        fits = lambda k: named.get(k.removeprefix("told.").partition(".")[0].partition("_")[0], True)  # noqa: E731  # a row of another thing is worth nothing
        taken = {k: v for k, v in own.items() if (t := tensors.get(f"{part}.{k}")) is not None and t.shape == v.shape and fits(k)}
        network.load_state_dict(own | {k: tensors[f"{part}.{k}"].to(v) for k, v in taken.items()})
        return network

    # --- text and pictures ------------------------------------------------------------------------------------------------------------------------

    def _load_text(self, pack: Path) -> tuple[TextEncoder, dict[str, Any]]:
        tensors, meta = load_pack(pack)
        if "text" not in meta:
            raise FileError(f"{pack} holds no text encoder: name a run of `sfumato train text`")
        text = zoo.load_into(zoo.make(meta["text"], meta["tokenizer"]), tensors, "text.")  # type: ignore[arg-type]
        if text.config.width != self.net.text_width:
            raise ValueError(f"text_width (={self.net.text_width}) must be the text encoder's width (={text.config.width})")
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
        """Augmented pictures "b c size size" in [-1, 1]."""
        return self.as_seen(render(self.shown.pixels, [self.scene(int(i)) for i in indices], self.size))

    def as_seen(self, rgba: Tensor) -> Tensor:
        """Pictures "b 4 h w" in [0, 1], premultiplied, as the network takes them: in [-1, 1], over white where it has no alpha."""
        x = over(rgba) if self.image_channels == 3 else rgba
        return (x * 2 - 1).to(self.device).contiguous(memory_format=torch.channels_last)

    def _hot(self, style: np.ndarray) -> Tensor:
        """Style indices "b" as weights "b styles"; all zero where there is none."""
        at = torch.from_numpy(np.asarray(style))
        if not self.styles:
            return torch.zeros(len(at), 0)
        return F.one_hot(at.clamp_min(0), len(self.styles)).float() * (at >= 0)[:, None]

    # --- what is said -----------------------------------------------------------------------------------------------------------------------------

    def said(self, positions: np.ndarray) -> tuple[Tensor, Tensor, Batch]:
        """(which encoded picture, five numbers in [0, 1) of each, what is said): at positions of the data order.

        As many positions in a row as there are styles hold each style once; within a style the pictures come in shuffled epochs.
        """
        rows = self._rows(positions)
        indices, texts, draws = [], [], []
        for position, row in zip(positions, rows, strict=True):
            rng = numpy_rng(self.seed, "train/caption", int(position))
            indices.append(int(row) * self.recipe.each + int(rng.integers(self.recipe.each)))
            texts.append(self.shown.caption(self.scene(indices[-1]), rng) if self.text else None)
            draws.append(rng.random(5))
        n = len(positions)
        ids, mask = self.text.tokenize([t or "" for t in texts]) if self.text else (torch.zeros(n, 1), torch.ones(n, 1, dtype=torch.bool))
        u = torch.tensor(np.array(draws), dtype=torch.float32)
        drop = self.recipe.drop
        both = u[:, 4] < drop.both
        batch = {
            "ids": ids,
            "mask": mask,
            "style": self._hot(self.shown.style[rows]),
            "label": torch.from_numpy(self.shown.label[rows]),
            "unsaid": torch.tensor([t is None for t in texts]),
            "no_text": (u[:, 2] < drop.text) | both,
            "no_style": (u[:, 3] < drop.style) | both,
        }
        return torch.tensor(indices), u, batch

    def _rows(self, positions: np.ndarray) -> np.ndarray:
        """Which picture stands at each position."""
        n, rows = len(self.groups), np.empty(len(positions), dtype=np.int64)
        which = shuffled(n, self.seed, "order/style", positions)
        for group in np.unique(which):
            here, members = which == group, self.groups[group]
            rows[here] = members[shuffled(len(members), self.seed, f"order/{group}", positions[here] // n)]
        return rows

    def heard(self, batch: Batch) -> Cond:
        """The condition of a batch, what is to be withheld withheld."""
        cond = Cond(style=batch["style"], label=batch["label"])
        if self.text:
            kind = batch["style"].device.type
            with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
                states, pooled = self.text(batch["ids"], batch["mask"])
            cond = replace(cond, text=states.float(), mask=batch["mask"], pooled=pooled.float())
        return without_style(without_text(silent(cond, batch["no_text"]), batch["unsaid"]), batch["no_style"])

    def cond(self, texts: Sequence[str | None], style: Tensor, label: Tensor) -> Cond:
        cond = Cond(style=style.to(self.device), label=label.to(self.device))
        if self.text is None:
            return cond
        states, mask, pooled = self.text.encode([t or "" for t in texts])
        return without_text(replace(cond, text=states, mask=mask, pooled=pooled), torch.tensor([t is None for t in texts], device=self.device))

    def preview(self) -> tuple[Cond, Cond]:
        """The preview prompts in fixed styles, two of each, and the same with nothing said."""
        asked = [a for a in self.shown.preview() for _ in range(2)]
        captions, styles, labels = zip(*asked, strict=True)
        cond = self.cond(captions, self._hot(np.array(styles)), torch.tensor(labels))
        return cond, silent(cond, torch.ones(len(asked), dtype=torch.bool, device=self.device))

    def packed(self, networks: dict[str, nn.Module], meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The pack that draws: the networks, those that are frozen among them."""
        parts = networks | ({"text": self.text} if self.text else {})
        tensors = {f"{name}.{k}": v for name, net in parts.items() for k, v in net.state_dict().items()}
        meta = {self.recipe.part: to_json(self.net), "size": self.size, "styles": self.styles, "labels": self.shown.labels} | meta
        meta |= self.shown.about()
        meta["credits"] += [c for c in self._inherited() if c not in meta["credits"]]
        return tensors, meta | ({"text": self.text_meta["text"], "tokenizer": self.text_meta["tokenizer"]} if self.text else {})

    def _inherited(self) -> list[dict[str, str]]:
        """Whose works the weights that the generator began from had learned from."""
        return list(read_metadata(find(self.recipe.init)).get("credits") or []) if self.recipe.init else []  # type: ignore[call-overload]


class Conditioned(Lessons):
    """The same over a frozen codec."""

    codec: Autoencoder
    measures = True  # whether the generator sees latents, which are standardised

    def __init__(self, recipe: Taught, seed: int, codec: Path, text: Path, run: Path, device: torch.device | str = "cpu", bf16: bool = False) -> None:
        self.recipe, self.device = recipe, torch.device(device)
        part = frozen_part(codec, run, "codec")
        self.codec, self.codec_meta = self._load_codec(part)
        super().__init__(recipe, seed, int(self.codec_meta["size"]), text, run, device, bf16)
        if self.measures:
            self._measure(part)

    @property
    def image_channels(self) -> int:
        return self.codec.spec.image_channels

    def _load_codec(self, pack: Path) -> tuple[Autoencoder, dict[str, Any]]:
        tensors, meta = load_pack(pack)
        if "codec" not in meta:
            raise FileError(f"{pack} holds no codec: name a run of `sfumato train autoencoder`")
        codec = zoo.load_into(zoo.make(meta["codec"]), tensors, "codec.").to(memory_format=torch.channels_last)  # type: ignore[arg-type, call-overload]
        return codec.to(self.device), meta  # type: ignore[return-value]

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

    def made_from(self) -> dict[str, Any]:
        """What a cache of encoded pictures depends on."""
        return {
            "codec": hash_tensors(self.codec.state_dict()),
            "seed": self.seed,
            "variety": to_json(self.recipe.variety),
            "each": self.recipe.each,
            "drawings": self.shown.digest,
        }

    def packed(self, networks: dict[str, nn.Module], meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return super().packed({"codec": self.codec} | networks, {"codec": self.codec_meta["codec"]} | meta)


def check_begun(recipe: Taught, net: Any, part: str = "") -> None:
    """Raises ValueError where `recipe.init` has no such part of this shape.

    For one's own pictures other styles, labels, words and things are no hindrance, other widths are.
    """
    pack = begun_from(recipe.init)
    meta = read_metadata(pack)
    part = part or recipe.part
    found = meta.get(part)
    apart, usual = OF_DATA if recipe.data != EMOJI else (), to_json(type(net)())  # what an older version did not know
    if not isinstance(found, dict) or any(found.get(k, usual[k]) != v for k, v in to_json(net).items() if k not in apart):
        raise ValueError(f"init (={recipe.init!r}) must hold a {part} of the recipe's shape: {pack} has {found or 'none'}")
    if missing := [k for k in ("styles", "labels", "words", "filler") if k not in meta]:
        raise FileError(f"{pack} lacks {', '.join(missing)} in its metadata: it was not written whole, or not by sfumato")
