"""What goes wrong with a generator and a discriminator that learn against each other: rules for the doctor (`sfumato.train.doctor`).

Looks tell the kernel distance, the diversity (of the real pictures 1) and the scores of training, held-out and drawn pictures; lines between them
tell gradients and how many the discriminator takes for what they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median

from sfumato.train.finding import Facts, Finding, Line, not_finite

COLLAPSED, FELL = 0.35, 0.6  # diversity of the real pictures', and of its own best, below which modes are lost
RISES = 1.1  # times the diversity of two looks ago
EARLY = 0.1  # of a run, before which a generator may draw one thing
OVERFIT = 0.5  # of the way from training to drawn scores that held-out ones have gone
EXPLODED = 50.0  # times the usual norm of a gradient
VANISHED = 0.05  # of the norm that it had
SURE = 0.97  # share of both kinds that a discriminator takes for what they are
SWING = 0.2  # of the mean distance, by which it goes up and down
CONVERGED = 0.1  # of the first distance, below which ups and downs are noise
NOISE = 0.25  # of the spread of scores, below which pictures are not told apart
LINES, LOOKS = 5, 8


def _collapse(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    seen = [line for line in looks if line["images"] >= EARLY * facts.get("images", 0)]
    if len(seen) < 3:
        return None
    best, last = max(line["diversity"] for line in seen), max(line["diversity"] for line in seen[-3:])
    young = seen[-1]["diversity"] > RISES * seen[-3]["diversity"]  # not yet learned is no collapse
    if young or (last >= FELL * best and last >= COLLAPSED):
        return None
    return Finding(
        "mode-collapse",
        f"what is drawn is all alike: its diversity is {last:.0%} of that of the real pictures",
        "the relativistic loss with penalty.r1 and penalty.r2, a lower --loop.lr, augment ada; the best checkpoint is in model-best.safetensors",
    )


def _overfit(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    def gone(line: Line) -> float:
        way = line["train_score"] - line["drawn_score"]
        told_apart = way > NOISE * line.get("train_spread", 0.0) > 0
        return (line["train_score"] - line["held_out_score"]) / way if told_apart else 0.0

    if len(looks) < 2 or min(gone(line) for line in looks[-2:]) < OVERFIT:
        return None
    return Finding(
        "discriminator-overfits",
        f"the discriminator knows its pictures by heart: held-out ones are {gone(looks[-1]):.0%} of the way to drawn ones",
        "augment ada or diffaugment, more pictures, a larger penalty.r1, --init with --recipe.freeze, --patience",
    )


def _vanishing(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    norms, right = _norms(steps, "generator"), _right(steps)
    if len(norms) < 2 * LINES or min(right[-LINES:]) < SURE or max(norms[-LINES:]) > VANISHED * max(norms):
        return None
    return Finding(
        "vanishing-gradient",
        f"the generator hears nothing: its gradient is {max(norms[-LINES:]) / max(norms):.2%} of what it was, and the discriminator is always right",
        "the loss non-saturating or relativistic instead of minimax, a penalty on slopes, a smaller d_lr",
    )


def _explosion(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    for name in ("discriminator", "generator"):
        norms = _norms(steps, name)
        if len(norms) >= 2 * LINES and min(norms[-2:]) > EXPLODED * max(median(norms[:LINES]), 1e-12):
            return Finding(
                "gradient-explosion",
                f"the gradient of the {name} is {norms[-1] / median(norms[:LINES]):.0f} times what it was",
                "a penalty on slopes (penalty.r1), discriminator.spectral, a lower --loop.lr or d_lr, --loop.clip",
            )
    return None


def _oscillation(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    distances = [line["kid"] for line in looks[-LOOKS:]]
    if len(distances) < LOOKS:
        return None
    moves = [b - a for a, b in itertools.pairwise(distances)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(moves))
    size = sum(abs(m) for m in moves) / len(moves) / max(sum(distances) / len(distances), 1e-12)
    if turns < (LOOKS - 2) / 2 or size < SWING or max(distances) < CONVERGED * looks[0]["kid"]:
        return None
    return Finding(
        "oscillation",
        f"the pair goes in circles: the kernel distance goes up and down by {size:.0%} from look to look",
        "a lower --loop.lr, --recipe.betas with a first number of 0, a penalty on slopes, larger batches, --loop.ema",
    )


def _norms(steps: Sequence[Line], name: str) -> list[float]:
    return [line[f"{name}/grad_norm"] for line in steps if math.isfinite(line.get(f"{name}/grad_norm", math.nan))]


def _right(steps: Sequence[Line]) -> list[float]:
    """The smaller of both shares that the discriminator takes for what they are."""
    return [min(line["discriminator/real_right"], line["discriminator/fake_right"]) for line in steps if "discriminator/real_right" in line]


RULES: tuple[Callable[[Sequence[Line], Sequence[Line], Facts], Finding | None], ...] = (
    not_finite,
    _explosion,
    _vanishing,
    _overfit,
    _collapse,
    _oscillation,
)
CAUSES = {  # of a finding, those of which it is a consequence
    "vanishing-gradient": {"not-finite", "gradient-explosion"},
    "mode-collapse": {"not-finite", "gradient-explosion", "vanishing-gradient"},
    "oscillation": {"not-finite", "gradient-explosion", "mode-collapse"},
    "discriminator-overfits": {"not-finite", "gradient-explosion"},
}
