"""The one training loop: phases, EMA, checkpoints, exact resume. Progress is counted in images.

A task says what is trained (networks, phases, batches as a pure function of the position in the data order); the loop owns optimisers,
schedules and files. On accelerate: CPU, one GPU, MPS, or several processes through `accelerate launch`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, checkpoint_name, checkpoints, load_tensors, save_tensors, sweep, thousands, write_json
from sfumato.core.config import at_least, from_json, to_json
from sfumato.core.images import save_png
from sfumato.core.language import translated
from sfumato.core.pack import save_pack
from sfumato.core.request import Device
from sfumato.core.rng import derive
from sfumato.core.runlog import RunLog, is_out_of_memory
from sfumato.nn.ema import RAMP, ema_copy, ema_update
from sfumato.nn.memory import keep_pages
from sfumato.train.shards import Shards, whole

BAD_STEPS_IN_A_ROW = 5
HALVINGS = 3  # of a batch that does not fit into memory
ROLLBACKS = 3  # of a run that repairs itself
MADE_FIRST = (  # before a run is begun
    "data.json",
    "base.json",
    "style.json",
    "facts.json",
    "latents*",
    "codes.*",
    "decoded.*",
    "parts/*.safetensors",
    "prior/data.json",
)
FREE_TO_CHANGE = (
    "images",
    "patience",
    "auto",
    "save_every",
    "sample_every",
    "log_every",
    "keep",
    "keep_every",
    "trackers",
    "threads",
    "device",
    "compile",
    "shard",
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how a run trains. Counts and periods are in images."""

    images: int = 100_000
    """How many are seen in all."""
    batch_size: int = 32
    """Over all processes. One that does not fit into memory is halved by itself, where one process trains and the loss does not compare the pictures
    of a batch (text does)."""
    accumulate: int = 1
    """Split each batch into that many parts."""
    lr: float = 1e-3
    """The learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Memory of Adam's averages."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip: float = 1.0
    """The norm to which gradients are clipped; 0 clips nothing."""
    warmup: int = 5_000
    """Images over which the learning rate rises."""
    decay: float = 0.3
    """The last share of the run, over which it falls linearly to zero."""
    ema: float = 0.05
    """Half-life of the averaged weights, as a share of the run."""
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    """auto: what this machine multiplies matrices faster in, measured once when the run begins."""
    seed: int = 0
    """Of everything that is drawn by chance."""
    save_every: int = 50_000
    """Images from one checkpoint to the next."""
    sample_every: int = 50_000
    """Images from one sample grid to the next."""
    log_every: int = 2_000
    """Images from one line of the log to the next."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Keep those at every so many images as well; 0: none."""
    trackers: tuple[str, ...] = ()
    """Programs that are to hear the log too: tensorboard, wandb."""
    threads: int = 0
    """Of the CPU; 0: as PyTorch has them."""
    compile: bool = False
    """Fuse the networks by torch.compile: a minute's start, then faster. Rounding differs, so a resume is exact only with the same setting."""
    shard: bool = False
    """Several processes share weights, averages and the optimiser's memory (FSDP2, arXiv 2304.11277); for full fine-tuning of diffusion networks."""
    patience: int = 0
    """End after so many looks (sample_every) without a better score, once all parts work; 0: never."""
    auto: bool = False
    """Let remedies act: a run that is not finite goes back to its newest checkpoint with half the learning rate, and a task does what its doctor
    advises."""
    device: Device = "auto"
    """Where it computes."""

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "accumulate", "save_every", "sample_every", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least 1")
        at_least(0, threads=self.threads, ema=self.ema, warmup=self.warmup, weight_decay=self.weight_decay)
        if self.patience < 0:
            raise ValueError(f"patience (={self.patience}) must be at least 0: looks without a better score, 0 never ends a run")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay (={self.decay}) must be between 0 and 1: it is the last fraction of the run")
        if self.clip < 0:
            raise ValueError(f"clip (={self.clip}) must be at least 0: the largest norm of a step's gradient, 0 clips nothing")
        if self.lr <= 0:
            raise ValueError(f"lr (={self.lr}) must be above 0")

    def lr_at(self, seen: int) -> float:
        """The learning rate after `seen` images."""
        rise = min(1.0, (seen + self.batch_size) / self.warmup) if self.warmup else 1.0
        left = 1 - seen / self.images
        return self.lr * rise * (min(1.0, left / self.decay) if self.decay else 1.0)


Batch = dict[str, Any]
Loss = Callable[[dict[str, nn.Module], Batch, float], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Phase:
    """One optimiser: the networks it changes, its loss (networks, batch, progress in [0, 1]) -> (scalar, statistics), its period in steps (every
    step until the progress `thinned`), from which progress on it works, and betas where they are not the loop's. `shares` names an earlier phase of
    the same networks whose optimiser it uses instead of one of its own.
    """

    name: str
    networks: tuple[str, ...]
    loss: Loss
    every: int = 1
    lr_scale: float = 1.0
    begins: float = 0.0
    thinned: float = 0.0
    betas: tuple[float, float] | None = None
    shares: str = ""


class Task(Protocol):
    """What is trained. `batch` must be a pure function of the positions; `pack` turns averaged weights into what draws.

    What a task may have besides: `after_step(averages, images, finite) -> statistics`, once after all phases of a step, for what is not learned by
    gradients; `remarks(run) -> list of JSON lines`, after each look, which are said and logged; `full_precision`, names of networks that autocast
    leaves alone; `partly_used`, True where a loss does not reach all parameters; `splittable`, False where a loss compares pictures of a batch;
    `shardable`, True where the weights may be cut up among processes, and `broadcasts`, False where a process keeps its own buffers;
    `complete_from`, the progress from which on all its parts work, before which no score counts as the best, and none as too long ago.
    """

    kind: str
    networks: dict[str, nn.Module]
    phases: list[Phase]

    def batch(self, positions: np.ndarray) -> Batch: ...

    def samples(self, networks: dict[str, nn.Module]) -> Image.Image | None: ...

    def evaluate(self, networks: dict[str, nn.Module]) -> dict[str, float]: ...

    def pack(self, networks: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, signum: int, images: int) -> None:
        super().__init__(f"stopped at {images:,} images, state saved: run the same command again to go on")
        self.signum = signum


class Diverged(RuntimeError):
    """Five steps in a row were not finite."""


def on_cpu(loop: LoopConfig) -> bool:
    """Said to accelerate outright: on a machine without a GPU it would otherwise take the processes of a launcher for separate runs."""
    return loop.device == "cpu" or (loop.device == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available())


def _processes(loop: LoopConfig) -> Any:
    """The process group of a launcher, or this process alone. Encoding data for the others may take long, hence the patience."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu(loop), **({"timeout": timedelta(hours=12)} if "RANK" in os.environ else {}))


@contextlib.contextmanager
def starting(out: Path) -> Iterator[None]:
    """Makes what trains in the run folder `out`. Where what was asked for is wrong and the run was never begun, files that were written meanwhile go
    again, so that it can be begun with other pictures or another base; not pictures of a prior, which say themselves what they were drawn from.
    """
    found = lambda: {path for pattern in MADE_FIRST for path in Path(out).glob(pattern)}  # noqa: E731
    before = found()
    try:
        yield
    except ValueError:
        if not (Path(out) / "config.json").exists():
            for path in found() - before:
                with contextlib.suppress(OSError):  # gone, or open still
                    path.unlink()
        raise


def main_first(loop: LoopConfig, make: Callable[[torch.device], Task]) -> Task:
    """Makes a task for the device of the run; the main process first, so that the others find the caches that it filled."""
    if loop.threads:
        torch.set_num_threads(loop.threads)
    keep_pages()
    state = _processes(loop)
    if loop.device not in ("auto", state.device.type):
        raise ValueError(f"device (={loop.device!r}) is not available here: use auto or {state.device.type}")
    check_batch(loop, state.num_processes)
    with state.main_process_first():
        return make(state.device)


def check_batch(loop: LoopConfig, world: int) -> None:
    """Raises ValueError where processes would have parts of different sizes."""
    if loop.batch_size % (world * loop.accumulate):
        raise ValueError(f"batch_size (={loop.batch_size}) must be a multiple of processes x accumulate (={world} x {loop.accumulate})")


def check_sharding(task: Task, distributed: str, shard: bool = False) -> None:
    """Raises ValueError where networks would be cut up that must be whole, or by a launcher."""
    if distributed in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ValueError(f"{task.kind} cannot be trained with {distributed} of a launcher, which cuts networks up: use torchrun (and --loop.shard)")
    if shard and not getattr(task, "shardable", False):
        raise ValueError(f"shard (=True) is for full fine-tuning of diffusion networks: the networks of {task.kind} must be whole in each process")


def begun_with(run: Path) -> dict[str, Any] | None:
    """The config.json of a run folder, None where there is none. Raises FileError where it is another program's."""
    path = run / "config.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"kind", "config", "loop"} <= found.keys() and "dtype" in found["loop"]:
            return found
    except (ValueError, AttributeError, TypeError):
        pass
    raise FileError(f"{path} is not the config of a run of sfumato: name another --out")


def settled(loop: LoopConfig, run: Path) -> LoopConfig:
    """`dtype` auto decided: what the run was begun with, else what the main process finds faster; the same in all processes."""
    if loop.dtype != "auto":
        return loop
    from accelerate.utils import broadcast_object_list

    begun = begun_with(Path(run))
    dtype = [begun["loop"]["dtype"] if begun else faster_dtype(_processes(loop).device)]
    if _processes(loop).num_processes > 1:
        broadcast_object_list(dtype)
    return replace(loop, dtype=dtype[0])


def faster_dtype(device: torch.device) -> Literal["fp32", "bf16"]:
    """On a GPU bf16 where it has it. On a CPU measured: AVX512-bf16 doubled the speed of one processor and halved that of another."""
    if device.type != "cpu":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 320, dtype=dtype), torch.ones(320, 960, dtype=dtype)
        began = time.perf_counter()
        a @ b
        return time.perf_counter() - began

    rounds = [(seconds(torch.bfloat16), seconds(torch.float32)) for _ in range(30)]  # by turns: other work on the machine meets both alike
    bf16, fp32 = (min(times) for times in zip(*rounds, strict=True))
    return "bf16" if bf16 < 0.8 * fp32 else "fp32"


class Trainer:
    """A task, its optimisers and its counters, bound to a run folder."""

    def __init__(self, task: Task, loop: LoopConfig, run: Path, config: Any) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        loop = settled(loop, run)
        self.task, self.loop, self.run = task, loop, Path(run)
        self.settings = type(config)
        self.config = {"kind": task.kind, "config": to_json(config), "loop": to_json(loop)}
        _forget_accelerator()
        self.accelerator = Accelerator(
            cpu=on_cpu(loop),
            mixed_precision="bf16" if loop.dtype == "bf16" else "no",
            log_with=list(loop.trackers) or None,
            project_dir=str(run),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    find_unused_parameters=getattr(task, "partly_used", False), broadcast_buffers=getattr(task, "broadcasts", True)
                )
            ],
        )
        check_sharding(task, str(self.accelerator.distributed_type).rpartition(".")[2], loop.shard)
        self.device = self.accelerator.device
        world = self.accelerator.num_processes
        if loop.shard and loop.dtype == "bf16":
            raise ValueError("dtype (='bf16') must be fp32 with shard, which casts nothing")
        self.shards = Shards(self.device, world) if loop.shard and world > 1 else None
        check_batch(loop, world)
        for network in task.networks.values():
            network.to(self.device)
        self.averages = {name: ema_copy(n) for name, n in task.networks.items()}
        if self.shards:
            self.shards.cut(task.networks, self.averages)
        self.prepared = {name: self._prepared(name, n) for name, n in task.networks.items()}
        if loop.compile:
            for network in self.prepared.values():
                network.compile()
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        for p in task.phases:
            self.optimisers[p.name] = self.optimisers[p.shares] if p.shares else self._optimiser(p)
        self.owners = [p for p in task.phases if not p.shares]  # of the optimisers
        self.accumulate = loop.accumulate  # doubled where a batch does not fit into memory
        self.counters = {"images": 0, "steps": 0, "skipped": 0, "skipped_in_a_row": 0, "stale": 0, "rollbacks": 0}
        self.best = -math.inf

    def _prepared(self, name: str, network: nn.Module) -> nn.Module:
        """As accelerate makes it ready; networks that the task wants in full precision without its autocast."""
        if not any(p.requires_grad for p in network.parameters()):
            return network.to(self.device)
        if self.shards:
            return network
        if name not in getattr(self.task, "full_precision", ()):
            return self.accelerator.prepare(network)
        before, self.accelerator.native_amp = self.accelerator.native_amp, False
        try:
            return self.accelerator.prepare(network)
        finally:
            self.accelerator.native_amp = before

    def _optimiser(self, phase: Phase) -> torch.optim.Optimizer:
        """AdamW; norms, biases and other vectors are not decayed."""
        parameters = [p for n in phase.networks for p in self.task.networks[n].parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.loop.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in parameters if not p.ndim], "weight_decay": 0.0},  # apart: they are not cut up where the others are
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.loop.lr, betas=phase.betas or self.loop.betas, fused=self.device.type != "mps"
        )

    # --- one step -----------------------------------------------------------------------------------------------------------------------------

    def positions(self, images: int) -> list[np.ndarray]:
        """This process's positions in the data order for the step that begins at `images`, in `accumulate` parts."""
        a = self.accelerator
        mine = np.arange(images, images + self.loop.batch_size).reshape(a.num_processes, -1)[a.process_index]
        return np.split(mine, self.accumulate)

    def step(self, batches: list[Batch]) -> dict[str, float]:
        """All phases that are due, then the averages. Returns the statistics of this step."""
        stats: dict[str, float] = {}
        seen = self.counters["images"]
        progress = seen / self.loop.images
        torch.manual_seed(derive(self.loop.seed, "step", seen) + self.accelerator.process_index)  # for dropout: a resume draws what a whole run draws
        lr = self.loop.lr_at(seen) * 0.5 ** self.counters["rollbacks"]
        finite = True
        for phase in self.task.phases:
            every = phase.every if progress >= phase.thinned else 1
            if self.counters["steps"] % every == 0 and progress >= phase.begins:
                ok, found = self._phase(phase, batches, progress, lr)
                finite &= ok
                stats |= found
        self.counters["skipped"] += not finite
        self.counters["skipped_in_a_row"] = 0 if finite else self.counters["skipped_in_a_row"] + 1
        self.counters["images"] += self.loop.batch_size
        self.counters["steps"] += 1
        for name, average in self.averages.items():
            ema, batch = self.loop.ema, self.loop.batch_size
            ema_update(average, self.task.networks[name], images=batch, half_life=ema * self.loop.images, seen=seen, ramp=max(RAMP, ema))
        after = getattr(self.task, "after_step", None)
        return stats | (after(self.averages, self.counters["images"], finite) if after else {}) | {"lr": lr}

    def _phase(self, phase: Phase, batches: list[Batch], progress: float, lr: float) -> tuple[bool, dict[str, float]]:
        optimiser, a = self.optimisers[phase.name], self.accelerator
        for group in optimiser.param_groups:
            group["lr"] = lr * phase.lr_scale
        stats = self._gradients(phase, batches, progress)
        parameters = [p for n in phase.networks for p in self.task.networks[n].parameters()]
        clip = self.shards.clip if self.shards else torch.nn.utils.clip_grad_norm_
        norm = clip(parameters, self.loop.clip or math.inf)
        finite = bool(a.reduce(torch.isfinite(norm).float().reshape(1), "sum").item() == a.num_processes)
        if finite:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if not finite:
            return False, {}
        norm_name = "grad_norm" if len(self.task.phases) == 1 else f"{phase.name}/grad_norm"
        return True, {k: sum(v) / len(v) for k, v in stats.items()} | {norm_name: float(norm)}

    def _gradients(self, phase: Phase, batches: list[Batch], progress: float) -> dict[str, list[float]]:
        """The gradient of the mean loss over `batches`; where they do not fit into memory, over halves of them, from then on."""
        while True:
            for other in self.task.networks.values():
                other.zero_grad(set_to_none=True)
            try:
                return self._backward(phase, batches, progress)
            except (RuntimeError, MemoryError) as e:
                halves = self._halves(batches) if is_out_of_memory(e) and self.accelerator.num_processes == 1 else None
                if halves is None:
                    raise
            batches, self.accumulate = halves, len(halves)
            at_once = self.loop.batch_size // self.accumulate
            tqdm.write(translated(f"out of memory: going on with {at_once} pictures at a time, batches are as large as before"), file=sys.stderr)

    def _halves(self, batches: list[Batch]) -> list[Batch] | None:
        """Every batch in two; None where that was done often enough, or the task compares the pictures of a batch with each other."""
        n = self.loop.batch_size // len(batches)
        if n % 2 or len(batches) >= self.loop.accumulate * 2**HALVINGS or not getattr(self.task, "splittable", True):
            return None
        half = [slice(0, n // 2), slice(n // 2, n)]
        return [{k: v[part] if hasattr(v, "__len__") and len(v) == n else v for k, v in b.items()} for b in batches for part in half]

    def _backward(self, phase: Phase, batches: list[Batch], progress: float) -> dict[str, list[float]]:
        stats: dict[str, list[float]] = defaultdict(list)
        for i, batch in enumerate(batches):
            waiting = [self.accelerator.no_sync(self.prepared[n]) for n in phase.networks] if i < len(batches) - 1 else []
            with contextlib.ExitStack() as stack:
                for context in waiting:
                    stack.enter_context(context)
                loss, found = phase.loss(self.prepared, batch, progress)
                self.accelerator.backward(loss / len(batches))
            for k, v in {"loss": loss.detach(), **found}.items():
                stats[k if len(self.task.phases) == 1 else f"{phase.name}/{k}"].append(float(v))
        return stats

    # --- the run ------------------------------------------------------------------------------------------------------------------------------

    def train(self, *, stop_at: int | None = None) -> None:
        """Goes on from the newest state in the run folder until the end, or until a signal (raises Stopped).

        `stop_at` ends the call early at that many images, as a signal would, without an exception.
        """
        begun_with(self.run)
        self.resume()
        loop, main = self.loop, self.accelerator.is_main_process
        end = min(loop.images, stop_at or loop.images)
        log = RunLog(self.run / "log.jsonl", self.counters["images"]) if main else None
        if main:
            for folder in (self.run, self.run / "parts", self.run / "samples"):
                sweep(folder)
            write_json(self.run / "config.json", self.config)
        if loop.trackers:
            missing = sorted(set(loop.trackers) - {str(getattr(t, "value", t)) for t in self.accelerator.log_with} - {"all"})
            if missing:
                raise ValueError(f"trackers (={missing[0]!r}) cannot be used here: install its package, or leave it out")
            self.accelerator.init_trackers(self.task.kind, config={"config": json.dumps(self.config)})
        began = self.counters["images"]
        if main:
            threads, n = torch.get_num_threads(), self.accelerator.num_processes
            tqdm.write(
                translated(f"{self.task.kind} on {self.device.type}, {loop.dtype}, {threads} threads, {n} process{'es' * (n > 1)}"), file=sys.stderr
            )
        bar = tqdm(total=loop.images, initial=began, unit=" images", disable=not main, dynamic_ncols=True, smoothing=0.05, mininterval=2)
        try:
            with _signals() as signalled, _no_denormals(), bar:
                self._steps(end, signalled, log, bar)
        finally:
            if loop.trackers:
                self.accelerator.end_training()

    def _steps(self, end: int, signalled: dict[str, int], log: RunLog | None, bar: tqdm) -> None:
        loop, clock = self.loop, (time.perf_counter(), self.counters["images"])
        sums: dict[str, list[float]] = defaultdict(list)
        for batches in self._batches(end):
            for k, v in self.step(batches).items():
                sums[k].append(v)
            images = self.counters["images"]
            bar.update(loop.batch_size)
            if self.counters["skipped_in_a_row"] >= BAD_STEPS_IN_A_ROW:
                self._report(sums, clock, log, bar)
                if self._rolled_back(log, bar):
                    return self._steps(end, signalled, log, bar)
                raise Diverged(
                    f"{BAD_STEPS_IN_A_ROW} steps in a row were not finite, last at {images:,} images; the newest checkpoint is intact: "
                    f"begin again in another --out with a lower lr (={loop.lr}) or with dtype fp32"
                )
            if self._due(loop.log_every) or images >= end:
                self._report(sums, clock, log, bar)
            stop = self._any(signalled["signum"])
            if not stop and (self._due(loop.sample_every) or images >= loop.images):
                said = getattr(bar, "postfix", None) or ""
                bar.set_postfix_str(translated("drawing samples"))
                self._look(log)
                bar.set_postfix_str(said, refresh=False)
            if self._due(loop.save_every) or images >= end or stop:
                self.save()
            if stop:
                raise Stopped(stop, images)
            if self.loop.patience and self._any(self.counters["stale"] >= self.loop.patience):
                if self.accelerator.is_main_process:
                    said = f"ended at {images:,} images: no better score in {self.loop.patience} looks; the best is in model-best.safetensors"
                    tqdm.write(translated(said), file=sys.stderr)
                self.save()
                return

    def _rolled_back(self, log: RunLog | None, bar: tqdm) -> bool:
        """Goes back to the newest checkpoint with half the learning rate, where that is wanted and was not done too often."""
        done, at = self.counters["rollbacks"] + 1, self.counters["images"]
        if not self.loop.auto or done > ROLLBACKS or not checkpoints(self.run, "state"):
            return False
        self.accelerator.wait_for_everyone()
        self.resume()
        self.counters["rollbacks"] = done
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        images = self.counters["images"]
        said = f"steps at {at:,} images were not finite: back to {images:,} images with the learning rate at {0.5**done:g} of what was asked for"
        if log:
            log = RunLog(log.path, images)
            log.write(images=images, action="rollback", says=said)
            tqdm.write(translated(said), file=sys.stderr)
        bar.n = images
        self.save()
        return True

    def _report(self, sums: dict[str, list[float]], clock: tuple[float, int], log: RunLog | None, bar: tqdm) -> None:
        """One line of the log: means since the last one, and the speed since `clock` (seconds, images)."""
        images = self.counters["images"]
        line = self._means(sums)
        sums.clear()
        speed = (images - clock[1]) / (time.perf_counter() - clock[0])
        line |= {"images": images, "images_per_s": round(speed, 2), "skipped": self.counters["skipped"]}
        bar.set_postfix(loss=f"{line.get('loss', line.get(f'{self.task.phases[0].name}/loss', math.nan)):.4f}")
        if log:
            log.write(**line)
        if self.loop.trackers:
            self.accelerator.log(line, step=images)

    def _due(self, every: int) -> bool:
        images = self.counters["images"]
        return images // every > (images - self.loop.batch_size) // every

    def _means(self, sums: dict[str, list[float]]) -> dict[str, Any]:
        """Statistics of the steps since the last line, over all processes."""
        names = sorted(sums)
        if not names:
            return {}
        mine = torch.tensor([sum(sums[k]) / len(sums[k]) for k in names], device=self.device)
        return {k: round(float(v), 6) for k, v in zip(names, self.accelerator.reduce(mine, "mean"), strict=True)}

    def _any(self, signum: int) -> int:
        if self.accelerator.num_processes == 1:
            return signum
        return int(self.accelerator.gather(torch.tensor([signum], device=self.device)).max())

    def _batches(self, end: int) -> Iterator[list[Batch]]:
        def load(images: int) -> list[Batch]:
            return [_to(self.task.batch(p), self.device) for p in self.positions(images)]

        starts = range(self.counters["images"], end, self.loop.batch_size)
        if self.device.type == "cpu":  # a second thread would only take the cores from the step
            yield from map(load, starts)
            return
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(load, s) for s in starts[:2]]
            for i in range(len(starts)):
                if i + 2 < len(starts):
                    ahead.append(pool.submit(load, starts[i + 2]))
                yield ahead.pop(0).result()

    def _look(self, log: RunLog | None) -> None:
        """Samples and scores of the averaged weights; the other processes wait."""
        if self.accelerator.is_main_process or self.shards:
            self._look_here(log)
        self.accelerator.wait_for_everyone()
        if self.loop.auto and self.accelerator.num_processes > 1:  # what a remedy changed in the main process
            for network in self.task.networks.values():
                for value in (*network.parameters(), *network.buffers()):
                    torch.distributed.broadcast(value.detach(), 0)

    def _look_here(self, log: RunLog | None) -> None:
        with torch.no_grad():
            scores = self.task.evaluate(self.averages)
            picture = self.task.samples(self.averages)
        images, main = self.counters["images"], self.accelerator.is_main_process
        if picture is not None and main:
            save_png(self.run / "samples" / f"{thousands(images)}.png", picture)
        if log and scores:
            log.write(images=images, **{k: round(v, 5) for k, v in scores.items()})
        score = scores.get("score", math.nan)
        complete = images >= getattr(self.task, "complete_from", 0.0) * self.loop.images
        self.counters["stale"] += "score" in scores and complete
        if complete and score > self.best and self.counters["skipped_in_a_row"] == 0:
            self.best, self.counters["stale"] = score, 0
            self._save_pack(self.run / "model-best.safetensors")
        for line in self.task.remarks(self.run) if log and hasattr(self.task, "remarks") else ():
            log.write(images=images, **line)  # type: ignore[union-attr]
            tqdm.write(translated(f"doctor: {line['says']}"), file=sys.stderr)
            if "action" in line:
                tqdm.write(translated(line["action"]), file=sys.stderr)

    # --- files --------------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the run needs to go on exactly."""
        tensors = {f"raw.{n}.{k}": v for n, net in self.task.networks.items() for k, v in net.state_dict().items()}
        tensors |= {f"ema.{n}.{k}": v for n, net in self.averages.items() for k, v in net.state_dict().items()}
        for phase in self.owners:
            if self.optimisers[phase.name].state:  # asking an optimiser that never stepped would make it step
                found = get_optimizer_state_dict(self._module(phase), self.optimisers[phase.name])["state"]
                tensors |= {f"optimiser.{phase.name}.{p}#{k}": v for p, values in found.items() for k, v in values.items()}
        return {k: whole(v) for k, v in tensors.items()} if self.shards else tensors

    def _module(self, phase: Phase) -> nn.Module:
        return nn.ModuleDict({n: self.task.networks[n] for n in phase.networks})

    def save(self) -> None:
        """Writes EMA pack, then state, and drops old ones; the other processes wait until it is done."""
        if self.accelerator.is_main_process or self.shards:
            self._save_here()
        self.accelerator.wait_for_everyone()

    def _save_here(self) -> None:
        images = self.counters["images"]
        counters = self.counters | {"best": self.best if math.isfinite(self.best) else None}
        stateless = {p.name: self._stateless(p) for p in self.owners}
        self._save_pack(self.run / checkpoint_name("model", images))
        state = self.state()
        if not self.accelerator.is_main_process:
            return
        save_tensors(self.run / checkpoint_name("state", images), state, {"run": self.config, "counters": counters, "stateless": stateless})
        for kind in ("state", "model"):
            for old in checkpoints(self.run, kind)[: -self.loop.keep]:
                number = round(float(re.findall(r"[\d.]+(?=k)", old.name)[0]) * 1000)
                if not (self.loop.keep_every and kind == "model" and number % self.loop.keep_every < self.loop.batch_size):
                    old.unlink(missing_ok=True)

    def _save_pack(self, path: Path) -> None:
        tensors, metadata = self.task.pack(self.shards.joined(self.averages) if self.shards else self.averages)
        if self.accelerator.is_main_process:
            save_pack(path, tensors, metadata | {"images": self.counters["images"]})

    def resume(self) -> None:
        """Loads the newest readable state, if there is one. Raises ValueError where it belongs to another configuration."""
        states = checkpoints(self.run, "state")
        for path in reversed(states):
            try:
                tensors, metadata = load_tensors(path)
            except FileError as e:
                tqdm.write(translated(f"{e}; trying the one before"), file=sys.stderr)
                continue
            if not {"run", "counters"} <= metadata.keys():
                raise FileError(f"{path} is not the state of a run: move it away, or use another --out")
            _check_same(self.config, self._completed(metadata["run"]), self.run)
            self._load(tensors, metadata["counters"], metadata.get("stateless", {}), path)
            return
        if states:
            raise FileError(
                f"none of the {len(states)} states in {self.run} can be read, the newest is {states[-1].name}: repair it or move them away"
            )

    def _completed(self, saved: Any) -> Any:
        """What a state says of its run; a setting that did not exist when it was begun has its default value."""
        try:
            return saved | {"config": to_json(from_json(self.settings, saved["config"])), "loop": to_json(from_json(LoopConfig, saved["loop"]))}
        except ValueError:
            return saved

    def _stateless(self, phase: Phase) -> list[str]:
        """Parameters that no loss has reached yet: their optimiser has nothing to remember of them."""
        known = self.optimisers[phase.name].state
        return sorted(n for n, p in self._module(phase).named_parameters() if p.requires_grad and p not in known)

    def _load(self, tensors: dict[str, Tensor], counters: Any, stateless: Any, path: Path) -> None:
        for prefix, networks in (("raw", self.task.networks), ("ema", self.averages)):
            for name, network in networks.items():
                start = f"{prefix}.{name}."
                own = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
                set_model_state_dict(network, own, options=StateDictOptions(full_state_dict=self.shards is not None))
        for phase in self.owners:
            start = f"optimiser.{phase.name}."
            state: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for key, v in tensors.items():
                if key.startswith(start):
                    parameter, what = key[len(start) :].rsplit("#", 1)
                    state[parameter][what] = v
            if state:
                module, optimiser = self._module(phase), self.optimisers[phase.name]
                missing = {n for n, p in module.named_parameters() if p.requires_grad} - state.keys()
                if missing != set(stateless.get(phase.name, ())):
                    raise FileError(
                        f"{path} lacks the optimiser's state of {len(missing)} parameters, such as {min(missing, default='')}: it is damaged"
                    )
                for name, p in module.named_parameters():  # in the parameter's own memory format: the fused optimiser walks memory, not indices
                    if name in state and not self.shards:
                        state[name] = {k: torch.empty_like(p, device="cpu").copy_(v) if v.shape == p.shape else v for k, v in state[name].items()}
                groups = get_optimizer_state_dict(module, optimiser)["param_groups"]
                options = StateDictOptions(strict=False, full_state_dict=self.shards is not None)  # what may be missing was looked at above
                set_optimizer_state_dict(module, optimiser, {"state": dict(state), "param_groups": groups}, options=options)
        self.best = -math.inf if counters["best"] is None else counters["best"]
        self.counters = {k: counters.get(k, 0) for k in self.counters}


def _check_same(ours: dict, theirs: Any, run: Path) -> None:
    for part in ("kind", "config", "loop"):
        a, b = json.loads(json.dumps(ours[part])), theirs[part]
        if part == "loop":
            a, b = ({k: v for k, v in side.items() if k not in FREE_TO_CHANGE} for side in (a, b))
        if a != b:
            different = [k for k in {**a, **b} if a.get(k) != b.get(k)] if isinstance(a, dict) else [part]
            raise ValueError(
                f"{run} holds a run with other settings ({', '.join(different)} in {part}): use the settings it was begun with, or another --out"
            )


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in batch.items()}


def _forget_accelerator() -> None:
    """accelerate keeps its precision for the whole process; a second run in one process must be free to choose another."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


@contextlib.contextmanager
def _no_denormals() -> Iterator[None]:
    """Numbers too small to matter are zero while training: on some CPUs they cost many times as much."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _signals() -> Iterator[dict[str, int]]:
    """Notes SIGTERM and SIGINT instead of dying; a second SIGINT interrupts at once."""
    noted = {"signum": 0}
    said = translated("stopping: this step or these samples are finished first, then the state is saved; once more stops at once, saving nothing")

    def note(signum: int, frame: object) -> None:
        if noted["signum"] and signum == signal.SIGINT:
            raise KeyboardInterrupt
        noted["signum"] = signum
        with contextlib.suppress(OSError):
            if signum == signal.SIGINT:
                os.write(2, f"\n{said}\n".encode())  # what was being written to stderr may not be begun anew in a handler

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
