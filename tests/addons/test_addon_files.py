"""IP-Adapters and ControlNets are found and checked by the headers of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from addon_files import random_controlnet, save_encoder, save_ip_adapter
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from localctl.addons.controlnets import find_controlnet
from localctl.addons.ip_adapters import find_ip_adapter, with_ip_adapters
from localctl.architectures import read_shape
from localctl.pipelines import BaseConfig


def test_an_ip_adapter_is_found_with_its_encoder(sd_pipe: Any, tmp_path: Path) -> None:
    file = save_ip_adapter(tmp_path / "models", sd_pipe)
    found = find_ip_adapter(file)
    assert found.place == str(file) and found.encoder == str(tmp_path / "models" / "image_encoder")
    (tmp_path / "models" / "sub").mkdir()
    moved = file.rename(tmp_path / "models" / "sub" / file.name)
    assert find_ip_adapter(moved.parent).encoder == found.encoder  # of the folder above
    (tmp_path / "models" / "image_encoder").rename(tmp_path / "clip")
    with pytest.raises(ValueError, match="no folder image_encoder beside"):
        find_ip_adapter(moved)
    assert find_ip_adapter(moved, tmp_path / "clip").encoder == str(tmp_path / "clip")


def test_no_network_is_asked_for_an_encoder_where_none_may_be(
    sd_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    found = find_ip_adapter(save_ip_adapter(tmp_path / "models", sd_pipe), local_files_only=True)
    read, asked = transformers.CLIPVisionModelWithProjection.from_pretrained, []

    def watched(*args: Any, **options: Any) -> Any:
        asked.append(options["local_files_only"])
        return read(*args, **options)

    monkeypatch.setattr(transformers.CLIPVisionModelWithProjection, "from_pretrained", watched)
    with with_ip_adapters(sd_pipe, [found]):
        assert asked == [True]


def test_ip_adapters_that_do_not_fit_are_refused(sd_pipe: Any, sdxl_pipe: Any, sd_folder: Path, tmp_path: Path) -> None:
    shape = read_shape(BaseConfig(name=str(sd_folder)))
    good = find_ip_adapter(save_ip_adapter(tmp_path / "good", sd_pipe))
    good.check(shape)
    large = save_ip_adapter(tmp_path / "xl", sdxl_pipe)
    with pytest.raises(ValueError, match="text of width 32 but this base has 16"):
        find_ip_adapter(large).check(shape)
    with pytest.raises(ValueError, match="cannot be loaded on this base"), with_ip_adapters(sd_pipe, [large]):
        pass
    assert sd_pipe.unet.encoder_hid_proj is None and sd_pipe.image_encoder is None
    with pytest.raises(ValueError, match="of which a pipeline takes one"), with_ip_adapters(sd_pipe, [good, large]):
        pass
    with (
        with_ip_adapters(sd_pipe, [good]),
        pytest.raises(ValueError, match="an IP-Adapter already"),
        with_ip_adapters(sd_pipe, [good]),
    ):
        pass
    state = load_file(good.weights.path)
    state["image_proj.proj.weight"] = torch.ones(64, 24)
    save_file(state, tmp_path / "good" / "ip-adapter.safetensors")
    with pytest.raises(ValueError, match="features of width 24 but the image encoder .* makes 12"):
        find_ip_adapter(tmp_path / "good").check(shape)
    save_file({"a": torch.ones(1)}, tmp_path / "good" / "ip-adapter.safetensors")
    with pytest.raises(ValueError, match="is not an IP-Adapter"):
        find_ip_adapter(tmp_path / "good")
    faces = {"image_proj.norm.weight": torch.ones(4), "ip_adapter.1.to_k_ip.weight": torch.ones(4, 4)}
    save_file(faces, tmp_path / "good" / "ip-adapter.safetensors")
    with pytest.raises(ValueError, match="is a FaceID adapter"):
        find_ip_adapter(tmp_path / "good")


def test_an_encoder_of_another_kind_is_refused(sd_pipe: Any, tmp_path: Path) -> None:
    file = save_ip_adapter(tmp_path, sd_pipe)
    config = tmp_path / "image_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["CLIPTextModel"]}))
    with pytest.raises(ValueError, match="not a CLIPVisionModelWithProjection"):
        find_ip_adapter(file)
    with pytest.raises(ValueError, match=r"cannot be used \(no config.json there\)"):
        find_ip_adapter(file, tmp_path)
    save_encoder(tmp_path / "image_encoder")
    (tmp_path / "image_encoder" / "model.safetensors").rename(tmp_path / "image_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only .bin weights, which are pickles"), with_ip_adapters(sd_pipe, [file]):
        pass


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you"])
def test_a_full_memory_is_not_called_a_damaged_controlnet(
    message: str, sd_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_controlnet(sd_pipe).save_pretrained(tmp_path / "net")

    def load(*args: Any, **options: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(ControlNetModel, "from_pretrained", load)
    with pytest.raises(RuntimeError, match=message):
        find_controlnet(tmp_path / "net").load()


def test_controlnets_are_found_and_checked_by_their_config(
    sd_pipe: Any, sd_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    random_controlnet(sd_pipe).save_pretrained(tmp_path / "net")
    found, shape = find_controlnet(tmp_path / "net"), read_shape(BaseConfig(name=str(sd_folder)))
    found.check(shape)
    assert found.place == str(tmp_path / "net") and found.load().config.conditioning_channels == 3
    with pytest.raises(ValueError, match="use a ControlNet made for this base"):
        found.check(read_shape(BaseConfig(name=str(sdxl_folder))))
    random_controlnet(sd_pipe, global_pool_conditions=True).save_pretrained(tmp_path / "pooled")
    with pytest.raises(ValueError, match="cannot be masked"):
        find_controlnet(tmp_path / "pooled").check(shape)
    for place, message in (
        (sd_folder / "unet", "it is a UNet2DConditionModel"),
        (tmp_path, "no config.json"),
        ("x", "no such"),
    ):
        with pytest.raises(ValueError, match=message):
            find_controlnet(place)
    weights = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="which are pickles"):
        found.load()
