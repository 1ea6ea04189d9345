"""A model of one's own pictures: `python bench/own.py --data FOLDER`. One JSON object on stdout.

Takes `count` pictures of a folder, evenly, runs `sfumato train all` on them as a user would, and reports minutes, how well pictures that no
training saw are repaired by the codec, how far what is drawn is from the folder beside the bundled model's pictures, and how many samples are
copies. The sheets `samples.png` and `nearest.png` in --out are unselected.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import ROOT, claim, emit, report

from sfumato.data.folder import scan


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures `sfumato train all` on a folder, and prints one JSON object."""

    data: Path
    """A folder of pictures."""
    count: int = 50
    """Pictures taken of it; 0 takes all."""
    out: Path = ROOT / "runs" / "bench-own"
    """The run folder; it must not exist, or it is gone on with and its minutes mean nothing."""
    effort: float = 1.0
    """How long to train, as a factor."""
    quick: bool = False
    """A smoke run of seconds: its figures mean nothing."""


def taken(options: Options) -> Path:
    """A folder with the pictures to train on, in the sub-folders that they lay in, with their captions."""
    folder = options.out.with_name(options.out.name + "-pictures")
    if folder.exists():
        return folder
    names = [e.name for e in scan(options.data, progress=False).entries]
    count = min(options.count or len(names), len(names))
    for i in range(count):
        source = options.data / names[i * len(names) // count]
        target = folder / names[i * len(names) // count]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        if source.with_suffix(".txt").exists():
            shutil.copy(source.with_suffix(".txt"), target.with_suffix(".txt"))
    return folder


def run(options: Options) -> dict[str, Any]:
    started = time.perf_counter()
    folder = taken(options)
    effort = 0.001 if options.quick else options.effort
    command = [sys.executable, "-m", "sfumato.apps.cli", "train", "all", "--data", str(folder), "--out", str(options.out), "--effort", str(effort)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - began) / 60
    found = json.loads((options.out / "report.json").read_text())
    bundled = found["distance of emoji"]
    claims = [
        claim("minutes of `sfumato train all`", minutes, "min", "<= 15"),
        claim("PSNR of unseen pictures through the codec", found["codec_psnr_of_unseen"], "dB", ">= 24"),
        claim("kernel distance to the folder / the bundled model's", found["distance"] / bundled, "fraction", "<= 0.5"),
        claim("samples that are copies of a training picture", found["copies"], "fraction"),
    ]
    return report(started, 0, claims, found)


def main(argv: list[str] | None = None) -> None:
    emit(run(tyro.cli(Options, args=argv)))


if __name__ == "__main__":
    main()
