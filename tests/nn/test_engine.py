"""Graphs of OpenVINO: the same numbers at every shape, one graph on the disk for all of them, another for other weights; and what is refused."""

from __future__ import annotations

import copy
import gc
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.core.checkpoint import FileError
from sfumato.core.seams import Cond
from sfumato.diffusion.unet import TIMES, UNet, UNetConfig
from sfumato.nn import engine as engines
from sfumato.nn import winograd
from sfumato.nn.engine import Engine, choose_engine
from sfumato.nn.lora import Delta, merge
from sfumato.nn.winograd import Conv3x3

pytest.importorskip("openvino")
SMALL = UNetConfig(widths=(32, 64, 64), blocks=1, depths=(1, 1, 0), heads=(2, 2, 2), context=16, pooled=8, sizes=6, size_width=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    return tmp_path / "engine"


def unet(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(SMALL).eval().requires_grad_(False)


class Two(nn.Module):
    """Two convolutions, where a whole UNet would only take longer to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv_in(x).tanh())


def told(rows: int, tokens: int, masked: bool = False) -> Cond:
    mask = (torch.arange(tokens) < tokens - 2).expand(rows, -1) if masked else None
    return Cond(text=torch.randn(rows, tokens, 16), mask=mask, pooled=torch.randn(rows, 8), extra={TIMES: torch.randint(0, 64, (rows, 6)).float()})


def kept(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


@torch.no_grad()
def test_one_graph_is_right_for_every_shape(own_cache: Path) -> None:
    net = unet()
    run = Engine("openvino", (net,)).of(net, dynamic=True)
    for rows, high, wide, tokens in ((1, 8, 8, 5), (2, 12, 20, 5), (3, 9, 7, 30), (2, 32, 40, 5), (1, 64, 64, 77)):
        x, t, cond = torch.randn(rows, 4, high, wide), torch.rand(rows), told(rows, tokens)
        torch.testing.assert_close(run(x, t, cond), net(x, t, cond), atol=1e-4, rtol=1e-4)
    assert len(kept(own_cache)) == 1
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), told(2, 9, masked=True)
    torch.testing.assert_close(run(x, t, cond), net(x, t, cond), atol=1e-4, rtol=1e-4)
    assert len(kept(own_cache)) == 2, "a mask is another input"


@torch.no_grad()
def test_several_results_and_what_the_disk_has() -> None:
    net, x, t, cond = unet(), torch.randn(2, 4, 8, 8), torch.rand(2), told(2, 5)
    out, deep = Engine("openvino", (net,)).of(net, "whole", dynamic=True)(x, t, cond)
    again = Engine("openvino", (net,)).of(net, "whole", dynamic=True)(x, t, cond)
    torch.testing.assert_close(out, net(x, t, cond), atol=1e-4, rtol=1e-4)
    assert torch.equal(out, again[0])
    assert torch.equal(deep, again[1])
    found = Engine("openvino", (net,)).of(net, "shallow", dynamic=True)(x, t, cond, deep)
    torch.testing.assert_close(found, out, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_change_of_the_weights_has_a_graph_of_its_own(own_cache: Path) -> None:
    """Also in another engine, and in the other order: what is on the disk is of what was there when it was made."""
    net, x = Two(), torch.randn(1, 4, 8, 8)
    engine = Engine("openvino", (net,))

    def same(engine: Engine) -> Tensor:
        found = engine.of(net, dynamic=True)(x)
        torch.testing.assert_close(found, net(x), atol=1e-4, rtol=1e-4)
        return found

    before, weight = same(engine), net.conv_out.weight
    delta = Delta(torch.randn(2, 32, 3, 3), torch.randn(4, 2, 1, 1))
    merged = merge(net, [({"conv_out": delta}, 0.5)])
    assert not torch.allclose(same(engine), before, atol=1e-3)
    same(Engine("openvino", (net,)))
    merged.eject()
    assert net.conv_out.weight is not weight
    assert torch.equal(same(engine), before)
    net.conv_in.padding_mode = "circular"
    assert not torch.allclose(same(engine), before, atol=1e-4)
    net.conv_in.padding_mode = "zeros"
    assert torch.equal(same(Engine("openvino", (net,))), before)
    assert len(kept(own_cache)) == 3


@torch.no_grad()
def test_what_comes_and_goes_and_copies_are_eager() -> None:
    """Layers with hooks, such as those of a LoRA that learns, and averages of a network."""
    net = unet()
    engine, other = Engine("openvino", (net,)), copy.deepcopy(net)
    assert engine.of(other) is other
    hook = net.conv_out.register_forward_hook(lambda layer, given, out: out + 1)
    assert engine.of(net) is net
    hook.remove()
    assert engine.of(net) is not net


@torch.no_grad()
def test_a_willing_engine_does_without(own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    net, x = Two(), torch.randn(1, 4, 8, 8)
    engine = Engine("openvino", (net,), willing=True)
    weight = net.conv_out.weight
    net.conv_out.weight = nn.Parameter(2 * weight, requires_grad=False)
    assert torch.equal(engine.of(net, dynamic=True)(x), net(x)), "no graph is made of what was changed"
    assert engine.used == f"torch {torch.__version__}"
    assert engine.version.startswith("openvino")
    assert not own_cache.exists()
    Engine("openvino", (net,)).of(net, dynamic=True)(x)
    found = engine.of(net, dynamic=True)
    assert len(kept(own_cache)) == 1
    engine.made.clear()
    assert not torch.equal(engine.of(net, dynamic=True)(x), net(x)), "but one that is there is taken"
    assert engine.used == engine.version
    net.conv_out.weight = weight
    monkeypatch.setattr(engines, "free_bytes", lambda path: 10)
    found = engine.of(net, dynamic=True)
    for _ in range(2):
        assert torch.equal(found(x), net(x))
    assert capsys.readouterr().err.count("has no room") == 1


@torch.no_grad()
def test_a_damaged_graph_is_made_anew(own_cache: Path) -> None:
    net, x = Branching().requires_grad_(False), torch.randn(2, 4)
    before = Engine("openvino", (net,)).of(net)(x)
    (folder,) = kept(own_cache)
    for damaged in (b"", (folder / "graph.xml").read_bytes()[:200]):
        (folder / "graph.xml").write_bytes(damaged)
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        assert torch.equal(Engine("openvino", (net,)).of(net)(x), before)


@torch.no_grad()
def test_threads_do_not_mix_their_numbers() -> None:
    net = Branching().requires_grad_(False)
    run = Engine("openvino", (net,)).of(net)
    inputs = [torch.full((2, 4), float(i)) for i in range(8)]
    expected = [net(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(40):
            for a, b in zip(pool.map(run, inputs), expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Branching(nn.Module):
    """Whose graph is of one shape: which branch is taken depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if len(x) > 1 else self.layer(x) - 1


@torch.no_grad()
def test_a_network_that_branches_has_a_graph_for_each_shape(own_cache: Path) -> None:
    net = Branching().requires_grad_(False)
    run = Engine("openvino", (net,)).of(net)
    for rows in (1, 2, 3):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(run(x), net(x), atol=1e-5, rtol=1e-5)
    assert len(kept(own_cache)) == 3


@torch.no_grad()
def test_a_graph_that_says_something_else_is_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Branching().requires_grad_(False), torch.randn(2, 4)
    traced = engines._Traced.forward
    monkeypatch.setattr(engines._Traced, "forward", lambda self, *tensors: traced(self, *tensors) * 1.01)
    with pytest.raises(FileError, match="computes another result than the network"):
        Engine("openvino", (net,)).of(net)(x)
    assert kept(own_cache) == []


class Tiled(nn.Module):
    """A layer that is computed by tiles in graphs, and in large pictures without."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 256, 1), Conv3x3(256, 256), nn.Conv2d(256, 4, 1)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@torch.no_grad()
def test_graphs_have_tiles_that_are_right_at_every_size(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "HERE", True)
    net = Tiled()
    run = Engine("openvino", (net,)).of(net, dynamic=True)
    for rows, high, wide in ((1, 16, 16), (2, 13, 22), (3, 1, 50), (1, 1, 1), (1, 70, 66)):
        x = torch.randn(rows, 4, high, wide)
        with winograd.as_written():
            expected = net(x)
        torch.testing.assert_close(run(x), expected, atol=1e-4, rtol=1e-4)
    (folder,) = kept(own_cache)
    assert (folder / "graph.bin").stat().st_size > 4 * 36 * 256 * 256


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 64])
def test_wrong_tiles_are_refused_where_the_network_has_them_too(side: int, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "HERE", True)
    right = winograd.convolved
    monkeypatch.setattr(winograd, "convolved", lambda *args: 1.01 * right(*args))
    net = Tiled()
    with pytest.raises(FileError, match="computes another result than the network"):
        Engine("openvino", (net,)).of(net, dynamic=True)(torch.randn(1, 4, side, side))
    assert kept(own_cache) == []


class Foreign(nn.Module):
    """With something that no graph can have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


@torch.no_grad()
def test_what_no_graph_can_have_is_said_in_one_line(own_cache: Path) -> None:
    foreign = Foreign()
    with pytest.raises(FileError, match="openvino cannot compute this network: take --engine eager"):
        Engine("openvino", (foreign,)).of(foreign)(torch.randn(2, 4))
    assert list(own_cache.iterdir()) == []


@torch.no_grad()
def test_graphs_that_were_not_used_for_longest_make_room(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Branching().requires_grad_(False), torch.randn(2, 4)

    def another() -> None:
        net.layer.bias += 1
        Engine("openvino", (net,)).of(net)(x)

    another()
    (first,) = kept(own_cache)
    monkeypatch.setattr(engines, "MOST_KEPT", engines.size_of(first) * 2)
    another()
    another()
    assert first not in kept(own_cache)
    assert kept(own_cache)
    left = own_cache / ".x.part"
    left.mkdir()
    os.utime(left, (0, 0))
    another()
    assert not left.exists(), "of a process that was killed"
    monkeypatch.setattr(engines, "free_bytes", lambda path: 10)
    with pytest.raises(FileError, match=r"no room for the .* take --engine eager"):
        another()


@torch.no_grad()
def test_few_graphs_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Two()
    monkeypatch.setattr(engines, "MOST_HELD", 1)
    run: Any = Engine("openvino", (net,)).of(net, dynamic=True)
    for side in (8, 16, 8):
        x = torch.randn(1, 4, side, side)
        torch.testing.assert_close(run(x), net(x), atol=1e-4, rtol=1e-4)
        assert len(run.compiled) == 1
    gc.collect()


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, fp32, bf16 = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
    assert choose_engine("auto", cpu, fp32, 860_000_000) == "openvino"
    assert choose_engine("auto", cpu, fp32, 10_000_000) == "eager", "tracing would take longer than a picture"
    assert choose_engine("auto", cpu, bf16, 860_000_000) == "eager"
    assert choose_engine("auto", cpu, fp32, 10**12) == "eager", "two copies have no room in memory"
    assert choose_engine("auto", cuda, fp32, 860_000_000) == "eager"
    assert choose_engine("compile", cuda, bf16, 1) == "compile"
    with pytest.raises(ValueError, match=r"engine \(='compile'\) is for GPUs"):
        choose_engine("compile", cpu, fp32, 1)
    with pytest.raises(ValueError, match=r"computes in fp32 on a CPU, not in bfloat16 on cpu"):
        choose_engine("openvino", cpu, bf16, 1)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", cpu, fp32, 860_000_000) == "eager"
    with pytest.raises(ValueError, match="pip install"):
        choose_engine("openvino", cpu, fp32, 1)


@torch.no_grad()
def test_compiled_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that traces as on a GPU and computes as written."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    net, x = Branching().requires_grad_(False), torch.randn(3, 4)
    engine = Engine("compile", (net,))
    assert engine.of(net) is not net
    torch.testing.assert_close(engine.of(net)(x), net(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(engine.of(net)(x[:1]), net(x[:1]), atol=1e-5, rtol=1e-5)
    assert engine.of(net) is engine.of(net)
    assert engine.version == f"torch {torch.__version__}"
    hook = net.layer.register_forward_hook(lambda layer, given, out: out + 1)
    assert engine.of(net) is net, "what was compiled knows nothing of hooks that come later"
    hook.remove()
