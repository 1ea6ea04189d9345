"""Shapes are annotations: checked in the tests, free of charge outside of them."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import sfumato
from sfumato.codecs.bottlenecks.kl import split
from sfumato.core.seams import Cond
from sfumato.data.augment import recolour
from sfumato.diffusion.dit import DiT, DiTConfig
from sfumato.diffusion.path import PathConfig, make_path, timesteps
from sfumato.diffusion.samplers import sample_ddim
from sfumato.nn.attention import Attention

PACKAGE = Path(sfumato.__file__).parent
SHAPED = (
    "nn/*.py",
    "codecs/**/*.py",
    "gans/*.py",
    "losses/*.py",
    "priors/*.py",
    "diffusion/*.py",
    "text/encoder.py",
    "data/augment.py",
    "data/latents.py",
)
MODULES = sorted(
    ".".join(("sfumato", *path.relative_to(PACKAGE).with_suffix("").parts))
    for pattern in SHAPED
    for path in PACKAGE.glob(pattern)
    if path.name != "__init__.py"
)


def functions(module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions and methods that a module's text defines."""
    for name, value in vars(module).items():
        members = vars(value).items() if inspect.isclass(value) and value.__module__ == module.__name__ else ()
        for path, f in [(name, value), *((f"{name}.{member}", f) for member, f in members)]:
            if inspect.isfunction(f) and inspect.unwrap(f).__code__.co_filename == module.__file__:
                yield path, f


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_of_tensors_say_their_shapes(name: str) -> None:
    """jaxtyping skips an annotation that it cannot read, so that each is read here; and no bare tensor goes in or out."""
    found = dict(functions(importlib.import_module(name)))
    assert found
    for function, f in found.items():
        hints = typing.get_type_hints(inspect.unwrap(f))
        private = any(part.startswith("_") and part != "__call__" for part in function.split("."))
        bare = [k for k, hint in hints.items() if hint in (torch.Tensor, torch.Tensor | None)]
        assert private or not bare, f"{name}.{function}: {bare} without a shape"
        if "jaxtyping." in str(list(hints.values())):
            assert hasattr(f, "__wrapped__"), f"{function} is not checked: was {name} imported before the hook of conftest.py?"


def test_there_are_modules() -> None:
    assert len(MODULES) > 15


RF = make_path(PathConfig())
WRONG = {
    "axes": lambda: Attention(8, 2)(torch.zeros(2, 8)),
    "another mask": lambda: Attention(8, 2)(torch.zeros(2, 3, 8), mask=torch.ones(1, 3, dtype=torch.bool)),
    "not a mask": lambda: Attention(8, 2)(torch.zeros(2, 3, 8), mask=torch.ones(2, 3)),
    "three channels": lambda: recolour(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3)),
    "integers": lambda: split(torch.zeros(2, 8, 4, 4, dtype=torch.int64)),
    "another batch": lambda: RF.mix(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(3)),
    "a picture that broadcasts": lambda: RF.mix(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(2)),
    "one time for all": lambda: DiT(DiTConfig(channels=4, width=8, depth=1, heads=2))(torch.zeros(2, 4, 8, 8), torch.zeros(()), Cond()),
    "a denoiser's times": lambda: sample_ddim(lambda x, t: x, torch.zeros(2, 4), timesteps(RF, 4)[None], RF),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_is_an_error_in_the_tests(call: Callable[[], object]) -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


@pytest.mark.usefixtures("unchecked")
def test_the_check_can_be_switched_off() -> None:
    assert RF.mix(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(2)).shape == (2, 4)


def test_what_is_returned_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention(8, 2)
    monkeypatch.setattr(attention, "out", torch.nn.Linear(8, 6))
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        attention(torch.zeros(2, 3, 8))


def test_outside_of_the_tests_nothing_is_checked() -> None:
    code = "import sys, sfumato.diffusion.dit, sfumato.data.augment, sfumato.text.encoder\nprint('beartype' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
