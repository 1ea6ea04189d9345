"""Low-rank changes of a network's layers (arXiv 2106.09685, section 4.1): W + scale up down, merged into the weights or added as the network runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Delta:
    """Of one layer: `down` "r in" and `up` "out r", of convolutions "r in kh kw" and "out r 1 1"; it counts `alpha` / r times."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return (len(self.down) if self.alpha is None else self.alpha) / len(self.down)

    def whole(self) -> Float[Tensor, " out *rest"]:
        """What is added to the weight, at least fp32."""
        up, down = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (self.up, self.down))
        return (self.scale * up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])

    def fits(self, layer: nn.Module) -> bool:
        """Whether it is of a layer of this shape; a linear change fits a 1x1 convolution too."""
        weight = getattr(layer, "weight", None)
        if weight is None or self.up.flatten(1).shape[1] != len(self.down):
            return False
        shape = (len(self.up), *self.down.shape[1:])
        flat = shape[:2] if set(shape[2:]) <= {1} else shape
        return tuple(weight.shape) in (shape, flat, (*flat, 1, 1))


@dataclass
class Attached:
    """Changes that are at work; `eject` takes them out again and leaves the weights bit for bit as they were."""

    weights: dict[nn.Module, Tensor] = field(default_factory=dict)
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def eject(self) -> None:
        for layer, weight in self.weights.items():
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)  # type: ignore[union-attr, arg-type]
        for hook in self.hooks:
            hook.remove()
        self.weights.clear()
        self.hooks.clear()


def merge(network: nn.Module, changes: list[tuple[Mapping[str, Delta], float]]) -> Attached:
    """Adds several sets of changes, {module: Delta} with a strength each, to the weights: as fast as without. Raises ValueError."""
    attached = Attached()
    by_layer: dict[nn.Module, list[tuple[Delta, float]]] = {}
    for deltas, strength in changes:
        for name, delta in deltas.items():
            by_layer.setdefault(_layer(network, name, delta), []).append((delta, strength))
    for layer, parts in by_layer.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        total = sum((strength * delta.whole().reshape(weight.shape).to(weight.device) for delta, strength in parts), weight.data)
        attached.weights[layer] = weight.data
        layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
    return attached


def attach(network: nn.Module, deltas: Mapping[str, Delta], strength: float | Callable[[], float] = 1.0) -> Attached:
    """Adds changes as the network runs, whose strength may be asked for at every call. Raises ValueError where one does not fit."""
    attached = Attached()
    for name, delta in deltas.items():
        layer = _layer(network, name, delta)
        attached.hooks.append(layer.register_forward_hook(_adding(delta, strength)))
    return attached


def _layer(network: nn.Module, name: str, delta: Delta) -> nn.Module:
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"there is no layer {name} in this network") from None
    if not delta.fits(layer):
        shapes = f"{tuple(delta.up.shape)} and {tuple(delta.down.shape)}"
        raise ValueError(f"the change of {name} ({shapes}) does not fit its weight {tuple(layer.weight.shape)}: it is of another kind of model")  # type: ignore[union-attr, arg-type, operator]
    return layer


def _adding(delta: Delta, strength: float | Callable[[], float]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = given[0]
        down, up = delta.down.to(x), delta.up.to(x)
        factor = delta.scale * (strength() if callable(strength) else strength)
        if isinstance(layer, nn.Conv2d):
            down, up = (v if v.ndim == 4 else v[:, :, None, None] for v in (down, up))
            return out + factor * F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)  # type: ignore[arg-type]
        return out + factor * F.linear(F.linear(x, down.flatten(1)), up.flatten(1))

    return hook
