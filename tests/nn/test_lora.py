"""Low-rank changes: merged or live they do the same, several add up, and afterwards every weight is as it was, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfumato.nn.ema import ema_copy
from sfumato.nn.layers import checkpointed
from sfumato.nn.lora import Delta, LowRank, attach, chosen, merge

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


# --- learning -------------------------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, stride=2)
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(6, 6), "to_k": nn.Linear(6, 6, bias=False)})
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x).mean((2, 3))
        return self.last(self.attn1["to_q"](h) * self.attn1["to_k"](h))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("attention", {"attn1.to_q", "attn1.to_k"}),
        ("linear", {"attn1.to_q", "attn1.to_k", "last"}),
        ("all", {"conv", "attn1.to_q", "attn1.to_k", "last"}),
        ("to_k|conv", {"attn1.to_k", "conv"}),
    ],
)
def test_which_layers_learn(layers: str, names: set[str]) -> None:
    assert set(chosen(Small(), layers)) == names


@pytest.mark.parametrize("layers", ["nothing", "("])
def test_no_layer_is_an_error(layers: str) -> None:
    with pytest.raises(ValueError, match=r"layers \(='"):
        chosen(Small(), layers)


def learned(network: nn.Module, seed: int = 0) -> LowRank:
    """Changes that are no longer zero."""
    torch.manual_seed(seed)
    lora = LowRank({"net": chosen(network, "all")}, rank=2, alpha=1.0)
    for up in lora.up.values():
        nn.init.normal_(up)
    return lora


def test_what_is_learned_is_what_is_merged() -> None:
    network, x = Small(), torch.randn(4, 3, 8, 8)
    plain = network(x)
    lora = learned(network)
    assert torch.equal(network(x), plain), "they rest until they are used"
    ours = lora(network, x)
    assert not torch.allclose(ours, plain, atol=1e-3)
    lora.rest()
    merged = merge(network, [(lora.deltas()["net"], 1.0)])
    torch.testing.assert_close(network(x), ours, atol=1e-5, rtol=1e-5)
    merged.eject()
    assert torch.equal(network(x), plain)


def test_gradients_reach_the_changes_alone_and_are_those_of_the_product() -> None:
    """W + s up down, so d/d up = s dW down^T and d/d down = s up^T dW."""
    network, x = Small(), torch.randn(4, 3, 8, 8)
    lora = learned(network)
    lora(network, x).square().sum().backward()
    grad = network.last.weight.grad
    delta = lora.delta("net/last")
    assert grad is not None
    torch.testing.assert_close(delta.up.grad, delta.scale * grad @ delta.down.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(delta.down.grad, delta.scale * delta.up.T @ grad, atol=1e-4, rtol=1e-4)


def test_new_changes_change_nothing_and_copies_are_apart() -> None:
    network, x = Small(), torch.randn(4, 3, 8, 8)
    plain = network(x)
    lora = LowRank({"net": chosen(network, "all")}, rank=2)
    assert torch.equal(lora(network, x), plain)
    average = ema_copy(lora)
    nn.init.normal_(lora.up["net/last"])
    assert torch.equal(average(network, x), plain)
    assert not torch.equal(lora(network, x), plain)


def test_checkpointing_finds_the_changes_again() -> None:
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        network = Small()
        lora = learned(network)
        if again:
            checkpointed(network, (nn.Conv2d, nn.Linear))
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        lora(network, x).square().sum().backward()
        grads.append({k: p.grad for k, p in lora.named_parameters()})
    for k, v in grads[0].items():
        torch.testing.assert_close(grads[1][k], v, atol=1e-6, rtol=1e-5)
