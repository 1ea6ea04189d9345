"""Stable Diffusion 1.5 at its full size, with random weights: `python bench/stable.py`. One JSON object on stdout.

diffusers writes the checkpoint; it is made a single file and a pickle, drawn with, and exported. Each piece of work is a process of its own, whose
largest memory the system tells; ours and diffusers draw by turns, the same picture from the same noise.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import ROOT, claim, emit, report
from safetensors import safe_open
from tqdm import tqdm

UNET: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4, "layers_per_block": 2, "sample_size": 512,
}  # fmt: skip
TEXT: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
QUICK: tuple[dict[str, Any], ...] = (
    {"block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 64, "attention_head_dim": 1},
    VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1},
)  # fmt: skip
PROMPT, NEGATIVE, SEED, GUIDANCE = "a photo of a red fox, sitting in the snow", "blurry, low quality", 7, 7.5
MOST_GIB = 8.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draws with a whole Stable Diffusion, and prints one JSON object."""

    side: int = 256
    """Pixels."""
    steps: int = 4
    repeats: int = 2
    """Of each, by turns."""
    out: Path = ROOT / "runs" / "bench-stable"
    """Where checkpoints are kept (some 20 GB)."""
    seed: int = 0
    """Of the weights."""
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""
    work: str = ""
    """One piece of work, in this process; used by the bench itself."""

    @property
    def folder(self) -> Path:
        return self.out / "diffusers"

    @property
    def single(self) -> Path:
        return self.out / "single.safetensors"

    @property
    def pickled(self) -> Path:
        return self.out / "single.ckpt"

    @property
    def exported(self) -> Path:
        return self.out / "exported"


# --- pieces of work -------------------------------------------------------------------------------------------------------------------------------


def write(options: Options) -> dict[str, Any]:
    """The checkpoint, by diffusers and transformers."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from sfumato.text.clip import usual_tokenizer

    torch.manual_seed(options.seed)
    unet, vae, text = QUICK if options.quick else (UNET, VAE, TEXT)
    words = json.loads(usual_tokenizer().to_str())["model"]
    told = CLIPTextConfig(vocab_size=49_408, max_position_embeddings=77, bos_token_id=49_406, eos_token_id=49_407, hidden_act="quick_gelu", **text)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**unet), vae=AutoencoderKL(**vae), text_encoder=CLIPTextModel(told), scheduler=scheduler,
        tokenizer=CLIPTokenizer(vocab=words["vocab"], merges=[tuple(m) for m in words["merges"]], model_max_length=77), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(options.folder)  # fmt: skip
    return {}


def convert(options: Options) -> dict[str, Any]:
    """Folder -> single file."""
    from sfumato.convert.stable import read_checkpoint, write_single

    write_single(read_checkpoint(options.folder), options.single)
    return {}


def pickle(options: Options) -> dict[str, Any]:
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(options.single)}, options.pickled)
    return {}


def export(options: Options) -> dict[str, Any]:
    """Single file -> folder."""
    from sfumato.convert.stable import read_checkpoint, write_folder

    write_folder(read_checkpoint(options.single), options.exported)
    return {}


def drawn_by_ours(model: Any, steps: int, side: int) -> np.ndarray:
    """The picture "1 h w 3" in [0, 1] that diffusers draws of the same."""
    from sfumato.core.request import GenerateRequest

    request = GenerateRequest(
        prompt=PROMPT, negative=NEGATIVE, guidance=GUIDANCE, seed=SEED, steps=steps, sampler="plms", schedule="leading", noise="diffusers",
        width=side, height=side,
    )  # fmt: skip
    *_, last = model.latents(model._rows(request))
    return ((model.decode(last).clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()  # type: ignore[no-any-return]


def drawn_by_diffusers(pipe: Any, steps: int, side: int) -> np.ndarray:
    return pipe(  # type: ignore[no-any-return]
        prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED), output_type="np",
        num_inference_steps=steps, width=side, height=side,
    ).images  # fmt: skip


def ours(options: Options, path: Path) -> dict[str, Any]:
    from sfumato.pipelines.load import load

    began = time.perf_counter()
    model = load(path, device="cpu")
    loaded = time.perf_counter()
    np.save(options.out / "ours.npy", drawn_by_ours(model, options.steps, options.side))
    return {"load": loaded - began, "draw": time.perf_counter() - loaded}


def diffusers(options: Options) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    began = time.perf_counter()
    pipe = StableDiffusionPipeline.from_pretrained(options.folder, local_files_only=True)
    loaded = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    np.save(options.out / "diffusers.npy", drawn_by_diffusers(pipe, options.steps, options.side))
    return {"load": loaded - began, "draw": time.perf_counter() - loaded}


WORK: dict[str, Callable[[Options], dict[str, Any]]] = {
    "write": write, "convert": convert, "pickle": pickle, "export": export, "diffusers, folder": diffusers,
    "ours, folder": lambda o: ours(o, o.folder), "ours, single file": lambda o: ours(o, o.single), "ours, pickle": lambda o: ours(o, o.pickled),
}  # fmt: skip


def apart(options: Options, work: str) -> dict[str, Any]:
    """A piece of work in a process of its own, with its largest memory in GiB; where it is only tried, in this one."""
    if options.quick:
        return WORK[work](options) | {"memory": 0.0}
    argv = [sys.executable, __file__, "--work", work, "--out", str(options.out), "--side", str(options.side), "--steps", str(options.steps)]
    argv += ["--seed", str(options.seed), *(["--quick"] if options.quick else [])]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{work} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


# --- all of it ------------------------------------------------------------------------------------------------------------------------------------


def unlike(a: Path, b: Path) -> int:
    """Tensors of two folders of diffusers that are not the same bit for bit, or in one of them only."""
    count = 0
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        with safe_open(a / f"{part}.safetensors", "pt") as one, safe_open(b / f"{part}.safetensors", "pt") as other:
            first, second = ({n.removeprefix("text_model."): n for n in f.keys()} for f in (one, other))  # noqa: SIM118  transformers 4 and 5
            shared = first.keys() & second.keys()
            count += len(first.keys() ^ second.keys()) + sum(not torch.equal(one.get_tensor(first[n]), other.get_tensor(second[n])) for n in shared)
    return count


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for work in tqdm(("write", "convert", "pickle", "export"), desc="checkpoints", file=sys.stderr):
        found[work] = apart(options, work)
    turns = ("diffusers, folder", "ours, folder", "ours, single file", "ours, pickle")
    seconds: dict[str, list[dict[str, Any]]] = {work: [] for work in turns}
    furthest = 0.0
    for _ in tqdm(range(1 if options.quick else options.repeats), desc="pictures", file=sys.stderr):
        for work in turns:
            seconds[work].append(apart(options, work))
            if work.startswith("ours"):
                furthest = max(furthest, float(np.abs(np.load(options.out / "ours.npy") - np.load(options.out / "diffusers.npy")).max()))
    found |= {work: {k: float(np.median([s[k] for s in told])) for k in told[0]} for work, told in seconds.items()}
    theirs = found["diffusers, folder"]
    claims = [
        claim("picture beside that of diffusers, in [0, 1]: furthest value", furthest, "", "<= 0.001"),
        claim("tensors that differ after single file and folder again", unlike(options.folder, options.exported), "", "<= 0"),
        *(claim(f"{work}: memory at most", found[work]["memory"], "GiB", f"<= {MOST_GIB}") for work in (*turns[1:], "export")),
        claim("diffusers, folder: memory", theirs["memory"], "GiB"),
        claim("drawing: diffusers / ours, folder", theirs["draw"] / found["ours, folder"]["draw"], "times", ">= 1"),
        claim("loading: diffusers / ours, folder", theirs["load"] / found["ours, folder"]["load"], "times", ">= 1"),
    ]
    return report(started, options.seed, claims, {"side": options.side, "steps": options.steps, "work": found})


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.work:
        told = WORK[options.work](options)
        print(json.dumps(told | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return
    emit(run(options))


if __name__ == "__main__":
    main()
