"""Addons between jobs: kept while they are the same, taken off without a trace when they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from addon_files import lora_state, random_controlnet, save_ip_adapter, save_lora, save_word
from PIL import Image
from safetensors.torch import save_file

from localctl.jobs.generate import JobModels, generate_job, load_models
from localctl.jobs.prepare import Job, prepare
from localctl.jobs.settings import SampleSettings


def job(**options: Any) -> Job:
    return prepare(SampleSettings(prompt=["a <toy>", "b"], base="base", num_inference_steps=2, **options))


def images(work: Job, models: JobModels) -> np.ndarray:
    ((_, output),) = generate_job(work, models)
    return np.stack([np.asarray(image) for image in output.images])


@pytest.fixture
def everything(base_here: Path, sd_pipe: Any) -> dict[str, Any]:
    """The settings of a job with each kind of addon."""
    save_lora(Path("a.safetensors"), sd_pipe, 1, "unet", "text_encoder", size=0.3)
    save_word(Path("toy.safetensors"), 16)
    save_ip_adapter(Path("ip"), sd_pipe)
    random_controlnet(sd_pipe).save_pretrained("net")
    Image.new("RGB", (64, 64), "red").save("red.png")
    return {
        "lora": "a.safetensors",
        "textual_inversion": "toy.safetensors",
        "ip_adapter": "ip",
        "ip_adapter_image": "red.png",
        "controlnet": "net",
        "controlnet_condition_image": "red.png",
    }


def test_addons_are_kept_for_the_next_job_and_leave_no_trace(everything: dict[str, Any]) -> None:
    full, plain = job(**everything), job()
    models = load_models(plain)
    before = images(plain, models)
    models = load_models(full, models)
    assert models.pipe is not None
    found, encoder = images(full, models), models.pipe.image_encoder
    again = job(**everything, lora_scale=0.5, seeds=[3])
    models = load_models(again, models)
    assert models.pipe.image_encoder is encoder and not np.array_equal(images(again, models), found)
    assert np.array_equal(images(full, load_models(full, models)), found)
    models = load_models(plain, models)
    assert models.pipe.image_encoder is None and np.array_equal(images(plain, models), before)
    assert not np.array_equal(found, before)


def test_weights_that_do_not_fit_leave_the_next_job_as_it_was(everything: dict[str, Any], sd_pipe: Any) -> None:
    plain = job()
    models = load_models(plain)
    before = images(plain, models)
    state = lora_state(sd_pipe, 1)
    cut = {name: value[:, :-1].contiguous() if "attn1" in name else value for name, value in state.items()}
    save_file(cut, "bad.safetensors")
    everything |= {"lora": ["a.safetensors", "bad.safetensors"]}
    with pytest.raises(ValueError, match=r"bad.safetensors does not fit this base"):
        load_models(job(**everything), models)
    assert np.array_equal(images(plain, load_models(plain, models)), before)


def test_a_file_that_is_written_anew_is_read_anew(everything: dict[str, Any], sd_pipe: Any) -> None:
    one = job(lora="a.safetensors")
    models = load_models(one)
    before = images(one, models)
    save_lora(Path("a.safetensors"), sd_pipe, 7, size=0.3)
    assert not np.array_equal(images(one, load_models(one, models)), before)
