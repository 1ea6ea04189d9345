from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import evaluation


def test_quick_measures_every_part_and_draws_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.main(["--quick", "--plots", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert set(found["details"]) == set(evaluation.PARTS)
    by_name = {c["name"]: c for c in found["claims"]}
    beside = [c for n, c in by_name.items() if n.endswith("relative difference")]
    assert len(beside) == 10
    assert all(c["holds"] for c in beside), "no figure differs from its reference, however small the run"
    moves = found["details"]["moves"]
    assert moves["resize"]["antialias"] == pytest.approx(0, abs=1e-3)
    assert min(v for k, v in moves["resize"].items() if k != "antialias") > 1
    assert moves["jpeg"]["30"] > moves["jpeg"]["95"] > 0.1
    assert {p.name for p in tmp_path.iterdir()} == {"frechet-count.svg", "frechet-jpeg.svg"}
    assert "<svg xmlns" in (tmp_path / "frechet-jpeg.svg").read_text()
