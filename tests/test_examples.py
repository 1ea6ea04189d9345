"""The short scripts run, on a few pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_vqgan_in_python(own_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "vqgan_in_python.py"), str(own_folder), "2"], capture_output=True, text=True, timeout=300, check=True
    )
    lines = re.findall(r"(.+), epoch \d: loss ([\d.]+), test error ([\d.]+), codes in use (\d+)%", done.stdout)
    assert [name for name, *_ in lines] == ["VQ-VAE", "VQ-VAE", "VQGAN", "VQGAN"]
    assert float(lines[1][2]) < float(lines[0][2]), "the codec learns"
    assert float(lines[3][2]) < float(lines[0][2]), "and goes on where it was"
    assert all(int(used) > 0 for *_, used in lines)
