"""Folders as people have them: every format and colour mode read right, every bad file named, nothing found out later."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from skimage import data as photographs

from sfumato.apps import cli
from sfumato.core.checkpoint import FileError
from sfumato.core.images import Unreadable, decode
from sfumato.data import folder as subject
from sfumato.data.folder import Bad, Entry, framed, near_duplicates, open_picture, scan, split, survey


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Smooth random colours, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    return image.getpixel(at)  # type: ignore[return-value]


def near(a: tuple[int, ...], b: tuple[int, ...], within: int = 3) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= within for x, y in zip(a, b, strict=True))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Twenty-four good pictures."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(24):
        (root / f"{i:02}.png").write_bytes(encoded(picture(i)))
    return root


def refusal(data: bytes) -> Unreadable | None:
    try:
        decode(data)
    except Unreadable as e:
        return e
    return None


def bad_of(root: Path) -> dict[str, Bad]:
    return {b.name: b for b in survey(root, progress=False).bad}


# --- reading right ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_gives_its_colours(kind: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 40, 90))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    found = decode(encoded(image, kind, **options))
    assert found.mode == "RGB"
    assert near(colour(found), (200, 40, 90))


def test_exif_orientation_turns_the_picture() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: red at the top
    found = decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert found.size == (20, 40)
    assert near(colour(found, (10, 2)), (255, 0, 0), 12)
    assert near(colour(found, (10, 35)), (255, 255, 255), 12)


def swapped_profile() -> bytes:
    """An RGB profile whose first channel is blue and whose last is red: what ignores it shows the wrong colour."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    rows = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    r, b = rows[b"rXYZ"], rows[b"bXYZ"]
    profile[r : r + 4], profile[b : b + 4] = profile[b : b + 4], profile[r : r + 4]
    return bytes(profile)


def test_an_icc_profile_is_applied_and_a_broken_one_is_not() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert near(colour(decode(encoded(red, icc_profile=swapped_profile()))), (0, 0, 255), 6)
    assert colour(decode(encoded(red, icc_profile=b"not a profile"))) == (255, 0, 0)
    clear = red.copy()
    clear.putalpha(77)
    found = colour(decode(encoded(clear, icc_profile=swapped_profile())))
    assert near(found[:3], (0, 0, 255), 6)
    assert found[3] == 77


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_shows_white_as_white_and_black_as_black(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 65535, 32896]] * 8, dtype=np.uint16).repeat(4, 1))
    else:
        image = Image.fromarray(np.array([[0, 255, 128]] * 8, dtype=np.uint8).repeat(4, 1)).convert("RGB").convert(mode)
    found = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100, "subsampling": 0} if mode == "CMYK" else {})))
    assert found.mode == "RGB"
    assert near(colour(found, (0, 0)), (0, 0, 0))
    assert near(colour(found, (4, 0)), (255, 255, 255))
    if mode not in ("1", "P"):
        assert near(colour(found, (8, 4)), (128, 128, 128))


def test_sixteen_bit_colour_is_rounded_not_clipped() -> None:
    values = np.full((8, 8), 0x4080, dtype=np.uint16)
    assert colour(decode(encoded(Image.fromarray(values)))) == (64, 64, 64)


def test_transparency_in_all_its_forms() -> None:
    image = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    image.paste((10, 200, 30, 255), (4, 0, 8, 8))
    palette = encoded(image.convert("P"), transparency=0)
    for data in (encoded(image), encoded(image, "WEBP", lossless=True, exact=True), encoded(image.convert("LA"))):
        found = decode(data)
        assert found.mode == "RGBA"
        assert colour(found, (0, 0))[3] == 0
        assert colour(found, (7, 0))[3] == 255
    assert decode(palette).mode in ("RGB", "RGBA")
    keyed = decode(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)))
    assert colour(keyed) == (1, 2, 3, 0)
    assert decode(encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 255)))).mode == "RGB"


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert near(colour(decode(data))[:3], (255, 0, 0))


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x10\0\0\0WEBP", b"GIF89a", b"BM", b"II*\0"]))
def test_no_bytes_make_it_fail_in_another_way(data: bytes, start: bytes) -> None:
    refused = refusal(start + data)
    assert refused is None or (refused.kind and "\n" not in str(refused))


@given(st.integers(0, 10**6), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_a_cut_picture_is_named_or_whole(where: int, kind: str) -> None:
    """Never half a picture: what was cut is refused, unless nothing but end marks and check sums is missing."""
    whole = encoded(picture(3, (40, 40)), kind)
    cut = whole[: where % len(whole)]
    refused = refusal(cut)
    if refused is None:
        assert decode(cut) == decode(whole)
    else:
        assert refused.kind in ("truncated", "damaged", "empty", "not-a-picture")


# --- bad files ----------------------------------------------------------------------------------------------------------------------------------

GOOD = encoded(picture(1, (64, 64)))
BAD_FILES = {
    "empty.png": (b"", "empty"),
    "cut.png": (GOOD[: len(GOOD) // 2], "truncated"),
    "cut.jpg": (encoded(picture(2, (64, 64)), "JPEG")[:-300], "truncated"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "html"),
    "drawing.png": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "html"),
    "paper.png": (b"%PDF-1.7\n...", "not-a-picture"),
    "archive.jpg": (b"PK\x03\x04rest", "not-a-picture"),
    "words.webp": (b"some notes that I saved here by mistake", "not-a-picture"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git-lfs"),
    "photo.heic": (b"\0\0\0\x18ftypheic" + b"\0" * 40, "format"),
    "zeros.jpg": (b"\0" * 500, "damaged"),
    "tiny.png": (encoded(Image.new("RGB", (3, 3))), "too-small"),
    "wrong-sum.png": (GOOD[:45] + bytes([GOOD[45] ^ 255]) + GOOD[46:], "damaged"),
    "float.tif": (encoded(Image.fromarray(np.full((16, 16), 7.5, dtype=np.float32)), "TIFF"), "format"),
    "bomb.png": (encoded(Image.new("1", (20_000, 20_000))), "too-large"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_its_kind_and_reason(many: Path, name: str) -> None:
    data, kind = BAD_FILES[name]
    (many / name).write_bytes(data)
    found = scan(many, progress=False)
    assert [(b.name, b.kind) for b in found.bad] == [(name, kind)]
    assert found.bad[0].reason
    assert len(found.entries) == 24


def test_files_that_are_no_files(many: Path) -> None:
    (many / "loop.png").symlink_to("loop.png")
    (many / "gone.png").symlink_to("nowhere.png")
    (many / "up").symlink_to(many)
    os.mkfifo(many / "pipe.png")
    kinds = {n: b.kind for n, b in bad_of(many).items()}
    assert kinds == {"loop.png": "link-loop", "gone.png": "dangling-link", "up": "link-loop", "pipe.png": "special"}


def test_a_file_that_may_not_be_read(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "07.png":
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert bad_of(many)["07.png"].reason == "cannot be read (Permission denied)"


def test_bad_zips(many: Path) -> None:
    (many / "broken.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with zipfile.ZipFile(many / "half.zip", "w") as z:
        z.writestr("inner.png", GOOD)
    raw = bytearray((many / "half.zip").read_bytes())
    raw[60:70] = b"0123456789"  # inside the stored picture: its check sum fails
    (many / "half.zip").write_bytes(raw)
    kinds = {n: b.kind for n, b in bad_of(many).items()}
    assert kinds == {"broken.zip": "damaged-zip", "half.zip/inner.png": "damaged"}


def test_a_zip_of_a_newer_kind_or_of_somebody_else_is_not_called_damaged(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(many / "new.zip", "w") as archive:
        archive.writestr("a.png", b"")
    newer = bytearray((many / "new.zip").read_bytes())
    newer[newer.index(b"PK\x01\x02") + 6] = 99  # "version needed to extract": 9.9
    (many / "new.zip").write_bytes(newer)
    (many / "locked.zip").write_bytes(b"PK")
    real = zipfile.ZipFile

    def refuse(path: Path, *more: Any) -> zipfile.ZipFile:
        if Path(path).name == "locked.zip":  # rights cannot be taken from root, as whom tests may run
            raise PermissionError(13, "Permission denied")
        return real(path, *more)

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    found = bad_of(many)
    assert {n: b.kind for n, b in found.items()} == {"new.zip": "format", "locked.zip": "unreadable"}
    assert "pack it again as a plain zip" in found["new.zip"].reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_turns_nothing(kind: str) -> None:
    """A rotation whose value is not a number, and data that is none."""
    wrong = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0ABC\0\0\0\0\0"
    for exif in (wrong, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0MM"):
        image = decode(encoded(picture(), kind, exif=exif))
        assert image.size == picture().size


def test_names_that_are_no_utf8(many: Path) -> None:
    name = os.fsdecode("狐狸.png".encode("gbk"))
    (many / name).write_bytes(encoded(picture(99)))
    for _ in range(2):  # the second time from its index
        assert name in {e.name for e in scan(many, progress=False).entries}


@pytest.mark.parametrize("code", ["utf-8", "gbk"])
def test_chinese_names_in_zips_without_the_flag_for_utf8(tmp_path: Path, code: str) -> None:
    member = "动物/狐狸.png".encode(code)
    plain = "x" * len(member)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr(plain, encoded(picture()))
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(plain.encode(), member))
    found = survey(tmp_path / "a.zip", progress=False)
    assert [e.name for e in found.entries] == ["动物/狐狸.png"]
    assert open_picture(found, found.entries[0]).size == picture().size


def test_a_file_that_is_repaired_is_good_again(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes
    with monkeypatch.context() as m:
        m.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")) if self.name == "07.png" else real(self))
        assert "07.png" in bad_of(many)
    assert bad_of(many) == {}


def test_tables_with_a_stray_quote_or_a_line_separator(many: Path) -> None:
    (many / "metadata.csv").write_text('file_name,text\n00.png,fine\n01.png,"' + "x" * 140_000)
    assert "stray quotation mark" in bad_of(many)["metadata.csv:3"].reason
    (many / "metadata.csv").unlink()
    (many / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "one\u2028two"}\n', encoding="utf-8")
    assert bad_of(many) == {}
    assert scan(many, progress=False).entries[0].caption == "one two"


def test_one_text_is_of_all_pictures_of_its_name(many: Path) -> None:
    (many / "00.jpg").write_bytes(encoded(picture(50), "JPEG"))
    (many / "00.txt").write_text("a thing")
    assert {e.name for e in scan(many, progress=False).entries if e.caption} == {"00.jpg", "00.png"}


def test_a_member_packed_in_another_way_is_named(many: Path) -> None:
    with zipfile.ZipFile(many / "odd.zip", "w") as z:
        z.writestr("a.png", GOOD)
    raw = bytearray((many / "odd.zip").read_bytes())
    for sign, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        raw[raw.find(sign) + offset] = 97  # WavPack
    (many / "odd.zip").write_bytes(raw)
    bad = bad_of(many)["odd.zip/a.png"]
    assert bad.kind == "format"
    assert bad.reason.endswith("pack it again as a plain zip")


def test_an_encrypted_member_is_named(many: Path) -> None:
    with zipfile.ZipFile(many / "secret.zip", "w") as z:
        z.writestr("a.png", GOOD)
    raw = bytearray((many / "secret.zip").read_bytes())
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.find(sign) + offset] |= 1
    (many / "secret.zip").write_bytes(raw)
    assert bad_of(many)["secret.zip/a.png"].kind == "encrypted"


def test_more_than_a_tenth_bad_is_refused_and_strict_refuses_one(many: Path) -> None:
    (many / "x.png").write_bytes(b"")
    with pytest.raises(FileError, match=r"1 files of .* are bad, such as x\.png, which is empty"):
        scan(many, strict=True, progress=False)
    for i in range(3):
        (many / f"y{i}.png").write_bytes(b"")
    with pytest.raises(FileError, match=r"4 of 28 files of .* cannot be used, more than 10%"):
        scan(many, progress=False)


def test_a_folder_without_pictures_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(FileError, match="holds no picture that can be used"):
        scan(tmp_path, progress=False)
    with pytest.raises(FileError, match="there is no folder or zip"):
        scan(tmp_path / "nothing", progress=False)
    with pytest.raises(FileError, match="is a single file"):
        scan(tmp_path / "readme.txt", progress=False)


def test_remarks_that_keep_nothing_out(many: Path) -> None:
    (many / "really.jpg").write_bytes(encoded(picture(50)))
    (many / "blank.png").write_bytes(encoded(Image.new("RGB", (32, 32), "red")))
    (many / "ghost.png").write_bytes(encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 0))))
    (many / "long.png").write_bytes(encoded(picture(51, (300, 20))))
    notes = {e.name: e.notes for e in scan(many, progress=False).entries if e.notes}
    assert notes == {
        "really.jpg": ("is a PNG file in spite of its ending .jpg",),
        "blank.png": ("is of one colour",),
        "ghost.png": ("is wholly transparent",),
        "long.png": ("is very long (300 x 20): most of it is cut away",),
    }


@pytest.mark.parametrize("name", ["astronaut", "camera", "coffee", "chelsea"])
def test_an_enlarged_photograph_is_told_from_a_real_one(name: str) -> None:
    photo = Image.fromarray(getattr(photographs, name)()).convert("RGB")
    w, h = photo.size
    assert not subject.is_enlarged(photo)
    assert subject.is_enlarged(photo.resize((w // 2, h // 2), Image.Resampling.LANCZOS).resize((w, h), Image.Resampling.BICUBIC))


# --- where pictures lie, and what is said of them -------------------------------------------------------------------------------------------------


def test_any_depth_zips_and_hidden_files(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "猫 和 狗"
    deep.mkdir(parents=True)
    (deep / "一.png").write_bytes(encoded(picture(1)))
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.png").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
        z.writestr("inner/two.PNG", encoded(picture(2)))
        z.writestr("__MACOSX/inner/._two.PNG", b"junk")
    found = scan(tmp_path, progress=False)
    assert [e.name for e in found.entries] == ["a/b/猫 和 狗/一.png", "set.zip/inner/two.PNG"]
    assert found.bad == ()
    alone = scan(tmp_path / "set.zip", progress=False)
    assert [e.name for e in alone.entries] == ["inner/two.PNG"]


def test_captions_and_labels(tmp_path: Path) -> None:
    for name in ("cats/one.png", "cats/two.jpg", "dogs/three.png", "dogs/four.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(len(name)), "JPEG" if name.endswith("jpg") else "PNG"))
    (tmp_path / "cats" / "one.txt").write_text("a cat\non a mat \n", encoding="utf-8")
    (tmp_path / "cats" / "two.txt").write_text("一只猫", encoding="utf-8-sig")
    (tmp_path / "cats" / "readme.txt").write_bytes(b"\xff\xfe\x00")
    lines = ['{"file_name": "three.png", "text": "a dog", "style": "oil", "year": 1999}', "{broken", '{"file_name": "lost.png", "text": "?"}', "[]"]
    (tmp_path / "dogs" / "metadata.jsonl").write_text("\n".join(lines))
    found = scan(tmp_path, progress=False)
    said = {e.name: (e.caption, e.labels) for e in found.entries}
    assert said == {
        "cats/one.png": ("a cat on a mat", {"folder": "cats"}),
        "cats/two.jpg": ("一只猫", {"folder": "cats"}),
        "dogs/three.png": ("a dog", {"folder": "dogs", "style": "oil", "year": "1999"}),
        "dogs/four.png": (None, {"folder": "dogs"}),
    }
    assert [(b.name, b.kind) for b in found.bad] == [(f"dogs/metadata.jsonl:{n}", "metadata") for n in (2, 3, 4)]


def test_a_csv_names_pictures_below_it(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(encoded(picture(1)))
    (tmp_path / "metadata.csv").write_text('file_name,text,style\n./img/a.png,"red, and round",ink\n,nothing,\n', encoding="utf-8")
    found = scan(tmp_path, progress=False)
    assert (found.entries[0].caption, found.entries[0].labels) == ("red, and round", {"style": "ink"})
    assert [(b.name, b.reason) for b in found.bad] == [("metadata.csv:3", "has no file_name")]


def test_a_caption_that_is_not_utf8_is_named(many: Path) -> None:
    (many / "00.txt").write_bytes("一只猫和一只狗".encode("gb18030"))
    assert bad_of(many)["00.txt"].reason == "is not UTF-8 text: save it as UTF-8"


# --- the index ------------------------------------------------------------------------------------------------------------------------------------


def test_the_second_scan_reads_what_changed_only(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan(many, progress=False)
    looked: list[str] = []
    real = subject.look

    def look(found: subject.Found) -> Entry | Bad:
        looked.append(found.name)
        return real(found)

    monkeypatch.setattr(subject, "look", look)
    assert scan(many, progress=False) == first
    assert looked == []
    (many / "05.png").write_bytes(encoded(picture(99, (30, 30))))
    (many / "06.png").unlink()
    (many / "new.png").write_bytes(b"")
    again = scan(many, progress=False)
    assert sorted(looked) == ["05.png", "new.png"]
    assert {e.name: e.width for e in again.entries}["05.png"] == 30
    assert len(again.entries) == 23
    subject._index_path(many).write_text("{broken")
    assert scan(many, progress=False) == again


def test_the_number_of_workers_changes_nothing(many: Path) -> None:
    one = scan(many, workers=1, progress=False)
    subject._index_path(many).unlink()
    assert scan(many, workers=4, progress=False) == one


# --- training and validation ------------------------------------------------------------------------------------------------------------------------


def entry(name: str, digest: str) -> Entry:
    return Entry(name=name, digest=digest, width=8, height=8, transparent=False, stamp=(0, 0), likeness="00" * 35)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60), st.sampled_from([0.05, 0.2, 0.5]))
def test_a_split_keeps_copies_together_and_both_sides_filled(numbers: list[int], fraction: float) -> None:
    entries = [entry(str(i), f"{n:064x}"[::-1]) for i, n in enumerate(numbers)]
    train, held = split(entries, fraction)
    assert sorted(e.name for e in train + held) == sorted(e.name for e in entries)
    assert not {e.digest for e in train} & {e.digest for e in held}
    assert train
    assert held or len(set(numbers)) == 1


def test_a_split_stays_when_pictures_are_added() -> None:
    digests = [np.random.default_rng(i).bytes(32).hex() for i in range(2000)]
    some, more = (split([entry(d, d) for d in digests[:n]])[1] for n in (1000, 2000))
    assert {e.name for e in some} <= {e.name for e in more}
    assert 60 < len(more) < 140
    assert split([entry("a", digests[0])], 0.0)[1] == []
    with pytest.raises(ValueError, match=r"fraction \(=1\.5\)"):
        split([], 1.5)


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    shots = {n: Image.fromarray(getattr(photographs, n)()).convert("RGB") for n in ("astronaut", "coffee", "chelsea", "rocket", "cat")}
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
    for name, shot in shots.items():
        shot.resize((128, 128)).save(tmp_path / "a" / f"{name}.png")
    for name in ("astronaut", "coffee"):
        shots[name].resize((96, 96)).save(tmp_path / "b" / f"{name}.jpg", quality=80)
    shots["rocket"].resize((128, 128)).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "b" / "rocket.png")
    a, b = (scan(tmp_path / side, progress=False).entries for side in ("a", "b"))
    pairs = {(x.name, y.name) for x, y in near_duplicates(list(a), list(b))}
    assert pairs == {("astronaut.png", "astronaut.jpg"), ("coffee.png", "coffee.jpg")}
    assert near_duplicates([], list(b)) == []


def test_the_index_is_json_lines_of_plain_values(many: Path) -> None:
    scan(many, progress=False)
    rows = [json.loads(line) for line in subject._index_path(many).read_text().splitlines()]
    assert [r["name"] for r in rows] == [f"{i:02}.png" for i in range(24)]


# --- on the sheet -----------------------------------------------------------------------------------------------------------------------------------


def test_what_is_opaque_is_cut_and_what_is_not_is_kept_whole() -> None:
    wide = Image.new("RGB", (90, 30), "blue")
    wide.paste("red", (30, 0, 60, 30))
    assert framed(wide, 16).getextrema() == ((255, 255), (0, 0), (0, 0))
    tall = Image.new("RGBA", (10, 40), (0, 255, 0, 255))
    square = framed(tall, 40)
    assert square.getchannel("A").getbbox() == (15, 0, 25, 40)


def test_colours_behind_transparency_do_not_bleed() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
    image.paste((0, 128, 0, 255), (0, 0, 32, 64))
    small = np.asarray(framed(image, 8)).astype(int)
    seen = small[small[..., 3] > 60]
    assert len(seen)
    assert (abs(seen[:, 0]) <= 8).all()
    assert (abs(seen[:, 2]) <= 8).all()


def test_a_picture_that_changed_after_the_scan_is_named(many: Path) -> None:
    found = scan(many, progress=False)
    assert open_picture(found, found.entries[3]).size == (24, 16)
    (many / "03.png").write_bytes(b"")
    with pytest.raises(FileError, match=r"03\.png is empty, though it was a good picture"):
        open_picture(found, found.entries[3])


def test_kinds_that_are_not_read_are_counted(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.svg", "b.svg", "c.jxl", "notes.md", "weights.bin"):
        (many / name).write_bytes(b"anything")
    with zipfile.ZipFile(many / "outer.zip", "w") as archive:
        archive.writestr("inner.zip", b"PK")
        archive.writestr("d.psd", b"8BPS")
    found = scan(many)
    assert found.others == {".svg": 2, ".jxl": 1, ".zip": 1, ".psd": 1}
    assert found.bad == (), "they are no bad files: a drawing may lie beside its source"
    cli.main(["data", "check", str(many)])
    assert "passed over, as they cannot be read here: 2 .svg, 1 .jxl, 1 .psd, 1 .zip" in capsys.readouterr().out
    for path in many.rglob("*.png"):
        path.unlink()
    for path in [p for p in many.rglob("*") if p.suffix in (".jpg", ".webp", ".gif")]:
        path.unlink()
    with pytest.raises(SystemExit):
        cli.main(["data", "check", str(many)])
    assert "holds no picture that can be used: it should hold files that end in .png" in (said := capsys.readouterr().err)
    assert "passed over: 2 .svg" in said
