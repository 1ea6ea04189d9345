"""What the doctor finds in a run, and what every kind of run can suffer from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]  # of log.jsonl
Facts = dict[str, Any]  # of the data and the networks

EQUAL = 0.02  # mean standard deviation over pictures, of a range of 2
SKIPPED = 3  # steps that were not finite


@dataclass(frozen=True)
class Finding:
    """`name` of the disease, what is seen, and what helps."""

    name: str
    sees: str
    helps: str

    @property
    def says(self) -> str:
        return f"{self.sees}; what helps: {self.helps}"


def equal(facts: Facts) -> Finding | None:
    """Pictures that are all but the same."""
    if facts.get("variety", 1.0) >= EQUAL:
        return None
    return Finding(
        "equal-data",
        f"the training pictures are all but equal: they differ by {facts['variety']:.4f} of a range of 2",
        "other pictures; `sfumato data check` names copies",
    )


def not_finite(looks: Sequence[Line], steps: Sequence[Line], facts: Facts) -> Finding | None:
    """Steps that were skipped."""
    skipped = steps[-1].get("skipped", 0) if steps else 0
    if skipped < SKIPPED:
        return None
    return Finding(
        "not-finite",
        f"{skipped:,} steps were not finite and were skipped",
        "a lower --loop.lr, --dtype fp32, or --loop.auto, which goes back to a checkpoint with half the learning rate",
    )
