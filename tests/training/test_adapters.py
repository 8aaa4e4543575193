"""Continuing from adapters: ours, plain ones, and those that do not fit."""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import T2IAdapter
from log_helpers import logged
from training_helpers import silent_run, tiny_settings

from localctl.adapter import LocalAdapter
from localctl.adapter_files import find_adapter
from localctl.base_specs import BASES
from localctl.bases import BaseConfig
from localctl.conditions import ConditionConfig
from localctl.settings import LossConfig
from localctl.training.adapter_plan import continued, plan_adapter
from localctl.training.models import load_models
from localctl.training.resume import is_free
from localctl.training.settings import MASKING, AdapterConfig, EarlyStoppingConfig, TrainSettings, ValidationConfig

pytest_plugins = ["families"]
CPU = torch.device("cpu")


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.fixture
def published(make_adapter, tmp_path):
    """A plain T2IAdapter in half precision with one residual block, as others publish them."""
    make_adapter(seed=3).adapter.half().save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def test_continues_from_a_published_adapter(published, sd_folder, tmp_path):
    settings = tiny_settings(
        sd_folder, tmp_path, adapter_model_name_or_path=str(published), adapter=AdapterConfig(mask_resize="cover")
    )
    adapter = load_models(settings, CPU, None).plain_adapter
    assert equal(adapter.adapter, T2IAdapter.from_pretrained(published).float())
    assert {(p.dtype, p.requires_grad) for p in adapter.parameters()} == {(torch.float32, True)}
    assert adapter.config["num_res_blocks"] == 1 and adapter.config["mask_resize"] == "cover"
    assert adapter.config["base"] == str(sd_folder) and adapter.config["condition"]["kind"] == "canny"


def test_continues_from_a_run_of_ours(make_adapter, sd_folder, tmp_path):
    saved = make_adapter(seed=4, mask_resize="inside")
    saved.save_pretrained(tmp_path / "run" / "adapter")
    for name in ("run", "run/adapter"):
        settings = tiny_settings(sd_folder, tmp_path, adapter_model_name_or_path=str(tmp_path / name))
        adapter = load_models(settings, CPU, None).plain_adapter
        assert isinstance(adapter, LocalAdapter) and equal(adapter, saved)
        assert adapter.config["mask_resize"] == "inside"


def test_what_is_left_open_is_as_in_the_adapter_to_continue_from(make_adapter, published, sd_folder, tmp_path):
    own = {"mask_resize": "inside", "mask_condition": True, "dim_condition": True, "unconditional_scale": 0.0}
    own["mask_margin"] = 3
    levels = (0.5, 1.0, 1.0, 2.0)
    make_adapter(**own, level_weights=levels, condition=asdict(ConditionConfig(kind="sobel"))).save_pretrained(
        tmp_path / "run" / "adapter"
    )

    def adapter(name, **given):
        options = {"condition": ConditionConfig(kind="sobel"), "adapter_model_name_or_path": str(tmp_path / name)}
        return silent_run(tiny_settings(sd_folder, tmp_path / "new", max_train_steps=1, **(options | given)))

    said = logged()
    run = adapter("run")
    assert {name: getattr(run.settings.adapter, name) for name in own} == own  # what checkpoints record
    assert {name: run.state.models.plain_adapter.config[name] for name in own} == own
    assert not [line for line in said if "from here on" in line]
    run.folder.release()

    changed = {"mask_resize": "nearest", "unconditional_scale": 1.0, "mask_features": False}
    run = adapter(
        "run", adapter=AdapterConfig(**changed, level_weights=levels), condition=ConditionConfig(kind="canny", low=10)
    )
    config = run.state.models.plain_adapter.config
    changed["mask_margin"] = 0  # of no use to features that are not masked
    assert {name: config[name] for name in own | changed} == own | changed
    notes = "\n".join(line for line in said if "from here on" in line)
    for line in (
        "adapter.mask_resize=nearest from here on; the adapter .* has inside",
        "adapter.mask_features=false from here on; the adapter .* has true",
        "adapter.unconditional_scale=1.0 from here on; the adapter .* has 0.0",
        "adapter.mask_margin=0 from here on; the adapter .* has 3",
        "condition=canny from here on; the adapter .* has sobel",
    ):
        assert re.search(line, notes), line
    assert len(notes.splitlines()) == 5
    whole = continued(replace(run.settings, adapter=AdapterConfig(mask_condition=False))).adapter
    assert (whole.mask_condition, whole.dim_condition) == (False, False)  # which would have no effect
    run.folder.release()
    other = ConditionConfig(kind="sobel", channels_used="rgb")
    continued(replace(run.settings, adapter=AdapterConfig(), condition=other))
    assert re.search("condition.channels_used=rgb from here on; the adapter .* has gray", said[-1])

    plain = adapter("published", adapter=AdapterConfig(unconditional_scale=0.5)).state.models.plain_adapter.config
    assert (plain["mask_resize"], plain["mask_condition"], plain["unconditional_scale"]) == ("area", False, 0.5)


def test_misfits_are_one_sentence_before_the_base_is_read(published, sd_folder, sdxl_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("localctl.training.frozen.load_pipeline", None)
    for base, changes, words in (
        (sd_folder, {"condition": ConditionConfig(kind="palette")}, "channels of 1|conditions of 1 channels"),
        (sd_folder, {"adapter": AdapterConfig(num_res_blocks=2)}, "num_res_blocks is 2 but .* has 1; set adapter.num"),
        (sd_folder, {"adapter": AdapterConfig(channels=(8, 16))}, r"channels is \(8, 16\) but"),
        (sdxl_folder, {}, "another kind of base"),
    ):
        settings = tiny_settings(base, tmp_path, adapter_model_name_or_path=str(published), **changes)
        with pytest.raises(ValueError, match=words) as error:
            load_models(settings, CPU, None)
        assert "\n" not in str(error.value)


def test_what_is_no_adapter_is_named(sd_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, words in (
        (str(tmp_path / "empty"), "no config.json in it"),
        (str(tmp_path / "nowhere"), "There is no adapter .*nowhere.*no such folder"),
        (str(sd_folder / "unet"), "names the class 'UNet2DConditionModel'; give a LocalAdapter"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            find_adapter(name, local_files_only=True)
        assert "\n" not in str(error.value)


def test_damaged_weights_are_one_sentence(published, sd_folder, tmp_path):
    weights = published / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    plan = plan_adapter(tiny_settings(sd_folder, tmp_path, adapter_model_name_or_path=str(published)))
    with pytest.raises(ValueError, match="weights of the adapter .* cannot be read") as error:
        plan.make(0)
    assert "\n" not in str(error.value)


def test_level_weights_are_set_or_taken_over_and_checked_before_the_base_is_read(make_adapter, sd_folder, tmp_path):
    weights = (0.5, 1.0, 1.0, 2.0)
    fresh = plan_adapter(tiny_settings(sd_folder, tmp_path, adapter=AdapterConfig(level_weights=weights)))
    assert tuple(fresh.make(0).config["level_weights"]) == weights
    make_adapter(level_weights=weights).save_pretrained(tmp_path / "saved")
    options = {"adapter_model_name_or_path": str(tmp_path / "saved")}
    for config, expected in ((AdapterConfig(), weights), (AdapterConfig(level_weights=(1.0,) * 4), (1.0,) * 4)):
        plan = plan_adapter(tiny_settings(sd_folder, tmp_path, adapter=config, **options))
        assert tuple(plan.make(0).config["level_weights"]) == expected
    with pytest.raises(ValueError, match="has 4 levels of features, but level_weights are"):
        plan_adapter(tiny_settings(sd_folder, tmp_path, adapter=AdapterConfig(level_weights=(1.0, 2.0))))


def test_an_adapter_takes_its_part_in_guidance_from_the_settings_and_its_masks_from_the_base(sd_folder, tmp_path):
    def scale(**options):
        return plan_adapter(tiny_settings(sd_folder, tmp_path, **options)).options["unconditional_scale"]

    assert scale() == 1 and scale(adapter=AdapterConfig(unconditional_scale=0.5)) == 0.5
    micro, sd15 = BASES["micro"], TrainSettings(base=BaseConfig(name="sd15"))
    assert asdict(TrainSettings().adapter) == asdict(AdapterConfig()) | micro.adapter | MASKING
    assert micro.adapter["mask_margin"] and micro.adapter["mask_resize"] == "cover"
    assert sd15.adapter.filled(**micro.adapter) == sd15.adapter  # none is open, and none as here
    assert (sd15.adapter.mask_resize, sd15.adapter.mask_margin, sd15.adapter.unconditional_scale) == ("area", 0, 1)
    assert (TrainSettings().proportion_full_masks, sd15.proportion_full_masks) == (1, 0)
    assert is_free("adapter.unconditional_scale")  # a checkpoint without it can be resumed


def test_masks_that_do_more_than_mask_features_are_those_of_the_settings():
    for changes in (
        {"adapter": AdapterConfig(mask_condition=True)},
        {"adapter": AdapterConfig(mask_features=False)},
        {"loss": LossConfig(mask_denoising=True)},
        {"loss": LossConfig(masked_denoising_weight=3)},
    ):
        assert TrainSettings(**changes).proportion_full_masks == 0
        assert TrainSettings(**changes, proportion_full_masks=0.5).proportion_full_masks == 0.5
    assert TrainSettings(adapter=AdapterConfig(mask_features=False)).adapter.mask_margin == 0
    with pytest.raises(ValueError, match="adapter.mask_margin=2 grows the mask of the features, and .* is false"):
        AdapterConfig(mask_margin=2, mask_features=False)


def test_the_adapter_says_how_its_condition_is_computed(sd_folder, tmp_path):
    """So that sampling computes the same."""
    condition = ConditionConfig(kind="canny", channels_used="rgb", low=100, high=200)
    adapter = plan_adapter(tiny_settings(sd_folder, tmp_path, condition=condition)).make(0)
    adapter.save_pretrained(tmp_path / "adapter")
    saved = LocalAdapter.from_pretrained(tmp_path / "adapter").config["condition"]
    assert ConditionConfig(**saved) == condition


def test_a_guidance_scale_that_the_base_would_ignore_is_refused(family_folders, tmp_path):
    base, given = tmp_path / "schnell", ValidationConfig(guidance_scale=5.0)
    shutil.copytree(family_folders("flux"), base)
    config = json.loads((base / "transformer" / "config.json").read_text())
    (base / "transformer" / "config.json").write_text(json.dumps({**config, "guidance_embeds": False}))
    scored = EarlyStoppingConfig(every=1, metric="frechet_micro", guidance_scale=5.0)
    for part, changes in (("validation", {"validation": given, "validation_steps": 1}),
                          ("early_stopping", {"early_stopping": scored})):  # fmt: skip
        with pytest.raises(ValueError, match=f"{part}.guidance_scale=5 has no effect: the base .* has no guidance"):
            plan_adapter(tiny_settings(base, tmp_path, **changes))
    plan_adapter(tiny_settings(base, tmp_path, validation_steps=1))  # with the scale that null stands for
    plan_adapter(tiny_settings(family_folders("flux"), tmp_path, validation=given, validation_steps=1))
