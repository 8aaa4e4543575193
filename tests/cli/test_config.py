import dataclasses
import hashlib
import json
import re
import shlex
from itertools import zip_longest
from pathlib import Path

import pytest

from localctl.base_specs import BASES, OF_ADAPTER
from localctl.cli.config import CONFIG_DIR, config_groups, load_config, schema_keys, settings_or_help
from localctl.cli.training_flags import ELSEWHERE
from localctl.redaction import flat, recorded
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings


def load(*argv: str) -> TrainSettings:
    return load_config(argv, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS, elsewhere=ELSEWHERE)


def test_no_arguments_give_the_default_recipe():
    settings = load()
    assert (settings.base.name, settings.data.name, settings.condition.kind) == ("micro", "micro", "canny")
    assert (settings.condition.low, settings.condition.high) == (50, 100)
    assert (settings.mask.kind, settings.loss.filter) == ("box", "sobel")


def test_yaml_and_dataclasses_agree_on_the_defaults():
    """Who builds TrainSettings() in Python gets the run that the command line gives."""
    assert load() == TrainSettings()


def test_groups_and_dotted_overrides():
    settings = load("base=sd15", "loss=laplacian", "loss.weight=1e-3", "mask=circle", "mask.count=[2, 3]")
    assert settings.base.name == "sd15"
    assert (settings.loss.filter, settings.loss.weight) == ("laplacian", 1e-3)
    assert (settings.mask.kind, settings.mask.count) == ("circle", (2, 3))


def test_the_value_beats_its_group_whatever_the_order():
    assert load("loss.weight=0.5", "loss=mse").loss.weight == 0.5


def test_experiments_change_values_and_groups_and_are_beaten_by_the_command_line():
    assert load("experiment=quick").max_train_steps == 100
    assert load("experiment=quick", "max_train_steps=7").max_train_steps == 7
    assert load("experiment=denoising_only").loss.filter == "none"
    best, paper = load("experiment=best_canny"), load("experiment=paper_canny")
    own = {name: getattr(best.adapter, name) for name in OF_ADAPTER}
    assert (own, best.adapter.unconditional_scale) == (BASES["micro"].adapter, 0)
    assert (paper.adapter.mask_resize, paper.adapter.unconditional_scale) == ("nearest", 1)
    assert (best.proportion_full_masks, paper.proportion_full_masks) == (1, 0)
    assert best.validation.unconditional_scale is None and best.loss == paper.loss
    assert load("experiment=denoising_only", "loss=mse").loss.filter == "mse"


@pytest.mark.parametrize("spelling", [("--max_train_steps", "7"), ("--max-train-steps=7",), ("max_train_steps=7",)])
def test_flags_with_underscores_dashes_and_equals(spelling):
    assert load(*spelling).max_train_steps == 7


def test_flags_of_the_ecosystem():
    settings = load(
        *shlex.split(
            "--pretrained_model_name_or_path sd21 --revision main --resume_from_checkpoint latest --output_dir out "
            "--train_batch_size 2 --learning_rate 1e-5 --seed 3 --mixed_precision no --gradient_accumulation_steps 4 "
            "--validation_steps 0 --checkpointing_steps 9 --checkpoints_total_limit 3 --dataloader_num_workers 2 "
            "--max_grad_norm 0.5 --lr_scheduler linear --lr_warmup_steps 0 --adam_beta1 0.8 --adam_beta2 0.9 "
            "--adam_weight_decay 0 --adam_epsilon 1e-6 --proportion_empty_prompts 0.5 --report_to none "
            "--max_train_samples 40 --overwrite_output_dir base.local_files_only=true"
        )
    )
    assert (settings.base.name, settings.base.revision, settings.base.local_files_only) == ("sd21", "main", True)
    assert (settings.data.count, settings.mixed_precision, settings.report_to) == (40, "no", "none")
    assert (settings.learning_rate, settings.adam_epsilon, settings.overwrite_output_dir) == (1e-5, 1e-6, True)
    assert (settings.resume_from_checkpoint, settings.checkpoints_total_limit) == ("latest", 3)


def test_a_bool_flag_does_not_swallow_what_follows():
    settings = load("--overwrite_output_dir", "seed=4")
    assert settings.overwrite_output_dir and settings.seed == 4
    assert not load("--overwrite_output_dir", "false").overwrite_output_dir


@pytest.mark.parametrize("text", ["a,b (1) [x]", "out/{a}/${b}", "x=y", "#1: 'q'", "07", "true", "über"])
def test_text_is_taken_literally(text):
    assert load(f"output_dir={text}").output_dir == text
    assert load("--output_dir", text).output_dir == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", (512, 512)), ("512x768", (768, 512)), ("1024X768", (768, 1024)), ("[768, 512]", (768, 512))],
)
def test_a_size_is_a_number_width_x_height_or_a_list_of_height_and_width(text, size):
    for argv in (["--resolution", text], [f"resolution={text}"], [f"data.resolution={text}"]):
        assert load("--train_data_dir=photos", *argv).data.size == size


def test_names_of_the_ecosystem_and_dashes_work_in_both_spellings():
    settings = load("train-data-dir=photos", "max_train_samples=7", "--validation.num-inference-steps", "3")
    assert (settings.data.path, settings.data.count, settings.validation.num_inference_steps) == ("photos", 7, 3)


def test_no_flag_is_both_here_and_elsewhere():
    assert not set(ELSEWHERE) & ({*schema_keys(TrainSettings)} | {*ALIASES} | {*config_groups()})
    assert all(text.endswith(".") for text in ELSEWHERE.values())


@pytest.mark.parametrize("name", ["network_dim", "lowram", "save_precision", "cache_latents", "loss_type", "bs"])
def test_flags_of_other_trainers_name_what_takes_their_place(name):
    with pytest.raises(ValueError, match=f"There is no --{name} here: .*\\.$"):
        load(f"--{name}", "1")


def test_null_and_numbers():
    assert load("condition=column", "condition.channels=1").condition.channels == 1
    assert load("max_train_steps=1e3").max_train_steps == 1000
    assert load("--checkpoints_total_limit", "null").checkpoints_total_limit is None
    assert load("seed=12345678901234567891").seed == 12345678901234567891
    assert load("mask.min_area=.1").mask.min_area == 0.1


def test_a_base_can_be_a_folder_or_a_hub_id():
    assert load("base=./some/folder").base.name == "./some/folder"
    assert load("--pretrained_model_name_or_path", "owner/name").base.name == "owner/name"
    assert load("base=sd15", "base.path=some/folder").base.name == "some/folder"


def test_mappings_and_nested_lists():
    settings = load("mask=mixture", "mask.mixture={box: 1, full: 0.5}", "adapter.channels=[8, 16]")
    assert settings.mask.mixture == {"box": 1.0, "full": 0.5}
    assert settings.adapter.channels == (8, 16)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["loss.wieght=1"], ["loss.wieght", "loss.weight"]),
        (["--learning_rte", "1"], ["--learning_rte", "--learning_rate"]),
        (["weight=1"], ["weight", "loss.weight"]),
        (["condition=cany"], ["cany", "canny"]),
        (["base=sd1.5"], ["sd1.5", "sd15"]),
        (["base=nowhere"], ["known are flux", "z_image, or a folder or hub id (owner/name)"]),
        (["experiment=quik"], ["quik", "quick"]),
        (["loss=huber"], ["huber"]),
        (["train"], ["train", "key=value"]),
        (["--seed"], ["--seed", "value"]),
        (["--seed", "--report_to", "none"], ["--seed", "value"]),
        (["seed=often"], ["seed", "often", "whole number"]),
        (["seed=1.5"], ["seed", "1.5", "whole number"]),
        (["loss.weight=heavy"], ["loss.weight", "heavy"]),
        (["overwrite_output_dir=perhaps"], ["overwrite_output_dir", "perhaps"]),
        (["adapter.channels=8"], ["adapter.channels", "[1, 2]"]),
        (["mask.mixture=[1"], ["mask.mixture", "[1"]),
        (["mask.box=[0, 1]"], ["mask.box", "4"]),
        (["loss.weight=nan"], ["weight"]),
        (["+new=1"], ["+new"]),
        (["--scale_lr"], ["--scale_lr", "--learning_rate"]),
        (["--lr", "1"], ["--lr", "--learning_rate"]),
        (["--enable-xformers-memory-efficient-attention"], ["enable_xformers", "leave it out"]),
        (["validation_prompt=a cat"], ["validation_prompt", "held-out"]),
        (["--snr_gamma=5"], ["snr_gamma", "loss.schedule=snr"]),
        (["--logging_dir", "logs"], ["--logging_dir", "--output_dir"]),
        (["--num_inference_steps", "5"], ["--validation.num_inference_steps", "--early_stopping.num_inference_steps"]),
        (["frobnicate=1"], ["frobnicate", "see --help"]),
        (["scheduler=ddim"], ["validation.scheduler or early_stopping.scheduler"]),
        (["--resolution", "512by768"], ["data.resolution", "WIDTHxHEIGHT", "[height, width]", "512by768"]),
        (["train_data_dir=x", "--resolution", "500x768"], ["500", "multiple of 8"]),
    ],
)
def test_mistakes_are_named_in_one_sentence(argv, words):
    with pytest.raises(ValueError) as caught:
        load(*argv)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 400


def test_an_unknown_key_in_a_file_is_an_error(tmp_path):
    (tmp_path / "train.yaml").write_text("sead: 1\n")
    with pytest.raises(ValueError, match="'sead'; did you mean seed"):
        load_config([], TrainSettings, config_dir=tmp_path)


@pytest.mark.parametrize("text", ["seed: !!python/object/apply:os.getpid []\n", "seed: [1\n", "seed: &a [*b]\n"])
def test_a_file_that_is_no_plain_yaml_is_one_sentence(tmp_path, text):
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(ValueError, match="configuration .*train.yaml cannot be (read|resolved) .*line 1"):
        load_config([], TrainSettings, config_dir=tmp_path)


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        load_config([], TrainSettings, config_dir=tmp_path / "none")


def test_help_names_every_key_group_and_flag(capsys):
    assert settings_or_help("train_adapter.py", ["--help"], TrainSettings, about="What for.", aliases=ALIASES) is None
    text = capsys.readouterr().out
    for key in [*schema_keys(TrainSettings), *config_groups(), *ALIASES]:
        assert key in text
    assert text.startswith("What for.\n\nusage: train_adapter.py ")
    assert "condition=canny|column|depth|hed" in text and "resume_from_checkpoint=null" in text
    for experiment in config_groups()["experiment"]:
        assert re.search(rf"^    {experiment} +\w", text, re.MULTILINE), experiment


def test_help_is_for_narrow_terminals_too(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    settings_or_help("train_adapter.py", ["seed=1", "-h"], TrainSettings, aliases=ALIASES)
    lines = capsys.readouterr().out.splitlines()
    assert (
        max(len(line) for line in lines if not line.lstrip().startswith(("usage", "condition=", "loss=", "mask=")))
        <= 80
    )


def test_the_sections_of_the_schema_are_the_groups():
    sections = {f.name for f in dataclasses.fields(TrainSettings) if dataclasses.is_dataclass(f.default_factory)}
    assert set(config_groups()) - {"experiment"} <= sections
    folders = {folder.name for folder in CONFIG_DIR.iterdir() if folder.is_dir()}
    assert folders - {"accelerate"} == set(config_groups()), "a folder of options that no program reads"


def test_a_group_of_one_program_is_a_plain_word_for_another(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "auto.yaml").write_text("{}")
    (tmp_path / "other.yaml").write_text("seed: 1\n")
    assert config_groups("other", tmp_path) == {}
    settings = load_config(["output_dir=runs/one"], TrainSettings, name="other", config_dir=tmp_path)
    assert (settings.seed, settings.output_dir) == (1, "runs/one")
    assert "adapter" not in config_groups("evaluate_fid")


def test_every_option_of_every_group_composes_what_it_always_did():
    """By a hash of what differs from the defaults, so that a new setting changes none. Experiments and bases may change
    any setting, the options of another group only those of the group: one of each is composed at once."""
    kept = json.loads(Path(__file__).with_name("composed_settings.json").read_text())
    defaults = flat(recorded(TrainSettings()))
    groups = config_groups()
    alone = [[f"{group}={option}"] for group in ("experiment", "base") for option in groups.pop(group)]
    rounds = zip_longest(*([f"{group}={option}" for option in options] for group, options in groups.items()))
    found = {}
    for names in (*alone, *([name for name in chosen if name] for chosen in rounds)):
        values = flat(recorded(load(*names)))
        changed = {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}
        for name in names:
            prefix = "" if names in alone else name.partition("=")[0] + "."
            own = {key: changed.pop(key) for key in list(changed) if key.startswith(prefix)}
            found[name] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
        assert not changed or changed == {"proportion_full_masks": 0.0}  # follows from loss=masked
    assert found == kept
