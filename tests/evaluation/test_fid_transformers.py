"""``evaluate_fid.py gen`` on transformers: guidance that suits the base, its weights in the record, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from families import token_adapter

from localctl.architectures import read_shape
from localctl.bases import BASES, BaseConfig
from localctl.cli import evaluate_fid
from localctl.denoisers.abilities import Abilities
from localctl.pipelines import load_pipeline

pytest_plugins = ["evaluation_fixtures", "families"]
Folders = Callable[[str], Path]


def test_a_set_is_generated_with_an_adapter(arguments: list[str], family_folders: Folders, tmp_path: Path) -> None:
    """Of Qwen-Image, whose guidance needs a negative prompt."""
    folder = family_folders("qwen_image")
    adapter = token_adapter(load_pipeline(str(folder)))
    adapter.register_to_config(base=str(folder))
    adapter.save_pretrained(tmp_path / "adapter")
    given = [*arguments, f"base={folder}", f"adapter={tmp_path / 'adapter'}", "num_images=2", "num_inference_steps=1"]
    assert evaluate_fid.main(["gen", *given, "max_sequence_length=64"]) == 0
    made = tmp_path / "fid" / "with_prompts"
    assert len(list((made / "images").glob("*.png"))) == 2
    settings = json.loads((made / "settings.json").read_text())
    known = settings["guidance_scale"], settings["true_cfg_scale"], settings["max_sequence_length"]
    assert known == (None, 4.0, 64) and len(settings["weights_sha256"]["transformer"]) == 64


def test_a_set_without_guidance_is_generated(arguments: list[str], family_folders: Folders, tmp_path: Path) -> None:
    """FLUX.1 has one call a step; an adapter's own scale is recorded as 1, for it has no effect there."""
    folder = family_folders("flux")
    adapter = token_adapter(load_pipeline(str(folder)))
    adapter.register_to_config(unconditional_scale=0.0)
    adapter.save_pretrained(tmp_path / "adapter")
    given = [*arguments, f"base={folder}", f"adapter={tmp_path / 'adapter'}", "num_images=2", "num_inference_steps=1"]
    assert evaluate_fid.main(["gen", *given, "max_sequence_length=64"]) == 0
    settings = json.loads((tmp_path / "fid" / "with_prompts" / "settings.json").read_text())
    assert settings["unconditional_scale"] == 1.0


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "qwen_image", "z_image", "pixart"])
def test_a_known_base_is_asked_before_its_files_are_here(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = BaseConfig(name=name)
    known = Abilities(base, read_shape(base))
    assert known.shape.from_table and known.pipeline == BASES[name].pipelines[0]
    assert "max_sequence_length" in known.arguments
    by = {"flux": "true_cfg_scale", "qwen_image": "true_cfg_scale", "flux2": None}  # Klein 4B is distilled
    assert known.guidance.by == by.get(name, "guidance_scale")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", "true_cfg_scale=2", "A StableDiffusion3Pipeline takes no true_cfg_scale; leave true_cfg_scale out"),
        ("qwen_image", "guidance_scale=2", "ignores guidance_scale; give true_cfg_scale in place of it"),
        ("sd3", "scheduler=ddim", "samples by flow matching, which the scheduler ddim is not for"),
        ("sd3", "controlnet=net", "ControlNets act on Stable Diffusion 1.x, 2.x and XL only, not on a SD3 transformer"),
        ("flux", "unconditional_scale=0", "does nothing without guidance; give a true_cfg_scale above 1, or leave it"),
        (
            "sd3",
            "data.resolution=72",
            "generates sides that are multiples of 16 pixels, not 72x72; set data.resolution",
        ),
    ],
)
def test_what_a_base_cannot_do_is_refused(
    arguments: list[str],
    family_folders: Folders,
    tmp_path: Path,
    name: str,
    change: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = family_folders(name)
    given = [*arguments, f"base={folder}", change]
    if "unconditional" in change:
        token_adapter(load_pipeline(str(folder))).save_pretrained(tmp_path / "adapter")
        given.append(f"adapter={tmp_path / 'adapter'}")
    assert evaluate_fid.main(["gen", *given]) == 2
    assert message in capsys.readouterr().err
