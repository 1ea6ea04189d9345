"""What a generator is taught of one's own pictures: captions, styles and classes as the folder says them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.data.augment import Variety
from sfumato.data.folder import open_picture, scan, split, square
from sfumato.data.shards import split_shards, write_shards
from sfumato.data.subjects import Own, subjects

STILL = Variety(place=0.0, flip=0.0, recolour=0.0)


def test_captions_and_sub_folders(own_folder: Path) -> None:
    own = subjects(str(own_folder), 16)
    assert isinstance(own, Own)
    assert own.captioned
    assert own.labels == ["circle", "square"]
    assert own.styles == []
    entries = split(scan(own_folder).entries)[0]
    assert own.pixels[torch.arange(own.source.count)].shape == (len(entries), 4, 32, 32)
    rng = np.random.default_rng(0)
    for row, entry in enumerate(entries):
        assert own.caption(own.scene(row, STILL, rng), rng) == entry.caption
        assert own.labels[own.label[row]] in str(entry.caption)
        assert own.style[row] == -1


def test_nothing_kept_apart_is_taught(own_folder: Path) -> None:
    own = subjects(str(own_folder), 16)
    assert isinstance(own, Own)
    found = scan(own_folder)
    unseen = split(found.entries)[1]
    assert len(unseen) == 4
    rows = own.pixels[torch.arange(own.source.count)].numpy()
    assert len(rows) == 36
    assert not {r.tobytes() for r in rows} & {square(open_picture(found, e), 32).tobytes() for e in unseen}
    shown = own.validation()
    assert shown.captions == [e.caption for e in unseen]
    assert shown.pixels.shape == (4, 4, 16, 16)
    assert [own.labels[i] for i in shown.label] == [e.labels["folder"] for e in unseen]


def test_a_column_named_style_gives_styles(own_folder: Path) -> None:
    names = sorted(p.relative_to(own_folder).as_posix() for p in own_folder.rglob("*.png"))
    rows = [{"file_name": n, "style": ("ink", "oil")[i % 2]} for i, n in enumerate(names)]
    table = own_folder / "metadata.jsonl"
    table.write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = subjects(str(own_folder), 16)
    assert isinstance(own, Own)
    assert own.styles == ["ink", "oil"]
    assert [own.styles[s] for s in own.style] == [own.source.words(i)[1]["style"] for i in range(own.source.count)]
    table.write_text("".join(json.dumps(r | {"style": f"a:{r['style']}"}) + "\n" for r in rows))
    with pytest.raises(ValueError, match=r"style \(='a:ink'\) must be plain letters without comma and colon"):
        subjects(str(own_folder), 16)


def test_nothing_is_drawn_that_the_caption_does_not_say(own_folder: Path) -> None:
    own = subjects(str(own_folder), 16)
    wild = Variety(recolour=1.0, count=0.4, pair=0.3, scene=0.3)
    for seed in range(20):
        scene = own.scene(0, wild, np.random.default_rng(seed))
        assert (scene.kind, len(scene.items), scene.ground, scene.items[0].colour) == ("one", 1, None, None)


def test_folders_that_hold_one_picture_each_are_no_classes(own_folder: Path) -> None:
    for i, path in enumerate(sorted(own_folder.rglob("*.png"))):
        (own_folder / f"day {i}").mkdir()
        path.rename(own_folder / f"day {i}" / path.name)
    own = subjects(str(own_folder), 16)
    assert own.labels == []
    assert (own.label == -1).all()


def test_a_model_knows_the_words_of_its_captions(own_folder: Path) -> None:
    (own_folder / "circle" / "01.txt").write_text("一个蓝色的圆", encoding="utf-8")
    about = subjects(str(own_folder), 16).about()
    said = {w for entry in about["words"].values() for w in entry["en"]}
    assert "a red square" in said
    assert "一个蓝色的圆" in said or "01.png" in [Path(e.name).name for e in split(scan(own_folder).entries)[1]]
    assert {"red", "square"} <= set(about["filler"])
    assert about["credits"] == [{"attribution": "36 pictures of own", "licence": "not said", "home": ""}]


def test_labels_of_the_embedded_drawings_are_refused(own_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"labels \(='concept'\) is of the embedded drawings"):
        subjects(str(own_folder), 16, labels="concept")


def test_shards_say_what_their_folder_says(own_folder: Path, own_shards: Path) -> None:
    own, shards = subjects(str(own_folder), 16), subjects(str(own_shards), 16)
    assert isinstance(shards, Own)
    held = split_shards(own_shards, 32)[1]
    assert (shards.labels, shards.styles, shards.captioned) == (own.labels, own.styles, own.captioned)
    assert shards.source.count + len(held) == 40
    rng = np.random.default_rng(0)
    for row in range(shards.source.count):
        caption = shards.caption(shards.scene(row, STILL, rng), rng)
        assert shards.labels[shards.label[row]] in str(caption)
    shown = shards.validation()
    assert shown.pixels.shape == (len(held), 4, 16, 16)
    assert [shards.labels[i] in str(c) for i, c in zip(shown.label, shown.captions, strict=True)] == [True] * len(held)
    assert shards.about()["credits"] == [{"attribution": f"{shards.source.count} pictures of shards", "licence": "not said", "home": ""}]


def test_shards_know_their_styles(own_folder: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(own_folder).as_posix() for p in own_folder.rglob("*.png"))
    rows = [{"file_name": n, "style": ("ink", "oil")[i % 2], "serial": i} for i, n in enumerate(names)]
    (own_folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_shards(scan(own_folder), tmp_path / "shards")
    shards = subjects(str(tmp_path / "shards"), 16)
    assert (shards.styles, shards.labels) == (["ink", "oil"], ["circle", "square"])
    assert isinstance(shards, Own)
    assert [shards.styles[s] for s in shards.style] == [shards.source.words(i)[1]["style"] for i in range(shards.source.count)]
