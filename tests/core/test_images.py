from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from sfumato.core.images import flatten, grid, png_bytes, premultiply, save_png, to_pil

rgba_u8 = arrays(np.uint8, (5, 7, 4))


def as_tensor(u8: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(u8).permute(2, 0, 1)[None].float() / 127.5 - 1


@given(rgba_u8)
def test_premultiplied_to_straight_and_back_is_exact(straight: np.ndarray) -> None:
    premultiplied = premultiply(straight)
    (image,) = to_pil(as_tensor(premultiplied))
    assert image.mode == "RGBA"
    assert np.array_equal(premultiply(np.asarray(image)), premultiplied)


@given(rgba_u8)
def test_straight_colours_come_back_as_closely_as_alpha_allows(straight: np.ndarray) -> None:
    (image,) = to_pil(as_tensor(premultiply(straight)))
    back, alpha = np.asarray(image).astype(float), straight[..., 3:].astype(float)
    assert np.array_equal(back[..., 3], straight[..., 3])
    off = np.abs(back[..., :3] - straight[..., :3])
    assert (off <= np.where(alpha > 0, 127.5 / np.maximum(alpha, 1) + 0.51, 255)).all()
    assert (back[..., :3][straight[..., 3] == 0] == 0).all(), "what is transparent has no colour"


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_modes_and_range(channels: int, mode: str) -> None:
    x = torch.stack([torch.full((channels, 2, 3), v) for v in (-1.0, 1.0, 5.0, -5.0, 0.0)])
    images = to_pil(x)
    assert [i.mode for i in images] == [mode] * 5
    assert [i.size for i in images] == [(3, 2)] * 5
    values = [np.asarray(i).reshape(-1)[-1] for i in images]
    assert values == [0, 255, 255, 0, 128]


def test_to_pil_keeps_every_8_bit_value() -> None:
    u8 = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.array_equal(np.asarray(to_pil(as_tensor(u8))[0]), u8)


def test_flatten_lays_over_the_ground() -> None:
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (200, 100, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    flat = flatten(image)
    assert flat.mode == "RGB"
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(200, 100, 0), (255, 255, 255)]
    assert flatten(image, (1, 2, 3)).getpixel((1, 0)) == (1, 2, 3)


@given(st.integers(1, 12), st.none() | st.integers(1, 5), st.integers(0, 3))
def test_grid_has_room_for_all_and_keeps_their_order(n: int, columns: int | None, gap: int) -> None:
    w, h = 3, 2
    images = [Image.new("RGB", (w, h), (i + 1, 0, 0)) for i in range(n)]
    sheet = grid(images, columns, gap)
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    assert sheet.size == (columns * (w + gap) - gap, rows * (h + gap) - gap)
    pixels = np.asarray(sheet)
    for i in range(n):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        assert (pixels[top : top + h, left : left + w] == (i + 1, 0, 0, 255)).all()
    assert (pixels[..., 3] > 0).sum() == n * w * h


def test_text_travels_in_the_png(tmp_path: Path) -> None:
    text = {"prompt": "一只狐狸 — “a fox”\nsecond line", "seed": "7"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8))
    save_png(tmp_path / "deep" / "a.png", image, text)
    with Image.open(tmp_path / "deep" / "a.png") as again:
        assert again.text == text  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(again), np.asarray(image))


def test_png_bytes_are_a_function_of_the_picture() -> None:
    image = Image.new("RGBA", (4, 4), (1, 2, 3, 4))
    assert png_bytes(image, {"a": "b"}) == png_bytes(image.copy(), {"a": "b"})
    assert Image.open(io.BytesIO(png_bytes(image))).text == {}  # type: ignore[attr-defined]
