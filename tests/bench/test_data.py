from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import data


def test_quick_measures_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    data.main(["--quick"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "commit", "seed", "seconds", "claims", "details"}
    assert len(found["claims"]) == 2 * len(data.STAGES)
    assert all(c["value"] is not None for c in found["claims"])
    assert set(found["details"]["large"]) == set(data.STAGES)
