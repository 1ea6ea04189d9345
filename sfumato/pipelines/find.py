"""Where models are: bundled names, files, run folders. No torch here, so that asking is quick."""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

from sfumato.core.checkpoint import FileError, checkpoints, read_metadata
from sfumato.core.request import TAG

BUNDLED = "emoji"
STABLE = "model_index.json"  # of a folder of diffusers
LORA_FILE = "pytorch_lora_weights.safetensors"  # of a folder with a LoRA of diffusers


def bundled() -> dict[str, Path]:
    """{name: file} of the models that come with the package."""
    folder = Path(str(resources.files("sfumato") / "bundled"))
    return {p.stem: p for p in sorted(folder.glob("*.safetensors"))}


def find(model: str | Path | None, what: str = "model") -> Path:
    """A bundled model's name, a pack, or a run folder (its newest pack) -> the file; a folder of diffusers as it is. None is the bundled default."""
    known = bundled()
    if model is None:
        if BUNDLED not in known:
            raise FileError("this installation has no bundled model: name one with --model FILE")
        return known[BUNDLED]
    path = Path(model)
    if path.is_dir():
        if (path / STABLE).exists():
            return path
        ended = path / "model.safetensors"
        packs = [ended] if (path / "report.json").exists() and ended.exists() else checkpoints(path, "model")  # the first of `train all`
        if not packs:
            raise FileError(f"{path} is a folder without a model-*.safetensors: name a run folder or a model file")
        return packs[-1]
    if path.exists():
        return path
    if str(model) in known:
        return known[str(model)]
    drawing = [name for name, file in known.items() if read_metadata(file).get("kind") != "upscaler"]
    raise FileError(
        f"{what} (={str(model)!r}) must be a file, a run folder, a folder of diffusers or one of: "
        f"{', '.join(drawing) or '(no bundled models here)'}; nothing is downloaded"
    )


def name_of(path: Path) -> str:
    """What a model is called: of a run the folder, since all runs call their files alike."""
    told = "report.json" if path.stem == "model" else "config.json" if path.stem.startswith("model-") or path.stem == "packed" else ""
    folder = path.resolve().parent
    return folder.name if told and (folder / told).exists() else path.stem if path.is_file() else path.resolve().name


def strength_of(told: str, prompt: str | None = None) -> tuple[Path, float]:
    """ "a.safetensors:0.8" -> the file and 0.8; where nothing is said what the prompt says ("<lora:a:0.8>"), else 1. Raises ValueError."""
    name, colon, number = told.rpartition(":")
    file, strength = Path(told), None
    if colon and name and not file.exists():
        file = Path(name)
        try:
            strength = float(number)
        except ValueError:
            raise ValueError(f"lora (={told!r}) must be a file, or a file and its strength: a.safetensors:0.8") from None
    if strength is None:
        said = {tag.group(1): tag.group(2) for tag in TAG.finditer(prompt or "")}
        strength = float(said.get(file.stem) or 1.0)
    if not math.isfinite(strength):
        raise ValueError(f"lora (={told!r}) must have a finite strength")
    return named_file(file), strength


def named_file(told: str | Path) -> Path:
    """A file of a LoRA or of learned words; of a folder the newest of a run of ours, or what diffusers calls its file."""
    path = Path(told)
    if not path.is_dir():
        return path
    of_run = checkpoints(path, "model")
    return of_run[-1] if of_run else path / LORA_FILE
