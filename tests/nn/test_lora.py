"""Low-rank changes: merged or live they do the same, several add up, and afterwards every weight is as it was, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfumato.nn.lora import Delta, attach, merge

LAYERS = {
    "0": (nn.Linear(6, 8), (6,)),
    "1": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 3, 3)),
    "2": (nn.Conv2d(6, 8, 1), (6,)),
}


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({k: type(m)(*_made(m)) for k, (m, _) in LAYERS.items()}).requires_grad_(False)


def _made(m: nn.Module) -> tuple[int, ...]:
    return (
        (m.in_features, m.out_features)
        if isinstance(m, nn.Linear)
        else (m.in_channels, m.out_channels, *m.kernel_size[:1], *m.stride[:1], *m.padding[:1])
    )  # type: ignore[union-attr, index, return-value]


def delta(name: str, seed: int, alpha: float | None = 2.0) -> Delta:
    g = torch.Generator().manual_seed(seed)
    shape = LAYERS[name][1]
    up = (8, 4) if len(shape) == 1 else (8, 4, 1, 1)
    return Delta(torch.randn(4, *shape, generator=g), torch.randn(*up, generator=g), alpha)


def given(name: str) -> Tensor:
    return torch.randn(2, 5, 6) if name == "0" else torch.randn(2, 6, 9, 9)


@pytest.mark.parametrize("name", LAYERS)
def test_merged_and_live_do_the_same(name: str) -> None:
    network, x = net(), given(name)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    plain = network[name](x)
    changes = {name: delta(name, 1)}
    merged = merge(network, [(changes, 0.7)])
    one = network[name](x)
    merged.eject()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    live = attach(network, changes, 0.7)
    two = network[name](x)
    live.eject()
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, plain)
    assert torch.equal(network[name](x), plain)


def test_several_add_up_and_alpha_counts() -> None:
    network, x = net(), given("0")
    a, b = {"0": delta("0", 1)}, {"0": delta("0", 2, None)}
    expected = network["0"](x) + x @ (0.5 * a["0"].whole() - 1.5 * b["0"].whole()).T
    merged = merge(network, [(a, 0.5), (b, -1.5)])
    assert torch.allclose(network["0"](x), expected, atol=1e-5)
    merged.eject()
    up, down = a["0"].up, a["0"].down
    assert torch.allclose(a["0"].whole(), 2 / 4 * up @ down)
    assert torch.allclose(b["0"].whole(), b["0"].up @ b["0"].down), "without alpha it is the rank"
    strength = [0.0]
    live = attach(network, a, lambda: strength[0])
    assert torch.equal(network["0"](x), net()["0"](x))
    strength[0] = 1.0
    assert not torch.equal(network["0"](x), net()["0"](x))
    live.eject()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="there is no layer 7 in this network"):
        merge(net(), [({"7": delta("0", 1)}, 1.0)])
    with pytest.raises(ValueError, match=r"the change of 1 .* does not fit its weight"):
        attach(net(), {"1": delta("0", 1)})
