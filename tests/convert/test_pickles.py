"""Pickles that would do harm where they are loaded: none of them does anything here, and each is one clear error or harmless tensors."""

from __future__ import annotations

import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.convert.checkpoint import read_tensors
from sfumato.convert.kohya import read_embedding
from sfumato.convert.stable import read_checkpoint
from sfumato.core.checkpoint import FileError

CODE, SHELL = "open({canary!r}, 'w').close()", "touch {canary}"
ATTACKS: dict[str, tuple[str, ...]] = {  # module.function: its arguments
    "os.system": (SHELL,), "posix.system": (SHELL,), "nt.system": (SHELL,), "os.popen": (SHELL,), "subprocess.call": (SHELL,),
    "subprocess.check_output": (SHELL,), "subprocess.getoutput": (SHELL,), "subprocess.Popen": (SHELL,), "pty.spawn": (SHELL,),
    "builtins.eval": (CODE,), "builtins.exec": (CODE,), "builtins.open": ("{canary}", "w"), "builtins.compile": (CODE, "x", "exec"),
    "builtins.__import__": ("antigravity",), "builtins.getattr": ("x", "y"), "__builtin__.eval": (CODE,), "io.open": ("{canary}", "w"),
    "timeit.timeit": (CODE,), "profile.run": (CODE,), "cProfile.run": (CODE,), "pdb.run": (CODE,), "bdb.Bdb.run": (CODE,), "trace.Trace.run": (CODE,),
    "code.InteractiveInterpreter.runcode": (CODE,), "runpy.run_path": ("{canary}.py",), "importlib.import_module": ("antigravity",),
    "pickle.loads": ("x",), "_pickle.loads": ("x",), "marshal.loads": ("x",), "shelve.open": ("{canary}",), "dbm.open": ("{canary}", "n"),
    "sqlite3.connect": ("{canary}",), "shutil.rmtree": ("{canary}-folder",), "os.remove": ("{canary}-file",), "os.mkdir": ("{canary}",),
    "pathlib.Path.touch": ("{canary}",), "tempfile.mkstemp": ("{canary}",), "logging.FileHandler": ("{canary}",),
    "zipfile.ZipFile": ("{canary}", "w"),
    "tarfile.open": ("{canary}", "w"), "gzip.open": ("{canary}", "w"), "codecs.open": ("{canary}", "w"), "ctypes.CDLL": ("{canary}.so",),
    "socket.create_connection": ("x",), "urllib.request.urlopen": ("file://{canary}",), "webbrowser.open": ("file://{canary}",),
    "functools.partial": ("x",), "operator.methodcaller": ("x",), "operator.attrgetter": ("x",), "types.FunctionType": ("x",),
    "types.CodeType": ("x",), "torch.load": ("{canary}",), "torch.save": ("x", "{canary}"), "torch.hub.load": ("x",), "torch.jit.load": ("{canary}",),
    "torch.serialization.load": ("{canary}",), "torch.storage._load_from_bytes": ("x",), "torch.utils.collect_env.run": (SHELL,),
    "torch._utils._rebuild_parameter.__globals__": ("x",), "numpy.load": ("{canary}",), "numpy.save": ("{canary}", "x"),
    "numpy.testing._private.utils.runstring": (CODE, "x"), "numpy.f2py.crackfortran.myeval": (CODE,), "PIL.Image.open": ("{canary}",),
    "safetensors.torch.save_file": ("x", "{canary}"), "pip.main": ("x",), "site.main": ("x",), "sys.exit": ("x",), "atexit.register": ("x",),
    "signal.raise_signal": ("9",), "os._exit": ("9",), "os.kill": ("0", "9"), "multiprocessing.Process": ("x",), "asyncio.run": ("x",),
}  # fmt: skip


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def called(module: str, name: str, arguments: tuple[str, ...], way: str) -> bytes:
    """The operations that call a function in one of a pickle's ways."""
    given = b"(" + b"".join(map(text, arguments)) + b"t"
    match way:
        case "reduce":
            return f"c{module}\n{name}\n".encode() + given + b"R"
        case "stack":
            return text(module) + text(name) + b"\x93" + given + b"R"
        case "new":
            return f"c{module}\n{name}\n".encode() + given + b"\x81"
        case "instance":
            return b"(" + b"".join(map(text, arguments)) + f"i{module}\n{name}\n".encode()
        case "object":
            return b"(" + f"c{module}\n{name}\n".encode() + b"".join(map(text, arguments)) + b"o"
        case "state":
            return f"c{module}\n{name}\n".encode() + b")\x81" + given + b"b"
    raise AssertionError(way)


WAYS = ("reduce", "stack", "new", "instance", "object", "state")


def zipped(path: Path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")


def bare(path: Path, program: bytes) -> None:
    path.write_bytes(program)


@pytest.mark.parametrize("write", [zipped, bare], ids=lambda f: f.__name__)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_a_pickle_says_is_done(attack: str, write: Callable[[Path, bytes], None], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "canary-folder").mkdir()
    (tmp_path / "canary-file").touch()
    module, _, name = attack.rpartition(".")
    arguments = tuple(a.format(canary=str(canary)) for a in ATTACKS[attack])
    way = WAYS[list(ATTACKS).index(attack) % len(WAYS)]
    for number, asked in enumerate(("reduce", way)):
        bad = tmp_path / f"{number}.ckpt"
        write(bad, b"\x80\x02}" + text("state_dict") + called(module, name, arguments, asked) + b"s.")
        begun = time.perf_counter()
        with pytest.raises(FileError) as said:
            read_tensors(bad)
        assert time.perf_counter() - begun < 1, "an error comes at once"
        assert "\n" not in str(said.value)
        assert not canary.exists()
        assert (tmp_path / "canary-folder").exists()
        assert (tmp_path / "canary-file").exists()


def test_there_are_enough_of_them() -> None:
    assert len(ATTACKS) >= 60


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """With Python's own reader the first of them does what it says: the tests above could fail."""
    canary = tmp_path / "canary"
    pickle.loads(b"\x80\x02" + called("os", "system", (SHELL.format(canary=canary),), "reduce") + b".")
    assert canary.exists()


@pytest.mark.parametrize(
    "program",
    [b"", b".", b"\x80\x02", b"\x80\xff}.", b"(" * 100_000, b"}" * 1000 + b".", b"\x80\x02}q\x00h\x05.",
     b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
     b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x02Papple\n.", b"\x80\x02X\x01\x00\x00\x00aQ."],
    ids=range(11),
)  # fmt: skip
def test_broken_pickles_are_one_line(program: bytes, tmp_path: Path) -> None:
    for write in (zipped, bare):
        write(tmp_path / "bad.ckpt", program)
        with pytest.raises(FileError) as said:
            read_tensors(tmp_path / "bad.ckpt")
        assert "\n" not in str(said.value)


def test_what_is_packed_is_not_unpacked(tmp_path: Path) -> None:
    """Some bytes that would be gigabytes: neither the program nor the numbers may be compressed."""
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as source:
        members = {n: source.read(n) for n in source.namelist()}
    for packed in ("data.pkl", "data/0"):
        with zipfile.ZipFile(tmp_path / "bad.ckpt", "w") as target:
            for name, data in members.items():
                target.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith(packed) else zipfile.ZIP_STORED)
        with pytest.raises(FileError, match="is compressed, which PyTorch never writes"):
            read_tensors(tmp_path / "bad.ckpt")


def test_tied_weights_do_not_share_memory_and_shapes_take_none(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"state_dict": {"a": whole, "b": whole, "c": whole[:2], "d": whole.view(2, 3).T}}, tmp_path / "a.ckpt")
    found = read_tensors(tmp_path / "a.ckpt")
    found["a"] += 1
    assert torch.equal(found["b"], whole)
    assert torch.equal(found["c"], whole[:2])
    assert torch.equal(found["d"], whole.view(2, 3).T)
    shapes = read_tensors(tmp_path / "a.ckpt", shapes=True)
    assert {k: (tuple(v.shape), v.dtype, v.device.type) for k, v in shapes.items()} == {
        k: (tuple(v.shape), torch.float32, "meta") for k, v in found.items()
    }


def test_learned_words_of_the_original_repository(tmp_path: Path) -> None:
    """Which wrote a whole ParameterDict."""
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 8))})
    torch.save({"string_to_param": words, "string_to_token": {"*": torch.tensor(265)}}, tmp_path / "style.pt")
    (vectors,) = read_embedding(tmp_path / "style.pt")["style"]
    assert torch.equal(vectors, words["*"].data)


PLACES = (
    "cond_stage_model.transformer.text_model.encoder.layers.{}.mlp.fc1.weight",
    "first_stage_model.encoder.down.{}.block.0.conv1.weight",
    "model.diffusion_model.input_blocks.{}.0.op.weight",
)


@pytest.mark.parametrize("place", PLACES)
def test_blocks_of_absurd_numbers_are_refused_at_once(place: str, stable: Path, tmp_path: Path) -> None:
    save_file(load_file(stable / "sd15.safetensors") | {place.format(300_000_000): torch.zeros(1)}, tmp_path / "bad.safetensors")
    begun = time.perf_counter()
    with pytest.raises(FileError, match="a block of the number"):
        read_checkpoint(tmp_path / "bad.safetensors")
    assert time.perf_counter() - begun < 2
