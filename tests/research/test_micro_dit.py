"""The studies on a transformer of the embedded scenes: its sampling, and results that name it without its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from localctl.adapter import LocalAdapter
from localctl.bases import MICRO_WEIGHTS
from research import heat_maps
from research.bases import sha256_of_base, suits
from research.control_share.__main__ import main as control_share
from research.flags import label_of
from research.layout_benchmark.__main__ import main as layout_benchmark
from research.micro_base.export import export_transformer
from research.micro_base.transformer import new_transformer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained one, with tokens of 16 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work") / "micro_dit" / "base"
    folder.parent.mkdir()
    vae, clip = AutoencoderKL.from_pretrained(MICRO_WEIGHTS / "vae"), CLIPModel.from_pretrained(MICRO_WEIGHTS / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(MICRO_WEIGHTS / "clip")
    export_transformer(folder, vae, clip, tokenizer, new_transformer(patch=2))
    return folder


@pytest.mark.parametrize(
    ("place", "label"),
    [
        ("micro", "micro"),
        ("outputs/adapter/adapter", "outputs/adapter/adapter"),
        ("/somewhere/micro_dit/base", "micro_dit"),
        ("/somewhere/run/adapter", "run"),
        ("/somewhere/other", "other"),
    ],
)
def test_a_label_names_no_folder_of_a_machine(place: str, label: str) -> None:
    assert label_of(place) == label_of(Path(place)) == label


def test_each_base_is_sampled_as_suits_it(base: Path) -> None:
    own, embedded = suits(str(base)), suits("micro")
    assert (own.scheduler, own.guidance_scale, own.max_sequence_length) == ("euler", 7.0, 0)
    assert (embedded.scheduler, embedded.guidance_scale, embedded.max_sequence_length) == ("ddim", 2.0, None)
    assert len({sha256_of_base(folder) for folder in (base, MICRO_WEIGHTS)}) == 2


@pytest.mark.slow
def test_the_studies_run_on_it(base: Path, tmp_path: Path) -> None:
    page = tmp_path / "micro_dit_layouts.md"
    few = ["--layouts", "3", "--references", "8", "--methods", "bias", "guidance"]
    given = ["--base", str(base), "--num_inference_steps", "2"]
    assert layout_benchmark([*given, *few, "--report", str(page), "--work_dir", str(tmp_path / "work")]) == 0
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "micro_dit_layouts").glob("*.json"))]
    assert [result["name"] for result in results] == ["bias", "guidance", "none"]
    assert {result["asked"]["protocol"]["base"] for result in results} == {"micro_dit"}
    assert {result["asked"]["protocol"]["scheduler"] for result in results} == {"euler"}
    assert "on the base `micro_dit`" in page.read_text() and "What is asked" not in page.read_text()
    adapter = LocalAdapter(
        in_channels=1, channels=[160] * 2, num_res_blocks=1, downscale_factor=16, adapter_type="token_adapter"
    )
    adapter.register_to_config(base=str(base), condition={"kind": "canny"})
    adapter.save_pretrained(tmp_path / "run" / "adapter")
    more = ["--adapter", str(tmp_path / "run" / "adapter"), "--count", "2", "--output_dir", str(tmp_path / "control")]
    assert control_share([*given, *more]) == 0
    content = json.loads((tmp_path / "control" / "control.json").read_text())
    assert [result["adapter"] for result in content["results"]] == ["run"]
    assert content["results"][0]["control"]["value"] == 0  # untrained: as without it
    assert str(tmp_path) not in json.dumps([content, results])
    sheet = tmp_path / "heat.png"
    assert (
        heat_maps.main([*given, "--layout", "examples/scene.json", "--controls", "bias", "--output", str(sheet)]) == 0
    )
    assert sheet.is_file()
