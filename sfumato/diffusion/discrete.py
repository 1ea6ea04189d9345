"""When and how a discrete model of Stable Diffusion is asked: what a checkpoint's `scheduler_config.json` decides, for any sampler.

Spacings are those of diffusers (table 2 of arXiv 2305.08891); schedules over sigma / alpha are those of `sfumato.diffusion.path.timesteps`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from jaxtyping import Float64
from torch import Tensor

from sfumato.core.config import nearest
from sfumato.diffusion.path import Path, PathConfig, Schedule, Spacing, discrete_times, make_path, timesteps
from sfumato.diffusion.precond import Prediction, check_prediction
from sfumato.diffusion.samplers import sampler

OPEN = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc")  # which leave the first step out, but of "trailing"
UNIT = (*OPEN, "ddim", "plms", "lcm")  # which begin with unit noise; the others with noise of the first time's sigma
TO_FIRST = ("ddim", "plms")  # which may end at what the first step leaves
SPACINGS = ("leading", "trailing", "linspace", "linspace-exact", "lcm")
ROUNDED = "karras-rounded"  # karras, heard at the nearest whole step
SCHEDULES: tuple[str, ...] = (*SPACINGS, *get_args(Schedule), ROUNDED)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """`sampler` and `schedule` are used where a request names none. `offset` of steps, of "leading" only; `ends`: at the clean picture, or at what
    the first step leaves; `rounded`: asked between two steps by a sampler of `OPEN`, a network hears the nearer one; `least`: those samplers end at
    what the first step leaves, too.
    """

    kind: str = "scheduler"
    path: PathConfig = field(default_factory=lambda: PathConfig(kind="vp-linear"))
    prediction: Prediction = "eps"
    sampler: str = "dpmpp_2m"
    schedule: str = "karras"
    spacing: Spacing = "leading"
    offset: int = 1
    ends: Literal["clean", "first"] = "first"
    rounded: bool = False
    least: bool = False

    def __post_init__(self) -> None:
        sampler(self.sampler)
        check_prediction(self.prediction)
        check_schedule(self.schedule)
        if self.spacing not in SPACINGS[:3]:
            raise ValueError(f"spacing (={self.spacing!r}) must be one of {', '.join(SPACINGS[:3])}")
        if self.prediction == "eps" and self.path.zero_snr:
            raise ValueError("prediction (='eps') says nothing of the picture where all is noise, which zero_snr has: such models predict v")

    @cached_property
    def made(self) -> Path:
        return make_path(self.path)

    def schedule_of(self, sampler: str) -> str:
        """What a sampler takes where nothing is asked for: models for "lcm" learned certain times."""
        return "lcm" if sampler == "lcm" else self.schedule

    def times(self, steps: int, sampler: str, schedule: str | None = None) -> Float64[Tensor, " times"]:
        """Falling times, one more than steps; 0 last. Raises ValueError for what there is not."""
        schedule = schedule or self.schedule_of(sampler)
        check_schedule(schedule)
        if schedule not in SPACINGS:
            return timesteps(self.made, steps, schedule=schedule.removesuffix("-rounded"))  # type: ignore[arg-type]
        spacing = schedule
        if sampler in OPEN and schedule in ("leading", "linspace"):
            spacing = f"{schedule}-open"
        elif sampler not in UNIT and schedule == "linspace":
            spacing = "linspace-exact"
        ends = self.ends if sampler in TO_FIRST else "first" if self.least and sampler in OPEN else "clean"
        return discrete_times(steps, spacing=spacing, num_betas=self.path.num_betas, offset=self.offset, ends=ends)  # type: ignore[arg-type]

    def start(self, ts: Float64[Tensor, " times"], sampler: str, schedule: str | None = None) -> float:
        """What noise is multiplied with at the first of the times."""
        return 1.0 if sampler in UNIT or (schedule or self.schedule_of(sampler)) == "leading" else float(self.made.sigma(ts[:1]))


def check_schedule(name: str) -> None:
    """Raises ValueError that names the nearest."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule (='{name}') must be one of {', '.join(SCHEDULES)}{nearest(name, SCHEDULES)}")
