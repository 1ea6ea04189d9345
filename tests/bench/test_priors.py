"""The bench of priors, in seconds: every way is trained, drawn with, looked at and timed, on the drawings and on pictures of classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import priors


def measured(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    priors.main(["--quick", "--count", "24", "--repeats", "1", *options])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])["details"]  # type: ignore[no-any-return]


def check(rows: dict[str, dict[str, list[float]]]) -> None:
    assert list(rows) == [*priors.BASELINES, *priors.LEARNED]
    for name, row in rows.items():
        kernel = next(v for k, v in row.items() if k.startswith("kernel distance"))
        assert len(kernel) == 3, name
        assert {"precision", "recall", "seconds a picture, one at a time", "codec alone: kernel distance"} <= row.keys()
        assert "label as asked, by the judge" in row


@pytest.mark.slow
def test_quick_compares_all_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--out", str(tmp_path / "out"))
    check(found["quality"]["rows"])
    assert "style as asked, by the judge" in found["quality"]["rows"]["gpt"]
    assert (tmp_path / "out" / "priors.png").exists()
    assert {"gpt, cached", "gpt, not cached", "maskgit, 8 steps"} == set(found["speed"]["batch 1"])


@pytest.mark.slow
def test_quick_compares_all_ways_by_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 100)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes(i % 10 for i in range(count)))
    check(measured(capsys, "--only", "quality", "--data", str(tmp_path), "--out", str(tmp_path / "out"))["quality"]["rows"])
