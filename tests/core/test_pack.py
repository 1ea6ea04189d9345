from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfumato.core.checkpoint import FileError
from sfumato.core.pack import compress, dequantise, expand, load_pack, quantise, save_pack


@given(st.integers(0, 1000), st.sampled_from([(8, 64), (16, 4, 3, 3), (3, 1)]), st.floats(1e-3, 1e3))
def test_int8_rows_err_by_at_most_half_a_step(seed: int, shape: tuple[int, ...], size: float) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantise(w)
    step = w.flatten(1).abs().amax(1) / 127
    error = (dequantise(q, scale) - w).flatten(1).abs().amax(1)
    assert bool((error <= 0.5 * step * 1.05 + 127 * step * 2**-11 + 1e-6).all())


def test_zero_rows_stay_zero() -> None:
    q, scale = quantise(torch.zeros(2, 5))
    assert float(dequantise(q, scale).abs().max()) == 0


def test_compress_and_expand() -> None:
    tensors = {"denoiser.w": torch.randn(64, 64), "denoiser.b": torch.randn(64), "codec.w": torch.randn(64, 64), "codec.n": torch.arange(3)}
    small = compress(tensors, int8=("denoiser.",))
    assert small["denoiser.w"].dtype == torch.int8
    assert small["denoiser.b"].dtype == small["codec.w"].dtype == torch.float16
    back = expand(small)
    assert set(back) == set(tensors)
    assert torch.equal(back["codec.n"], tensors["codec.n"])
    torch.testing.assert_close(back["denoiser.w"], tensors["denoiser.w"], atol=0.03, rtol=0)
    torch.testing.assert_close(back["codec.w"], tensors["codec.w"], atol=2e-3, rtol=1e-3)


def write(path: Path) -> Path:
    save_pack(path, compress({"codec.w": torch.randn(64, 64)}, int8=("codec.",)), {"kind": "codec"})
    return path


def test_round_trip(tmp_path: Path) -> None:
    tensors, meta = load_pack(write(tmp_path / "m.safetensors"))
    assert tensors["codec.w"].dtype == torch.float32
    assert meta["kind"] == "codec"
    assert meta["format"] == 2


@given(st.floats(0, 1), st.booleans(), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(where: float, in_header: bool, bit: int) -> None:
    """Anywhere: in the numbers, in their names, in what is said of them; nothing but the header's padding may go unseen."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "m.safetensors")
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        at = int(where * (start - 1)) if in_header else min(start + int(where * (len(data) - start)), len(data) - 1)
        padding = in_header and not data[at:start].strip()
        data[at] ^= 1 << bit
        path.write_bytes(data)
        if padding:
            return
        with pytest.raises(FileError):
            load_pack(path)


def test_a_cut_pack_and_a_flipped_bit_are_never_a_silently_wrong_tensor(tmp_path: Path) -> None:
    """Cut at 64 places and with 256 single bits flipped: refused, or, where only padding was hit, the same."""
    whole = write(tmp_path / "m.safetensors").read_bytes()
    tensors, meta = load_pack(tmp_path / "m.safetensors")
    damaged = [whole[: k * len(whole) // 64] for k in range(64)]
    for k in range(256):
        data = bytearray(whole)
        data[k * (len(whole) - 1) // 255] ^= 1 << k % 8
        damaged.append(bytes(data))
    passed = 0
    for data in damaged:
        (tmp_path / "d.safetensors").write_bytes(data)
        try:
            found, said = load_pack(tmp_path / "d.safetensors")
        except FileError as e:
            assert "\n" not in str(e)  # noqa: PT017
            continue
        passed += 1
        assert said == meta
        assert all(torch.equal(found[k], v) for k, v in tensors.items())
    assert passed <= 8


def test_packs_of_the_first_format_are_read(tmp_path: Path) -> None:
    from sfumato.core.checkpoint import hash_tensors, save_tensors

    tensors = {"a": torch.zeros(1)}
    save_tensors(tmp_path / "old.safetensors", tensors, {"kind": "codec", "hash": hash_tensors(tensors), "format": 1})
    assert load_pack(tmp_path / "old.safetensors")[1]["kind"] == "codec"


def test_packs_that_draw_differently_have_other_hashes(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1)}
    one, two, again = (save_pack(tmp_path / f"{i}.safetensors", tensors, {"kind": "codec", "size": size}) for i, size in enumerate((64, 96, 64)))
    assert one == again != two


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FileError, match="not one of sfumato's"):
        load_pack(tmp_path / "foreign.safetensors")
    from sfumato.core.checkpoint import hash_tensors, save_tensors

    tensors = {"a": torch.zeros(1)}
    save_tensors(tmp_path / "new.safetensors", tensors, {"kind": "codec", "hash": hash_tensors(tensors), "format": 99})
    with pytest.raises(FileError, match="update sfumato"):
        load_pack(tmp_path / "new.safetensors")
