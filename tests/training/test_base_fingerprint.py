"""Any change of the base changes its fingerprint; loading it from elsewhere or from memory does not."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from log_helpers import logged
from safetensors.torch import load_file, save_file
from training_helpers import silent_run, tiny_settings

from localctl.pipelines import load_pipeline
from localctl.training.resume import fingerprints, weights_digest
from localctl.training.settings import DataConfig

sys.path.append(str(Path(__file__).parents[1] / "data"))
from file_data import picture, read_metadata, write_imagefolder, write_metadata


def of_base(pipe) -> dict:
    return json.loads(json.dumps(fingerprints({"pipeline": pipe, **pipe.components})))


def changed(before: dict, now: dict) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def noise_beyond_the_first(weights: dict) -> None:
    for value in weights.values():
        value.view(-1)[16:] += 0.01


CHANGES = {
    "scheduler.prediction_type": lambda base: edit(base / "scheduler/scheduler_config.json", prediction_type="sample"),
    "scheduler.beta_end": lambda base: edit(base / "scheduler/scheduler_config.json", beta_end=0.03),
    "scheduler.beta_schedule": lambda base: edit(base / "scheduler/scheduler_config.json", beta_schedule="linear"),
    "scheduler.rescale_betas_zero_snr": lambda base: edit(
        base / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True
    ),
    "vae.scaling_factor": lambda base: edit(base / "vae/config.json", scaling_factor=9.0),
    "vae.shift_factor": lambda base: edit(base / "vae/config.json", shift_factor=0.1),
    "unet.norm_eps": lambda base: edit(base / "unet/config.json", norm_eps=0.1),
    "text_encoder.layer_norm_eps": lambda base: edit(base / "text_encoder/config.json", layer_norm_eps=0.1),
    "weights of unet": lambda base: edit_weights(
        base / "unet/diffusion_pytorch_model.safetensors", noise_beyond_the_first
    ),
    "weights of vae": lambda base: edit_weights(
        base / "vae/diffusion_pytorch_model.safetensors", noise_beyond_the_first
    ),
    "weights of text_encoder": lambda base: edit_weights(
        base / "text_encoder/model.safetensors", noise_beyond_the_first
    ),
}


@pytest.fixture
def base(sd_folder, tmp_path):
    return Path(shutil.copytree(sd_folder, tmp_path / "base"))


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_in_the_base_is_named(base, name):
    before = of_base(load_pipeline(str(base)))
    CHANGES[name](base)
    assert changed(before, of_base(load_pipeline(str(base)))) == [name]


def test_another_tokenizer(sd_pipe):
    before = of_base(sd_pipe)
    sd_pipe.tokenizer.add_tokens(["<cat>"])
    assert changed(before, of_base(sd_pipe)) == ["tokenizer"]


def test_sdxl_and_what_it_makes_of_an_empty_prompt(sdxl_pipe):
    before = of_base(sdxl_pipe)
    assert {"weights of text_encoder_2", "tokenizer_2", "text_encoder_2.projection_dim"} <= before.keys()
    sdxl_pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert changed(before, of_base(sdxl_pipe)) == ["pipeline.force_zeros_for_empty_prompt"]


def test_a_single_value_anywhere_and_exchanged_values(sd_pipe):
    unet = sd_pipe.unet
    parameter = max(unet.parameters(), key=lambda p: p.numel()).data.view(-1)
    before, kept = weights_digest(unet), parameter.clone()
    parameter[len(parameter) // 2 + 1] += 1e-3
    assert weights_digest(unet) != before
    parameter.copy_(kept.flip(0))  # the same sum
    assert weights_digest(unet) != before
    parameter.copy_(kept)
    assert weights_digest(unet) == before


def test_it_does_not_depend_on_threads_layout_or_names(sd_pipe):
    before, threads = weights_digest(sd_pipe.unet), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert weights_digest(sd_pipe.unet.to(memory_format=torch.channels_last)) == before
    finally:
        torch.set_num_threads(threads)
        sd_pipe.unet.to(memory_format=torch.contiguous_format)
    renamed = torch.nn.ModuleDict({"other_name": sd_pipe.unet})
    assert weights_digest(renamed) == before


def test_the_same_base_elsewhere_with_a_librarys_new_keys(base, tmp_path):
    before = of_base(load_pipeline(str(base)))
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    edit(moved / "scheduler/scheduler_config.json", _diffusers_version="9.9", steps_offset=1)
    edit(moved / "unet/config.json", _diffusers_version="9.9", _name_or_path="somewhere")
    edit(moved / "text_encoder/config.json", transformers_version="9.9")
    assert of_base(load_pipeline(str(moved))) == before


def first_run(base: Path, tmp_path: Path):
    root = write_imagefolder(tmp_path / "data")
    data = DataConfig(path=str(root), resolution=64, validation_share=0)
    settings = tiny_settings(base, tmp_path / "run", data=data, max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    return root, replace(settings, resume_from_checkpoint="latest", max_train_steps=2)


def test_a_resume_in_another_world_is_refused_and_says_which(base, tmp_path):
    root, settings = first_run(base, tmp_path)
    assert silent_run(settings).state.step == 1
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    elsewhere = replace(settings, data=replace(settings.data, path=str(moved)))
    assert silent_run(elsewhere).state.step == 1

    write_metadata(root, [line | {"text": "something else"} for line in read_metadata(root)])
    for i in range(6):
        picture(i + 7).save(root / "images" / f"{i:03}.png")
    for name in ("scheduler.beta_end", "vae.scaling_factor", "weights of unet"):
        CHANGES[name](base)
    with pytest.raises(ValueError) as refused:
        silent_run(settings)
    lines = [line.strip().partition(": ") for line in str(refused.value).splitlines()[1:]]
    expected = ["captions", "images", "scheduler.beta_end", "vae.scaling_factor", "weights of unet"]
    assert sorted(name for name, _, _ in lines) == sorted(expected)
    assert all(" -> " in values for _, _, values in lines) and "9.0" in str(refused.value)
    said = logged()
    assert silent_run(replace(settings, force_resume=True)).state.step == 1
    assert sum("accepted by --force_resume" in line for line in said) == 5
