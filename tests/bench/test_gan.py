"""The bench of GANs, in seconds: cells, a race and a step, and the second time from what was kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import gan


def found(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    gan.main(["--quick", *options])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])  # type: ignore[no-any-return]


@pytest.mark.slow
def test_quick_runs_every_part_and_keeps_its_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 128)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes(i % 10 for i in range(count)))
    where = ("--data", str(tmp_path), "--out", str(tmp_path / "out"))
    parts = found(capsys, *where)["details"]
    assert set(parts["study"]["rows"]) == {"wasserstein + none", "wasserstein + wgan-gp", "relativistic + none", "relativistic + wgan-gp"}
    assert set(parts["race"]["rows"]) == {*gan.RIVALS, gan.COLOURED}
    assert {"ours", "textbook"} == set(parts["step"])
    again = found(capsys, *where, "--only", "study")["details"]["study"]
    assert again["rows"] == parts["study"]["rows"], "from the files of the first time"


def test_the_interval_of_a_ratio_holds_every_choice_of_seeds() -> None:
    ratio, low, high = gan.ratio_of([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    assert (ratio, low, high) == (0.5, 0.5, 0.5)
    ratio, low, high = gan.ratio_of([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert low < ratio < high
    assert ratio == 0.5
