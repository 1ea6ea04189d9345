"""Training a pair and drawing with it: what learns when, penalties in their steps, controllers, exact resume, conditions, transfer, truncation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.apps.cli import main
from sfumato.core.checkpoint import checkpoints, load_tensors
from sfumato.core.config import from_json, to_json
from sfumato.core.pack import load_pack
from sfumato.core.request import GenerateRequest
from sfumato.core.runlog import read_log
from sfumato.core.seams import Cond
from sfumato.gans.dcgan import DCGANConfig
from sfumato.gans.residual import ResidualConfig
from sfumato.gans.style import StyleConfig
from sfumato.losses.adversarial import KINDS, discriminator_loss
from sfumato.pipelines.gan import GANModel
from sfumato.pipelines.load import load
from sfumato.train.gan import (
    PRESETS,
    AdaptConfig,
    Balance,
    GANRecipe,
    GANTask,
    PenaltyConfig,
    preset_own,
    preset_smoke,
    train,
    without_effect,
)
from sfumato.train.loop import LoopConfig, check_sharding

RECIPE, LOOP = preset_smoke()
LOOP = replace(LOOP, device="cpu", images=96, warmup=16, save_every=96, sample_every=96, log_every=16)
TEXT = Path("emoji")
SMALL = {"dcgan": DCGANConfig(width=16, most=32, norm="group"), "residual": ResidualConfig(width=16, most=32),
         "style": StyleConfig(width=16, most=32, w=16)}  # fmt: skip


def of(network: str = "", told: dict[str, int] | None = None, **more: object) -> GANRecipe:
    change = ({"network": SMALL[network]} if network else {}) | (told or {})
    pair = {"generator": replace(RECIPE.generator, **change), "discriminator": replace(RECIPE.discriminator, **change)}
    return replace(RECIPE, **pair, **more)  # type: ignore[arg-type]


def task_of(recipe: GANRecipe, run: Path) -> GANTask:
    return GANTask(recipe, 0, TEXT, run)


def same_states(a: Path, b: Path) -> None:
    one, two = (load_tensors(checkpoints(p, "state")[-1])[0] for p in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one), [k for k in one if not torch.equal(one[k], two[k])][:5]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gan")
    train(RECIPE, replace(LOOP, images=320, sample_every=160), out, text=TEXT)
    return out


# --- training -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["", *SMALL])
def test_what_is_said_counts_step_by_step(network: str, own_folder: Path, tmp_path: Path) -> None:
    recipe = of(network, data=str(own_folder), limit=0, labels="auto", told_from=0.25, told_ramp=0.5)
    task = task_of(recipe, tmp_path)
    batch = task.batch(np.arange(4))
    others = [replace(task.heard(batch), label=torch.full((4,), i)) for i in range(2)]
    for p in task.networks["discriminator"].parameters():
        p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    told = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        task.judge(task.networks, batch, progress)
        with torch.no_grad():
            of_each = [task.networks["discriminator"].eval()(batch["x"], c) for c in others]
            drawn = [task.networks["generator"].eval()(batch["z"][:, 0], c) for c in others]
        told.append(float((of_each[0] - of_each[1]).abs().mean()))
        assert torch.equal(drawn[0], drawn[1]) == (progress <= 0.25)
    assert told == pytest.approx([0, 0, told[-1] / 2, told[-1], told[-1]], rel=1e-3)
    assert told[-1] > 0
    assert task.complete_from == 0.75
    begun = task_of(recipe, tmp_path)
    begun.recipe = replace(recipe, init="somewhere")
    begun.tell(0.0)
    assert float(begun.networks["generator"].told.share) == 1, "a pair that has learned to draw hears at once"


def test_it_learns_and_shows(run: Path) -> None:
    log = read_log(run / "log.jsonl")
    look = [line for line in log if "kid" in line][-1]
    assert {"kid", "diversity", "train_score", "held_out_score", "drawn_score", "score"} <= look.keys()
    step = next(line for line in log if "discriminator/loss" in line)
    assert {"generator/loss", "discriminator/slope", "discriminator/real_right", "ada_p"} <= step.keys()
    assert sorted((run / "samples").glob("*.png"))


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("network", ["", *SMALL])
def test_each_phase_teaches_its_own_network(loss: str, network: str, tmp_path: Path) -> None:
    """The generator's loss reaches every parameter of the generator and none of the discriminator, and the other way round."""
    task = task_of(of(network, loss=loss, penalty=PenaltyConfig(r1=0.1, r2=0.1)), tmp_path)
    batch = task.batch(np.arange(8))
    for name in ("generator", "discriminator"):
        for p in task.networks[name].parameters():
            if not bool(p.any()):  # what starts at nothing hides what is behind it
                torch.nn.init.normal_(p, std=0.1)
    both = {name: dict(task.networks[name].named_parameters()) for name in ("generator", "discriminator")}
    for mine, other, go in (("discriminator", "generator", task.judge), ("generator", "discriminator", task.fool)):  # as a step has them
        loss_of, _ = go(task.networks, batch, 0.0)
        nothing = torch.autograd.grad(loss_of, list(both[other].values()), allow_unused=True, retain_graph=True)
        assert all(g is None for g in nothing), other
        gradients = torch.autograd.grad(loss_of, list(both[mine].values()), allow_unused=True)
        for name, g in zip(both[mine], gradients, strict=True):
            assert g is not None, (mine, name)
            assert float(g.abs().sum()) > 0 or g.ndim <= 1, (mine, name)
        assert all(p.requires_grad for p in both[other].values()), "as before"


def test_lazy_penalties_are_as_heavy_as_frequent_ones(tmp_path: Path) -> None:
    """Every 4 steps 4 times the penalty: the same on average, in a step of its own with the rate and betas of arXiv 1912.04958, appendix B."""
    often, rarely = (task_of(of(penalty=PenaltyConfig(r1=2.0, every=k)), tmp_path / str(k)) for k in (1, 4))
    assert [p.name for p in often.phases] == ["discriminator", "generator"]
    d, penalty, _ = rarely.phases
    assert (penalty.name, penalty.every, penalty.shares, penalty.lr_scale) == ("penalty", 4, "discriminator", 0.8)
    assert d.betas == penalty.betas == (0.0, 0.99**0.8)
    batch = often.batch(np.arange(8))
    with_it, found = often.judge(often.networks, batch, 0.0)
    alone, _ = rarely.smooth(rarely.networks, batch, 0.0)
    assert float(alone.detach()) == pytest.approx(4 * float(found["penalty"]), rel=1e-5)
    without, _ = rarely.judge(rarely.networks, batch, 0.0)
    assert float(with_it) == pytest.approx(float(without) + float(found["penalty"]), rel=1e-5)


@pytest.mark.parametrize("every", [1, 4])
def test_penalties_fall_to_their_end_by_a_cosine(every: int, tmp_path: Path) -> None:
    falling, still = (task_of(of(penalty=PenaltyConfig(r1=2.0, every=every, end=e)), tmp_path / str(e)) for e in (0.3, 1.0))

    def weight(task: Any, progress: float) -> float:
        batch = task.batch(np.arange(8))
        if every > 1:
            return float(task.smooth(task.networks, batch, progress)[0].detach())
        loss, found = task.judge(task.networks, batch, progress)
        return float((loss - found["classification"]).detach())

    for progress, share in ((0.0, 1.0), (0.5, 0.65), (1.0, 0.3)):
        assert weight(falling, progress) == pytest.approx(share * weight(still, 0.0), rel=1e-4)
        assert weight(still, progress) == pytest.approx(weight(still, 0.0), rel=1e-6)
    with pytest.raises(ValueError, match=r"penalty.end \(=1.5\) must be between 0 and 1"):
        PenaltyConfig(end=1.5)


class Linear(nn.Module):
    """A discriminator a . x, whose slope is |a| everywhere."""

    mixes = False

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)) / 20)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        return (x * self.a).sum((1, 2, 3))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    ("weights", "value", "slope"),  # of n = |a|: the penalty, and what it is multiplied with to give its gradient in a
    [
        ({"r1": 2.0}, lambda n: n**2, lambda n: 2.0),
        ({"r2": 2.0}, lambda n: n**2, lambda n: 2.0),
        ({"r1": 2.0, "r2": 6.0}, lambda n: 4 * n**2, lambda n: 8.0),
        ({"gp": 3.0}, lambda n: 3 * (n - 1) ** 2, lambda n: 6 * (n - 1) / n),
        ({"gp": 3.0, "one_sided": True}, lambda n: 3 * max(n - 1, 0) ** 2, lambda n: 6 * max(n - 1, 0) / n),
        ({"dragan": 3.0}, lambda n: 3 * (n - 1) ** 2, lambda n: 6 * (n - 1) / n),
        ({"dragan": 3.0, "r1": 2.0}, lambda n: 3 * (n - 1) ** 2 + n**2, lambda n: 6 * (n - 1) / n + 2),
    ],
)
@pytest.mark.parametrize("steep", [0.5, 2.0])
def test_every_penalty_of_a_linear_discriminator(
    weights: dict[str, float], value: Callable[[float], float], slope: Callable[[float], float], steep: float, every: int, tmp_path: Path
) -> None:
    """As the task adds them up: values and gradients are the formulas', also where a controller has made them louder."""
    task = task_of(of(penalty=PenaltyConfig(every=every, **weights), augment="none"), tmp_path)  # type: ignore[arg-type]
    critic = Linear().double()
    critic.a.data *= steep / critic.a.data.norm()
    task.networks["discriminator"], task.balance.louder = critic, torch.tensor(1.5)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in task.batch(np.arange(8)).items()}
    task.networks["generator"].double()
    if every == 1:
        _, found = task.judge(task.networks, batch, 0.0)
        assert float(found["penalty"]) == pytest.approx(value(steep), rel=1e-6, abs=1e-9)
        without = replace(task.recipe, penalty=PenaltyConfig())
        both = []
        for recipe in (task.recipe, without):
            task.recipe = recipe
            critic.zero_grad()
            task.judge(task.networks, batch, 0.0)[0].backward()
            assert critic.a.grad is not None
            both.append(critic.a.grad.clone())
        gradient = both[0] - both[1]
    else:
        task.smooth(task.networks, batch, 0.0)[0].backward()
        assert critic.a.grad is not None
        gradient = critic.a.grad / every
    assert (gradient - 1.5 * slope(steep) * critic.a.data).abs().max() <= 1e-6


def test_lecam_of_scores_and_its_gradient(tmp_path: Path) -> None:
    task = task_of(of(loss="hinge", penalty=PenaltyConfig(lecam=0.5), augment="none"), tmp_path)
    critic = Linear()
    task.networks["discriminator"] = critic
    task.balance.scores.copy_(torch.tensor([0.7, -0.3]))
    batch = task.batch(np.arange(8))
    real, fake = batch["x"], task.drawn(task.networks["generator"], batch["z"][:, 0], task.heard(batch)).detach()
    a, b = critic(real, Cond()).detach(), critic(fake, Cond()).detach()
    with_it, without = task.judge(task.networks, batch, 0.0)
    expected = 0.5 * ((a + 0.3).square().mean() + (b - 0.7).square().mean())
    assert float(with_it) - float(without["classification"]) == pytest.approx(float(expected), rel=1e-5)
    (gradient,) = torch.autograd.grad(with_it - discriminator_loss("hinge", critic(real, Cond()), critic(fake, Cond())), critic.a)
    mean = lambda w, x: (w[:, None, None, None] * x).mean(0)  # noqa: E731
    assert torch.allclose(gradient, mean(a + 0.3, real) + mean(b - 0.7, fake), atol=1e-6)


def test_both_phases_of_one_network_share_an_optimiser(tmp_path: Path) -> None:
    trainer = train(of(penalty=PenaltyConfig(r1=1.0, every=2)), replace(LOOP, images=64), tmp_path, text=TEXT)
    optimisers = trainer.optimisers
    assert optimisers["penalty"] is optimisers["discriminator"]
    steps = {int(s["step"]) for s in optimisers["discriminator"].state.values()}
    assert steps == {4 + 2}
    assert not any(k.startswith("optimiser.penalty") for k in load_tensors(checkpoints(tmp_path, "state")[-1])[0])


@pytest.mark.parametrize(
    "recipe",
    [
        of(
            "style",
            augment="ada",
            p=0.3,
            loss="non-saturating",
            penalty=PenaltyConfig(r1=1.0, every=2),
            adapt=AdaptConfig(penalty="slope", images=500),
        ),
        of("residual", loss="wasserstein", penalty=PenaltyConfig(gp=10.0, lecam=0.1), steps=2, augment="diffaugment"),
    ],
    ids=["style", "residual"],
)
def test_a_stop_and_a_resume_change_nothing(recipe: GANRecipe, tmp_path: Path) -> None:
    loop = replace(LOOP, save_every=32)
    train(recipe, loop, tmp_path / "whole", text=TEXT)
    for stop in (32, 64, None):
        train(recipe, loop, tmp_path / "parts", text=TEXT, stop_at=stop)
    same_states(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("network", ["residual", "style"])
def test_a_bounded_discriminator_is_kept_and_the_generator_draws(network: str, tmp_path: Path) -> None:
    recipe = of(network, {"labels": 1}, penalty=PenaltyConfig(), loss="hinge", labels="group")
    recipe = replace(recipe, discriminator=replace(recipe.discriminator, spectral=True))
    train(recipe, LOOP, tmp_path, text=TEXT)
    model = load(tmp_path)
    assert len(model.generate(label=model.meta["labels"][0], seed=1)) == 1


def test_averaged_weights_draw_with_statistics_of_their_own(tmp_path: Path) -> None:
    task = task_of(of("residual"), tmp_path)
    raw = task.networks["generator"]
    drawing = task.drawing(task.networks)
    cond, z = task.looked_at["cond"][:64], task.noise("norms/z", 64)
    x, y = raw.train()(z, cond), drawing(z, cond)  # with the statistics of this very batch
    torch.testing.assert_close(x, y, atol=0.05, rtol=0.05)
    before = [b.clone() for b in raw.buffers()]
    task.drawing(task.networks)
    assert all(torch.equal(a, b) for a, b in zip(before, raw.buffers(), strict=True)), "the network itself is left as it is"


def test_what_a_loop_may_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no second derivative"):
        train(RECIPE, replace(LOOP, compile=True), tmp_path / "run", text=TEXT)
    with pytest.raises(ValueError, match="gan cannot be trained with FSDP of a launcher, which cuts networks up"):
        check_sharding(task_of(RECIPE, tmp_path), "FSDP")
    with pytest.raises(ValueError, match="the networks of gan must be whole"):
        check_sharding(task_of(RECIPE, tmp_path), "MULTI_CPU", shard=True)
    check_sharding(task_of(RECIPE, tmp_path), "MULTI_CPU")


def test_batches_are_a_pure_function_of_the_position(tmp_path: Path) -> None:
    task = task_of(RECIPE, tmp_path)
    whole, parts = task.batch(np.arange(24)), [task.batch(np.arange(s, s + 6)) for s in range(0, 24, 6)]
    for key in ("x", "z"):
        assert torch.equal(whole[key], torch.cat([p[key] for p in parts]))
    assert not torch.equal(whole["z"][:, 0], whole["z"][:, 1])


def test_mirroring_doubles_the_pictures(own_folder: Path, tmp_path: Path) -> None:
    """Every look at a picture draws anew which way it faces."""
    task = task_of(of(data=str(own_folder), limit=0), tmp_path)
    count = len(task.shown.pixels)
    seen: dict[int, set[bytes]] = {}
    for epoch in range(16):
        positions = np.arange(epoch * count, (epoch + 1) * count)
        for row, x in zip(task._rows(positions), task.batch(positions)["x"], strict=True):
            seen.setdefault(int(row), set()).add(x.numpy().tobytes())
    assert max(len(v) for v in seen.values()) == 2
    assert np.mean([len(v) == 2 for v in seen.values()]) > 0.5, "pictures that are their own mirror image have one"


def test_grey_pictures_are_drawn_grey_from_the_start(run: Path, tmp_path: Path) -> None:
    """And what was learned of colours is in the run: it is gone on with, and drawn with."""
    (tmp_path / "grey").mkdir()
    for i in range(24):
        line = np.random.default_rng(i).integers(0, 255, (16, 16, 1), dtype=np.uint8)
        Image.fromarray(line.repeat(3, 2)).save(tmp_path / "grey" / f"{i}.png")
    recipe = replace(RECIPE, generator=replace(RECIPE.generator, colours=True), data=str(tmp_path / "grey"), augment="none", limit=0)
    train(recipe, LOOP, tmp_path / "run", text=TEXT, stop_at=32)
    trainer = train(recipe, LOOP, tmp_path / "run", text=TEXT)
    x = trainer.task.looks(trainer.task.drawing(trainer.averages), torch.randn(4, 16), Cond())  # type: ignore[attr-defined]
    grey = x.mean(1, keepdim=True)
    assert float((x - grey).std()) < 0.05 * float(grey.std())
    drawn = np.asarray(next(load(tmp_path / "run", device="cpu").pictures(GenerateRequest(seed=1))).image.convert("RGB")).astype(int)
    assert np.abs(drawn[..., 0] - drawn[..., 1]).max() <= 8
    assert drawn.std() > 1
    for begun, wanted in ((run, False), (tmp_path / "run", True)):  # a pair goes on in the colours that it learned with
        task = task_of(replace(recipe, init=str(begun)), tmp_path / "other")
        theirs = load_tensors(checkpoints(begun, "model")[-1])[0]
        assert task.net.colours == wanted
        assert all(torch.equal(v, theirs[f"generator.{k}"]) for k, v in task.networks["generator"].state_dict().items())


def test_looks_have_noise_of_places_as_pictures_that_are_drawn(tmp_path: Path) -> None:
    task = task_of(of("style"), tmp_path)
    for m in task.networks["generator"].modules():
        if hasattr(m, "strength"):
            m.strength.data.fill_(1.0)  # type: ignore[union-attr, operator]
    generator = task.drawing(task.networks)
    z = task.noise("look/z", 2)
    cond = task.looked_at["cond"][:2]
    assert not torch.equal(task.looks(generator, z, cond), generator(z, cond))
    assert torch.equal(task.looks(generator, z, cond), task.looks(generator, z, cond))


def test_the_doctor_reads_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", str(run)])
    page = Path(capsys.readouterr().out.strip().splitlines()[-1]).read_text()
    assert "What it draws" in page
    assert "diversity" in page
    assert "Codebook" not in page


# --- controllers ----------------------------------------------------------------------------------------------------------------------------------


def test_a_controller_follows_overfitting_and_is_bounded() -> None:
    recipe = of(augment="ada", adapt=AdaptConfig(penalty="overfit", images=1000, most=5.0))
    balance = Balance(0.0)
    for _ in range(3000):
        balance.follow({"scores": torch.tensor([1.0, -1.0]), "held": torch.tensor(0.2)}, recipe, 10)
    assert float(balance.overfit) == pytest.approx(0.4)
    assert float(balance.p) == pytest.approx(0.85)
    assert float(balance.louder) == pytest.approx(5)
    for _ in range(3000):
        balance.follow({"scores": torch.tensor([1.0, -1.0]), "held": torch.tensor(0.6)}, recipe, 10)
    assert float(balance.overfit) == pytest.approx(0.2, rel=1e-4)
    assert float(balance.p) == 0
    assert float(balance.louder) == pytest.approx(0.2)


def test_a_controller_brings_the_slope_to_where_it_should_be() -> None:
    """A discriminator whose slope halves when the penalty doubles: the weight settles where the slope is what was asked for."""
    recipe = of(adapt=AdaptConfig(penalty="slope", slope=0.5, images=2000, most=100.0))
    balance = Balance(0.0)
    for _ in range(4000):
        balance.follow({"slope": 2 / balance.louder}, recipe, 10)
    assert float(balance.slope) == pytest.approx(0.5, rel=0.1)
    assert float(balance.louder) == pytest.approx(4, rel=0.1)


# --- conditions, transfer ---------------------------------------------------------------------------------------------------------------------------


def test_text_and_style_are_heard(tmp_path: Path) -> None:
    width = 256
    train(of(told={"text_width": width, "styles": 1}), LOOP, tmp_path, text=TEXT)
    model = load(tmp_path)
    assert len(model.styles) > 1
    a, b = (next(model.pictures(GenerateRequest(prompt=p, seed=3, style=model.styles[0]))).image for p in ("a cat", "a rocket"))
    assert a.tobytes() != b.tobytes()


def test_ones_own_pictures_by_class(own_folder: Path, tmp_path: Path) -> None:
    train(of(data=str(own_folder), limit=0, labels="auto"), LOOP, tmp_path / "run", text=tmp_path / "nowhere")
    model = load(tmp_path / "run")
    assert isinstance(model, GANModel)
    assert model.meta["labels"] == ["circle", "square"]
    a, b = (next(model.pictures(GenerateRequest(label=n, seed=3))).image for n in ("circle", "square"))
    assert a.tobytes() != b.tobytes()


def test_it_begins_from_another_pair_and_freezes_a_part(run: Path, own_folder: Path, tmp_path: Path) -> None:
    recipe = of(data=str(own_folder), limit=0, init=str(run), freeze=2)
    task = task_of(recipe, tmp_path)
    theirs = load_tensors(checkpoints(run, "model")[-1])[0]
    for name in ("generator", "discriminator"):
        assert all(torch.equal(v, theirs[f"{name}.{k}"]) for k, v in task.networks[name].state_dict().items())
    trainer = train(recipe, LOOP, tmp_path / "run", text=TEXT)
    ours = trainer.task.networks["discriminator"].state_dict()
    still = {k for k, v in ours.items() if torch.equal(v, theirs[f"discriminator.{k}"])}
    assert {"network.first.weight", "network.blocks.1.0.mix.weight"} <= still
    assert "network.blocks.2.0.mix.weight" not in still
    with pytest.raises(ValueError, match=r"freeze \(=2\) needs --init"):
        task_of(replace(recipe, init=None), tmp_path / "alone")
    with pytest.raises(ValueError, match=r"freeze \(=9\) must be below 3, the parts of this discriminator"):
        task_of(replace(recipe, freeze=9), tmp_path / "frozen")
    with pytest.raises(ValueError, match="must hold a generator of the recipe's shape"):
        task_of(of("style", data=str(own_folder), limit=0, init=str(run)), tmp_path / "other")


# --- drawing --------------------------------------------------------------------------------------------------------------------------------------


def test_the_same_request_is_the_same_picture(run: Path) -> None:
    model = load(run)
    request = GenerateRequest(seed=5, count=3)
    a, b = (list(model.pictures(request)) for _ in range(2))
    assert [p.png() for p in a] == [p.png() for p in b]
    alone = next(model.pictures(replace(request, seed=7, count=1)))
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(a[2].image)).max() <= 1
    assert a[0].image.tobytes() != a[1].image.tobytes()


def test_what_has_no_effect_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, loop = preset_own()
    assert without_effect(recipe, loop) == []
    for preset in PRESETS.values():
        assert without_effect(*preset()) == [], preset
    changed = replace(
        recipe, augment="none", penalty=PenaltyConfig(one_sided=True, every=4), adapt=AdaptConfig(target=0.5, slope=2.0, most=5.0, images=5)
    )
    said = " ".join(without_effect(replace(changed, discriminator=replace(recipe.discriminator, labels=3)), replace(loop, betas=(0.5, 0.9))))
    for name in (
        "loop.betas",
        "discriminator.text_width",
        "penalty.one_sided",
        "penalty.every",
        "adapt.target",
        "adapt.images",
        "adapt.most",
        "adapt.slope",
    ):
        assert f"warning: {name}" in said, name


def test_nothing_is_best_before_all_that_is_said_counts(tmp_path: Path, own_folder: Path) -> None:
    recipe = of("", data=str(own_folder), limit=0, labels="auto", told_from=0.5, told_ramp=0.25)
    train(recipe, replace(LOOP, images=128, sample_every=32, save_every=128), tmp_path, text=TEXT, stop_at=64)
    assert not (tmp_path / "model-best.safetensors").exists()
    train(recipe, replace(LOOP, images=128, sample_every=32, save_every=128), tmp_path, text=TEXT)
    assert (tmp_path / "model-best.safetensors").exists()


@pytest.mark.parametrize("network", ["", "style"])
def test_truncation_pulls_towards_what_is_usual(network: str, tmp_path: Path) -> None:
    train(of(network), LOOP, tmp_path, text=TEXT)
    model = load(tmp_path)
    spread = {}
    for t in (0.0, 0.5, 1.0):
        images = [np.asarray(i).astype(float) for i in model.generate(seed=0, count=16, truncation=t)]
        spread[t] = float(np.std(images, axis=0).mean())
    assert list(spread.values()) == sorted(spread.values())
    assert spread[0.0] < 1, "at 0 there is one picture, but for places of noise"
    assert spread[0.5] < spread[1.0]


def test_what_a_pair_cannot_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cat = str(tmp_path / "a.png"), str(tmp_path / "cat.png")
    Image.new("RGB", (16, 16)).save(cat)
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(run), "--init", cat, "--out", out])
    assert "draws from noise in one pass and begins from no picture" in capsys.readouterr().err
    main(
        [
            "generate",
            "--model",
            str(run),
            "--steps",
            "4",
            "--guidance",
            "2",
            "--temperature",
            "0.5",
            "--truncation",
            "0.7",
            "--seed",
            "1",
            "--out",
            out,
        ]
    )
    said = capsys.readouterr().err
    for name in ("steps", "guidance", "temperature"):
        assert f"{name} has no effect" in said
    assert "truncation has no effect" not in said
    main(["generate", "--from", out, "--model", str(run), "--out", str(tmp_path / "b.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(run), "--truncation", "1.5", "--out", str(tmp_path / "c.png")])
    assert "truncation (=1.5) must be at most 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"truncation \(=3\) must be between 0 and 2"):
        GenerateRequest(truncation=3)


def test_recipes_go_through_json_and_say_what_is_wrong() -> None:
    for preset in PRESETS.values():
        recipe, loop = preset()
        assert from_json(GANRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe
        assert from_json(LoopConfig, json.loads(json.dumps(to_json(loop)))) == loop
    batch = replace(RECIPE.discriminator, network=DCGANConfig())
    for change, said in (
        ({"told_from": 0.8, "told_ramp": 0.5}, r"told_from \(=0.8\) and told_ramp \(=0.5\) must be shares of the training, together at most 1"),
        ({"discriminator": replace(RECIPE.discriminator, size=32)}, r"generator.size \(=16\) must be discriminator.size \(=32\)"),
        ({"discriminator": batch}, "a penalty on slopes needs group or none"),
        ({"steps": 0}, r"steps \(=0\) must be at least 1"),
        ({"p": 0.9}, "must be between 0 and 0.85"),
        ({"p": 0.2, "augment": "none"}, "augment ada"),
        ({"betas": (-0.5, 0.9)}, r"betas \(=\(-0.5, 0.9\)\) must be from 0 to below 1"),
        ({"d_lr": float("nan")}, "d_lr"),
        ({"freeze": -1}, r"freeze \(=-1\) must be at least 0"),
        ({"memory": True}, "memory"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(RECIPE, **change)
    for change in ({"r1": -1.0}, {"gp": float("nan")}, {"every": 0}):
        with pytest.raises(ValueError, match="penalty"):
            PenaltyConfig(**change)  # type: ignore[arg-type]
    for change in ({"slope": float("inf")}, {"most": 1.0}, {"target": 0.0}):
        with pytest.raises(ValueError, match=r"adapt\.target"):
            AdaptConfig(**change)  # type: ignore[arg-type]


def test_three_pictures_are_too_few(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"has 2 pictures to learn from: at least 4 are wanted"):
        task_of(of(data=str(tmp_path), limit=0), tmp_path / "run")


def test_from_folder_to_picture_by_commands(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "gan", "--preset", "smoke", "--data", str(own_folder), "--out", "runs/gan", "--loop.images", "96", "--device", "cpu"])
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("draw with it: sfumato "))
    main([*said.split()[4:], "--truncation", "0.7", "--seed", "1", "--out", "a.png"])
    assert (tmp_path / "a.png").exists()
    main(["pack", "runs/gan"])
    tensors, meta = load_pack(Path("runs/gan/packed.safetensors"))
    assert not any(k.startswith("discriminator") for k in (*tensors, *meta))
    main(["generate", "--model", "runs/gan/packed.safetensors", "--truncation", "0.7", "--seed", "1", "--out", "b.png"])
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(float) for name in "ab")
    assert abs(a - b).mean() < 2
    begun = ["train", "gan", "--preset", "smoke", "--data", str(own_folder), "--out", "runs/next", "--loop.images", "32", "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([*begun, "--init", "runs/gan/packed.safetensors"])
    assert "must hold a discriminator of the recipe's shape" in capsys.readouterr().err
    main([*begun, "--init", "runs/gan", "--patience", "3"])
    config = json.loads(Path("runs/next/config.json").read_text())
    assert (config["config"]["init"], config["loop"]["patience"]) == ("runs/gan", 3)
    main(["train", "gan", "--preset", "smoke", "--data", str(own_folder), "--out", "runs/other", "--plan"])
