"""The published recipe is what it says, whatever the defaults become."""

import functools
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from localctl.cli.config import CONFIG_DIR, load_config, schema_keys
from localctl.training.adapter_plan import plan_adapter
from localctl.training.schedule import bound_steps, learning_rate_at
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings, WandbConfig

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("paper_*.yaml"))
# Settings that choose machine and images, not what is learned; or of transformers alone.
FREE = {
    "base.vae", "base.revision", "base.variant", "base.dtype", "base.local_files_only", "overwrite_output_dir",
    "dry_run", "report_to", "dataloader_num_workers", "cpu_threads", "allow_tf32", "compile",
    "resume_from_checkpoint", "force_resume", "max_nonfinite_steps", "push_to_hub", "hub_model_id", "hub_private_repo",
    "hub_token",
    "quantization", "offload_base", "flow_shift", "distilled_guidance", "max_sequence_length",
    "adapter.token_width", "adapter.condition_space",
    *(f"wandb.{field.name}" for field in fields(WandbConfig)),
}  # fmt: skip
PINNED_DATA = {"data.resolution", "data.keep_latents", "data.center_crop", "data.random_flip"}


@functools.cache
def load(*argv, config_dir=CONFIG_DIR):
    return load_config(argv, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS, config_dir=config_dir)


def test_every_value_of_the_published_recipe():
    canny = load("experiment=paper_canny")
    assert canny.base.name == "sd15" and canny.adapter_model_name_or_path is None
    adapter = canny.adapter
    assert (adapter.adapter_type, adapter.channels) == ("full_adapter", (320, 640, 1280, 1280))
    assert (adapter.num_res_blocks, adapter.downscale_factor) == (2, 8)
    assert (adapter.mask_condition, adapter.mask_resize) == (False, "nearest")
    assert plan_adapter(canny).options["in_channels"] == 1
    assert (canny.condition.kind, canny.condition.low, canny.condition.high) == ("canny", 100, 200)
    assert canny.condition.channels_used == "rgb"
    mask = canny.mask
    assert (mask.kind, mask.min_area, mask.max_area, mask.soft_edge) == ("box", 10_000 / 512**2, 1, 0)
    assert mask.box_law == "corners"
    loss = canny.loss
    assert (loss.filter, loss.schedule, loss.weight, loss.normalise) == ("sobel", "constant", 1e-3, "map")
    assert (loss.mask_resize, loss.squared_mask, loss.denoising_weight) == ("nearest", True, 1.0)
    assert (canny.timestep_sampling, canny.proportion_empty_prompts) == ("cubic", 0.5)
    assert canny.proportion_full_masks == 0
    assert (canny.learning_rate, canny.adam_beta1, canny.adam_beta2) == (8e-5, 0.9, 0.999)
    assert (canny.adam_weight_decay, canny.adam_epsilon, canny.max_grad_norm) == (1e-2, 1e-8, 1.0)
    assert (canny.lr_scheduler, canny.lr_warmup_steps) == ("linear", 500)
    bound = bound_steps(canny, 600_000)
    assert (learning_rate_at(bound, 250), learning_rate_at(bound, 500), learning_rate_at(bound, 750_000)) == (
        4e-5,
        8e-5,
        0,
    )
    assert learning_rate_at(bound, 375_250) == pytest.approx(4e-5)
    assert (canny.train_batch_size, canny.gradient_accumulation_steps) == (4, 2)
    assert (canny.num_train_epochs, canny.max_train_steps) == (10, None)
    assert bound.max_train_steps == 750_000
    assert canny.validation.proportion_empty_prompts == 0.3
    assert canny.early_stopping.every == 10_000
    assert not (canny.use_8bit_adam or canny.use_ema)


def test_colour_and_sobel_differ_where_they_should():
    canny, color, sobel = (load(f"experiment=paper_{name}") for name in ("canny", "color", "sobel"))
    assert (color.adapter.adapter_type, color.adapter.channels) == ("light_adapter", (320, 640, 1280))
    assert color.adapter.num_res_blocks == 4 and (color.condition.kind, color.condition.cells) == ("palette", 8)
    assert color.condition.palette_filter == "bicubic"
    assert plan_adapter(color).options["in_channels"] == 3 and plan_adapter(sobel).options["in_channels"] == 1
    assert sobel.adapter == canny.adapter and sobel.condition.kind == "sobel"
    for other in (color, sobel):
        differing = {key for key in schema_keys(TrainSettings) if value(other, key) != value(canny, key)}
        assert {key.split(".")[0] for key in differing} <= {"adapter", "condition", "output_dir"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("no_local", {"loss.filter": "none"}),
        ("mse", {"loss.filter": "mse"}),
        ("laplacian", {"loss.filter": "laplacian"}),
        ("step_unit", {"loss.schedule": "step_unit"}),
        ("time_unit", {"loss.schedule": "time_unit"}),
        ("snr", {"loss.schedule": "snr"}),
        ("mask_mean", {"loss.normalise": "mask"}),
    ],
)
def test_an_ablation_changes_one_thing(name, changed):
    canny, other = load("experiment=paper_canny"), load(f"experiment=paper_canny_{name}")
    found = {k: value(other, k) for k in schema_keys(TrainSettings) if value(other, k) != value(canny, k)}
    assert found == {**changed, "output_dir": f"outputs/paper_canny_{name}"}


def value(settings, key):
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_key_is_pinned(name):
    """The recipe sets everything that matters, so that defaults of the dataclasses do not apply."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train", overrides=[f"experiment={name}"]), resolve=True)
    wanted = {key for key in schema_keys(TrainSettings) if not key.startswith("data.")} | PINNED_DATA
    missing = {key for key in wanted - FREE if not has(composed, key.split("."))}
    assert missing == set()
    assert composed["data"]["resolution"] == 512 and composed["data"]["keep_latents"] is False


def has(values, path):
    for part in path:
        if part not in values:
            return False
        values = values[part]
    return True


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_default_runs_values_do_not_leak_in(name, tmp_path):
    """Everything that the default run is made of is changed; the recipe stays."""
    folder = tmp_path / "config"
    shutil.copytree(CONFIG_DIR, folder)
    train = yaml.safe_load((folder / "train.yaml").read_text())
    for key, changed in {"learning_rate": 0.7, "train_batch_size": 99, "lr_scheduler": "constant", "seed": 5}.items():
        assert key in train
        train[key] = changed
    for key in set(train) - {"defaults", "lr_scheduler", "timestep_sampling", "output_dir"}:
        train[key] = train[key] * 2 + 1 if isinstance(train[key], int) else train[key] / 2
    train["timestep_sampling"] = "uniform"
    train["adam_beta1"], train["use_ema"] = 0.1, True
    (folder / "train.yaml").write_text(yaml.safe_dump(train, sort_keys=False))
    for option in ("condition/canny", "mask/box", "loss/sobel", "adapter/auto"):
        path = Path(folder, f"{option}.yaml")
        kept = yaml.safe_load(path.read_text())
        extra = {"condition/canny": {"low": 1}, "mask/box": {"min_area": 0.9}, "loss/sobel": {"t_min": 3}}
        path.write_text(yaml.safe_dump({**kept, **extra.get(option, {"num_res_blocks": 7})}))
    assert load(f"experiment={name}", config_dir=folder) == load(f"experiment={name}")


def test_groups_can_still_be_chosen_beside_it():
    other = load("experiment=paper_canny", "loss=laplacian", "base=sdxl", "adapter=auto", "--max_train_steps", "7")
    assert (other.loss.filter, other.loss.normalise) == ("laplacian", "mask") and other.base.name == "sdxl"
    assert plan_adapter(other).options["adapter_type"] == "full_adapter_xl"
    assert bound_steps(other, 600_000).max_train_steps == 7


def test_the_masked_denoising_loss_is_an_option_of_the_group():
    loss = load("loss=masked").loss
    assert (loss.filter, loss.mask_denoising, loss.normalise, loss.mask_resize) == ("none", True, "map", "nearest")
    assert loss.squared_mask and load("loss=sobel", "loss.mask_denoising=true").loss.filter == "sobel"


def test_level_weights_dimming_and_names_from_the_command_line():
    adapter = load(
        "adapter.level_weights=[1,1,0.5,0]", "adapter.mask_condition=true", "adapter.dim_condition=true"
    ).adapter
    assert adapter.level_weights == (1, 1, 0.5, 0) and adapter.dim_condition
    named = load("--report_to", "wandb", "--tracker_project_name", "mine", "wandb.tags=[a,b]", "--wandb.name", "one")
    assert (named.wandb.project, named.wandb.tags, named.wandb.name) == ("mine", ("a", "b"), "one")
    for argv, words in (
        (["adapter.dim_condition=true"], "dim_condition has no effect unless the condition is masked"),
        (["adapter.level_weights=[0,0,0,0]"], "level_weights are all 0"),
        (["adapter.level_weights=[1,-1,1,1]"], "level_weights must be at least 0, not -1"),
        (["validation.proportion_empty_prompts=1.5"], "validation.proportion_empty_prompts must be at most 1"),
    ):
        with pytest.raises(ValueError, match=words):
            load(*argv)
