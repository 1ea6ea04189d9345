"""The adversarial half of a codec's training: when the discriminator learns, when it is heard, and how loud (arXiv 2012.09841).

A run has three parts. First reconstruction alone; from `begins` on the discriminator learns, but the codec does not hear it; from `joins` on its
weight rises over `ramp` of the run. So it is never a beginner's judgement that the codec follows; nor, later, that of one which has lost its way: it
is trusted as far as it tells pictures from copies (see `Adversary.trust`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.gans.discriminators import PatchConfig, PatchDiscriminator
from sfumato.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, lecam_penalty, middle, r1_penalty

MEMORY = 0.99  # of the running averages of scores
QUICK = 0.95  # of that of the share right


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """`weight` 0 is none. `begins`, `joins` and `ramp` are fractions of the run. `adaptive` balances the gradients on the last layer; the weight that
    it finds is `most` at most. `trusting`: the share right of both kinds from which on it is heard in full, at chance it is not heard (0.5: always in
    full). `steps` discriminator steps a codec step; `lr` is relative to the codec's, `betas` are its own. `r1` and `lecam` weigh those penalties.
    """

    weight: float = 0.0
    loss: Literal["hinge", "non-saturating", "least-squares"] = "hinge"
    discriminator: PatchConfig = field(default_factory=PatchConfig)
    begins: float = 0.5
    joins: float = 0.6
    ramp: float = 0.1
    adaptive: bool = True
    most: float = 10.0
    trusting: float = 0.7
    steps: int = 1
    lr: float = 1.0
    betas: tuple[float, float] = (0.5, 0.9)
    r1: float = 0.0
    lecam: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.most <= 0 or self.r1 < 0 or self.lecam < 0 or self.lr <= 0:
            raise ValueError(
                f"weight (={self.weight}), r1 (={self.r1}) and lecam (={self.lecam}) must be at least 0, "
                f"most (={self.most}) and lr (={self.lr}) above 0"
            )
        if not 0 <= self.begins <= self.joins <= 1 or self.ramp < 0:
            raise ValueError(
                f"begins (={self.begins}) and joins (={self.joins}) must be from 0 to 1 in this order, ramp (={self.ramp}) at least 0: "
                "a discriminator that has not learned is not to be heard"
            )
        if not 0.5 <= self.trusting <= 1:
            raise ValueError(f"trusting (={self.trusting}) must be from 0.5 to 1: the share right from which on a discriminator is heard in full")
        if self.steps < 1:
            raise ValueError(f"steps (={self.steps}) must be at least 1: discriminator steps for each of the codec")

    def heard(self, progress: float) -> float:
        """The share of `weight` at that point of the run."""
        if not self.weight or progress < self.joins:
            return 0.0
        return self.weight * min(1.0, (progress - self.joins) / self.ramp if self.ramp else 1.0)


class Controls(nn.Module):
    """What a run remembers besides weights: whether its codebook was made, running averages of the scores (real, generated) and of the share that
    the discriminator takes for what it is, and by how much a remedy has lowered the adversarial weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("scores", torch.zeros(2))
        self.register_buffer("right", torch.full((), 0.5))
        self.register_buffer("lowered", torch.ones(()))

    def forward(self) -> None:
        """Nothing to compute."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, value in self.named_buffers():
            state_dict.setdefault(prefix + name, value.clone())  # of a run that was begun before there was this one
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Adversary:
    """The discriminator's side of a task; `controls` and the discriminator are networks of the task, so that a checkpoint holds them."""

    def __init__(self, config: AdversaryConfig, controls: Controls) -> None:
        self.config, self.controls = config, controls
        self.network = PatchDiscriminator(config.discriminator)
        self.seen: list[Tensor] = []  # of this step: mean scores (real, generated), share right

    @property
    def trust(self) -> Tensor:
        """0 where the discriminator does no better than chance, 1 from `trusting` on."""
        if self.config.trusting == 0.5:
            return torch.ones_like(self.controls.right)
        return ((self.controls.right - 0.5) / (self.config.trusting - 0.5)).clamp(0, 1)

    def hear(self, y: Tensor, weight: Tensor, reconstruction: Any, share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(a scalar with the gradient and the value of reconstruction(y) + w * adversarial, statistics) for pictures y; `weight`: the last layer's.

        Both losses are followed back to the pictures once, and together through the codec: not once more for the weight.
        """
        c = self.config
        leaf = y.detach().requires_grad_()
        with torch.autocast(y.device.type, enabled=False):
            near, found = reconstruction(leaf)
            fooled = generator_loss(c.loss, self.network(leaf.float()))
            of_near, of_fooled = torch.autograd.grad(near, leaf)[0], torch.autograd.grad(fooled, leaf)[0]
        w = torch.ones((), device=y.device)
        if c.adaptive:
            on_last = [torch.autograd.grad(y, weight, g.to(y), retain_graph=True)[0].float() for g in (of_near, of_fooled)]
            w = mean_of_processes(adaptive_weight(*on_last, most=c.most))
        trust = self.trust
        scale = share * self.controls.lowered * trust * w
        carrier = (y * (of_near + scale * of_fooled)).sum()
        value = near.detach() + scale * fooled.detach()
        return carrier - carrier.detach() + value, found | {
            "adversarial": fooled.detach(),
            "adaptive": w,
            "trust": trust,
            "adversarial_weight": scale,
        }

    def judge(self, network: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on pictures and their copies, and how many of each it takes for what they are."""
        c = self.config
        if c.r1:
            real = real.detach().requires_grad_()
        fake = fake.to(real)
        if c.discriminator.norm == "batch":  # each with statistics of its own, as when the codec is judged
            of_real, of_fake = network(real).float(), network(fake).float()
        else:
            of_real, of_fake = network(torch.cat([real, fake])).float().chunk(2)
        loss = plain = discriminator_loss(c.loss, of_real, of_fake) / 2
        if c.lecam:
            loss = loss + c.lecam * lecam_penalty(of_real, of_fake, self.controls.scores.clone())
        if c.r1:
            loss = loss + c.r1 * r1_penalty(of_real, real)
        half = middle(c.loss, *self.controls.scores)
        found = {"real_right": (of_real > half).float().mean(), "fake_right": (of_fake < half).float().mean()}
        with torch.no_grad():
            right = (found["real_right"] + found["fake_right"]) / 2
            self.seen.append(mean_of_processes(torch.stack([of_real.mean(), of_fake.mean(), right])))
        return loss, found | {"classification": plain.detach(), "real_score": of_real.detach().mean(), "fake_score": of_fake.detach().mean()}

    @torch.no_grad()
    def settle(self, finite: bool) -> None:
        """Takes the scores of a step into the running averages, unless the step was not finite."""
        seen, self.seen = self.seen, []
        if seen and finite:
            *scores, right = torch.stack(seen).mean(0).unbind()
            self.controls.scores.lerp_(torch.stack(scores), 1 - MEMORY)
            self.controls.right.lerp_(right, 1 - QUICK)


def mean_of_processes(t: Tensor) -> Tensor:
    """The mean over the processes of a launcher; alone as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(t)
        t = t / torch.distributed.get_world_size()
    return t
