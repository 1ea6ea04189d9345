"""Trainings that are killed, and disks that fail. Run as a script it is the training that is killed, again and again."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sfumato.core import checkpoint
from sfumato.core.checkpoint import FileError, checkpoints, read_metadata
from sfumato.train.loop import Batch

sys.path.insert(0, str(Path(__file__).parent))
from test_loop import LOOP, ROOT, Toy, assert_same, final, fit

LONG = replace(LOOP, images=12_800, save_every=64, sample_every=256, log_every=640)
MOMENTS = 50
IN_A_SAVE = ("half written", "not synced", "not renamed", "just renamed", "old ones not removed")

linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc, which tells what file a handle is of, is of Linux")


def moments() -> list[tuple[str, int]]:
    """Where each life ends: at the n-th step, or at the n-th time that a save comes so far. Half of them are inside a save."""
    rng = np.random.default_rng(7)
    kinds = [IN_A_SAVE[i // 2 % len(IN_A_SAVE)] if i % 2 else "step" for i in range(MOMENTS)]
    return [(kind, int(rng.integers(5, 16) if kind == "step" else rng.integers(2, 6))) for kind in kinds]


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def of_a_checkpoint(*args: Any, **options: Any) -> bool:
    """Whether a call of mkstemp, fsync, replace or save_file is about a state or a pack."""
    names = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else str(a) for a in args] + [str(options.get("prefix", ""))]
    return any(Path(n).name.startswith((".state-", ".model-", "state-", "model-")) for n in names if len(n) < 500)


def at(n: int, before: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    """`before`, but its n-th call for a checkpoint is `then`."""
    left = [n]

    def call(*args: Any, **options: Any) -> Any:
        left[0] -= of_a_checkpoint(*args, **options)
        return then(*args, **options) if left[0] == 0 and of_a_checkpoint(*args, **options) else before(*args, **options)

    return call


def trap(kind: str, n: int) -> None:
    """Arranges the end of this process."""
    save, replace_, unlink = safetensors.torch.save_file, os.replace, Path.unlink

    def half(tensors: Any, path: Any, metadata: Any = None) -> None:
        save(tensors, path, metadata)
        os.truncate(path, Path(path).stat().st_size // 2)
        dies()

    def renamed(a: Any, b: Any) -> None:
        replace_(a, b)
        dies()

    def removing(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(("state-", "model-")):
            dies()
        unlink(path, missing_ok)

    match kind:
        case "half written":
            safetensors.torch.save_file = at(n, save, half)
        case "not synced":
            os.fsync = at(n, os.fsync, lambda handle: dies())
        case "not renamed":
            os.replace = at(n, replace_, lambda a, b: dies())
        case "just renamed":
            os.replace = at(n, replace_, renamed)
        case "old ones not removed":
            Path.unlink = removing  # type: ignore[method-assign, assignment]


class Watched(Toy):
    """Writes down how far it has come, and dies at its n-th step."""

    def __init__(self, progress: mmap.mmap, steps: int) -> None:
        super().__init__()
        self.progress, self.steps = progress, steps

    def batch(self, positions: np.ndarray) -> Batch:
        if len(positions) == LONG.batch_size:
            self.progress[:8] = int(positions[0]).to_bytes(8, "little")
            self.steps -= 1
            if self.steps == 0:
                dies()
        return super().batch(positions)


def live_and_die(run: Path) -> None:
    """One life after another in processes of their own, forked before torch has begun any thread; says how each ended."""
    import accelerate  # noqa: F401  # once, not in every life

    tempfile.tempdir = str(run.parent / "nowhere")  # not there, unless PyTorch makes it for its compiler's cache
    torch.set_num_threads(1)
    progress = mmap.mmap(-1, 8)
    for kind, n in moments():
        child = os.fork()
        if child == 0:
            try:
                trap(kind, n)
                fit(run, LONG, task=Watched(progress, n if kind == "step" else 10**9))
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        states = checkpoints(run, "state")
        saved = read_metadata(states[-1])["counters"]["images"] if states else 0  # type: ignore[index, call-overload]
        print(json.dumps({"kind": kind, "killed": os.WIFSIGNALED(status), "at": int.from_bytes(progress[:8], "little"), "saved": saved}), flush=True)


@linux
def test_a_training_that_is_killed_fifty_times_ends_as_if_it_never_was(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": "/nowhere"}
    done = subprocess.run([sys.executable, __file__, str(tmp_path / "run")], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lives = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lives) == MOMENTS, done.stderr
    assert all(life["killed"] for life in lives), done.stderr
    in_a_save = [life for life in lives if life["kind"] in IN_A_SAVE]
    assert len(in_a_save) >= 15
    assert all(life["at"] % LONG.save_every == LONG.save_every - LONG.batch_size for life in in_a_save), "elsewhere"
    assert all(life["at"] - life["saved"] <= LONG.save_every for life in lives), "more than one interval was lost"
    assert lives[-1]["saved"] < LONG.images
    torch.set_num_threads(1)
    fit(tmp_path / "run", LONG)
    fit(tmp_path / "whole", LONG)
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert list((tmp_path / "run").rglob("*.part")) == [], "what was half written is left lying about"
    assert [p for p in (tmp_path / "nowhere").rglob("*") if p.is_file()] == [], "something was written to the folder for temporary files"


# --- disks that fail ------------------------------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("where", ["mkstemp", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_save_that_fails_says_so_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    torch.set_num_threads(1)
    fit(tmp_path / "whole")
    fit(tmp_path / "run", stop_at=160)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")}

    module = checkpoint.tempfile if where == "mkstemp" else checkpoint.os
    works, failed = getattr(module, where), []

    def fails(*args: Any, **options: Any) -> Any:
        if not of_a_checkpoint(*args, **options):
            return works(*args, **options)
        failed.append(args)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(module, where, fails)
        with pytest.raises(FileError, match=os.strerror(number)) as error:
            fit(tmp_path / "run")
        assert "\n" not in str(error.value)
    assert len(failed) == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")} == before
    assert list((tmp_path / "run").rglob("*.part")) == []
    fit(tmp_path / "run")
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a file's size are of Unix")
def test_a_short_write_is_one_clear_line(tmp_path: Path) -> None:
    """The system writes a part of the state and then no more, as on a full disk."""
    run = tmp_path / "run"
    argv = ["train", "autoencoder", "--preset", "smoke", "--out", str(run), "--device", "cpu", "--threads", "1"]
    code = (
        "import resource, sys; from sfumato.apps.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY)); main(sys.argv[2:])"
    )

    def train(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, str(limit), *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = train(100_000)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sfumato: error: cannot write ")
    assert "Traceback" not in done.stderr
    assert list(run.rglob("*.part")) == []
    assert checkpoints(run, "state") == []
    assert train(2**30).returncode == 0
    assert final(run)


if __name__ == "__main__":
    live_and_die(Path(sys.argv[1]))
