from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import own


@pytest.mark.slow
def test_quick_runs_the_whole_command(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.main(["--data", str(own_folder), "--count", "20", "--out", str(tmp_path / "run"), "--quick"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "commit", "seed", "seconds", "claims", "details"}
    assert len(found["claims"]) == 4
    assert all(c["value"] is not None for c in found["claims"])
    assert found["details"]["pictures"] == 20
    assert len(list((tmp_path / "run-pictures").rglob("*.txt"))) == 20
    for name in ("samples.png", "nearest.png", "model.safetensors"):
        assert (tmp_path / "run" / name).exists()
