"""One's own pictures: a folder, or a zip, of any depth, with captions and labels in the imagefolder convention.

`scan` looks at every file once, in parallel, and says of each whether it can be used: nothing is found out in the middle of a training,
and no bad file is silently replaced by another picture. What it found is kept in the cache folder, so that the next scan reads changed
files only. Training and validation are told apart by content, so that a copy of a picture never stands on both sides.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import stat
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, cache_folder, new_array, replacing, write_bytes, write_json
from sfumato.core.images import Unreadable, decode, flatten, premultiply
from sfumato.core.language import translated

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".apng")
NOT_READ = (".svg", ".svgz", ".jxl", ".psd", ".xcf", ".kra", ".ai", ".eps", ".pdf", ".tga", ".ico", ".icns", ".exr", ".hdr", ".jp2", ".j2k", ".dng",
            ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".7z", ".rar", ".tar", ".gz", ".tgz")  # fmt: skip  # named where they lie about
FORMATS = {"PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "WEBP": (".webp",), "GIF": (".gif",)}
METADATA = ("metadata.jsonl", "metadata.csv")
WORDS = ("caption", "metadata")  # kinds of Bad that are of words, not of pictures
TOO_MANY_BAD = 0.1
MOST_EXACT = 512  # pictures kept apart that are looked at while training
LARGEST_FILE = 512 * 2**20
INDEX_VERSION = 2
ALIKE_BITS, ALIKE_COLOUR = 10, 8  # of 256, of 255: as far as two versions of one picture lie apart at most
SOFT = 0.2  # photographs and drawings have mostly 0.26 and more of their contrast in the finest detail, enlarged twofold 0.12 to 0.19


@dataclass(frozen=True)
class Entry:
    """A picture that can be used. `name` is its path below the root, through zips too; `digest` the sha256 of its bytes.

    `stamp` (bytes, modification time in ns) tells whether it has changed; `likeness` is a 256-bit difference hash with the mean colour, in
    hexadecimal digits; `notes` are remarks that do not keep it from being used.
    """

    name: str
    digest: str
    width: int
    height: int
    transparent: bool
    stamp: tuple[int, int]
    likeness: str
    notes: tuple[str, ...] = ()
    caption: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bad:
    """A file that cannot be used, and why; `kind` is one word."""

    name: str
    kind: str
    reason: str
    stamp: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Found:
    """A file to look at: on disk, or the `member` of a zip on disk."""

    name: str
    path: Path
    member: str | None
    stamp: tuple[int, int]


@dataclass(frozen=True)
class Other:
    """A file that is passed over: a picture of a kind that is not read, or an archive inside an archive."""

    name: str


@dataclass(frozen=True)
class Scan:
    """What a folder holds, in the order of the names; `files` says where an entry of that name lies, `others` counts what is passed over."""

    root: Path
    entries: tuple[Entry, ...]
    bad: tuple[Bad, ...]
    files: dict[str, Found]
    others: dict[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, int]:
        """How many bad files there are of each kind, most first."""
        return dict(Counter(b.kind for b in self.bad).most_common())


# --- finding ------------------------------------------------------------------------------------------------------------------------------------


def find(root: Path) -> Iterator[Found | Bad | Other]:
    """Every file below `root` (a folder or a zip) that is named like a picture or says something of one. Hidden files are not looked at."""
    if root.is_file():
        yield from _in_zip(root, "")
        return
    yield from _in_folder(root, "", (os.path.realpath(root),))


def _in_folder(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[Found | Bad | Other]:
    """Folders behind symbolic links are followed unless they lead back to a folder above."""
    try:
        items = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as e:
        yield Bad(prefix.rstrip("/") or ".", "unreadable", f"cannot be opened ({e.strerror})")
        return
    for item in items:
        name = prefix + item.name
        if item.name.startswith(".") or item.name == "__MACOSX":
            continue
        try:
            facts = item.stat()
        except OSError as e:
            if e.errno == errno.ELOOP:
                yield Bad(name, "link-loop", "is a symbolic link that leads back to itself")
            elif _wanted(item.name):
                dangling = item.is_symlink()
                yield Bad(name, "dangling-link" if dangling else "unreadable", "is a symbolic link to nothing" if dangling else str(e.strerror))
            continue
        if stat.S_ISDIR(facts.st_mode):
            real = os.path.realpath(item.path)
            if real in above:
                yield Bad(name, "link-loop", "is a symbolic link to a folder that it lies in")
            else:
                yield from _in_folder(Path(item.path), name + "/", (*above, real))
        elif item.name.lower().endswith(".zip"):
            yield from _in_zip(Path(item.path), name + "/")
        elif _wanted(item.name):
            if not stat.S_ISREG(facts.st_mode):
                yield Bad(name, "special", "is a device, socket or pipe, not a file")
            else:
                yield Found(name, Path(item.path), None, (facts.st_size, facts.st_mtime_ns))
        elif _ending(item.name) in NOT_READ:
            yield Other(name)


def _in_zip(path: Path, prefix: str) -> Iterator[Found | Bad | Other]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda m: m.filename)
        modified = path.stat().st_mtime_ns
    except PermissionError as e:
        yield Bad(prefix.rstrip("/") or path.name, "unreadable", f"cannot be read ({e.strerror})")
        return
    except NotImplementedError as e:
        yield Bad(prefix.rstrip("/") or path.name, "format", f"is a zip of a kind that cannot be read here ({e}): pack it again as a plain zip")
        return
    except (zipfile.BadZipFile, OSError, ValueError) as e:  # zipfile says OSError of damage too: a seek to where nothing can be
        yield Bad(prefix.rstrip("/") or path.name, "damaged-zip", f"is not a readable zip archive ({e})")
        return
    for m in members:
        name = _member_name(m)
        parts = name.split("/")
        if m.is_dir() or any(p.startswith(".") or p == "__MACOSX" for p in parts):
            continue
        if not _wanted(parts[-1]):
            if _ending(parts[-1]) in (*NOT_READ, ".zip"):
                yield Other(prefix + name)
        elif m.flag_bits & 1:
            yield Bad(prefix + name, "encrypted", "is encrypted inside the zip: unpack it with its password")
        else:
            yield Found(prefix + name, path, m.filename, (m.file_size, modified))


def _member_name(member: zipfile.ZipInfo) -> str:
    """A member's name as it was meant: without the flag for UTF-8, Python takes it for an old American code page; it may be UTF-8 or Chinese GBK."""
    if member.flag_bits & 0x800 or member.filename.isascii():
        return member.filename
    raw = member.filename.encode("cp437", "replace")
    for code in ("utf-8", "gbk"):
        try:
            return raw.decode(code)
        except UnicodeDecodeError:
            continue
    return member.filename


def _wanted(name: str) -> bool:
    return name.lower() in METADATA or _ending(name) in (*SUFFIXES, ".txt")


def _is_picture(name: str) -> bool:
    return _ending(name) in SUFFIXES


def _ending(name: str) -> str:
    return os.path.splitext(name.lower())[1]


_open_zips = threading.local()


def read(found: Found) -> bytes:
    """The bytes of a file, or of a member of a zip. Raises Unreadable."""
    if found.stamp[0] > LARGEST_FILE:
        raise Unreadable("too-large", f"has {found.stamp[0] / 2**20:,.0f} MiB, more than {LARGEST_FILE // 2**20}")
    try:
        if found.member is None:
            return found.path.read_bytes()
        kept = _open_zips.__dict__.setdefault("archives", {})
        if found.path not in kept:
            kept.clear()  # one open archive a thread
            kept[found.path] = zipfile.ZipFile(found.path)
        with kept[found.path].open(found.member) as f:
            return f.read(LARGEST_FILE + 1)
    except NotImplementedError as e:
        raise Unreadable("format", f"is packed inside the zip in a way that cannot be read here ({e}): pack it again as a plain zip") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise Unreadable("damaged", f"is damaged inside the zip ({e})") from None
    except OSError as e:
        raise Unreadable("unreadable", f"cannot be read ({e.strerror or e})") from None


# --- looking at one picture ---------------------------------------------------------------------------------------------------------------------


def look(found: Found) -> Entry | Bad:
    """Decodes one picture whole, and says what there is to say of it."""
    try:
        data = read(found)
        image = decode(data)
        if min(image.size) < 8:
            raise Unreadable("too-small", f"has {image.width} x {image.height} pixels: at least 8 x 8 are needed to see anything")
    except Unreadable as e:
        return Bad(found.name, e.kind, str(e), found.stamp)
    flat = flatten(image)
    return Entry(
        name=found.name,
        digest=hashlib.sha256(data).hexdigest(),
        width=image.width,
        height=image.height,
        transparent=image.mode == "RGBA",
        stamp=found.stamp,
        likeness=likeness(flat),
        notes=tuple(_notes(found.name, data, image, flat)),
    )


def open_picture(found: Scan, entry: Entry) -> Image.Image:
    """The picture of an entry, as `sfumato.core.images.decode` gives it. Raises FileError where it has changed since the scan."""
    try:
        return decode(read(found.files[entry.name]))
    except Unreadable as e:
        raise FileError(f"{entry.name} {e}, though it was a good picture when the folder was scanned: give the command again") from None


def framed(image: Image.Image, size: int, whole: bool | None = None) -> Image.Image:
    """The picture as a square of `size` pixels: what is opaque is cut to its middle, what has transparency is kept whole, with more around it.

    `whole` decides that otherwise. Colours behind transparency do not bleed: resizing is done with premultiplied alpha.
    """
    w, h = image.size
    if not (image.mode == "RGBA" if whole is None else whole):
        side = min(w, h)
        left, top = (w - side) // 2, (h - side) // 2
        return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    side = max(w, h)
    square = Image.new(image.mode, (side, side))
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    if image.mode != "RGBA":
        return square.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return square.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGBA")


def _notes(name: str, data: bytes, image: Image.Image, flat: Image.Image) -> Iterator[str]:
    true = Image.open(io.BytesIO(data)).format or ""
    suffix = os.path.splitext(name.lower())[1]
    if true in FORMATS and suffix not in FORMATS[true]:
        yield f"is a {true} file in spite of its ending {suffix}"
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:  # type: ignore[index]
        yield "is wholly transparent"
    elif all(low == high for low, high in flat.getextrema()):  # type: ignore[misc]
        yield "is of one colour"
    elif is_enlarged(flat):
        yield "looks enlarged: it lacks fine detail"
    if max(image.size) > 4 * min(image.size):
        yield f"is very long ({image.width} x {image.height}): most of it is cut away"


def likeness(flat: Image.Image) -> str:
    """A difference hash of 16 x 16 grey steps and the mean colour: pictures that differ by scale or compression only have nearly the same."""
    grey = np.asarray(flat.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + 2)  # what is flat gives zeros, not noise
    colour = np.asarray(flat.resize((1, 1), Image.Resampling.BOX))[0, 0]
    return bits.tobytes().hex() + colour.tobytes().hex()


def is_enlarged(flat: Image.Image) -> bool:
    """Whether a picture loses little when it is halved and doubled again: then it was made from a smaller one, or is blurred.

    Measured on the 256 pixels of its middle, as the share of its steps between neighbours that is lost.
    """
    w, h = flat.size
    if min(w, h) < 32:
        return False
    cut = [min(256, w) // 2 * 2, min(256, h) // 2 * 2]
    left, top = (w - cut[0]) // 2, (h - cut[1]) // 2
    grey = flat.convert("L").crop((left, top, left + cut[0], top + cut[1]))
    half = grey.resize((cut[0] // 2, cut[1] // 2), Image.Resampling.BICUBIC).resize((cut[0], cut[1]), Image.Resampling.BICUBIC)
    a, b = (np.asarray(i, dtype=np.float32) for i in (grey, half))
    steps = np.abs(np.diff(a, axis=0)).mean() + np.abs(np.diff(a, axis=1)).mean()
    return bool(steps > 0.5 and np.abs(a - b).mean() < SOFT * steps)


# --- captions and labels ------------------------------------------------------------------------------------------------------------------------


def _said(files: Iterable[Found], names: set[str]) -> tuple[dict[str, str], dict[str, dict[str, str]], list[Bad]]:
    """Captions and labels by picture, from `name.txt` files and from metadata tables (which win); and what is wrong with them."""
    captions: dict[str, str] = {}
    labels: dict[str, dict[str, str]] = {}
    bad: list[Bad] = []
    stems: dict[str, list[str]] = {}
    for n in sorted(names):
        stems.setdefault(os.path.splitext(n)[0], []).append(n)
    for file in sorted(files, key=lambda f: (os.path.basename(f.name).lower() in METADATA, f.name)):
        base = os.path.basename(file.name)
        if base.lower() not in METADATA and os.path.splitext(file.name)[0] not in stems:
            continue  # a text beside no picture: a readme
        try:
            text = read(file).decode("utf-8-sig")
        except (Unreadable, UnicodeDecodeError) as e:
            bad.append(Bad(file.name, "caption", str(e) if isinstance(e, Unreadable) else "is not UTF-8 text: save it as UTF-8"))
            continue
        if base.lower() not in METADATA:
            if text.strip():
                captions |= dict.fromkeys(stems[os.path.splitext(file.name)[0]], " ".join(text.split()))
            continue
        folder = file.name[: -len(base)]
        for number, row in _rows(file.name, text):
            if isinstance(row, str):
                bad.append(Bad(f"{file.name}:{number}", "metadata", row))
                continue
            name = folder + str(row.pop("file_name")).replace("\\", "/").removeprefix("./")
            if name not in names:
                bad.append(Bad(f"{file.name}:{number}", "metadata", f"names {name}, which is not there or cannot be used"))
                continue
            if said := row.pop("text", None):
                captions[name] = " ".join(str(said).split())
            labels[name] = {str(k).strip(): str(v).strip() for k, v in row.items() if isinstance(v, (str, int, float, bool)) and str(v).strip()}
    return captions, labels, bad


def _rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, row with a file_name, or what is wrong with the line)."""
    if name.lower().endswith(".csv"):
        n = 1
        try:
            for n, record in enumerate(csv.DictReader(io.StringIO(text)), 2):
                row = {k: v for k, v in record.items() if k}
                yield n, row if row.get("file_name") else "has no file_name"
        except csv.Error as e:
            yield n + 1, f"and all after it cannot be read ({e}): look for a stray quotation mark"
        return
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            yield n, f"is not JSON ({e.msg})"
            continue
        yield n, dict(row) if isinstance(row, dict) and isinstance(row.get("file_name"), str) else "has no file_name"


def _with_words(entries: list[Entry], captions: dict[str, str], labels: dict[str, dict[str, str]]) -> list[Entry]:
    """Entries with their captions and labels; where pictures lie in several folders, the folder is the label `folder`."""
    folders = {e.name: os.path.basename(os.path.dirname(e.name)) for e in entries}
    told = len(set(folders.values())) > 1
    return [
        replace(e, caption=captions.get(e.name), labels=({"folder": folders[e.name]} if told and folders[e.name] else {}) | labels.get(e.name, {}))
        for e in entries
    ]


# --- the scan -----------------------------------------------------------------------------------------------------------------------------------


def scan(root: Path | str, *, strict: bool = False, workers: int = 0, progress: bool = True) -> Scan:
    """What `survey` finds, if one can train on it.

    Raises FileError where there is no picture, where more than one in ten is bad, or, `strict`, where any is.
    """
    found = survey(root, workers=workers, progress=progress)
    check(found, strict)
    return found


def survey(root: Path | str, *, workers: int = 0, progress: bool = True) -> Scan:
    """Looks at every picture below `root`, a folder or a zip. `workers` 0: one a core. Raises FileError where there is no such folder."""
    root = Path(root)
    if not root.exists():
        raise FileError(f"there is no folder or zip {root}")
    if root.is_file() and root.suffix.lower() != ".zip":
        raise FileError(f"{root} is a single file: name a folder of pictures, or a zip")
    files: list[Found] = []
    bad: list[Bad] = []
    others: Counter[str] = Counter()
    for item in find(root):
        if isinstance(item, Other):
            others[_ending(item.name)] += 1
        elif isinstance(item, Bad):
            bad.append(item)
        else:
            files.append(item)
    seen = _remembered(root)
    pictures = [f for f in files if _is_picture(f.name)]
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks about damaged EXIF data
        known = [seen.get(f.name) for f in pictures]
        fresh = [f for f, k in zip(pictures, known, strict=True) if k is None or k.stamp != f.stamp]
        silent = not progress or not fresh
        bar = tqdm(pool.map(look, fresh), total=len(fresh), desc=translated("looking at pictures"), unit=" files", leave=False, disable=silent)
        new = dict(zip((f.name for f in fresh), bar, strict=True))
    looked: list[Entry | Bad] = [new.get(f.name) or seen[f.name] for f in pictures]
    if fresh or len(seen) != len(looked):
        _remember(root, looked)
    entries = [e for e in looked if isinstance(e, Entry)]
    captions, labels, wrong = _said((f for f in files if not _is_picture(f.name)), {e.name for e in entries})
    bad += [b for b in looked if isinstance(b, Bad)]
    words = tuple(_with_words(entries, captions, labels))
    return Scan(root, words, tuple(sorted(bad + wrong, key=lambda b: b.name)), {f.name: f for f in pictures}, dict(others.most_common()))


def passed_over(found: Scan) -> str:
    """What is passed over, in words: "12 .svg, 1 .zip"."""
    return ", ".join(f"{n} {ending}" for ending, n in found.others.items())


def check(found: Scan, strict: bool = False) -> None:
    """Raises FileError where one cannot train on what was found: see `scan`."""
    bad = sum(b.kind not in WORDS for b in found.bad)
    if not found.entries:
        more = f": {bad} files cannot be used, {_example(found)}" if bad else f": it should hold files that end in {', '.join(SUFFIXES[:6])}"
        others = f"; passed over: {passed_over(found)}" if found.others else ""
        raise FileError(f"{found.root} holds no picture that can be used{more}{others}")
    if strict and found.bad:
        raise FileError(f"{len(found.bad)} files of {found.root} are bad, {_example(found)}: repair or remove them, or leave --strict out")
    if bad > TOO_MANY_BAD * (len(found.entries) + bad):
        raise FileError(
            f"{bad} of {len(found.entries) + bad} files of {found.root} cannot be used, more than {TOO_MANY_BAD:.0%}, {_example(found)}: "
            f"`sfumato data check --all {found.root}` names them: repair or remove them"
        )


def _example(found: Scan) -> str:
    b = found.bad[0]
    return f"such as {b.name}, which {b.reason}"


def _index_path(root: Path) -> Path:
    return cache_folder() / f"folder-v{INDEX_VERSION}-{hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:16]}.jsonl"


def _remembered(root: Path) -> dict[str, Entry]:
    """What an earlier scan found, by name; nothing where its index cannot be read."""
    path = _index_path(root)
    if not path.exists():
        return {}
    found: dict[str, Entry] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["stamp"] = tuple(row["stamp"])
            found[row["name"]] = Entry(**row | {"notes": tuple(row["notes"])})
    except (ValueError, TypeError, KeyError, OSError):
        return {}
    return found


def _remember(root: Path, looked: list[Entry | Bad]) -> None:
    good = (e for e in looked if isinstance(e, Entry))  # what is bad is looked at again: it may be repaired, or allowed, or readable by then
    rows = ({k: v for k, v in asdict(e).items() if k not in ("caption", "labels")} for e in good)
    write_bytes(_index_path(root), "".join(json.dumps(r) + "\n" for r in rows).encode())  # in ASCII: names may be no UTF-8


# --- pixels -------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Pictures as pixels, uint8 "n 4 size size", premultiplied, mapped from the cache folder: what training needs of drawings, of one's own."""

    pixels: Tensor
    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def style(self) -> np.ndarray:
        return np.zeros(len(self), dtype=int)

    @property
    def may_flip(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)


def pixels_path(entries: Sequence[Entry], size: int) -> Path:
    """Where the pixels of these pictures are kept, or would be."""
    name = hashlib.sha256(json.dumps([INDEX_VERSION, size, [e.digest for e in entries]]).encode()).hexdigest()[:24]
    return cache_folder() / f"pixels-{name}.npy"


def pixels_of(found: Scan, entries: Sequence[Entry], size: int) -> Pictures:
    """The pictures as squares of `size` pixels, decoded once; kept in the cache folder."""
    import torch

    if not entries:
        return Pictures(torch.zeros(0, 4, size, size, dtype=torch.uint8), ())
    path = pixels_path(entries, size)
    if not path.exists():
        with replacing(path) as temporary, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            held = new_array(temporary, np.uint8, (len(entries), 4, size, size))
            squares = pool.map(lambda e: square(open_picture(found, e), size), entries)
            for i, pixels in enumerate(tqdm(squares, total=len(entries), desc=translated("decoding"), unit=" pictures", leave=False)):
                held[i] = pixels
            held.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch minds that the file is not to be written to; nobody does
        return Pictures(torch.from_numpy(np.load(path, mmap_mode="r")), tuple(entries))


def same_pictures(run: Path, found: Scan, *, words: bool = False) -> None:
    """Notes in a run folder what it is trained on, with `words` captions and labels too, or raises ValueError where that has changed since."""
    digest = hashlib.sha256("".join(sorted(e.digest for e in found.entries)).encode()).hexdigest()
    now: dict[str, Any] = {"pictures": len(found.entries), "digest": digest}
    if words:
        said = sorted(json.dumps([e.digest, e.caption, sorted(e.labels.items())]) for e in found.entries)
        now["words"] = hashlib.sha256("".join(said).encode()).hexdigest()
    same_data(run, found.root, now)


def same_data(run: Path, where: Path | str, now: dict[str, Any]) -> None:
    path = run / "data.json"
    if not path.exists():
        write_json(path, now)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if {**before, "words": None} == {**now, "words": None} and before != now:
        raise ValueError(f"captions or labels of {where} have changed since {run} was begun: put them back as they were, or name another --out")
    if before != now:
        raise ValueError(
            f"{where} has changed since {run} was begun ({before['pictures']} pictures then, {now['pictures']} now): "
            "put it back as it was, or name another --out"
        )


def square(image: Image.Image, size: int) -> np.ndarray:
    """A picture as uint8 "4 size size", premultiplied."""
    return premultiply(np.asarray(framed(image, size).convert("RGBA"))).transpose(2, 0, 1)


# --- training and validation --------------------------------------------------------------------------------------------------------------------


def split(entries: Iterable[Entry], fraction: float = 0.05) -> tuple[list[Entry], list[Entry]]:
    """(training, validation) by the hash of the content: copies stay together, and a picture keeps its side when others join a hundred or more.

    Of few contents, one in ten or five are for validation, whatever is less; of two or more, one at least.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction (={fraction}) must be at least 0 and below 1: the part kept for validation")
    entries = list(entries)
    if not entries:
        return [], []
    chosen = {e.digest for e in entries if int(e.digest[:8], 16) < fraction * 2**32}
    digests = {e.digest for e in entries}
    least = max(min(5, len(digests) // 10), 1)
    if fraction and len(chosen) < least and len(digests) > 1:
        chosen = set(sorted(digests)[:least])
    if chosen == digests:
        chosen = chosen - {max(digests)}
    return [e for e in entries if e.digest not in chosen], [e for e in entries if e.digest in chosen]


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of n indices, from all over them."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)).tolist() if n else []


def near_duplicates(a: list[Entry], b: list[Entry]) -> list[tuple[Entry, Entry]]:
    """Pairs (of a, of b) that show the same: another size, compression or format of one picture."""
    if not a or not b:
        return []
    bits_a, colour_a = _likenesses(a)
    bits_b, colour_b = _likenesses(b)
    pairs = []
    for j in range(len(b)):
        apart = np.unpackbits(bits_a ^ bits_b[j], axis=1).sum(1)
        tinted = np.abs(colour_a - colour_b[j]).max(1)
        pairs += [(a[i], b[j]) for i in np.flatnonzero((apart <= ALIKE_BITS) & (tinted <= ALIKE_COLOUR))]
    return pairs


def _likenesses(entries: list[Entry]) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(bytes.fromhex("".join(e.likeness for e in entries)), dtype=np.uint8).reshape(len(entries), 35)
    return raw[:, :32], raw[:, 32:].astype(np.int16)
