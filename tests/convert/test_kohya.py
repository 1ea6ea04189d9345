"""LoRA files in every layout mean the same changes; those of other kinds are refused by name; learned words in their three formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.convert.compvis import from_unet
from sfumato.convert.kohya import TEXT, UNET, Lora, read_embedding, read_lora, write_lora
from sfumato.core.checkpoint import FileError
from sfumato.diffusion.unet import UNet, UNetConfig
from sfumato.nn.lora import merge
from sfumato.text.clip import ClipConfig, ClipText

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
WORDS = "encoder.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(widths=(32, 64), depths=(1, 0), heads=(4, 4), blocks=1, context=24, mid_depth=1))
    text = ClipText(ClipConfig(vocabulary=99, width=24, inner=32, depth=2, heads=4, tokens=20, end=98))
    return {n: net.eval().requires_grad_(False) for n, net in ((UNET, unet), (TEXT, text))}


def parts(networks: dict[str, nn.Module], layers: dict[str, str], rank: int = 4) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """{(network, layer): (down, up)} of random numbers."""
    g, found = torch.Generator().manual_seed(1), {}
    for layer, network in layers.items():
        weight: Tensor = networks[network].get_submodule(layer).weight  # type: ignore[assignment]
        up = (len(weight), rank, *(1,) * (weight.ndim - 2))
        found[network, layer] = torch.randn(rank, *weight.shape[1:], generator=g), torch.randn(*up, generator=g)
    return found


def kohya(made: Any) -> dict[str, Tensor]:
    found = {}
    for (network, layer), (down, up) in made.items():
        name = ("lora_unet_" + layer if network == UNET else "lora_te_text_model_" + layer).replace(".", "_")
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    return found


def authors(made: Any, unet: nn.Module) -> dict[str, Tensor]:
    """kohya's names for SDXL: those of the checkpoint's authors, and te1."""
    found = {}
    for (network, layer), (down, up) in made.items():
        (theirs,) = from_unet({f"{layer}.weight": down}, unet.config) if network == UNET else ("",)  # type: ignore[arg-type]
        name = ("lora_unet_" + theirs.removesuffix(".weight") if network == UNET else "lora_te1_text_model_" + layer).replace(".", "_")
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    return found


def peft(made: Any) -> dict[str, Tensor]:
    found = {}
    for (network, layer), (down, up) in made.items():
        name = f"{network}.{layer}" if network == UNET else f"{network}.text_model.{layer}"
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return found


def processors(made: Any) -> dict[str, Tensor]:
    """Of diffusers before peft: attention of the UNet only, without the name of the network."""
    found = {}
    for (_, layer), (down, up) in made.items():
        path, _, q = layer.removesuffix(".0").rpartition(".")
        found |= {f"{path}.processor.{q}_lora.down.weight": down, f"{path}.processor.{q}_lora.up.weight": up}
    return found


ATTENTION = {LINEAR: UNET, OUT: UNET}
ALL = ATTENTION | {CONV: UNET, WORDS: TEXT}


def test_every_layout_means_the_same(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    made, told = parts(networks, ALL), {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.lora_alpha": 2})}
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
        "kohya": (kohya(made), {"ss_network_dim": "4"}), "authors": (authors(made, networks[UNET]), {}), "peft": (peft(made), told),
    }  # fmt: skip
    for name, (tensors, about) in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=about)
        found = read_lora(tmp_path / f"{name}.safetensors", networks)
        assert {(n, layer) for n, of in found.changes.items() for layer in of} == set(made), name
        for (network, layer), (down, up) in made.items():
            whole = found.changes[network][layer].whole()
            expected = (2 / 4 * up.flatten(1) @ down.flatten(1)).reshape(whole.shape)
            assert torch.allclose(whole, expected, atol=1e-6), (name, layer)
        assert found.rank == 4
    attention = parts(networks, ATTENTION)
    save_file(processors(attention), tmp_path / "old.safetensors")
    old = read_lora(tmp_path / "old.safetensors", networks)
    assert set(old.changes[UNET]) == set(ATTENTION)
    assert old.changes[UNET][LINEAR].scale == 1


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_what_is_written_is_read(layout: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    save_file(kohya(parts(networks, ALL)), tmp_path / "a.safetensors", metadata={"ss_network_dim": "4", "other": "x"})
    one = read_lora(tmp_path / "a.safetensors", networks)
    write_lora(one, tmp_path / "b.safetensors", layout=layout)
    two = read_lora(tmp_path / "b.safetensors", networks)
    for network, of in one.changes.items():
        for layer, delta in of.items():
            assert torch.allclose(two.changes[network][layer].whole(), delta.whole(), rtol=1e-5, atol=1e-6)
    assert two.about.get("ss_network_dim") == "4"
    with pytest.raises(ValueError, match=r"layout \(='x'\) must be kohya or peft"):
        write_lora(one, tmp_path / "c.safetensors", layout="x")


def test_a_merged_network_draws_as_one_whose_weights_were_changed(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    from sfumato.core.seams import Cond

    made = parts(networks, {k: v for k, v in ALL.items() if v == UNET})
    save_file(kohya(made), tmp_path / "a.safetensors")
    unet = networks[UNET]
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), Cond(text=torch.randn(1, 5, 24))
    plain = unet(x, t, cond)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    merged = merge(unet, [(read_lora(tmp_path / "a.safetensors", networks).changes[UNET], 0.8)])
    drawn = unet(x, t, cond)
    merged.eject()
    assert torch.equal(unet(x, t, cond), plain)
    for (_, layer), (down, up) in made.items():
        state[f"{layer}.weight"] += 0.8 * (2 / 4) * (up.flatten(1) @ down.flatten(1)).reshape(state[f"{layer}.weight"].shape)
    other = UNet(unet.config).eval()  # type: ignore[arg-type]
    other.load_state_dict(state)
    assert float((drawn - other(x, t, cond)).abs().max()) <= 1e-4
    assert float((drawn - plain).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_x.dora_scale", "is a DoRA: that is not read"),
        ("unet.x.lora_magnitude_vector", "is a DoRA"),
        ("lora_unet_x.hada_w1_a", "is a LoHa"),
        ("lora_unet_x.lokr_w1", "is a LoKr"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("ip_adapter.1.to_k_ip.weight", "is an IP-Adapter"),
        ("lora_unet_nowhere.alpha", "holds only alpha of lora_unet_nowhere: it was cut off"),
        ("something.weight", "is no LoRA: it holds something.weight"),
    ],
)
def test_others_are_refused_by_name(name: str, said: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=said):
        read_lora(tmp_path / "a.safetensors", networks)


def test_loras_of_other_models_are_refused(networks: dict[str, nn.Module], tmp_path: Path) -> None:
    name = "lora_unet_" + LINEAR.replace(".", "_")
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 7), f"{name}.lora_up.weight": torch.zeros(32, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"from 7 to 32 numbers, which is not its shape: it is of another model"):
        read_lora(tmp_path / "a.safetensors", networks)
    name = name.replace("blocks_0_attentions", "blocks_9_attentions")
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 7), f"{name}.lora_up.weight": torch.zeros(32, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(FileError, match="which this model does not have: it is of another kind of model"):
        read_lora(tmp_path / "b.safetensors", networks)


def test_learned_words_in_their_formats(tmp_path: Path) -> None:
    v = torch.randn(2, 24)
    save_file({"<cat-toy>": v[0]}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": v}, tmp_path / "style.safetensors")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(v)}, "name": "x", "step": 100}, tmp_path / "old.pt")
    torch.save({"<two>": v}, tmp_path / "learned_embeds.bin")
    save_file({"clip_l": v, "clip_g": torch.randn(2, 32)}, tmp_path / "xl.safetensors")
    for file, name, count in (("learned_embeds.safetensors", "<cat-toy>", 1), ("style.safetensors", "style", 2), ("old.pt", "old", 2),
                              ("learned_embeds.bin", "<two>", 2)):  # fmt: skip
        ((found, (vectors,)),) = read_embedding(tmp_path / file).items()
        assert found == name
        assert torch.equal(vectors, v[:count]), file
    assert [e.shape for e in read_embedding(tmp_path / "xl.safetensors")["xl"]] == [(2, 24), (2, 32)]
    save_file({"a": torch.zeros(2, 3, 4)}, tmp_path / "wrong.safetensors")
    with pytest.raises(FileError, match="is no textual inversion"):
        read_embedding(tmp_path / "wrong.safetensors")


def test_a_lora_knows_its_rank() -> None:
    assert Lora({}, {}).rank == 0
