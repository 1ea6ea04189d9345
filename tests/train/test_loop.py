"""The loop on tasks that take milliseconds. Run as a script it is the driver of the tests that need real processes."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.core.checkpoint import FileError, hash_tensors, load_tensors
from sfumato.core.runlog import read_log
from sfumato.gans.discriminators import PatchConfig
from sfumato.train import autoencoder, gan
from sfumato.train import loop as loop_module
from sfumato.train.adversary import AdversaryConfig
from sfumato.train.loop import Batch, Diverged, LoopConfig, Phase, Stopped, Trainer, checkpoint_name, checkpoints, faster_dtype, settled

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are too small for two, and bit-equality is promised for the same number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Settings:
    kind: str = "toy"
    width: int = 8
    depth: int = 2


class Toy:
    """Fits the sum of four sines. Positions in `bad` have a picture that is not finite; `fail_at` is a power cut; `pause` is in seconds a step."""

    kind = "toy"

    def __init__(self, bad: frozenset[int] | range = frozenset(), fail_at: int | None = None, pause: float = 0.0) -> None:
        torch.manual_seed(0)
        self.networks: dict[str, nn.Module] = {"net": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))}
        self.phases = [Phase("net", ("net",), self.loss)]
        self.bad, self.fail_at, self.pause = bad, fail_at, pause
        self.seen: list[np.ndarray] = []

    def batch(self, positions: np.ndarray) -> Batch:
        if self.fail_at is not None and self.fail_at in positions:
            raise RuntimeError("power cut")
        time.sleep(self.pause)
        self.seen.append(positions)
        x = torch.sin(torch.from_numpy(positions)[:, None] * torch.tensor([1.0, 0.7, 0.31, 0.011])).float()
        target = x.sum(1, keepdim=True)
        for row, p in enumerate(positions):
            if int(p) in self.bad:
                x[row] = math.nan
        return {"x": x, "target": target}

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        error = networks["net"](batch["x"]) - batch["target"]
        return error.square().mean(), {"abs": error.detach().abs().mean()}

    def samples(self, networks: dict[str, nn.Module]) -> None:
        return None

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        batch = Toy().batch(np.arange(100_000, 100_064))
        return {"score": -(networks["net"](batch["x"]) - batch["target"]).square().mean().item()}

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"net.{k}": v for k, v in networks["net"].state_dict().items()}, {"kind": "toy"}


LOOP = LoopConfig(images=320, batch_size=16, warmup=32, save_every=160, sample_every=320, log_every=32, lr=1e-2, device="cpu")
THOUSANDS = replace(LOOP, images=6_000, batch_size=1_000, warmup=0, save_every=1_000, sample_every=6_000, log_every=1_000)


def fit(out: Path, loop: LoopConfig = LOOP, task: Any = None, config: Any = None, **kwargs: Any) -> Trainer:
    trainer = Trainer(task or Toy(), loop, out, config or Settings())
    trainer.train(**kwargs)
    return trainer


def final(run: Path) -> dict[str, Tensor]:
    return load_tensors(checkpoints(run, "state")[-1])[0]


def smoke() -> tuple[autoencoder.AutoencoderRecipe, LoopConfig]:
    """The autoencoder's smoke preset, cut to 20 steps."""
    recipe, preset = autoencoder.preset_smoke()
    return recipe, replace(preset, images=320, save_every=320, sample_every=320, device="cpu")


def assert_same(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Newest states and packs agree: raw and averaged weights, optimiser, counters."""
    ours, theirs = (load_tensors(checkpoints(run, "state")[-1]) for run in (a, b))
    assert ours[0].keys() == theirs[0].keys()
    assert {k.split(".")[0] for k in ours[0]} == {"raw", "ema", "optimiser"}
    for name, t in ours[0].items():
        off = (t.double() - theirs[0][name].double()).abs().max().item() if t.numel() else 0.0
        assert off <= tolerance, f"{name} differs by {off}"
    if tolerance == 0:
        assert ours[1]["counters"] == theirs[1]["counters"]
        packs = [load_tensors(checkpoints(run, "model")[-1])[1]["hash"] for run in (a, b)]
        assert packs[0] == packs[1]


def script(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """This file as a program of its own."""
    command = [sys.executable, "-u", __file__, *arguments]
    return subprocess.Popen(command, env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# --- resume -----------------------------------------------------------------------------------------------------------------------------------


def test_twenty_steps_are_ten_and_ten_bit_for_bit(tmp_path: Path) -> None:
    recipe, loop = smoke()
    autoencoder.train(recipe, loop, tmp_path / "whole")
    autoencoder.train(recipe, loop, tmp_path / "halves", stop_at=160)
    between = final(tmp_path / "halves")
    torch.manual_seed(12345)  # global randomness must not matter
    autoencoder.train(recipe, loop, tmp_path / "halves")
    assert_same(tmp_path / "whole", tmp_path / "halves")
    after = final(tmp_path / "halves")
    assert any(not torch.equal(between[k], after[k]) for k in after if k.startswith("raw.")), "nothing was learned in between"


def test_a_run_that_was_terminated_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe, loop = smoke()
    autoencoder.train(recipe, loop, tmp_path / "whole")
    process = script("slow-smoke", str(tmp_path / "cut"))
    assert process.stdout is not None
    steps = 0
    while steps < 5:
        line = process.stdout.readline()
        assert line, f"the driver ended early with {process.wait()}"
        steps += line.startswith("step")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 8
    assert process.returncode == 128 + signal.SIGTERM, rest
    assert "state saved: run the same command again" in rest
    images = load_tensors(checkpoints(tmp_path / "cut", "state")[-1])[1]["counters"]["images"]  # type: ignore[index]
    assert 5 * 16 <= images < 320
    assert not list((tmp_path / "cut").glob("**/*.part"))
    autoencoder.train(recipe, loop, tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    fit(tmp_path)
    before = (final(tmp_path), read_log(tmp_path / "log.jsonl"))
    task = Toy()
    fit(tmp_path, task=task)
    assert task.seen == []
    assert before[1] == read_log(tmp_path / "log.jsonl")
    assert all(torch.equal(v, final(tmp_path)[k]) for k, v in before[0].items())


def test_a_signal_raises_stopped_and_gives_the_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    class Interrupted(Toy):
        def batch(self, positions: np.ndarray) -> Batch:
            if 48 in positions:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(positions)

    with pytest.raises(Stopped, match="stopped at 64 images") as stopped:
        fit(tmp_path, task=Interrupted())
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    fit(tmp_path)
    fit(tmp_path / "whole")
    assert_same(tmp_path, tmp_path / "whole")


def newest_state(run: Path) -> dict:
    return load_tensors(checkpoints(run, "state")[-1])[1]


def test_training_in_a_thread_of_a_server(tmp_path: Path) -> None:
    thread = threading.Thread(target=fit, args=(tmp_path,))
    thread.start()
    thread.join(30)
    assert newest_state(tmp_path)["counters"]["images"] == 320


CHANGES: list[tuple[LoopConfig, Settings, str]] = [
    (replace(LOOP, lr=2e-2), Settings(), r"lr in loop"),
    (replace(LOOP, batch_size=32, seed=1), Settings(), r"batch_size, seed in loop"),
    (LOOP, Settings(depth=3), r"depth in config"),
]


@pytest.mark.parametrize(("loop", "config", "named"), CHANGES)
def test_other_settings_are_refused_by_name(tmp_path: Path, loop: LoopConfig, config: Settings, named: str) -> None:
    fit(tmp_path, stop_at=160)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=named) as error:
        fit(tmp_path, loop, config=config)
    assert str(tmp_path) in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_another_kind_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, stop_at=160)
    other = Toy()
    other.kind = "other"
    with pytest.raises(ValueError, match="kind"):
        fit(tmp_path, task=other)


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    fit(tmp_path, stop_at=160)
    fit(tmp_path, replace(LOOP, log_every=64, save_every=64, keep=2, images=640))
    assert newest_state(tmp_path)["run"]["loop"]["images"] == 640


def test_auto_takes_the_faster_dtype_once_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was begun in one number format goes on in it, on a machine that would choose another too."""
    auto = replace(LOOP, dtype="auto")
    monkeypatch.setattr(loop_module, "faster_dtype", lambda _: "bf16")
    assert fit(tmp_path / "run", auto, stop_at=160).loop.dtype == "bf16"
    monkeypatch.setattr(loop_module, "faster_dtype", lambda _: "fp32")
    assert fit(tmp_path / "run", auto).loop.dtype == "bf16"
    assert settled(auto, tmp_path / "another").dtype == "fp32"
    assert settled(replace(auto, dtype="bf16"), tmp_path / "another").dtype == "bf16"
    assert faster_dtype(torch.device("cpu")) in ("fp32", "bf16")
    assert faster_dtype(torch.device("mps")) == "fp32"


class Tanh(nn.Module):
    """A forward pass of its own: torch.compile leaves the ones of torch.nn alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_under_the_same_names(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch.manual_seed(1)
    start = Tanh().state_dict()
    for compiled in (False, True):
        task = Toy()
        task.networks = {"net": Tanh()}
        task.networks["net"].load_state_dict(start)
        counters.clear()
        fit(tmp_path / str(compiled), replace(LOOP, compile=compiled), task)
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert_same(tmp_path / "False", tmp_path / "True", tolerance=1e-4)


def test_a_cut_newest_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    fit(tmp_path / "whole", THOUSANDS)
    fit(tmp_path / "cut", THOUSANDS, stop_at=4_000)
    newest = checkpoints(tmp_path / "cut", "state")[-1]
    assert newest.name == "state-000004k.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    task = Toy()
    fit(tmp_path / "cut", THOUSANDS, task=task)
    assert task.seen[0][0] == 3_000
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_whose_states_are_all_unreadable_is_not_begun_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would overwrite the log and the checkpoints of what may still be saved."""
    fit(tmp_path, THOUSANDS, stop_at=2_000)
    log = (tmp_path / "log.jsonl").read_bytes()
    for state in checkpoints(tmp_path, "state"):
        state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(FileError, match=r"none of the 2 states in .* can be read, the newest is state-000002k"):
        fit(tmp_path, THOUSANDS)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
@pytest.mark.parametrize("content", ['{"model_type": "clip"}', "[]", "{broken", '{"kind": 1, "config": 2, "loop": 3}'])
def test_a_folder_with_another_programs_config_is_refused_and_left_alone(tmp_path: Path, dtype: Any, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileError, match="is not the config of a run of sfumato: name another --out"):
        fit(tmp_path, replace(LOOP, dtype=dtype))
    assert (tmp_path / "config.json").read_text() == content


def test_a_foreign_state_is_refused_in_one_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / checkpoint_name("state", 1_000))
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        fit(tmp_path)
    assert "\n" not in str(error.value)


# --- files ------------------------------------------------------------------------------------------------------------------------------------


def names(run: Path, kind: str) -> list[str]:
    return [p.name for p in checkpoints(run, kind)]


def test_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    fit(tmp_path, replace(THOUSANDS, keep=2))
    assert names(tmp_path, "state") == ["state-000005k.safetensors", "state-000006k.safetensors"]
    assert names(tmp_path, "model") == ["model-000005k.safetensors", "model-000006k.safetensors"]
    assert (tmp_path / "model-best.safetensors").exists()


def test_every_nth_pack_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, replace(THOUSANDS, keep=1, keep_every=2_000))
    assert names(tmp_path, "state") == ["state-000006k.safetensors"]
    assert names(tmp_path, "model") == [f"model-00000{n}k.safetensors" for n in (2, 4, 6)]


def test_checkpoints_are_ordered_by_number_beyond_a_thousand_million(tmp_path: Path) -> None:
    for images in (999_999_000, 1_000_000_000, 5_000):
        (tmp_path / checkpoint_name("state", images)).touch()
    (tmp_path / "state-best.safetensors").touch()
    assert [p.name for p in checkpoints(tmp_path, "state")] == [checkpoint_name("state", n) for n in (5_000, 999_999_000, 1_000_000_000)]


def test_the_pack_holds_the_averaged_weights(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    tensors, metadata = load_tensors(checkpoints(tmp_path, "model")[-1])
    average = trainer.averages["net"].state_dict()
    assert all(torch.equal(tensors[f"net.{k}"], v) for k, v in average.items())
    assert any(not torch.equal(trainer.task.networks["net"].state_dict()[k], v) for k, v in average.items())
    assert metadata["images"] == 320


def test_log_lines_are_not_duplicated_after_a_crash(tmp_path: Path) -> None:
    fit(tmp_path / "whole", THOUSANDS)
    loop = replace(THOUSANDS, save_every=2_000)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", loop, task=Toy(fail_at=3_500))
    assert read_log(tmp_path / "cut" / "log.jsonl")[-1]["images"] == 3_000, "logged beyond what was saved"
    fit(tmp_path / "cut", loop)
    whole, cut = ([(x["images"], x["loss"]) for x in read_log(tmp_path / n / "log.jsonl") if "loss" in x] for n in ("whole", "cut"))
    assert [images for images, _ in cut] == list(range(1_000, 7_000, 1_000))
    assert cut == whole


def test_config_json_says_how_the_run_was_made(tmp_path: Path) -> None:
    fit(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == newest_state(tmp_path)["run"]
    assert saved["config"] == {"kind": "toy", "width": 8, "depth": 2}
    assert saved["loop"]["batch_size"] == 16


# --- steps that are not finite ----------------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    task = Toy(bad=frozenset({20, 40}))  # the second and the third batch
    trainer = Trainer(task, LOOP, tmp_path, Settings())
    for step in range(4):
        before = {k: v.clone() for k, v in task.networks["net"].state_dict().items()}
        trainer.step([task.batch(p) for p in trainer.positions(16 * step)])
        same = all(torch.equal(before[k], v) for k, v in task.networks["net"].state_dict().items())
        assert same == (step in (1, 2))
        assert trainer.counters["skipped_in_a_row"] == (0, 1, 2, 0)[step]
    assert trainer.counters == {"images": 64, "steps": 4, "skipped": 2, "skipped_in_a_row": 0, "stale": 0, "rollbacks": 0}


def test_a_skipped_step_leaves_every_state_finite_and_is_logged(tmp_path: Path) -> None:
    fit(tmp_path, task=Toy(bad=frozenset({20})))
    assert all(torch.isfinite(v).all() for v in final(tmp_path).values())
    assert read_log(tmp_path / "log.jsonl")[0]["skipped"] == 1


def test_the_log_is_json_that_any_reader_accepts(tmp_path: Path) -> None:
    """NaN is no JSON; one skipped step must not hide the loss of the whole period."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the log")

    fit(tmp_path, task=Toy(bad=frozenset({20})))
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_five_in_a_row_end_the_run_without_a_best(tmp_path: Path) -> None:
    task = Toy(bad=range(10_000))
    before = {k: v.clone() for k, v in task.networks["net"].state_dict().items()}
    with pytest.raises(Diverged, match=r"5 steps in a row were not finite, last at 80 images.*lower lr \(=0\.01\)"):
        fit(tmp_path, replace(LOOP, sample_every=16, save_every=10_000), task=task)
    assert len(task.seen) == 5
    assert not (tmp_path / "model-best.safetensors").exists()
    assert all(torch.equal(before[k], v) for k, v in task.networks["net"].state_dict().items())


def test_divergence_keeps_the_best_and_the_newest_state(tmp_path: Path) -> None:
    loop = replace(LOOP, sample_every=16, save_every=32)
    with pytest.raises(Diverged):
        fit(tmp_path, loop, task=Toy(bad=range(96, 10_000)))
    assert load_tensors(tmp_path / "model-best.safetensors")[1]["images"] <= 96  # type: ignore[operator]
    assert all(torch.isfinite(v).all() for v in final(tmp_path).values())
    fit(tmp_path, loop)
    assert newest_state(tmp_path)["counters"]["images"] == 320


def test_a_skipped_first_step_does_not_count_as_an_optimiser_step(tmp_path: Path) -> None:
    """Saving before the optimiser ever stepped must not make it step: with and without the save, the run is the same."""
    bad = frozenset({5})
    fit(tmp_path / "whole", task=Toy(bad=bad))
    fit(tmp_path / "halves", task=Toy(bad=bad), stop_at=16)
    fit(tmp_path / "halves", task=Toy(bad=bad))
    assert_same(tmp_path / "whole", tmp_path / "halves")


# --- schedule and order -----------------------------------------------------------------------------------------------------------------------


def test_learning_rate_values() -> None:
    loop = LoopConfig(images=1_000, batch_size=10, warmup=100, decay=0.2, lr=2.0)
    at = {0: 0.2, 40: 1.0, 90: 2.0, 500: 2.0, 800: 2.0, 900: 1.0, 990: 0.1}
    assert {seen: loop.lr_at(seen) for seen in at} == pytest.approx(at)
    flat = replace(loop, warmup=0, decay=0.0)
    assert {flat.lr_at(seen) for seen in range(0, 1_000, 10)} == {2.0}
    triangle = replace(loop, warmup=0, decay=1.0)
    assert [triangle.lr_at(s) for s in (0, 250, 500)] == pytest.approx([2.0, 1.5, 1.0])


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 600), st.floats(0, 1), st.floats(0, 0.999))
def test_the_learning_rate_is_never_zero_or_above_its_setting(images: int, batch: int, warmup: int, decay: float, at: float) -> None:
    loop = LoopConfig(images=images, batch_size=batch, warmup=warmup, decay=decay, lr=1.0)
    assert 0 < loop.lr_at(int(at * images)) <= 1.0


def test_the_optimiser_gets_the_scheduled_rate(tmp_path: Path) -> None:
    task = Toy()
    task.phases = [replace(task.phases[0], lr_scale=0.5)]
    trainer = Trainer(task, LOOP, tmp_path, Settings())
    for step in range(3):
        stats = trainer.step([task.batch(p) for p in trainer.positions(16 * step)])
        assert stats["lr"] == pytest.approx(LOOP.lr_at(16 * step))
        assert [g["lr"] for g in trainer.optimisers["net"].param_groups] == pytest.approx([0.5 * stats["lr"]] * 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", 0, r"images \(=0\) must be at least 1"),
        ("decay", 1.5, r"decay \(=1\.5\)"),
        ("lr", 0.0, r"lr \(=0\.0\) must be above 0"),
        ("clip", -1.0, r"clip \(=-1\.0\) must be at least 0"),
    ],
)
def test_settings_are_checked(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**{field: value})


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size \(=16\) must be a multiple of processes x accumulate \(=1 x 3\)"):
        Trainer(Toy(), replace(LOOP, accumulate=3), tmp_path, Settings())


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_data_order_does_not_depend_on_the_split(tmp_path: Path, accumulate: int) -> None:
    first, rest = Toy(), Toy()
    loop = replace(LOOP, accumulate=accumulate)
    fit(tmp_path, loop, task=first, stop_at=160)
    fit(tmp_path, loop, task=rest)
    seen = [*first.seen, *rest.seen]
    assert len(seen) == 20 * accumulate
    assert np.array_equal(np.concatenate(seen), np.arange(320))


def test_accumulation_does_not_change_the_result(tmp_path: Path) -> None:
    fit(tmp_path / "one")
    fit(tmp_path / "two", replace(LOOP, accumulate=2))
    assert_same(tmp_path / "one", tmp_path / "two", 1e-5)


def test_a_gradient_is_cut_to_the_norm_of_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    trainer = Trainer(Toy(), replace(LOOP, clip=0.01), tmp_path, Settings())
    step = trainer.optimisers["net"].step

    def noted() -> None:
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.task.networks["net"].parameters())))
        step()

    monkeypatch.setattr(trainer.optimisers["net"], "step", noted)
    logged = [trainer.step([Toy().batch(np.arange(i * 16, i * 16 + 16))])["grad_norm"] for i in range(4)]
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert min(logged) > 0.02, "the log says the norm before it was cut"


def test_trackers_that_are_not_installed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trackers \(='aim'\) cannot be used here: install its package"):
        fit(tmp_path, replace(LOOP, trackers=("aim",)))


class Narrow(Toy):
    """Has memory for `fits` pictures at a time."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits, self.tried = fits, 0

    def loss(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch["x"]) > self.fits:
            self.tried += 1
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return super().loss(networks, batch, progress)


def test_a_batch_that_does_not_fit_is_halved_and_the_result_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Narrow(fits=4)
    assert fit(tmp_path / "narrow", task=task).accumulate == 4
    assert task.tried == 2, "from then on it knows"
    said = capsys.readouterr().err
    assert "out of memory: going on with 8 pictures at a time" in said
    assert "out of memory: going on with 4 pictures at a time" in said
    fit(tmp_path / "wide")
    assert_same(tmp_path / "wide", tmp_path / "narrow", 1e-5)


@pytest.mark.parametrize(("fits", "splittable", "tried"), [(1, True, 4), (8, False, 1)])
def test_memory_that_never_suffices_ends_the_run(tmp_path: Path, fits: int, splittable: bool, tried: int) -> None:
    task = Narrow(fits)
    task.splittable = splittable
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        fit(tmp_path, task=task)
    assert task.tried == tried


def test_training_learns(tmp_path: Path) -> None:
    fit(tmp_path, replace(LOOP, images=3_200, log_every=320))
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]


# --- several phases ---------------------------------------------------------------------------------------------------------------------------


class Two(Toy):
    """A generator whose loss runs through a critic with a loss of its own. `leak`: its gradient reaches the critic's weights in passing."""

    def __init__(self, leak: bool = True, every: int = 1) -> None:
        super().__init__()
        self.leak = leak
        self.networks = {"net": nn.Linear(4, 4), "critic": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))}
        self.phases = [Phase("g", ("net",), self.generator), Phase("d", ("critic",), self.critic, every=every)]

    def generator(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        y, critic = networks["net"](batch["x"]), networks["critic"]
        score = critic(y) if self.leak else functional_call(critic, {k: v.detach() for k, v in critic.named_parameters()}, (y,))
        return -score.mean(), {}

    def critic(self, networks: dict[str, nn.Module], batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return (networks["critic"](batch["x"]) - batch["target"]).square().mean(), {}

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]:
        return {}


def test_one_phase_leaves_no_gradient_for_the_next(tmp_path: Path) -> None:
    fit(tmp_path / "passing", task=Two(leak=True))
    fit(tmp_path / "closed", task=Two(leak=False))
    assert_same(tmp_path / "passing", tmp_path / "closed", 1e-6)


def test_a_phase_runs_in_its_period_and_resumes(tmp_path: Path) -> None:
    task = Two(leak=False, every=3)
    trainer = Trainer(task, LOOP, tmp_path / "steps", Settings())
    for step in range(6):
        before = [{k: v.clone() for k, v in task.networks[n].state_dict().items()} for n in ("net", "critic")]
        stats = trainer.step([task.batch(p) for p in trainer.positions(16 * step)])
        changed = [
            any(not torch.equal(b[k], v) for k, v in task.networks[n].state_dict().items()) for b, n in zip(before, ("net", "critic"), strict=True)
        ]
        assert changed == [True, step % 3 == 0]
        assert ("d/loss" in stats) == (step % 3 == 0)
        assert "g/loss" in stats
    fit(tmp_path / "whole", task=Two(leak=False, every=3))
    fit(tmp_path / "halves", task=Two(leak=False, every=3), stop_at=160)
    fit(tmp_path / "halves", task=Two(leak=False, every=3))
    assert_same(tmp_path / "whole", tmp_path / "halves")


def test_gradient_norms_are_told_apart_by_phase(tmp_path: Path) -> None:
    task = Two(leak=False)
    trainer = Trainer(task, LOOP, tmp_path, Settings())
    assert {"g/grad_norm", "d/grad_norm"} <= trainer.step([task.batch(p) for p in trainer.positions(0)]).keys()


# --- several processes ------------------------------------------------------------------------------------------------------------------------


def two(what: str, out: Path) -> list[subprocess.Popen[str]]:
    """This file as two processes that train together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [script(what, str(out), RANK=str(r), LOCAL_RANK=str(r), **world) for r in range(2)]


BAD_ON_ONE_RANK = range(50, 53)  # of the step of 48 to 63, the half of the first process


@pytest.mark.parametrize(("what", "bad"), [("toy", range(0)), ("toy-bad", BAD_ON_ONE_RANK)])
def test_two_processes_are_one_with_the_same_global_batch(tmp_path: Path, what: str, bad: range) -> None:
    """Also where a step is not finite in one of them only: both skip it."""
    for process in two(what, tmp_path / "two"):
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert f"2 processes, {int(len(bad) > 0)} skipped" in said
    one = fit(tmp_path / "one", task=Toy(bad=bad))
    assert one.counters["skipped"] == (len(bad) > 0)
    assert_same(tmp_path / "one", tmp_path / "two", 1e-5)


def vqgan() -> tuple[autoencoder.AutoencoderRecipe, LoopConfig]:
    """A codebook made by k-means, then a discriminator; nothing that differs by process on purpose (restarts, a weight that is a mean of ratios)."""
    adversary = AdversaryConfig(weight=0.1, begins=0.3, joins=0.5, adaptive=False, discriminator=PatchConfig(width=16, layers=1))
    net = ConvnetConfig(image_channels=3, widths=(16,), encoder_blocks=(0,), decoder_blocks=(0,))
    codec = AutoencoderConfig(convnet=net, bottleneck=VQConfig(size=16, channels=4, restart=0.0, learn="ema", cosine=False))
    recipe = autoencoder.AutoencoderRecipe(codec=codec, size=8, perceptual=0.0, limit=12, adversary=adversary)
    return recipe, LoopConfig(images=96, batch_size=8, warmup=8, save_every=96, sample_every=96, log_every=8, device="cpu")


def test_two_processes_share_a_codebook_and_a_discriminator(tmp_path: Path) -> None:
    """Both end with the same networks, bit for bit; one process with the whole batch sees the same losses until
    k-means chooses by the last digits.
    """
    digests = set()
    for process in two("vqgan", tmp_path / "two"):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        digests |= {line for line in said.splitlines() if line.startswith("networks")}
    assert len(digests) == 1
    recipe, loop = vqgan()
    autoencoder.train(recipe, loop, tmp_path / "one")
    one, both = ([line for line in read_log(tmp_path / n / "log.jsonl") if "images_per_s" in line] for n in ("one", "two"))
    for i, (a, b) in enumerate(zip(one, both, strict=True)):
        for name in ("codec/l1", "codec/commitment", "codec/grad_norm", "discriminator/real_score"):
            assert (name in a) == (name in b)
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-5 if i < 2 else 0.1), (i, name)


PAIRS = {
    "gan-lazy": {"penalty": gan.PenaltyConfig(r1=1.0, r2=1.0, every=2), "adapt": gan.AdaptConfig(penalty="slope", images=64)},
    "gan-between": {"penalty": gan.PenaltyConfig(gp=10.0, lecam=0.1), "loss": "wasserstein", "steps": 2},
    "gan-dragan": {"penalty": gan.PenaltyConfig(dragan=1.0, every=3), "loss": "hinge", "augment": "ada", "p": 0.5},
}


def pair(what: str) -> tuple[gan.GANRecipe, LoopConfig]:
    recipe, loop = gan.preset_smoke()
    loop = replace(loop, images=96, batch_size=8, warmup=8, save_every=96, sample_every=96, log_every=8, device="cpu")
    return replace(recipe, **({"augment": "none"} | PAIRS[what])), loop  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["gan-lazy", *(pytest.param(p, marks=pytest.mark.slow) for p in ("gan-between", "gan-dragan"))])
def test_two_processes_train_one_pair(tmp_path: Path, what: str) -> None:
    """Both end with the same networks and controllers, bit for bit. Where nothing is drawn at random besides noise, one process with the whole batch
    gets nearly the same ones (all but the mean of the scores, of which a relativistic loss knows nothing: rounding alone moves it); where only the
    places of the penalty are, it begins with the same scores.
    """
    digests = set()
    for process in two(what, tmp_path / "two"):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        digests |= {line for line in said.splitlines() if line.startswith("networks")}
    assert len(digests) == 1
    alone = gan.train(*pair(what), tmp_path / "one", text=tmp_path / "one")
    one, both = ([line for line in read_log(tmp_path / n / "log.jsonl") if "images_per_s" in line] for n in ("one", "two"))
    steps = {"gan-lazy": len(one), "gan-between": 1, "gan-dragan": 0}[what]
    for a, b in zip(one[:steps], both[:steps], strict=True):
        ours, theirs = ([x["discriminator/real_score"] - x["discriminator/fake_score"], x["discriminator/classification"]] for x in (a, b))
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), a["images"]
        assert ("penalty/slope" in a) == ("penalty/slope" in b)
        assert a.get("penalty/slope", 0) == pytest.approx(b.get("penalty/slope", 0), abs=1e-5), a["images"]
    for name in ("real_score", "fake_score"):
        assert what == "gan-dragan" or one[0][f"discriminator/{name}"] == pytest.approx(both[0][f"discriminator/{name}"], abs=1e-5)
    if what == "gan-lazy":
        assert_same(tmp_path / "one", tmp_path / "two", 1e-3)
        assert float(alone.task.networks["balance"].louder) != 1.0  # type: ignore[arg-type]


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path) -> None:
    both = two("toy-slow", tmp_path / "run")
    stdout = both[1].stdout
    assert stdout is not None
    while not (line := stdout.readline()).startswith("step"):
        assert line, "the second process ended early"
    both[1].send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=90)[0] for p in both]
    assert [p.returncode for p in both] == [128 + signal.SIGTERM] * 2, said
    stopped = {line for text in said for line in text.splitlines() if line.startswith("stopped at")}
    assert len(stopped) == 1, said
    assert len(checkpoints(tmp_path / "run", "state")) == 1
    fit(tmp_path / "run")
    fit(tmp_path / "one")
    assert_same(tmp_path / "one", tmp_path / "run", 1e-5)


class Loud(Toy):
    """Says when it begins a step."""

    def batch(self, positions: np.ndarray) -> Batch:
        print("step", positions[0])
        return super().batch(positions)


class Slow(autoencoder.AutoencoderTask):
    """The smoke task, slowed down so that a signal can hit it, and heard."""

    def batch(self, positions: np.ndarray) -> Batch:
        print("step", positions[0])
        time.sleep(0.2)
        return super().batch(positions)


def drive(what: str, out: str) -> None:
    torch.set_num_threads(1)
    try:
        if what.startswith("toy"):
            bad = BAD_ON_ONE_RANK if what == "toy-bad" else range(0)
            done = fit(Path(out), task=Loud(pause=0.2) if what == "toy-slow" else Toy(bad=bad))
            print(f"{done.accelerator.num_processes} processes, {done.counters['skipped']} skipped")
        elif what == "vqgan" or what in PAIRS:
            done = autoencoder.train(*vqgan(), Path(out)) if what == "vqgan" else gan.train(*pair(what), Path(out), text=Path(out))
            print("networks", hash_tensors({f"{n}.{k}": v for n, net in done.task.networks.items() for k, v in net.state_dict().items()}))
        else:
            recipe, loop = smoke()
            Trainer(Slow(recipe, loop.seed), loop, Path(out), recipe).train()
    except Stopped as stopped:
        print(stopped)
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    drive(*sys.argv[1:])
