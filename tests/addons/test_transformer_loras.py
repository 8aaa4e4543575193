"""LoRAs on transformers: as diffusers itself loads what it saves, on the command line too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from addon_files import lora_state, save_lora
from families import FAMILIES, Family, run
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from sample_helpers import assert_same, pixels, refused_early

from localctl.addons.loras import find_lora, with_loras
from localctl.architectures import read_shape
from localctl.cli import sample
from localctl.pipelines import BaseConfig, load_pipeline

pytest_plugins = ["families"]
Folders = Callable[[str], Path]
LOADED = ["sd3", "flux", "z_image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux2", "qwen_image"))]
LAYERS = ["to_q", "to_v", "to_out.0"]


def saved_by_diffusers(folder: Path, place: Path) -> None:
    """Save a LoRA of rank 2 and alpha 4, with its metadata, by the calls of diffusers' own training scripts."""
    pipe: Any = load_pipeline(str(folder))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS)
    pipe.transformer.add_adapter(config)
    torch.manual_seed(1)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.5 * torch.randn_like(parameter)
    state = get_peft_model_state_dict(pipe.transformer)
    more = {"text_encoder_lora_layers": None} if type(pipe).__name__ == "FluxPipeline" else {}
    type(pipe).save_lora_weights(
        place, transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict(), **more
    )


@pytest.mark.parametrize("name", LOADED)
def test_it_acts_as_diffusers_loads_it_and_leaves_no_trace(name: str, family_folders: Folders, tmp_path: Path) -> None:
    family: Family = FAMILIES[name]
    folder = family_folders(name)
    saved_by_diffusers(folder, tmp_path / "style")
    pipe: Any = load_pipeline(str(folder))
    plain = run(family, pipe)
    find_lora(tmp_path / "style").check(read_shape(BaseConfig(name=str(folder))))
    with with_loras(pipe, [tmp_path / "style"]) as use:
        assert torch.equal(run(family, pipe), plain)
        use({"style": 0.5})
        found = run(family, pipe)
    assert torch.equal(run(family, pipe), plain)
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    torch.testing.assert_close(run(family, pipe), found, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


def test_it_acts_on_the_command_line_beside_a_layout_and_the_record_repeats_it(
    family_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = family_folders("sd3")
    save_lora(tmp_path / "style.safetensors", load_pipeline(str(folder)), 1, "transformer", "text_encoder", size=0.2)
    regions = [{"phrase": "cat", "box": [0, 0, 0.5, 1]}]
    Path("scene.json").write_text(json.dumps({"prompt": "a cat", "regions": regions}))
    flags = [
        "--base",
        str(folder),
        "--layout",
        "scene.json",
        "--num_inference_steps",
        "2",
        "--max_sequence_length",
        "24",
    ]
    assert sample.main([*flags, "--output_dir", "plain"]) == 0
    assert sample.main([*flags, "--lora", "style.safetensors", "--lora_scale", "0.5", "--output_dir", "styled"]) == 0
    assert sample.main(["--from_json", "styled", "--output_dir", "again"]) == 0
    styled = pixels("styled")
    assert_same(pixels("again"), styled)
    assert not np.array_equal(styled["00_seed0.png"], pixels("plain")["00_seed0.png"])


def test_it_may_change_a_convolution(family_folders: Folders, tmp_path: Path) -> None:
    folder, family = family_folders("sd3"), FAMILIES["sd3"]
    pipe: Any = load_pipeline(str(folder))
    weight = pipe.transformer.pos_embed.proj.weight
    torch.manual_seed(1)
    state = {"A": torch.randn(2, *weight.shape[1:]), "B": torch.randn(len(weight), 2, 1, 1)}
    for name, channels in (("own", 1), ("wide", 2)):
        inside = {"A": state["A"].repeat(1, channels, 1, 1), "B": state["B"]}
        save_file(
            {f"transformer.pos_embed.proj.lora_{end}.weight": value for end, value in inside.items()},
            tmp_path / f"{name}.safetensors",
        )
    shape = read_shape(BaseConfig(name=str(folder)))
    find_lora(tmp_path / "own.safetensors").check(shape)
    with pytest.raises(ValueError, match=f"proj for {2 * weight.shape[1]} .* takes {weight.shape[1]};"):
        find_lora(tmp_path / "wide.safetensors").check(shape)
    plain = run(family, pipe)
    with with_loras(pipe, [tmp_path / "own.safetensors"]) as use:
        use({"own": 1.0})
        assert not torch.equal(run(family, pipe), plain)


def test_what_does_not_fit_is_refused_before_the_base_is_loaded(
    family_folders: Folders,
    sd_pipe: Any,
    sd_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sd3 = family_folders("sd3")
    own = lora_state(load_pipeline(str(sd3)), 1, "transformer")
    save_file(own, tmp_path / "own.safetensors")
    save_file({name: value.repeat(1, 2) for name, value in own.items()}, tmp_path / "wide.safetensors")
    save_file({name.replace("attn", "attention"): value for name, value in own.items()}, tmp_path / "other.safetensors")
    save_lora(tmp_path / "unet.safetensors", sd_pipe)
    for base, name, message in (
        (sd3, "wide", "changes transformer_blocks.0.attn.to_k for 32 channels, which this base takes 16"),
        (sd3, "other", "changes transformer_blocks.0.attention.to_k for 16 channels, which this base does not have"),
        (sd3, "unet", "is for a base with a U-Net, which this one does not have"),
        (sd_folder, "own", "is for a base with a transformer, which this one does not have"),
        (family_folders("pixart"), "own", "--lora: diffusers loads no LoRAs on a PixArtSigmaPipeline; leave it out"),
    ):
        flags = ["--base", str(base), "--prompt", "a cat", "--lora", str(tmp_path / f"{name}.safetensors")]
        refused_early(flags, message, monkeypatch, capsys)
