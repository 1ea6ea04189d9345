"""`sfumato info`: what a file is, told from its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.core.checkpoint import FileError, checkpoints, read_metadata
from sfumato.core.config import to_json
from sfumato.core.images import texts_in
from sfumato.core.request import METADATA_KEY, SEVERAL_KEY, SOURCE_KEY, parse_metadata

FOREIGN = (".ckpt", ".pt", ".pth", ".bin")  # pickles, of which nothing is run


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
            text, parameters, several, source = map(texts_in(image).get, (METADATA_KEY, "parameters", SEVERAL_KEY, SOURCE_KEY))
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise FileError(f"{path} begins like a picture but cannot be read: {e}") from None
    if text:
        facts |= _record(parse_metadata(text))
    elif several:
        records = _several(several)
        first = _record(records[0])
        prompts = list(dict.fromkeys(str(r["request"].prompt) for r in records))
        facts |= {"pictures": len(records), "drawn by": first["drawn by"], "prompts": "; ".join(prompts), "seeds": [r["seed"] for r in records]}
    elif parameters:
        facts["parameters"] = parameters
    return facts | ({"source": source} if source else {})


def _several(text: str) -> list[dict[str, Any]]:
    """The records of a grid or a sheet. Raises ValueError where there is none."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list) or not found:
        raise ValueError("the picture's metadata cannot be read: it should be a list of records")
    return [parse_metadata(json.dumps(r)) for r in found]


def _record(record: dict[str, Any]) -> dict[str, Any]:
    model = record["model"]
    facts = {"drawn by": f"sfumato {record['version']}, model {model['name']} {model['hash'][:10]}, {record['engine']}, {record['dtype']}"}
    without = () if record["request"].init else ("strength",)
    asked = {("asked size" if k == "size" else k): v for k, v in to_json(record["request"]).items() if v is not None and k not in without}
    facts |= asked | {"seed": record["seed"], "style": record.get("style")}
    if "until" not in record:
        return facts
    end = {f"until {k}": getattr(record["until"], k) for k in ("prompt", "style", "seed")}
    return facts | {k: v for k, v in end.items() if v is not None} | {k: record[k] for k in ("frames", "fps")}


def _tensors(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"what": "safetensors file", "bytes": f"{path.stat().st_size:,}"}
    meta = {} if path.suffix in FOREIGN else read_metadata(path)
    run, counters = meta.get("run"), meta.get("counters")
    if isinstance(run, dict) and isinstance(counters, dict):
        return facts | {"what": f"training state ({run.get('kind')})", **counters}
    if "kind" not in meta:
        from sfumato.convert.about import about

        return about(path) | {"bytes": facts["bytes"]}
    facts["what"] = f"model ({meta['kind']})"
    shown = ("hash", "format", "images", "size", "styles", "labels", "prediction", "path")
    facts |= {k: meta[k] for k in shown if meta.get(k) not in (None, [])}
    if isinstance(meta.get("words"), dict):
        facts["concepts"] = len(meta["words"])
    return facts | {name: json.dumps(meta[name]) for name in ("codec", "text", "denoiser", "prior") if name in meta}


def _pipeline(path: Path) -> dict[str, Any]:
    """Of a folder of diffusers."""
    from sfumato.convert.about import of_unet
    from sfumato.convert.diffusers import read_json, scheduler_config, unet_config

    index = read_json(path / "model_index.json")
    parts = {k: v for k, v in index.items() if isinstance(v, list) and v and v[0]}
    facts = {"what": "folder of diffusers", "kind": index.get("_class_name"), "holds": ", ".join(parts)}
    if not all((path / name).exists() for name in ("unet/config.json", "scheduler/scheduler_config.json")):
        return facts
    told, scheduler = read_json(path / "unet" / "config.json"), scheduler_config(read_json(path / "scheduler" / "scheduler_config.json"))
    files = [p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin")]
    facts |= of_unet(unet_config(told, path))
    facts |= {"predicts": scheduler.prediction, "sampler": scheduler.sampler, "schedule": scheduler.schedule}
    variants = sorted({p.name.split(".")[1] for p in files if p.name.count(".") == 2})
    return facts | ({"variants": ", ".join(variants)} if variants else {}) | {"bytes": f"{sum(p.stat().st_size for p in files):,}"}


def _component(config: Path) -> str | None:
    """What one of diffusers' or transformers' networks is called; None of a run."""
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        return told.get("_class_name") or ", ".join(told.get("architectures") or ()) or None
    except (ValueError, AttributeError, TypeError):
        return None


def _run(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    if (path / "model_index.json").exists():
        return _pipeline(path)
    if config.exists() and (kind := _component(config)):
        return {"what": f"folder of diffusers: {kind}"}
    if not config.exists():
        raise FileError(f"{path} is a folder without a config.json: not a run of sfumato")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        kind, images = settings["kind"], settings["loop"]["images"]
    except (ValueError, KeyError, TypeError):
        raise FileError(f"{config} is not the config of a run of sfumato") from None
    states = checkpoints(path, "state")
    facts: dict[str, Any] = {"what": f"training run ({kind})"}
    if states:
        counters: Any = read_metadata(states[-1])["counters"]
        facts |= {
            "images": f"{counters['images']:,} of {images:,}",
            "skipped steps": counters["skipped"],
            "newest state": states[-1].name,
        }
    return facts | {"settings": json.dumps(settings["config"])}
