"""Where models are: bundled names, files, run folders. No torch here, so that asking is quick."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sfumato.core.checkpoint import FileError, checkpoints, read_metadata

BUNDLED = "emoji"
STABLE = "model_index.json"  # of a folder of diffusers


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
