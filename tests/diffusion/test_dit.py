from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato.core.seams import Cond
from sfumato.diffusion.dit import DiT, DiTConfig
from sfumato.nn.conditions import silent, without_label, without_style, without_text
from sfumato.nn.embeddings import Memory

SMALL = DiTConfig(channels=4, patch=2, width=32, depth=2, heads=2, text_width=16, styles=3, labels=5)


def trained(config: DiTConfig) -> DiT:
    """A network whose zero-started layers are not zero, as after training."""
    torch.manual_seed(0)
    net = DiT(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def cond(n: int, tokens: int = 5) -> Cond:
    g = torch.Generator().manual_seed(1)
    style = torch.eye(3)[torch.arange(n) % 3]
    return Cond(
        text=torch.randn(n, tokens, 16, generator=g),
        mask=torch.ones(n, tokens, dtype=torch.bool),
        pooled=torch.randn(n, 16, generator=g),
        style=style,
        label=torch.arange(n) % 5,
    )


def run(net: DiT, c: Cond, n: int = 2, side: int = 8) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, side, side, generator=g).expand(n, -1, -1, -1)
    return net(x, torch.full((n,), 0.4), c)


def test_a_new_network_says_nothing() -> None:
    assert float(run(DiT(SMALL), cond(2)).detach().abs().max()) == 0


def test_shapes_and_other_sizes() -> None:
    net = trained(SMALL)
    assert run(net, cond(2)).shape == (2, 4, 8, 8)
    assert run(net, cond(2), side=12).shape == (2, 4, 12, 12)
    with pytest.raises(ValueError, match="multiples of 2"):
        run(net, cond(2), side=7)


def test_a_text_without_a_mask_is_all_tokens() -> None:
    net, c = trained(SMALL), cond(2)
    bare = Cond(**(c.__dict__ | {"mask": None}))
    torch.testing.assert_close(run(net, bare), run(net, c))
    yes = torch.tensor([True, False])
    torch.testing.assert_close(run(net, without_text(bare, yes)), run(net, without_text(c, yes)))


@pytest.mark.parametrize("name", ["channels", "patch", "depth", "heads", "cross_every"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(=0\) must be at least 1"):
        replace(SMALL, **{name: 0})


def test_every_condition_changes_the_prediction() -> None:
    net, c = trained(SMALL), cond(1)
    base = run(net, c, 1)
    yes = torch.tensor([True])
    for other in (without_text(c, yes), without_style(c, yes), without_label(c, yes), Cond(**(c.__dict__ | {"pooled": -c.pooled}))):
        assert float((run(net, other, 1) - base).detach().abs().max()) > 1e-4


def test_no_condition_equals_withheld_condition() -> None:
    """A model asked without text, style and label sees what it saw in training when they were dropped."""
    net, c, yes = trained(SMALL), cond(1), torch.tensor([True])
    dropped = without_label(without_style(without_text(c, yes), yes), yes)
    torch.testing.assert_close(run(net, dropped, 1), run(net, Cond(), 1), atol=1e-5, rtol=0)


def test_masked_tokens_do_not_matter() -> None:
    net, c = trained(SMALL), cond(1)
    longer = Cond(
        **(c.__dict__ | {"text": torch.cat([c.text, torch.randn(1, 3, 16)], 1), "mask": torch.cat([c.mask, torch.zeros(1, 3, dtype=torch.bool)], 1)})
    )
    torch.testing.assert_close(run(net, longer, 1), run(net, c, 1), atol=1e-5, rtol=0)


def test_a_style_mixture_is_between() -> None:
    """Weights of a mixture are linear in the conditioning vector: half and half is the mean of the two vectors."""
    net = trained(SMALL)
    t, x = torch.full((3,), 0.4), torch.zeros(3, 4, 8, 8)
    styles = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.5, 0.5, 0]])
    vector = net._condition(t, Cond(style=styles), x)[0]
    torch.testing.assert_close(vector[2], (vector[0] + vector[1]) / 2)


def test_rows_are_independent() -> None:
    net, c = trained(SMALL), cond(4)
    together = run(net, c, 4)
    alone = torch.cat([run(net, c[i : i + 1], 1) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter() -> None:
    net, c = trained(SMALL), cond(4)
    run(net.train(), c, 4).square().sum().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_without_text_styles_or_labels() -> None:
    """Unconditional and label-only models are the same network with fewer inputs."""
    for config in (
        DiTConfig(channels=4, width=32, depth=1, heads=2, text_width=0, styles=0),
        DiTConfig(channels=4, width=32, depth=1, heads=2, text_width=0, labels=5),
    ):
        net = trained(config)
        assert run(net, Cond(), 2).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("change", [{"width": 30}, {"heads": 5}])
def test_impossible_sizes_are_named(change: dict) -> None:
    with pytest.raises(ValueError, match="width"):
        DiTConfig(**change)


def test_a_norm_of_each_blocks_own_can_do_what_the_shared_one_does() -> None:
    """Blocks that all hold the shared weights give the shared network's output, and each of them gets a gradient."""
    shared, own = trained(SMALL), DiT(replace(SMALL, modulation="block")).eval()
    own.load_state_dict({k: v for k, v in shared.state_dict().items() if not k.startswith("modulation")}, strict=False)
    for block in own.blocks:
        block.modulation.weight.data.copy_(shared.modulation.weight)
        block.offsets.data += shared.modulation.bias.view(6, -1)
    assert torch.allclose(run(own, cond(2)), run(shared, cond(2)), atol=1e-5)
    run(own, cond(2)).square().sum().backward()
    assert all(float(block.modulation.weight.grad.abs().sum()) > 0 for block in own.blocks)


def test_an_unknown_modulation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"modulation .*'blocks'.*single, block"):
        DiTConfig(modulation="blocks")  # type: ignore[arg-type]


def test_memory_recalls_what_the_text_is_near() -> None:
    """Far apart keys and great sharpness: each key's own text recalls its own value, silence nothing, whatever the length of the vector."""
    memory = Memory(4, 8, 6)
    memory.keys.data = torch.eye(4, 8)
    memory.log_sharpness.data.fill_(5.0)
    assert torch.allclose(memory(3 * torch.eye(4, 8)), memory.values, atol=1e-5)
    assert not memory(torch.zeros(2, 8)).any()
    between = memory(torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]]))
    assert torch.allclose(between[0], memory.values[:2].mean(0), atol=1e-5)


def test_a_denoiser_with_a_memory_learns_it_and_forgets_it_in_silence() -> None:
    net = trained(replace(SMALL, memory=5))
    run(net, cond(2)).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in net.memory.parameters())
    silence = silent(cond(2), torch.ones(2, dtype=torch.bool))
    before = run(net, silence)
    net.memory.values.data += 1
    assert torch.equal(run(net, silence), before)


def test_a_memory_needs_text() -> None:
    with pytest.raises(ValueError, match=r"memory .*text_width"):
        DiTConfig(memory=3, text_width=0)
