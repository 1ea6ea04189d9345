"""Stable Diffusion 1.5 at its full size beside diffusers: seconds and memory. `python bench/sd.py`. One JSON object on stdout.

Random weights, written by diffusers: for time only, and to compare pictures. Each side is a process of its own that works when it is told to, by
turns, with the same threads; what is measured is the median, with a 95 % interval of the ratio over pairs. diffusers is measured as it comes, and
once more with freed pages kept, as ours keeps them. Cold starts and memory are of new processes. Its parts (--only): steps, pictures, starts,
memory, fast (of a small UNet of the emoji latents, --bed), bundled.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, of_parts
from stable import Options as Written
from stable import drawn_by_diffusers, drawn_by_ours
from stable import write as write_folder
from tqdm import tqdm

from sfumato.metrics.intervals import bootstrap

OURS, EAGER, THEIRS, KEEPING = "ours", "ours, eager", "diffusers", "diffusers, pages kept"
MOST_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Options(Written):
    """Measures Stable Diffusion beside diffusers, and prints one JSON object."""

    only: str = "steps,pictures,starts,memory,fast,bundled"
    """Parts, with commas."""
    sides: tuple[int, ...] = (256, 512)
    """Pixels of the steps."""
    side: int = 256
    """Pixels of whole pictures."""
    steps: int = 20
    processes: int = 3
    """Of each side, one after the other: two that do the same differ by up to a tenth."""
    repeats: int = 3
    """Of each process, by turns."""
    pictures: int = 1
    """Whole pictures of each process, by turns."""
    threads: int = 2
    bed: Path = ROOT / "runs" / "unet"
    """A run of `sfumato train diffusion --preset unet`, for the fast mode."""
    judge: Path = ROOT / "runs" / "judge"
    """Where bench/judge.py keeps its judges."""
    names: int = 400
    """Things that the fast mode draws."""

    @property
    def halves(self) -> Path:
        return self.out / "halves"

    @property
    def series(self) -> int:
        """Starts, and pictures of the bundled model."""
        return 1 if self.quick else 5


# --- sides: what a process does when it is told to ------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    began = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - began}


def inputs(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a picture and the states of a text."""
    draw = torch.Generator().manual_seed(side)
    return torch.randn(1, 4, side // 8, side // 8, generator=draw), torch.randn(1, 77, 768, generator=draw)


def of_ours(options: Options, engine: str, path: Path, low_memory: bool = False) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    from sfumato.core.seams import Cond
    from sfumato.pipelines.load import load

    model: Any = load(path, device="cpu", threads=options.threads, engine=engine, low_memory=low_memory)  # type: ignore[arg-type]

    @torch.no_grad()
    def unet(told: dict[str, Any]) -> dict[str, Any]:
        x, text = inputs(told["side"])
        text = text[:, :, : model.denoiser.config.context]
        return timed(lambda: model.engine.of(model.denoiser, "whole", dynamic=True)(x, torch.tensor([0.5]), Cond(text=text)))

    @torch.no_grad()
    def vae(told: dict[str, Any]) -> dict[str, Any]:
        return timed(lambda: model.engine.of(model.codec, "decode", dynamic=True)(inputs(told["side"])[0]))

    def picture(told: dict[str, Any]) -> dict[str, Any]:
        return timed(lambda: np.save(told["file"], drawn_by_ours(model, told["steps"], told["side"])))

    return {"unet": unet, "vae": vae, "picture": picture}


def of_diffusers(options: Options, keeping: bool, path: Path) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    if keeping:
        from sfumato.nn.memory import keep_pages

        keep_pages()
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(options.threads)
    pipe = StableDiffusionPipeline.from_pretrained(path, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def unet(told: dict[str, Any]) -> dict[str, Any]:
        x, text = inputs(told["side"])
        text = text[:, :, : pipe.unet.config.cross_attention_dim]
        return timed(lambda: pipe.unet(x, torch.tensor([499]), encoder_hidden_states=text))

    @torch.no_grad()
    def vae(told: dict[str, Any]) -> dict[str, Any]:
        return timed(lambda: pipe.vae.decode(inputs(told["side"])[0]))

    def picture(told: dict[str, Any]) -> dict[str, Any]:
        return timed(lambda: np.save(told["file"], drawn_by_diffusers(pipe, told["steps"], told["side"])))

    return {"unet": unet, "vae": vae, "picture": picture}


SIDES: dict[str, Callable[[Options], dict[str, Callable[[dict[str, Any]], dict[str, Any]]]]] = {
    OURS: lambda o: of_ours(o, "openvino", o.folder), EAGER: lambda o: of_ours(o, "eager", o.folder),
    THEIRS: lambda o: of_diffusers(o, False, o.folder), KEEPING: lambda o: of_diffusers(o, True, o.folder),
    "ours, eager, halves": lambda o: of_ours(o, "eager", o.halves), "ours, low memory": lambda o: of_ours(o, "eager", o.halves, True),
    "diffusers, halves": lambda o: of_diffusers(o, False, o.halves),
}  # fmt: skip


def serve(options: Options) -> None:
    """Does what each line of stdin says, and answers with a line."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    can = SIDES[options.work](options)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        found = can[told["do"]](told) | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        print(json.dumps(found), file=answers, flush=True)


class Side:
    """A process of one side."""

    def __init__(self, name: str, options: Options) -> None:
        self.began = time.perf_counter()
        argv = [sys.executable, __file__, "--work", name, "--out", str(options.out), "--threads", str(options.threads)]
        env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "TRANSFORMERS_VERBOSITY": "error"}
        env |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        self.answer()
        self.ready = time.perf_counter() - self.began

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)  # type: ignore[no-any-return]

    def ask(self, do: str, **told: Any) -> dict[str, Any]:
        print(json.dumps({"do": do} | told), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def in_turns(names: tuple[str, ...], options: Options, repeats: int, do: str, **told: Any) -> dict[str, list[float]]:
    """Seconds of each side, by turns, in some processes of each; after one in each that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=options.processes * (repeats + 1), desc=f"{do} {told.get('side', '')}", file=sys.stderr) as bar:
        for _ in range(options.processes):
            sides = {name: Side(name, options) for name in names}
            for i in range(repeats + 1):
                for name, side in sides.items():
                    seconds = side.ask(do, **told, **({"file": str(options.out / f"{name}.npy")} if do == "picture" else {}))["seconds"]
                    found[name] += [seconds] if i else []
                bar.update()
            for side in sides.values():
                side.end()
    return found


def ratios(what: str, found: dict[str, list[float]], goal: str | None, processes: int) -> list[dict[str, Any]]:
    """How many times as long diffusers takes, as it comes (the goal is of that) and with pages kept: medians of pairs, intervals over processes."""
    claims = []
    for theirs in (THEIRS, KEEPING):
        for ours in (OURS, EAGER):
            if theirs in found and ours in found:
                pairs = np.divide(found[theirs], found[ours])
                low, high = bootstrap(lambda a: np.median(a, -1), np.median(pairs.reshape(processes, -1), axis=1))
                aim = goal if (ours, theirs) == (OURS, THEIRS) else None
                claims.append(claim(f"{what}: {theirs} / {ours} ({low:.2f} to {high:.2f})", float(np.median(pairs)), "times", aim))
    return claims


def written(options: Options) -> None:
    """The checkpoint, and one in 16 bits."""
    if not options.folder.exists():
        write_folder(options)
    if not options.halves.exists():
        from sfumato.convert.stable import read_checkpoint
        from sfumato.convert.stable import write_folder as export

        export(read_checkpoint(options.folder), options.halves, half=True)


# --- parts ----------------------------------------------------------------------------------------------------------------------------------------

ALL = (OURS, EAGER, THEIRS, KEEPING)
Part = tuple[list[dict[str, Any]], dict[str, Any]]


def steps(options: Options) -> Part:
    """One step of the UNet, and the decoder."""
    claims, details = [], {}
    for side in options.sides:
        for do, goal in (("unet", 1.5 if side <= 256 else 1.2), ("vae", 1.15)):
            found = details[f"{do} {side}"] = in_turns(ALL, options, options.repeats, do, side=side)
            claims += ratios(f"{do} at {side // 8} x {side // 8} latents", found, f">= {goal}", options.processes)
    return claims, details


def pictures(options: Options) -> Part:
    """Whole pictures, and how far they are from each other."""
    found = in_turns((OURS, EAGER, THEIRS), options, options.pictures, "picture", side=options.side, steps=options.steps)
    claims = ratios(f"picture of {options.side} x {options.side}, {options.steps} steps", found, ">= 1", options.processes)
    theirs = np.load(options.out / f"{THEIRS}.npy")
    for name in (OURS, EAGER):
        gap = float(np.abs(np.load(options.out / f"{name}.npy") - theirs).max())
        claims.append(claim(f"{name}: furthest value from diffusers' picture, in [0, 1]", gap, "", "<= 0.001"))
    return claims, {"seconds": found}


def starts(options: Options) -> Part:
    """New processes: until they can draw, and until they have drawn."""
    ready: dict[str, list[float]] = {}
    drawn: dict[str, list[float]] = {}
    told = {"side": options.side, "steps": options.steps}
    for i in tqdm(range(options.series), desc="cold starts", file=sys.stderr):
        for name in (OURS, THEIRS):
            side = Side(name, options)
            ready.setdefault(name, []).append(side.ready)
            if i < options.processes:
                side.ask("picture", **told, file=str(options.out / "cold.npy"))
                drawn.setdefault(name, []).append(time.perf_counter() - side.began)
            side.end()
    share = np.divide(ready[OURS], ready[THEIRS])
    low, high = bootstrap(lambda a: np.median(a, -1), share)
    claims = [claim(f"import and load: ours / diffusers ({low:.2f} to {high:.2f})", float(np.median(share)), "", "<= 0.5")]
    claims += ratios(f"new process to a picture of {options.side} x {options.side}, {options.steps} steps", drawn, ">= 1", len(drawn[OURS]))
    return claims, {"ready": ready, "drawn": drawn}


def memory(options: Options) -> Part:
    """The most that a new process held, in GiB, to draw one picture of 512 x 512."""
    side, peak = 64 if options.quick else 512, {}
    for name in tqdm((EAGER, THEIRS, "ours, eager, halves", "ours, low memory", "diffusers, halves"), desc="memory", file=sys.stderr):
        process = Side(name, options)
        peak[name] = process.ask("picture", side=side, steps=2, file=str(options.out / f"{name}.npy"))["memory"]
        process.end()
    gap = float(np.abs(np.load(options.out / "ours, low memory.npy") - np.load(options.out / "ours, eager, halves.npy")).max())
    return [
        claim(f"memory, {side} x {side}: ours, eager / diffusers", peak[EAGER] / peak[THEIRS], "", "<= 0.8"),
        claim("memory, a file of 16 bits: ours, low memory", peak["ours, low memory"], "GiB", f"<= {MOST_GIB}"),
        claim("low memory: furthest value from the picture without, in [0, 1]", gap, "", "<= 0.001"),
    ], {"gib": peak}


def fast(options: Options) -> Part:
    """What the fast mode costs and saves, on a small UNet of the emoji latents: the same things by each way."""
    from common import draw, from_pil
    from judge import LOOP, RECIPE, judge

    from sfumato.core.images import flatten
    from sfumato.data.emoji import drawable
    from sfumato.pipelines.load import load

    if not options.bed.exists():
        return [claim(f"fast: {options.bed} is not here (sfumato train diffusion --preset unet)", np.nan)], {}
    torch.set_num_threads(options.threads)
    model, told = load(options.bed, device="cpu", engine="eager"), judge(RECIPE, LOOP, options.judge)
    things = [c for c in drawable() if c.index in set(told.known)]
    things = things[:: max(1, len(things) // options.names)][: options.names]
    ways: dict[str, dict[str, Any]] = {
        "exact": {"steps": options.steps}, "fast": {"steps": options.steps, "fast": True},
        "fast, guidance from 0.2": {"steps": options.steps, "fast": True, "guidance_interval": (0.2, 1.0)},
        "ddim": {"steps": 50, "sampler": "ddim"}, "half the steps": {"steps": options.steps // 2},
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    images: dict[str, Any] = {}
    draw_all = lambda way: draw(model, [c.names["en"] for c in things], [None] * len(things), range(len(things)), **way)  # type: ignore[arg-type]  # noqa: E731
    draw_all({"steps": 1})
    for _ in range(1 if options.quick else 3):
        for name, way in ways.items():
            began = time.perf_counter()
            images[name] = draw_all(way)
            seconds[name].append(time.perf_counter() - began)
    labels = torch.tensor([told.known.index(c.index) for c in things])
    flat = {name: np.stack([np.asarray(flatten(i), dtype=np.float64) for i in found]) for name, found in images.items()}
    for name, found in images.items():
        errors = np.square(flat[name] - flat["exact"]).reshape(len(things), -1).mean(1)
        accuracy = float((told(from_pil(found))[0].argmax(1) == labels).double().mean())
        rows[name] = {"seconds": float(np.median(seconds[name])), "accuracy": accuracy,
                      "psnr": float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-4))))}  # fmt: skip
    exact, quick = rows["exact"], rows["fast"]
    return [
        claim("fast: exact / fast", exact["seconds"] / quick["seconds"], "times", ">= 2"),
        claim("fast: 50 steps of ddim / fast", rows["ddim"]["seconds"] / quick["seconds"], "times", ">= 4"),
        claim("fast: likeness to the exact picture, mean of pictures", quick["psnr"], "dB", ">= 25"),
        claim("fast: things recognised, less than exact", exact["accuracy"] - quick["accuracy"], "", "<= 0.02"),
    ], {"rows": rows, "things": len(things), "judge_meaningful": told.meaningful}


def bundled(options: Options) -> Part:
    """The bundled model: from the command to a picture, and pictures one by one and sixteen at once, by both engines."""
    from sfumato.pipelines.load import load

    command, out = [sys.executable, "-m", "sfumato.apps.cli", "generate", "a red fox", "--seed", "1", "--force"], options.out / "cold.png"
    cold = []
    for _ in range(options.series):
        began = time.perf_counter()
        subprocess.run([*command, "--out", str(out), "--threads", str(options.threads)], check=True, capture_output=True, cwd=ROOT)
        cold.append(time.perf_counter() - began)
    found: dict[str, Any] = {"cold": cold}
    models = {name: load(device="cpu", threads=options.threads, engine=name) for name in ("eager", "openvino")}  # type: ignore[arg-type]
    for count in (1, 16):
        for i in range(1 + options.series):
            for name, model in models.items():
                seconds = timed(lambda: model.generate("a red fox", seed=1, count=count))["seconds"]  # noqa: B023
                found.setdefault(f"{name}, {count}", []).extend([seconds] if i else [])
    claims = [claim("bundled model: command to picture", float(np.median(cold)), "s")]
    for count in (1, 16):
        claims += [
            claim(f"bundled model: {name}, {count} at once", count / float(np.median(found[f"{name}, {count}"])), "pictures/s") for name in models
        ]
    return claims, found


PARTS = {"steps": steps, "pictures": pictures, "starts": starts, "memory": memory, "fast": fast, "bundled": bundled}


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.work:
        serve(options)
        return
    if options.quick:
        few = {"sides": (64,), "side": 64, "steps": 2, "processes": 1, "repeats": 1}
        options = Options(**asdict(options) | few)
    options.out.mkdir(parents=True, exist_ok=True)
    written(options)
    emit(of_parts(PARTS, options.only, options, options.seed))


if __name__ == "__main__":
    main()
