"""What tests load is a copy of what was read before, and read again when a file has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from localctl.pipelines import load_pipeline


def test_copies_are_equal_and_apart_and_changed_files_are_read_again(sd_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(sd_folder, folder)
    read, _, third = (load_pipeline(str(folder)) for _ in range(3))
    weights = read.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in third.unet.state_dict().items())
    assert third.unet.config == read.unet.config and not third.unet.training
    third.unet.conv_in.weight.zero_()
    third.scheduler.set_timesteps(7)
    fourth = load_pipeline(str(folder))
    assert torch.equal(fourth.unet.conv_in.weight, weights["conv_in.weight"])
    assert fourth.scheduler.num_inference_steps is None
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert torch.equal(load_pipeline(str(folder)).unet.conv_in.weight, weights["conv_in.weight"] + 1)
