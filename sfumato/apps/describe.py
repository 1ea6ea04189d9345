"""`sfumato info`: what a file is, told from its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.core.checkpoint import FileError, checkpoints, read_metadata
from sfumato.core.request import METADATA_KEY


def describe(path: Path) -> dict[str, Any]:
    """Facts about a pack, a state, a run folder or a picture, in the order to print them. Raises FileError for anything else."""
    if not path.exists():
        raise FileError(f"there is no file {path}")
    if path.is_dir():
        return _run(path)
    with path.open("rb") as f:
        start = f.read(8)
    if start.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8")):
        return _picture(path)
    return _tensors(path)


def _picture(path: Path) -> dict[str, Any]:
    try:
        with Image.open(path) as image:
            facts: dict[str, Any] = {"what": f"{image.format} picture", "size": f"{image.width} x {image.height}", "mode": image.mode}
            text, parameters = image.info.get(METADATA_KEY), image.info.get("parameters")
    except (OSError, SyntaxError) as e:
        raise FileError(f"{path} begins like a picture but cannot be read: {e}") from None
    if text:
        record = json.loads(text)
        facts |= {"drawn by": f"sfumato {record['version']}, model {record['model']['name']} {record['model']['hash'][:10]}, {record['engine']}"}
        facts |= {k: v for k, v in record["request"].items() if v is not None} | {"seed": record["seed"], "style": record["style"]}
    elif parameters:
        facts["parameters"] = parameters
    return facts


def _tensors(path: Path) -> dict[str, Any]:
    meta = read_metadata(path)
    facts: dict[str, Any] = {"what": "safetensors file", "bytes": f"{path.stat().st_size:,}"}
    if "run" in meta:
        run, counters = meta["run"], meta["counters"]
        return facts | {"what": f"training state ({run['kind']})", **counters}  # type: ignore[call-overload, dict-item, index]
    if "kind" not in meta:
        return facts | {"of sfumato": "no: it says nothing of its kind"}
    facts["what"] = f"model ({meta['kind']})"
    shown = ("hash", "format", "images", "size", "styles", "labels", "prediction", "path")
    facts |= {k: meta[k] for k in shown if meta.get(k) not in (None, [])}
    if isinstance(meta.get("words"), dict):
        facts["concepts"] = len(meta["words"])
    return facts | {name: json.dumps(meta[name]) for name in ("codec", "text", "denoiser") if name in meta}


def _run(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    if not config.exists():
        raise FileError(f"{path} is a folder without a config.json: not a run of sfumato")
    settings = json.loads(config.read_text())
    states = checkpoints(path, "state")
    facts: dict[str, Any] = {"what": f"training run ({settings['kind']})"}
    if states:
        counters: Any = read_metadata(states[-1])["counters"]
        facts |= {
            "images": f"{counters['images']:,} of {settings['loop']['images']:,}",
            "skipped steps": counters["skipped"],
            "newest state": states[-1].name,
        }
    return facts | {"settings": json.dumps(settings["config"])}
