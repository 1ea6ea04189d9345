"""Low-rank changes of a network's layers (arXiv 2106.09685, section 4.1): W + scale up down; merged into the weights, added as the network runs, or
learned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
        kind = getattr(layer, "computes_in", weight.dtype)  # what is kept in 16 bits has its changes in full
        layer.weight = nn.Parameter(total.to(kind), requires_grad=weight.requires_grad)
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
        now = strength() if callable(strength) else strength
        return out + _added(layer, given[0], delta, now) if now else out

    return hook


def _added(layer: nn.Module, x: Tensor, delta: Delta, strength: float = 1.0) -> Tensor:
    """What a change adds to a layer's output for x."""
    down, up, factor = delta.down.to(x), delta.up.to(x), delta.scale * strength
    if isinstance(layer, nn.Conv2d):
        down, up = (v if v.ndim == 4 else v[:, :, None, None] for v in (down, up))
        return factor * F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)  # type: ignore[arg-type]
    return factor * F.linear(F.linear(x, down.flatten(1)), up.flatten(1))


@torch.no_grad()
def difference(tuned: nn.Module, base: nn.Module, layers: str, rank: int) -> tuple[dict[str, Delta], tuple[float, float]]:
    """The changes of a rank that bring the layers of `base` nearest to those of `tuned` (the largest singular values, Eckart and Young 1936), of
    layers that differ; and the squares of all differences, and of those that are left. Raises RuntimeError for networks of other shapes.
    """
    found, whole, left, others = {}, 0.0, 0.0, dict(tuned.named_modules())
    for name, layer in chosen(base, layers).items():
        other = others.get(name)
        if other is None or other.weight.shape != layer.weight.shape:  # type: ignore[union-attr]
            raise RuntimeError(f"{name} is not the same")
        change = other.weight.double() - layer.weight.double()  # type: ignore[union-attr, operator]
        if not bool(change.any()):
            continue
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        r, root = min(rank, len(s)), s[:rank].sqrt()
        up, down = (u[:, :r] * root).float(), (root[:, None] * v[:r]).float()
        found[name] = Delta(down.reshape(r, *change.shape[1:]), up.reshape(len(up), r, *[1] * (change.ndim - 2)))
        whole, left = whole + float(s.square().sum()), left + float(s[r:].square().sum())
    return found, (whole, left)


# --- learning -------------------------------------------------------------------------------------------------------------------------------------

ATTENTION = re.compile(r"(^|\.)(attn\d?|self_attn|attention|cross)\.")  # of our networks and of those of Stable Diffusion
UNNAMED = "add_embedding."  # of SDXL: layers that other programs do not find by their names in files of LoRA


def chosen(network: nn.Module, layers: str) -> dict[str, nn.Module]:
    """The layers that are to change, by name: within attention ("attention"), every linear one ("linear"), convolutions as well ("all"), or those
    whose names a regular expression finds. Raises ValueError where there is none.
    """
    found = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)}
    named = {n: m for n, m in found.items() if not n.startswith(UNNAMED)}
    try:
        match layers:
            case "attention":
                found = {n: m for n, m in found.items() if ATTENTION.search(n)}
            case "linear":
                found = {n: m for n, m in named.items() if isinstance(m, nn.Linear) or m.kernel_size == (1, 1)}
            case "all":
                found = named
            case _:
                found = {n: m for n, m in found.items() if re.search(layers, n)}
    except re.error as e:
        raise ValueError(f"layers (={layers!r}) must be attention, linear, all, or a regular expression: {e}") from None
    if not found:
        raise ValueError(f"layers (={layers!r}) finds no layer: take attention, linear, all, or a part of a layer's name")
    return found


class _AtWork:
    """Which of several sets of changes of the same layers are added just now; copies of them share it."""

    def __init__(self) -> None:
        self.now: LowRank | None = None

    def __deepcopy__(self, memo: Any) -> _AtWork:
        return self


class LowRank(nn.Module):
    """Changes that are learned, of the layers {network: {name: layer}} of frozen networks. At first they change nothing: `up` is zero.

    Called with a function and its arguments it runs that with the changes at work. They stay so until others are, or `rest` is called: a backward
    pass that computes anew what was not kept must find them. A copy (averages) changes the same layers.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, nn.Module]], rank: int, alpha: float | None = None) -> None:
        super().__init__()
        self.alpha, self.at_work = alpha, _AtWork()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for network, of_network in layers.items():
            for name, layer in of_network.items():
                out, *shape = layer.weight.shape  # type: ignore[union-attr, operator]
                r, key = min(rank, out, math.prod(shape)), _key(network, name)
                self.down[key] = nn.Parameter(torch.empty(r, *shape))
                self.up[key] = nn.Parameter(torch.zeros(out, r, *[1] * (len(shape) - 1)))
                nn.init.kaiming_uniform_(self.down[key], a=5**0.5)
                layer.register_forward_hook(_learned(self.at_work, key))

    def delta(self, key: str) -> Delta:
        return Delta(self.down[key], self.up[key], self.alpha)

    def deltas(self) -> dict[str, dict[str, Delta]]:
        """{network: {layer: what is learned of it}}."""
        found: dict[str, dict[str, Delta]] = {}
        for key in self.down:
            (network, name), delta = key.split("/", 1), self.delta(key)
            found.setdefault(network, {})[name.replace("/", ".")] = Delta(delta.down.detach(), delta.up.detach(), delta.alpha)
        return found

    def forward(self, run: Callable[..., Any], *args: Any) -> Any:
        self.at_work.now = self
        return run(*args)

    def rest(self) -> None:
        """The networks as they were."""
        self.at_work.now = None


def _key(network: str, layer: str) -> str:
    """A name that a parameter may have."""
    return f"{network}/{layer.replace('.', '/')}"


def _learned(at_work: _AtWork, key: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        return None if at_work.now is None else out + _added(layer, given[0], at_work.now.delta(key))

    return hook
