"""The architecture of DESIGN.md, read from the imports: a file imports from lower floors or from its own folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sfumato"
FLOORS = (
    ("core",),
    ("nn", "data"),
    ("text", "codecs", "gans", "losses"),
    ("priors", "diffusion", "metrics"),
    ("convert",),
    ("zoo", "parts"),
    ("pipelines",),
    ("train",),
    ("apps",),
)
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
OF_THE_ROOT = {"load": "pipelines", "__version__": "core"}  # where the names live that `sfumato` itself offers
WITHOUT_TORCH = ("seams", "request", "config", "checkpoint", "rng", "images", "report", "runlog")
FORBIDDEN_NAMES = ("utils", "util", "helper", "helpers", "base", "manager", "v2")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """sfumato/data/emoji.py -> "sfumato.data.emoji"; a package's own file is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[str]:
    """Every sfumato module that the code names, at its top, in functions, for type checkers, and through importlib."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sfumato":
            yield f"sfumato.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{source}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def violations(code: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports against the floors. The package's own `sfumato/__init__.py` and `__main__.py` stand above all."""
    parts = module.split(".")
    if len(parts) < 2 or parts[1] == "__main__":
        return []
    own = parts[1]
    if own not in FLOOR:
        return [f"{module}: {own} has no floor"]
    found = []
    for name in imports(ast.parse(code), module, is_package):
        root, _, rest = name.partition(".")
        if root != "sfumato" or not rest:  # the bare root loads nothing; what is taken from it counts
            continue
        theirs = OF_THE_ROOT.get(rest, rest.split(".")[0])
        if theirs not in FLOOR:
            found.append(f"{module} imports {name}, which has no floor")
        elif theirs != own and FLOOR[theirs] >= FLOOR[own]:
            found.append(f"{module} (floor {FLOOR[own]}) imports {name} (floor {FLOOR[theirs]})")
    return found


def loaded(*arguments: str) -> set[str]:
    """The top-level packages that a fresh interpreter loads, and nothing may be printed by the import itself."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, cwd=ROOT, check=True)
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_there_are_sources() -> None:
    assert len(SOURCES) > 15


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert violations(path.read_text(), module_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    "code",
    [
        "from sfumato.train.loop import Trainer",
        "import sfumato.train.loop",
        "from sfumato import train",
        "import sfumato\nsfumato.load()",
        "from sfumato import load",
        "from ..train import loop",
        "from ..losses import perceptual",
        "from sfumato.losses.perceptual import perceptual",
        "def f():\n    from sfumato.diffusion import path",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sfumato.apps import cli",
        "import importlib\nimportlib.import_module('sfumato.pipelines.load')",
        "from sfumato.utils import anything",
    ],
)
def test_the_checker_sees_a_wrong_import(code: str) -> None:
    assert len(violations(code, "sfumato.codecs.planted")) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import torch, json",
        "from sfumato.core.config import to_json",
        "from sfumato import core",
        "import sfumato\nprint(sfumato.__version__)",
        "from sfumato.codecs.bottlenecks.kl import KL",
        "from .bottlenecks import kl",
        "from . import convnets",
        "from ..nn.layers import ResBlock",
    ],
)
def test_the_checker_lets_a_right_import_pass(code: str) -> None:
    assert violations(code, "sfumato.codecs.planted") == []


def test_a_folder_without_a_floor_is_seen() -> None:
    assert violations("", "sfumato.shed.things") == ["sfumato.shed.things: shed has no floor"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_and_docstrings(path: Path) -> None:
    assert not set(path.stem.lower().split("_")) & set(FORBIDDEN_NAMES)
    code = path.read_text()
    empty_package = path.name == "__init__.py" and not code.strip()
    assert empty_package or ast.get_docstring(ast.parse(code)), f"{path} needs a docstring"


def test_importing_the_package_loads_no_torch_and_prints_nothing() -> None:
    assert "torch" not in loaded("-c", "import sfumato")
    quiet = subprocess.run([sys.executable, "-c", "import sfumato"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert quiet.stdout == quiet.stderr == ""


def test_the_light_part_of_core_loads_no_torch() -> None:
    modules = [f"sfumato.core.{name}" for name in WITHOUT_TORCH if (PACKAGE / "core" / f"{name}.py").exists()]
    names = loaded("-c", "import " + ", ".join(modules))
    assert "sfumato.core.checkpoint" in names
    assert "torch" not in names


def test_help_loads_no_torch() -> None:
    if not (PACKAGE / "apps" / "cli.py").exists():
        return
    assert "torch" not in loaded("-m", "sfumato.apps.cli", "--help")


def test_the_torch_check_can_fail() -> None:
    assert "torch" in loaded("-c", "import sfumato.nn.layers")
