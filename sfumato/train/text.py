"""Trains the text encoder: captions of one thing meet across languages, and meet the pictures of that thing.

loss = multi-positive contrastive between captions (arXiv 2004.11362, eq. 2) + agreement of the pooled vector with projected image
features of the concept (arXiv 2103.00020, over all concepts) + attributes (colour, kind, ground), so that what the picture will need is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.nn.functional
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.checkpoint import load_tensors, save_tensors
from sfumato.core.config import to_json
from sfumato.core.rng import numpy_rng, shuffled
from sfumato.data.augment import Variety
from sfumato.data.shards import same_source
from sfumato.data.subjects import EMOJI
from sfumato.text.encoder import TextConfig, TextEncoder, train_tokenizer
from sfumato.train.loop import Batch, LoopConfig, Phase, Trainer, main_first, starting
from sfumato.train.sayings import ATTRIBUTES, EmojiSayings, OwnSayings, Question, Said, Sayings

TALKATIVE = Variety(recolour=0.35, count=0.12, pair=0.1, scene=0.15)
IMAGE_WIDTH = 256  # principal components of the image features that are kept


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """What decides what the text encoder learns; `captions_each` captions of one concept stand in a batch together.

    `data` is "emoji", the embedded drawings, or a folder or zip of one's own pictures with captions.
    """

    kind: str = "train-text"
    data: str = EMOJI
    text: TextConfig = field(default_factory=TextConfig)
    captions_each: int = 4
    attributes: float = 0.5
    variety: Variety = TALKATIVE
    limit: int = 0

    def __post_init__(self) -> None:
        if self.captions_each < 1 or self.limit < 0:
            raise ValueError(f"captions_each (={self.captions_each}) must be at least 1 and limit (={self.limit}) at least 0")
        if self.data != EMOJI and self.limit:
            raise ValueError(f"limit (={self.limit}) is of the embedded drawings: leave it out for {self.data}")


def preset_bundled() -> tuple[TextRecipe, LoopConfig]:
    """The text encoder of the bundled model: 4.0 M parameters (contrastive, arXiv 2004.11362 and 2103.00020).

    On two cores 14 minutes beside other work (480 captions/s). Names found again: 0.999 (English), 0.990 (Chinese); unseen templates 0.92 and 0.88.

    `sfumato train text --preset bundled --data emoji --out runs/text`
    """
    return TextRecipe(), LoopConfig(
        images=400_000, batch_size=256, lr=1e-3, warmup=20_000, dtype="auto", log_every=10_240, save_every=100_000, sample_every=100_000
    )


def preset_own() -> tuple[TextRecipe, LoopConfig]:
    """A text encoder for the captions of one's own pictures, from nothing: in whatever language they are written.

    `sfumato train text --preset own --data DIR --out runs/own-text`
    """
    recipe, loop = preset_bundled()
    return replace(recipe, attributes=0.0), replace(loop, images=100_000, warmup=5_000, save_every=50_000, sample_every=50_000)


def preset_smoke() -> tuple[TextRecipe, LoopConfig]:
    """A text encoder that trains in seconds, to try the tools."""
    text = TextConfig(vocabulary=600, width=32, depth=1, heads=2)
    return TextRecipe(text=text, limit=12), LoopConfig(images=1280, batch_size=64, warmup=64, save_every=640, sample_every=640, log_every=64)


PRESETS = {"bundled": preset_bundled, "own": preset_own, "smoke": preset_smoke}


def whitened(features: Tensor, width: int = IMAGE_WIDTH) -> Tensor:
    """Features "n d" -> their leading principal components with unit variance, "n min(width, n - 1, d)"."""
    centred = features - features.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    width = min(width, len(features) - 1, features.shape[1])
    return u[:, :width] * (len(features) - 1) ** 0.5 * (s[:width] / (s[:width] + 1e-3 * s[0]))


class Heads(nn.Module):
    """What only training needs: the projection of image features, attribute classifiers and temperatures."""

    def __init__(self, width: int, image_width: int, attributes: bool = True) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, width)
        self.attributes = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in ATTRIBUTES.items() if attributes})
        self.log_scale = nn.Parameter(torch.tensor([2.6, 2.6]))  # 1 / temperature of captions and of images

    def prototypes(self, features: Tensor) -> Tensor:
        """Image features "c d" -> unit vectors "c width" in the space of the pooled captions."""
        return F.normalize(self.image(features), dim=1)

    def forward(self, features: Tensor, pooled: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Prototypes, attribute logits of the captions, and the two scales."""
        return self.prototypes(features), {k: h(pooled) for k, h in self.attributes.items()}, self.log_scale.exp().clamp(max=100)


def contrastive(z: Tensor, positive: Tensor, ignored: Tensor, scale: Tensor) -> Tensor:
    """Supervised contrastive loss of unit vectors "b d": each row against its positives; ignored pairs are neither."""
    self_mask = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.T * scale).masked_fill(self_mask | ignored, -1e9)
    log_p = logits - logits.logsumexp(1, keepdim=True)
    positive = positive & ~self_mask & ~ignored
    count = positive.sum(1)
    per_row = -(log_p * positive).sum(1) / count.clamp_min(1)
    return per_row[count > 0].mean() if bool((count > 0).any()) else z.sum() * 0


def everyone(x: Tensor) -> Tensor:
    """The rows of all processes, in their order, with gradients: captions are compared across the whole batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


class TextTask:
    """See `sfumato.train.loop.Task`. A "picture" of this task is a caption."""

    kind = "text"
    splittable = False  # the captions of a batch are compared with each other

    def __init__(self, recipe: TextRecipe, seed: int, run: Path) -> None:
        self.recipe, self.seed = recipe, seed
        self.sayings: Sayings = EmojiSayings(recipe.limit, recipe.variety) if recipe.data == EMOJI else OwnSayings(recipe.data)
        self.features, tokenizer = self._begun(run / "parts" / "begun.safetensors")
        torch.manual_seed(seed)
        self.networks: dict[str, nn.Module] = {
            "text": TextEncoder(recipe.text, tokenizer),
            "heads": Heads(recipe.text.width, self.features.shape[1], recipe.attributes > 0 and recipe.data == EMOJI),
        }
        self.phases = [Phase("text", ("text", "heads"), self.loss)]

    def _begun(self, path: Path) -> tuple[Tensor, str]:
        """Image features and tokenizer, made when the run begins and kept in its folder: a resume must not give the embeddings new meanings."""
        made_for = {"vocabulary": self.recipe.text.vocabulary, "limit": self.recipe.limit}
        made_for |= {"captions": self.sayings.digest} if self.sayings.digest else {}
        if not path.exists():
            tokenizer = train_tokenizer(self.sayings.corpus(), self.recipe.text.vocabulary)
            save_tensors(path, {"features": whitened(self.sayings.features())}, {"tokenizer": tokenizer.to_str(), "made_for": made_for})
        tensors, meta = load_tensors(path)
        if meta.get("made_for", made_for) != made_for:
            raise ValueError(f"{path} was made for {meta['made_for']}, not for {made_for}: remove it, or name another --out")
        return tensors["features"], str(meta["tokenizer"])

    def batch(self, positions: np.ndarray) -> Batch:
        things = shuffled(self.sayings.count, self.seed, "order", positions // self.recipe.captions_each)
        said: list[Said] = [self.sayings.say(int(thing), numpy_rng(self.seed, "caption", int(p))) for p, thing in zip(positions, things, strict=True)]
        ids, mask = self.networks["text"].tokenize([s.text for s in said])  # type: ignore[operator]
        n = self.sayings.count
        return {
            "ids": ids,
            "mask": mask,
            "means": torch.stack([_hot(s.means, n) for s in said]),
            "shown": torch.stack([_hot(s.shows, n) for s in said]),
            "attributes": torch.tensor([s.attributes for s in said]),
        }

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        _, pooled = networks["text"](batch["ids"], batch["mask"])
        pooled, batch = everyone(pooled), {k: everyone(batch[k]) for k in ("means", "shown", "attributes")}
        z = F.normalize(pooled.float(), dim=1)
        prototypes, logits, scales = networks["heads"](self.features.to(z.device), pooled)
        means_, shown = batch["means"], batch["shown"]
        same = (shown @ shown.T == shown.sum(1)[:, None]) & (shown.sum(1)[:, None] == shown.sum(1)[None])
        touching = (means_ @ shown.T > 0) | (shown @ means_.T > 0)
        between = contrastive(z, same, touching & ~same, scales[0])
        log_p = F.log_softmax(z @ prototypes.float().T * scales[1], dim=1)
        images = -(log_p * means_ / means_.sum(1, keepdim=True)).sum(1).mean()
        attributes = sum(
            (F.cross_entropy(h.float(), batch["attributes"][:, i]) / len(logits) for i, h in enumerate(logits.values())), z.new_zeros(())
        )
        return between + images + self.recipe.attributes * attributes, {
            "captions": between.detach(), "images": images.detach(), "attributes": attributes.detach()
        }  # fmt: skip

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image | None:
        return None

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        """Part of the texts whose nearest image prototype is of a thing that they mean."""
        scores = {name: self._retrieval(networks, asked) for name, asked in self.sayings.questions().items()}
        return scores | {"score": float(np.mean(list(scores.values())))}

    def _retrieval(self, networks: dict[str, nn.Module], asked: list[Question]) -> float:
        heads = networks["heads"]
        prototypes = heads.prototypes(self.features.to(next(heads.parameters()).device))  # type: ignore[operator]
        hits = []
        for start in range(0, len(asked), 256):
            part = asked[start : start + 256]
            pooled = networks["text"].encode([t for t, _ in part])[2]  # type: ignore[operator]
            best = (F.normalize(pooled, dim=1) @ prototypes.T).argmax(1).tolist()
            hits += [b in right for b, (_, right) in zip(best, part, strict=True)]
        return float(np.mean(hits))

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        text = networks["text"]
        tensors = {f"text.{k}": v for k, v in text.state_dict().items()}
        return tensors, {"kind": "text", "text": to_json(self.recipe.text), "tokenizer": text.tokenizer.to_str()}  # type: ignore[operator, union-attr]


def _hot(indices: Any, n: int) -> Tensor:
    row = torch.zeros(n)
    row[list(indices)] = 1
    return row


def train(recipe: TextRecipe, loop: LoopConfig, out: Path, *, stop_at: int | None = None) -> Trainer:
    """Trains, or goes on with, the text encoder in the run folder `out`. Raises ValueError for accumulate > 1."""
    if loop.accumulate > 1:
        raise ValueError(f"accumulate (={loop.accumulate}) must be 1 here: the captions of a batch are compared with each other")
    out = Path(out)
    with starting(out):
        if recipe.data != EMOJI:
            same_source(out, recipe.data)
        trainer = Trainer(main_first(loop, lambda _: TextTask(recipe, loop.seed, out)), loop, out, recipe)
    trainer.train(stop_at=stop_at)
    return trainer
