"""Bases in one file of weights, in the layout of the original code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original_layout import save_original
from safetensors.torch import save_file
from sample_helpers import pixels

from localctl.bases import resolve_base
from localctl.cli import sample
from localctl.pipelines import load_pipeline
from localctl.sampling import generate


@pytest.fixture
def checkpoint(sd_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny base in one file, with its configs and tokenizer in the folder beside it."""
    monkeypatch.chdir(tmp_path)
    sd_pipe.save_pretrained("tiny")
    for path in Path("tiny").rglob("*.safetensors"):
        path.unlink()
    return save_original(sd_pipe, Path("tiny.safetensors"))


def test_a_base_in_one_file_is_the_same_base(
    checkpoint: Path, sd_pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_pipeline(str(checkpoint))
    for part in ("unet", "vae", "text_encoder"):
        own, read = getattr(sd_pipe, part).state_dict(), getattr(loaded, part).state_dict()
        assert own.keys() == read.keys() and all(torch.equal(value, read[name]) for name, value in own.items())
    assert capsys.readouterr().err.count("should be kept") == 0
    assert load_pipeline(str(checkpoint), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    flags = ["--prompt", "a b", "--num_inference_steps", "2", "--guidance_scale", "3"]
    assert sample.main([*flags, "--base", "tiny.safetensors", "--output_dir", "out"]) == 0
    expected = generate(sd_pipe, "a b", num_inference_steps=2, guidance_scale=3.0).images[0]
    made = pixels("out")["00_seed0.png"].astype(int)
    assert np.abs(made - np.asarray(expected)).max() <= 1, "equal weights lie in memory in another order"
    assert sample.main(["--from_json", "out", "--output_dir", "again"]) == 0


def test_the_family_of_a_file_gives_its_configs(tmp_path: Path) -> None:
    name = "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
    for width, known in ((768, "sd15"), (1024, "sd21"), (2048, "sdxl")):
        path = tmp_path / f"{known}.safetensors"
        save_file({name: torch.zeros(4, width)}, path)
        spec = resolve_base(str(path), one_file=True)
        assert (spec.id_or_path, spec.file) == (resolve_base(known).id_or_path, str(path))
        assert spec.fp16_vae == resolve_base(known).fp16_vae


def test_other_files_are_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is one file, from which images can be generated; for anything else"):
        resolve_base(str(checkpoint))
    shutil.copy(checkpoint, "alone.safetensors")
    Path("model.ckpt").write_bytes(b"")
    Path("cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    save_file({"other": torch.zeros(1)}, "other.safetensors")
    for name, words in (
        ("alone.safetensors", "reads text of width 16, as no known base; put its configs in alone"),
        ("model.ckpt", "is not a .safetensors file"),
        ("cut.safetensors", "is damaged or cut off"),
        ("other.safetensors", "is no Stable Diffusion checkpoint"),
    ):
        assert sample.main(["--prompt", "a", "--base", name]) == 2
        assert words in capsys.readouterr().err
