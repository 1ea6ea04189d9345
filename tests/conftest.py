"""Threads, reproducible examples, shapes checked where they are annotated, and a cache folder of the session's own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from beartype import beartype
from hypothesis import settings
from jaxtyping import AbstractArray, install_import_hook

# the modules with shapes in their annotations
SHAPED = ("nn", "codecs", "gans", "losses", "metrics", "priors", "diffusion", "text.encoder", "data.augment", "data.latents")


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype for the annotations that hold a shape. Other mistakes have errors of their own, which users see and tests ask for."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    return beartype(function)


def has_shape(hint: Any) -> bool:
    """Whether a jaxtyping annotation is this one or inside it."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(has_shape(part) for part in get_args(hint))


def where_there_are_shapes(*, typechecker: Any, jaxtyped: Any = jaxtyping.jaxtyped) -> Callable[[Any], Any]:
    """What the hook decorates with: jaxtyping's own is slow, and most functions have no shape to check."""
    return lambda f: jaxtyped(f, typechecker=typechecker) if any("[Tensor, '" in str(hint) for hint in f.__annotations__.values()) else f


jaxtyping.jaxtyped = where_there_are_shapes
install_import_hook([f"sfumato.{name}" for name in SHAPED], f"sys.modules[{__name__!r}].shapes")  # before sfumato is imported

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # of two that share two cores, each has one
if THREADS == 1:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
if "SFUMATO_CACHE" not in os.environ:  # nothing is written to the user's; all processes of a run share one
    os.environ["SFUMATO_CACHE"] = tempfile.mkdtemp(prefix="sfumato-tests-")
    atexit.register(shutil.rmtree, os.environ["SFUMATO_CACHE"], ignore_errors=True)
os.environ["SFUMATO_LANG"] = "en"
torch.set_num_threads(THREADS)
settings.register_profile("sfumato", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("sfumato")


@pytest.fixture(autouse=True)
def same_arithmetic() -> Iterator[None]:
    """What a test did to the whole process ends with it: the number of threads changes the last bits of sums."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked, as outside of the tests: for what the code itself says of a wrong one."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs codec, text and diffusion of the smoke presets: a real model, trained for seconds."""
    from sfumato.train import autoencoder, diffusion, text

    folder = tmp_path_factory.mktemp("smoke")
    autoencoder.train(*autoencoder.preset_smoke(), folder / "codec")
    text.train(*text.preset_smoke(), folder / "text")
    diffusion.train(*diffusion.preset_smoke(), folder / "diffusion", codec=folder / "codec", text=folder / "text")
    return folder


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Forty pictures of one's own in two sub-folders, discs and squares of six colours with captions: what is said can be seen."""
    import numpy as np
    from PIL import Image, ImageDraw

    colours = ("red", "green", "blue", "orange", "purple", "black")
    for i in range(40):
        rng = np.random.default_rng(i)
        shape, colour = ("square", "circle")[i % 2], colours[i % 6]
        image = Image.new("RGB", (40, 32), tuple(int(v) for v in rng.integers(128, 256, 3)))
        x, y = (int(v) for v in rng.integers(2, 18, 2))
        pen = ImageDraw.Draw(image)
        (pen.ellipse if i % 2 else pen.rectangle)((x, y, x + 14, y + 10), fill=colour)
        path = tmp_path / "own" / shape / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        path.with_suffix(".txt").write_text(f"a {colour} {shape}", encoding="utf-8")
    return tmp_path / "own"


@pytest.fixture
def own_shards(own_folder: Path, tmp_path: Path) -> Path:
    """The same pictures as WebDataset shards of nine."""
    from sfumato.data.folder import scan
    from sfumato.data.shards import write_shards

    write_shards(scan(own_folder), tmp_path / "shards", per_shard=9)
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of Stable Diffusion, and what lies beside it: a LoRA, a learned word, a photograph, a picture of another interface."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from safetensors.torch import load_file, save_file

    from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
    from sfumato.codecs.bottlenecks.kl import KLConfig
    from sfumato.codecs.resnets import ResnetConfig
    from sfumato.convert.stable import Checkpoint, write_single
    from sfumato.diffusion.discrete import SchedulerConfig
    from sfumato.diffusion.unet import UNet, UNetConfig
    from sfumato.text.clip import ClipConfig, ClipText, usual_tokenizer
    from sfumato.text.prompts import Ear

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("stable")
    net = ResnetConfig(width=32, multipliers=(1, 1, 1, 1), blocks=1, attention=(), resolution=512, z_channels=4, double_z=True)
    ear = Ear(ClipText(ClipConfig(width=64, inner=64, depth=2, heads=1)), usual_tokenizer(), 49_407)
    unet = UNet(UNetConfig(widths=(32, 64), depths=(0, 1), heads=(1, 1), blocks=1, context=64))
    codec = Autoencoder(AutoencoderConfig(convnet=net, bottleneck=KLConfig(channels=4)))
    write_single(Checkpoint(unet, codec, [ear], SchedulerConfig(), "1", 512), out / "sd15.safetensors")
    torch.save({"state_dict": load_file(out / "sd15.safetensors")}, out / "sd15.ckpt")
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{layer}.lora_down.weight": torch.randn(2, 64), f"{layer}.lora_up.weight": torch.randn(64, 2)}, out / "style.safetensors")
    torch.save({"string_to_param": {"*": torch.randn(2, 64)}, "name": "x"}, out / "my-style.pt")
    Image.linear_gradient("L").convert("RGB").save(out / "photo.png")
    Image.new("L", (256, 256), 255).save(out / "mask.png")
    told = PngInfo()
    told.add_text("parameters", "a fox\nSteps: 1, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, Model: x")
    Image.new("RGB", (64, 64)).save(out / "webui.png", pnginfo=told)
    return out
