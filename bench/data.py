"""Data at scale: `python bench/data.py`. One JSON object on stdout.

Makes a folder of many small pictures (100,000, of 32 x 32 pixels) and measures looking at it, sharding it, indexing the shards, and drawing
training positions from them: seconds, pictures a second, and what each adds to this process's resident memory over the same with a tenth.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import claim, emit, report
from PIL import Image

from sfumato.core.images import decode
from sfumato.data.folder import scan
from sfumato.data.shards import Shards, write_shards


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures folders and shards, and prints one JSON object."""

    quick: bool = False
    """A smoke run of a few hundred pictures: its figures mean nothing."""
    pictures: int = 100_000
    """Pictures of the large folder; the small one has a tenth."""
    stage: str = ""
    """Only for this script itself: one measurement in a process of its own."""
    folder: Path = Path()
    """Only for this script itself."""


def make(folder: Path, n: int) -> None:
    """n different pictures in folders of 1,000."""
    for i in range(n):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04d}").mkdir(parents=True)
        pixels = np.random.Generator(np.random.PCG64(i)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
        (folder / f"{i // 1000:04d}" / f"{i:06d}.png").write_bytes(buffer.getvalue())


def resident() -> float:
    """MiB of this process in memory, pages of mapped files not counted."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def stage(what: str, folder: Path) -> dict[str, float]:
    """One measurement; in a process of its own, so that memory is its own too."""
    before, began = resident(), time.perf_counter()
    out = folder.with_name(folder.name + "-shards")
    match what:
        case "scan":
            held: Any = scan(folder, progress=False)
        case "rescan":
            held = scan(folder, progress=False)
        case "shard":
            held = None
            write_shards(scan(folder, progress=False), out)
        case "index":
            held = Shards(out)
        case _:
            held = Shards(out)
            began = time.perf_counter()
            for step in range(20):
                for i in held.order(0, np.arange(step * 997, step * 997 + 64)):
                    decode(held[int(i)].data)
    return {"seconds": time.perf_counter() - began, "mib": resident() - before}


STAGES = ("scan", "rescan", "shard", "index", "draw")


def measured(folder: Path, cache: Path) -> dict[str, dict[str, float]]:
    found = {}
    for what in STAGES:
        command = [sys.executable, __file__, "--stage", what, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"SFUMATO_CACHE": str(cache), "PATH": ""})
        found[what] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    n = 400 if options.quick else options.pictures
    with tempfile.TemporaryDirectory() as root:
        large, small = Path(root) / "large", Path(root) / "small"
        make(large, n)
        make(small, n // 10)
        big, little = (measured(f, Path(root) / "cache") for f in (large, small))
    texts = {
        "scan": "first look at a folder", "rescan": "second look, nothing changed", "shard": "writing shards", "index": "indexing shards",
        "draw": "drawing 1,280 positions of training and decoding them",
    }  # fmt: skip
    claims = []
    for what, text in texts.items():
        claims.append(claim(f"{text}, {n:,} pictures", big[what]["seconds"], "s"))
        grown = big[what]["mib"] - little[what]["mib"]
        goal = "<= 8" if what in ("index", "draw") else None
        claims.append(claim(f"{text}: memory over that of {n // 10:,} pictures", grown, "MiB", goal))
    return report(started, 0, claims, {"large": big, "small": little, "pictures": n})


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv)
    if options.stage:
        print(json.dumps(stage(options.stage, options.folder)))
        return
    emit(run(options))


if __name__ == "__main__":
    main()
