from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sfumato.data.augment import COLOURS, GROUNDS, Placed, Scene, Variety, draw_scene, ground, place, recolour, render

SIZE = 16


def blobs(n: int = 3, size: int = 2 * SIZE) -> Tensor:
    """uint8 premultiplied drawings with soft edges."""
    g = torch.Generator().manual_seed(3)
    alpha = F.interpolate(torch.rand(n, 1, 6, 6, generator=g), size=size, mode="bilinear", align_corners=False)
    rgb = F.interpolate(torch.rand(n, 3, 8, 8, generator=g), size=size, mode="bilinear", align_corners=False)
    return (torch.cat([rgb * alpha, alpha], dim=1) * 255).floor().to(torch.uint8)


def dot(row: int, column: int, size: int = 2 * SIZE) -> Tensor:
    """One opaque white square of 4 x 4 source pixels."""
    x = torch.zeros(1, 4, size, size)
    x[:, :, row : row + 4, column : column + 4] = 1
    return x


def centre(x: Tensor) -> tuple[float, float]:
    """Centre of mass of alpha: right and down of the middle, in canvas sides."""
    a = x[0, 3]
    at = (torch.arange(a.shape[0]) + 0.5) / a.shape[0] - 0.5
    return float((a.sum(0) * at).sum() / a.sum()), float((a.sum(1) * at).sum() / a.sum())


# --- place ------------------------------------------------------------------------------------------------------------------------------------


def test_identity_is_the_exact_area_average() -> None:
    x = blobs().float() / 255
    assert (place(x, [Placed(i) for i in range(3)], SIZE) - F.avg_pool2d(x, 2)).abs().max() <= 1e-6


def test_what_stays_is_as_if_it_had_been_sampled() -> None:
    """Drawings that are not moved take a shorter way; beside ones that are, each keeps its row."""
    x, items = torch.rand(4, 4, 2 * SIZE, 2 * SIZE), [Placed(0), Placed(1, scale=0.5), Placed(2, flip=True), Placed(3, dx=0.1)]
    nearly = [replace(i, angle=1e-6) for i in items]
    assert (place(x, items, SIZE) - place(x, nearly, SIZE)).abs().max() <= 1e-5


def test_flip_mirrors_left_and_right() -> None:
    x = blobs().float() / 255
    flipped = place(x, [Placed(i, flip=True) for i in range(3)], SIZE)
    assert (flipped - F.avg_pool2d(x, 2).flip(-1)).abs().max() <= 1e-5


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, 2), (-4, 5), (16, 0)])
def test_a_shift_by_whole_pixels_moves_the_picture(right: int, down: int) -> None:
    x = blobs(1).float() / 255
    moved = place(x, [Placed(0, dx=right / SIZE, dy=down / SIZE)], SIZE)[0]
    still = F.avg_pool2d(x, 2)[0]
    expected = torch.zeros_like(still)
    for row in range(SIZE):
        for column in range(SIZE):
            if 0 <= row - down < SIZE and 0 <= column - right < SIZE:
                expected[:, row, column] = still[:, row - down, column - right]
    assert (moved - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_anticlockwise(quarters: int) -> None:
    x = blobs(1).float() / 255
    turned = place(x, [Placed(0, angle=90.0 * quarters)], SIZE)
    assert (turned - torch.rot90(F.avg_pool2d(x, 2), quarters, dims=(2, 3))).abs().max() <= 1e-4


def test_a_small_angle_lifts_what_is_on_the_right() -> None:
    x, y = centre(place(dot(14, 26), [Placed(0, angle=10.0)], SIZE))
    assert x > 0.3
    assert y == pytest.approx(-(28 / 32 - 0.5) * np.sin(np.deg2rad(10)), abs=0.01)


def test_a_drawing_is_mirrored_before_it_is_turned_and_moved() -> None:
    x, y = centre(place(dot(14, 26), [Placed(0, flip=True, angle=90.0, dx=0.125, dy=0.0)], SIZE))
    assert (x, y) == (pytest.approx(0.125, abs=0.01), pytest.approx(0.375, abs=0.01))  # right -> left by the mirror -> down by the turn


def test_half_scale_keeps_a_quarter_of_the_area_in_the_middle() -> None:
    x = torch.ones(1, 4, 2 * SIZE, 2 * SIZE)
    small = place(x, [Placed(0, scale=0.5)], SIZE)
    assert small[0, 3].sum().item() == pytest.approx(SIZE**2 / 4, rel=0.02)
    assert centre(small) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))


# --- recolour ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLOURS)
def test_a_plain_drawing_takes_exactly_the_colour(name: str) -> None:
    alpha = blobs()[:, 3:].float() / 255
    x = torch.cat([torch.tensor([0.7, 0.4, 0.2])[None, :, None, None] * alpha, alpha], dim=1)
    colour = torch.tensor([COLOURS[name]] * 3)
    y = recolour(x, colour)
    assert torch.equal(y[:, 3:], alpha)
    mean = y[:, :3].sum((2, 3)) / alpha.sum((2, 3))
    assert (mean - colour).abs().max() < 2e-3


@given(st.integers(0, 2**31), st.sampled_from(sorted(COLOURS)))
def test_recolouring_keeps_alpha_and_the_order_of_lightness(seed: int, name: str) -> None:
    g = torch.Generator().manual_seed(seed)
    alpha = torch.rand(1, 1, 8, 8, generator=g)
    grey = torch.rand(1, 1, 8, 8, generator=g)
    x = torch.cat([(grey * alpha).expand(1, 3, 8, 8), alpha], dim=1)
    y = recolour(x, torch.tensor([COLOURS[name]]))
    assert torch.equal(y[:, 3:], alpha)
    assert (y[:, :3] >= 0).all()
    assert (y[:, :3] <= alpha + 1e-6).all()
    seen = alpha[0, 0] > 0.05
    before, after = grey[0, 0][seen], (y[0, 1] / alpha[0, 0])[seen]
    assert (after[before.argsort()].diff() >= -1e-4).all()


# --- draw_scene -------------------------------------------------------------------------------------------------------------------------------

varieties = st.builds(
    Variety,
    place=st.floats(0, 1),
    scale=st.tuples(st.floats(0.3, 0.8), st.floats(0.8, 1.3)),
    angle=st.floats(0, 45),
    recolour=st.floats(0, 1),
    count=st.floats(0, 0.33),
    pair=st.floats(0, 0.33),
    scene=st.floats(0, 0.33),
)
PARTNERS = [(5, True), (6, False)]


def scene_of(seed: int, variety: Variety, may_flip: bool = True, partners: list[tuple[int, bool]] = PARTNERS) -> Scene:
    return draw_scene(np.random.default_rng(seed), variety, 4, may_flip, partners)


@given(st.integers(0, 2**32), varieties)
def test_a_scene_is_a_function_of_its_stream(seed: int, variety: Variety) -> None:
    assert scene_of(seed, variety) == scene_of(seed, variety)


@given(st.integers(0, 2**32), varieties, st.booleans())
def test_a_scene_stays_within_the_variety(seed: int, v: Variety, may_flip: bool) -> None:
    scene = scene_of(seed, v, may_flip)
    first = scene.items[0]
    assert scene.kind in ("one", "count", "pair", "scene")
    assert (scene.ground is not None) == (scene.kind == "scene")
    assert first.drawing == 4
    assert may_flip or not first.flip
    assert all(abs(p.angle) <= v.angle for p in scene.items)
    assert all(p.colour is None or p.colour in COLOURS for p in scene.items)
    if scene.kind == "one" and first != Placed(4, flip=first.flip, colour=first.colour):
        assert v.scale[0] <= first.scale <= v.scale[1]
    if scene.kind in ("one", "scene"):
        assert len(scene.items) == 1
        room = max(1 - first.scale, 0) / 2 + 0.02
        assert max(abs(first.dx), abs(first.dy)) <= room + 1e-12
    if scene.kind == "scene":
        assert scene.ground in GROUNDS
        assert 0.5 <= first.scale <= 0.75
        assert first.dy >= 0
    if scene.kind == "count":
        assert len(scene.items) in (2, 3)
        assert len({replace(p, dx=0.0, dy=0.0) for p in scene.items}) == 1, "several of one thing look the same"
    if scene.kind == "pair":
        left, right = scene.items
        assert left.dx < 0 < right.dx
        assert right.drawing in (5, 6)
        assert not (right.drawing == 6 and right.flip)


@pytest.mark.parametrize("kind", ["count", "pair", "scene"])
def test_rates_are_rates(kind: str) -> None:
    kinds = [scene_of(seed, Variety(**{kind: 0.3})).kind for seed in range(400)]
    assert set(kinds) == {"one", kind}
    assert kinds.count(kind) / 400 == pytest.approx(0.3, abs=0.08)  # 3.5 standard deviations


def test_without_a_partner_there_is_no_pair() -> None:
    assert all(scene_of(seed, Variety(pair=1.0), partners=[]).kind == "one" for seed in range(50))


def test_rate_one_and_rate_zero() -> None:
    still, always = Variety(place=0.0, recolour=0.0), Variety(recolour=1.0)
    assert {scene_of(seed, still, may_flip=False) for seed in range(50)} == {Scene((Placed(4),))}
    assert all(scene_of(seed, always).items[0].colour in COLOURS for seed in range(50))


# --- grounds and render -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", GROUNDS)
def test_grounds_are_opaque_and_as_named(name: str, size: int) -> None:
    x = ground(name, size)
    upper, lower, _ = GROUNDS[name]
    assert x.shape == (4, size, size)
    assert (x[3] == 1).all()
    assert x.min() >= 0
    assert x.max() <= 1
    assert torch.equal(x, ground(name, size)), "the same each time"
    slack = 0.07 if name == "sky" else 0.02  # a gradient's outermost pixels stand half a pixel inside
    for row, colour in ((0, upper), (-1, lower)):
        middle = x[:3, row].median(dim=1).values
        if name != "sky" or size == 64:
            assert (middle - torch.tensor(colour)).abs().max() < slack


def test_render_lays_each_item_over_what_is_behind() -> None:
    """Porter-Duff "over" on premultiplied colours: front + (1 - alpha) back."""
    pixels = blobs()
    items = (Placed(0, scale=0.8, dx=-0.1), Placed(1, scale=0.7, angle=20.0, dx=0.1), Placed(2, scale=0.5))
    canvas = ground("garden", SIZE)[None]
    for item in items:
        front = place(pixels[item.drawing][None].float() / 255, [item], SIZE)
        canvas = front + (1 - front[:, 3:]) * canvas
    assert (render(pixels, [Scene(items, "scene", "garden")], SIZE) - canvas).abs().max() < 1e-6


def test_an_opaque_front_hides_the_back() -> None:
    pixels = torch.zeros(2, 4, 2 * SIZE, 2 * SIZE, dtype=torch.uint8)
    pixels[0, (0, 3)] = 255  # red
    pixels[1, (2, 3)] = 255  # blue
    x = render(pixels, [Scene((Placed(0), Placed(1)), "pair")], SIZE)[0]
    assert (x - torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None, None]).abs().max() < 1e-5


@given(st.integers(0, 2**32), varieties)
def test_what_is_rendered_is_premultiplied(seed: int, variety: Variety) -> None:
    scenes = [draw_scene(np.random.default_rng([seed, i]), variety, i, True, [(1, True)]) for i in range(3)]
    x = render(blobs(), scenes, SIZE)
    assert x.shape == (3, 4, SIZE, SIZE)
    assert x.min() >= 0
    assert x[:, 3].max() <= 1
    assert (x[:, :3] <= x[:, 3:] + 1e-5).all()
    for i, scene in enumerate(scenes):
        assert scene.ground is None or (x[i, 3] - 1).abs().max() < 1e-5


def test_a_scene_does_not_depend_on_its_neighbours() -> None:
    variety = Variety(count=0.25, pair=0.25, scene=0.25, recolour=0.5)
    scenes = [draw_scene(np.random.default_rng(i), variety, i % 3, True, [(2, True)]) for i in range(12)]
    together = render(blobs(), scenes, SIZE)
    for i, scene in enumerate(scenes):
        assert (render(blobs(), [scene], SIZE)[0] - together[i]).abs().max() < 1e-6


@given(st.integers(0, 2**32), st.tuples(st.floats(1, 1.2), st.floats(1.2, 1.6)))
def test_what_fills_the_canvas_goes_on_filling_it(seed: int, scale: tuple[float, float]) -> None:
    scene = scene_of(seed, Variety(place=1.0, scale=scale, angle=0.0, recolour=0.0))
    x = render(torch.full((5, 4, 32, 32), 255, dtype=torch.uint8), [scene], 16)
    assert float(x.min()) > 0.999


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.2, 10, 80), (1.0, 200, 200)])
def test_mirroring_has_its_rate(rate: float, low: int, high: int) -> None:
    v = Variety(place=0.0, recolour=0.0, flip=rate)
    assert low <= sum(scene_of(seed, v, may_flip=True).items[0].flip for seed in range(200)) <= high
