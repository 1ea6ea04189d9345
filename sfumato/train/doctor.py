"""Reads a training run as a doctor would: what the figures say, in words, and what helps.

Every finding is one rule over the lines of `log.jsonl` and a few facts of the data. Thresholds stand at the top; a rule that fires on healthy runs
is worse than none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sfumato.core.runlog import read_log
from sfumato.train import diseases
from sfumato.train.finding import Facts, Finding, Line, equal, not_finite

DEAD = 0.5  # share of codes that are used, below which the others are a disease
FEW_LATENTS = 16  # of the training pictures for each code
RIGHT, WRONG = 0.97, 0.55  # share that a discriminator takes for what they are: too strong above, too weak below
WORSE_THAN_BLANK = 1.3  # times the loss of a discriminator that says nothing, which one that learns stays below
AT_CAP = 0.5  # share of steps with the adaptive weight at its cap
FELL = 3.0  # dB below the best
OVERFIT, WORSE = 3.0, 0.3  # dB between training and held-out pictures; dB of held-out ones below their best
SOFT = 0.35  # share of the originals' detail that copies keep; healthy VQGANs of 8 x 8 codes keep 0.45
DEAD_CHANNELS = 0.1  # share of latent channels that carry anything
LATE = 0.8  # of a run, before which copies may be blurred still
LINES = 5  # of the log, that a judgement is made from
LOOK = {"psnr", "kid"}  # what a line of a look has, of a codec or of a GAN


def diagnose(lines: Sequence[Line], facts: Facts) -> list[Finding]:
    """All that is wrong with a run, the most fundamental first. Of what follows from something else only the cause is named."""
    gan = facts.get("kind") == "gan"
    rules, causes = (diseases.RULES, diseases.CAUSES) if gan else (RULES, CAUSES)
    looks, steps = [line for line in lines if LOOK & line.keys()], [line for line in lines if "images_per_s" in line]
    if (found := equal(facts)) is not None:
        return [found]
    found = [f for rule in rules if (f := rule(looks, steps, facts)) is not None]
    names = {f.name for f in found}
    return [f for f in found if not names & causes.get(f.name, set())]


def _too_many_codes(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    each = facts["pictures"] * facts["cells"] / facts["codes"] if facts.get("codes") else math.inf
    if each >= FEW_LATENTS:
        return None
    right, kind = codes_for(facts["pictures"] * facts["cells"]), facts.get("bottleneck", "vq")
    return Finding(
        "too-many-codes",
        f"{facts['codes']:,} codes for {facts['pictures']:,} pictures: {each:.1f} latents a code",
        f"more pictures, or about {right:,} codes (at the end of the command: recipe.codec.bottleneck:{kind}-config "
        f"--recipe.codec.bottleneck.{'steps' if kind == 'fsq' else 'size'} ...)",
    )


def codes_for(latents: int) -> int:
    """The largest power of two of codes that so many latents of training pictures can teach, 16 at least."""
    return 2 ** max(4, int(math.log2(max(latents, 1) / FEW_LATENTS)))


def _dead(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    uses = [line["usage"] for line in steps if "usage" in line]
    if len(uses) < 2 or max(uses[-2:]) >= DEAD or not facts.get("codes"):
        return None
    return Finding(
        "dead-codes",
        f"{1 - uses[-1]:.0%} of the codes are dead: an epoch did not choose them once",
        "k-means at the start (recipe.kmeans), restarts (bottleneck.restart), cosine codes of few channels, or a smaller codebook; "
        "fsq has no dead codes",
    )


def _collapse(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    if len(looks) < 3:
        return None
    best, last = max(line["psnr"] for line in looks[:-1]), looks[-1]["psnr"]
    train = looks[-1].get("train_psnr", last)
    if best - last < FELL or train - last > OVERFIT:
        return None
    return Finding(
        "collapse",
        f"reconstruction fell from {best:.1f} to {last:.1f} dB",
        "the best checkpoint is in model-best.safetensors; a later adversary.joins, a smaller adversary.weight, a lower --loop.lr",
    )


def _too_strong(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    right = _rates(steps)
    if len(right) < LINES or min(min(r) for r in right[-LINES:]) < RIGHT or not _heard(steps):
        return None
    return Finding(
        "discriminator-too-strong",
        f"the discriminator is too strong: it is right of {min(right[-1]):.0%} of all patches and teaches nothing",
        "a lower adversary.lr, fewer layers or a smaller width, adversary.discriminator.spectral, adversary.r1 or lecam above 0",
    )


def _too_fast(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    losses = sorted([line["discriminator/classification"] for line in steps if "discriminator/classification" in line][-2 * LINES :])
    blank = facts.get("blank", math.inf)
    if len(losses) < 2 * LINES or losses[LINES] < WORSE_THAN_BLANK * blank:
        return None
    return Finding(
        "discriminator-too-fast",
        f"the discriminator overshoots: its loss of {losses[LINES]:.1f} is above the {blank:.2f} of one that says nothing",
        "a lower adversary.lr, adversary.r1 or lecam above 0, adversary.discriminator.spectral",
    )


def _too_weak(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    right = _rates(steps)
    if len(right) < 2 * LINES or max(sum(r) / 2 for r in right[-LINES:]) > WRONG or not _heard(steps):
        return None
    return Finding(
        "discriminator-too-weak",
        f"the discriminator is too weak: it is right of {sum(right[-1]) / 2:.0%} of all patches, by chance 50 %",
        "a higher adversary.lr, more adversary.steps, a wider discriminator, an earlier adversary.begins",
    )


def _rates(steps: Sequence[Line]) -> list[tuple[float, float]]:
    """(of real, of copies): the share that the discriminator takes for what they are."""
    return [(line["discriminator/real_right"], line["discriminator/fake_right"]) for line in steps if "discriminator/real_right" in line]


def _heard(steps: Sequence[Line]) -> bool:
    return bool(steps) and "codec/adaptive" in steps[-1]


def _at_cap(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    weights = [line["codec/adaptive"] for line in steps if "codec/adaptive" in line]
    if len(weights) < LINES or sum(w > 0.9 * facts.get("most", math.inf) for w in weights[-LINES:]) < AT_CAP * LINES:
        return None
    return Finding(
        "weight-at-cap",
        f"the adversarial weight is at its cap (adversary.most, {facts['most']:g}): the discriminator's gradient has all but gone",
        "what helps a discriminator that is too strong; or a smaller adversary.weight",
    )


def _overfit(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    if len(looks) < 3 or "train_psnr" not in looks[-1]:
        return None
    gap, best = looks[-1]["train_psnr"] - looks[-1]["psnr"], max(line["psnr"] for line in looks)
    if gap < OVERFIT or best - looks[-1]["psnr"] < WORSE:
        return None
    return Finding(
        "overfit",
        f"training pictures are copied {gap:.1f} dB better than held-out ones, which get worse",
        "more pictures, more augmentation (recipe.variety), a narrower network, --patience; the best is in model-best.safetensors",
    )


def _few(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    if not looks or facts["parameters"] <= facts["pictures"] * facts["values"] or "train_psnr" not in looks[-1]:
        return None
    if looks[-1]["train_psnr"] - looks[-1]["psnr"] < OVERFIT:
        return None
    return Finding(
        "few-pictures",
        f"{facts['parameters']:,} parameters for {facts['pictures']:,} pictures: they are learned by heart",
        "more pictures, a narrower network (recipe.codec.convnet.widths), or beginning from a trained codec (recipe.init)",
    )


def _soft(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    if len(looks) < 3 or looks[-1]["images"] < LATE * facts.get("images", math.inf):
        return None
    if max(line.get("detail", 1.0) for line in looks[-2:]) >= SOFT or (facts.get("adversary") and not _heard(steps)):
        return None
    return Finding(
        "blurred",
        f"copies are blurred: they keep {looks[-1]['detail']:.0%} of the originals' detail",
        "more training, features (recipe.perceptual above 0, an earlier perceptual-from), recipe.edges, more channels or codes"
        if facts.get("adversary")
        else "more training, features (recipe.perceptual above 0, an earlier perceptual-from), recipe.edges, a discriminator (preset vqgan), "
        "more channels or codes",
    )


def _posterior(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    if len(looks) < 2 or "live_channels" not in looks[-1] or looks[-1]["live_channels"] >= DEAD_CHANNELS:
        return None
    return Finding(
        "posterior-collapse",
        f"{1 - looks[-1]['live_channels']:.0%} of the latent channels say nothing: the posterior has collapsed onto N(0, I)",
        "a smaller recipe.kl (beta), recipe.kl-warmup, recipe.free-bits",
    )


RULES: tuple[Callable[[Sequence[Line], Sequence[Line], Facts], Finding | None], ...] = (
    not_finite,
    _posterior,
    _too_many_codes,
    _dead,
    _collapse,
    _too_strong,
    _too_fast,
    _too_weak,
    _at_cap,
    _few,
    _overfit,
    _soft,
)
CAUSES = {  # of a finding, those of which it is a consequence
    "dead-codes": {"too-many-codes"},
    "overfit": {"few-pictures", "too-many-codes"},
    "few-pictures": {"too-many-codes"},
    "weight-at-cap": {"discriminator-too-strong", "discriminator-too-weak", "discriminator-too-fast"},
    "collapse": {"not-finite", "discriminator-too-strong", "discriminator-too-fast"},
    "discriminator-too-weak": {"discriminator-too-fast"},
    "blurred": {"posterior-collapse", "not-finite", "too-many-codes", "discriminator-too-strong", "collapse"},
    "discriminator-too-strong": {"not-finite"},
}


class Doctor:
    """Follows a run while it trains, and says each thing once, until it is gone and comes back."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def look(self, log: Path) -> list[dict[str, Any]]:
        """JSON lines of what was not found at the look before; the log says what that was, also to a run that was gone on with."""
        lines = read_log(log)
        looks = [line["images"] for line in lines if LOOK & line.keys()]
        before = [line for line in lines if line["images"] <= looks[-2]] if len(looks) > 1 else []
        said = {f.name for f in diagnose(before, self.facts)} if before else set()
        return [{"finding": f.name, "says": f.says} for f in diagnose(lines, self.facts) if f.name not in said]

    def save(self, run: Path) -> None:
        """Writes the facts beside the log, for `sfumato doctor`."""
        (run / "facts.json").write_text(json.dumps(self.facts, indent=2), encoding="utf-8")


def facts_of(run: Path) -> Facts:
    """What a run says of its data; nothing where it was begun before there was a doctor."""
    try:
        return json.loads((run / "facts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"pictures": 0, "cells": 0, "codes": 0, "parameters": 0, "values": 1}
