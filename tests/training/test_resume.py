import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from log_helpers import logged
from training_helpers import silent_run, tiny_settings

from localctl.cli.config import schema_keys
from localctl.data import MicroScenes
from localctl.redaction import MASKED, FromEnvironment, recorded
from localctl.training.checkpoints import verify_checkpoint
from localctl.training.earlier import as_earlier
from localctl.training.resume import (
    FREE,
    changes,
    check_unchanged,
    config_hash,
    data_fingerprint,
    describe,
    is_free,
    setting_changes,
    weights_fingerprint,
)
from localctl.training.schedule import first_local_step
from localctl.training.settings import TrainSettings


def described(settings=None, count=6, bias=0.0, world_size=1, precision="no"):
    torch.manual_seed(0)
    part = torch.nn.Linear(3, 2)
    with torch.no_grad():
        part.bias += bias
    settings = settings or TrainSettings()
    made = describe(settings, MicroScenes(count=count), {"unet": part}, world_size=world_size, precision=precision)
    return json.loads(json.dumps(made))  # as it comes back from a manifest


def test_the_free_settings_exist_and_each_has_its_reason():
    keys = schema_keys(TrainSettings)
    for name, reason in FREE.items():
        assert reason and any(key == name or key.startswith(f"{name}.") for key in keys), name
    assert is_free("validation.count") and is_free("output_dir")
    for key in ("seed", "train_batch_size", "loss.filter", "data.count", "base.dtype", "learning_rate", "nothing"):
        assert not is_free(key)


def test_the_docs_list_exactly_the_free_settings():
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    table = text.partition("| setting | why it may change |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| `{name}` | {reason} |" for name, reason in FREE.items()]


def test_every_setting_that_is_not_free_is_guarded():
    """This includes settings added later: the table lists what may change, not what may not."""
    before, now = described(), described()
    guarded = {key for key in schema_keys(TrainSettings) if not is_free(key)}
    for key in guarded:
        *path, last = key.split(".")
        section = before["settings"]
        for part in path:
            section = section[part]
        kept, section[last] = section[last], "something else"
        assert changes(before, now) == [f"{key}: something else -> {kept}"]
        section[last] = kept
    assert changes(before, now) == []


def test_what_changed_is_listed_old_to_new_and_can_be_forced():
    first = TrainSettings()
    second = replace(first, seed=3, learning_rate=1e-4, loss=replace(first.loss, filter="mse"), logging_steps=7)
    lines = changes(described(first), described(second, count=7, bias=1.0, world_size=2, precision="bf16"))
    assert lines[:3] == ["loss.filter: sobel -> mse", "seed: 0 -> 3", "learning_rate: 0.003 -> 0.0001"]
    assert lines[3:5] == ["processes: 1 -> 2", "precision: no -> bf16"]
    assert [line.partition(":")[0] for line in lines[5:]] == ["samples in the data", "weights of unet"]
    said = logged()
    with pytest.raises(ValueError) as refused:
        check_unchanged(described(first), described(second), force=False)
    assert "--force_resume" in str(refused.value) and "\n  seed: 0 -> 3" in str(refused.value) and not said
    check_unchanged(described(first), described(second), force=True)
    assert [line.rpartition("force_resume: ")[2] for line in said] == lines[:3]


def test_what_is_only_said():
    before = described()
    before["versions"]["torch"] = "1.0"
    said = logged()
    check_unchanged(before, described(replace(TrainSettings(), max_train_steps=5)), force=False)
    assert len(said) == 2 and "torch 1.0 -> " in said[0] and "max_train_steps 700 -> 5" in said[1]


def test_a_local_term_begins_where_it_did_in_a_run_of_another_length(sd_folder, tmp_path):
    settings = tiny_settings(sd_folder, tmp_path, max_train_steps=2, checkpointing_steps=2, train_batch_size=1)
    settings = replace(settings, loss=replace(settings.loss, start=0.5))
    silent_run(settings).train()
    said = logged()
    for steps in (4, 10):  # from the first checkpoint, and from that of a run that was longer already
        run = silent_run(replace(settings, max_train_steps=steps, resume_from_checkpoint="latest"))
        assert run.first_local == 1 and said[-1].endswith(f"-> {steps}: the local term begins after step 1, as before.")
        if steps == 4:
            run.train()
        run.folder.release()
    other = replace(run.settings, loss=replace(settings.loss, start=0.8), force_resume=True)
    assert silent_run(other).first_local == 8
    earlier = {"settings": asdict(settings)}  # of a version that did not record the step
    assert first_local_step(replace(settings, max_train_steps=10), earlier) == 1
    assert first_local_step(other, earlier) == first_local_step(other) == 8
    cut = {"settings": {"loss": {"start": 0.5}, "max_train_steps": None}}
    for unreadable in ({}, {"settings": {"loss": None}}, cut):  # are refused where settings are compared
        assert first_local_step(replace(settings, max_train_steps=10), unreadable) == 5


def test_a_setting_that_did_not_exist_yet_had_its_default():
    before = described()
    del before["settings"]["timestep_sampling"]
    assert changes(before, described()) == []
    changed = described(replace(TrainSettings(), timestep_sampling="cubic"))
    assert changes(before, changed) == ["timestep_sampling: uniform -> cubic"]
    before["settings"]["old_name"] = 4
    assert changes(before, described()) == ["old_name: 4 -> gone"]


def test_a_run_of_an_earlier_version_goes_on_with_its_own_defaults():
    before = described()["settings"]
    before["adapter"] = {**before["adapter"], "mask_resize": "nearest"}
    del before["adapter"]["mask_margin"], before["proportion_full_masks"]
    said = logged()
    found = as_earlier(TrainSettings(), {"settings": before})
    assert setting_changes(before, recorded(found)) == []
    assert (found.adapter.mask_resize, found.adapter.mask_margin, found.proportion_full_masks) == ("nearest", 0, 0)
    assert any(
        "proportion_full_masks=0.0, as in the checkpoint, which is of an earlier version" in line for line in said
    )
    asked = replace(TrainSettings(), proportion_full_masks=0.5)  # not a default, so it is refused
    changed = setting_changes(before, recorded(as_earlier(asked, {"settings": before})))
    assert changed == ["proportion_full_masks: 0.0 -> 0.5"]
    today = described(replace(TrainSettings(), proportion_full_masks=0.5))
    assert as_earlier(TrainSettings(), today) == TrainSettings()  # a run of today changes no default


def test_a_masked_setting_is_compared_too():
    secret, other = (replace(TrainSettings(), timestep_sampling=FromEnvironment(t)) for t in ("cubic", "uniform"))
    assert described(secret)["settings"]["timestep_sampling"] == MASKED
    assert changes(described(secret), described(secret)) == []
    assert changes(described(secret), described(other)) == ["a setting with a masked value"]
    assert config_hash(secret) != config_hash(other)


def test_a_value_that_was_masked_is_compared_by_the_hash():
    """Column names were once treated as secrets; a value from the environment may also be passed directly."""
    keyed = replace(TrainSettings(), data=replace(TrainSettings().data, key_column="name"))
    before = described(keyed)
    before["settings"]["data"]["key_column"] = MASKED
    assert changes(before, described(keyed)) == changes(described(keyed), before) == []
    other = described(replace(keyed, data=replace(keyed.data, key_column="id")))
    assert changes(before, other) == ["a setting with a masked value"]
    assert changes(before, described()) == ["data.key_column: *** -> None"]
    del before["settings"]["timestep_sampling"]  # an earlier version, so its hash is of other settings
    before["config_sha256"] = "another"
    assert changes(before, described(keyed)) == []


@pytest.mark.parametrize("name", ["settings", "data", "base"])
def test_a_section_that_is_none_is_a_change_and_no_crash(name):
    now = described(replace(TrainSettings(), seed=1))
    with pytest.raises(ValueError, match="These changed"):
        check_unchanged({**now, name: ["anything"]}, now, force=False)
    check_unchanged({**now, "versions": ["anything"]}, now, force=False)


def test_the_hash_is_of_what_may_not_change():
    first = TrainSettings()
    assert config_hash(first) == config_hash(replace(first, output_dir="elsewhere", logging_steps=3))
    assert config_hash(first) != config_hash(replace(first, seed=1))


def test_data_are_told_apart():
    def samples(source):
        return data_fingerprint(source)["samples in the data"]

    same = [samples(MicroScenes(count=9)) for _ in range(2)]
    others = [MicroScenes(count=10), MicroScenes(count=9, profile="rich"), MicroScenes("val", count=9)]
    assert same[0] == same[1] and len({same[0], *(samples(source) for source in others)}) == 4
    assert samples(MicroScenes(count=1))

    class WithBadRows(MicroScenes):
        def __getitem__(self, index):
            if index == 0:
                raise ValueError("damaged")
            return super().__getitem__(index)

    assert len({samples(WithBadRows(count=n)) for n in (8, 9)} | {same[0]}) == 3

    class Known(MicroScenes):
        fingerprints = {"captions": "mine"}

    assert data_fingerprint(Known(count=3)) == {"captions": "mine"}


def old_manifest(info: dict) -> dict:
    """Write a manifest as before contents were recorded."""
    samples = info["data"].get("names of the examples") or info["data"]["samples in the data"]
    return {**info, "data": samples, "base": info["base_first_values"]}


def test_a_checkpoint_of_before_is_compared_as_before_and_says_so():
    said = logged()
    check_unchanged(old_manifest(described()), described(), force=False)
    assert len(said) == 1 and "could be compared" in said[0]
    with pytest.raises(ValueError, match="samples in the data: others than before\n  weights of the base: others"):
        check_unchanged(old_manifest(described()), described(count=7, bias=1.0), force=False)


def test_what_a_checkpoint_does_not_know_is_not_compared():
    """A newer library version has more keys, and a newer version of localctl compares more."""
    before = described()
    before["base"]["unet.gone_key"] = 1
    now = described()
    now["base"] |= {"unet.new_key": 1, "scheduler.beta_end": 0.012}
    now["data"]["captions"] = "abc"
    assert changes(before, now) == []
    before["base"]["weights of text_encoder_2"] = "d" * 64
    before["data"] = {}
    assert changes(before, now) == ["weights of text_encoder_2: dddddddddddd -> gone"]
    assert changes({**before, "base": None}, now) == ["base: None -> known"]


def test_where_rows_came_or_went_nothing_else_is_compared():
    names = {"number of examples": 5, "names of the examples": "a", "captions": "b", "images": "c"}
    before, now = described(), described()
    before["data"], now["data"] = names, {**names, "number of examples": 6, "names of the examples": "x", "images": "y"}
    assert changes(before, now) == ["number of examples: 5 -> 6", "names of the examples: a -> x"]


def test_bases_are_told_apart(sd_pipe, v_pipe):
    assert weights_fingerprint({"unet": sd_pipe.unet}) == weights_fingerprint({"unet": v_pipe.unet})  # same weights
    before = weights_fingerprint({"unet": sd_pipe.unet})
    sd_pipe.unet.conv_out.bias.data[0] += 1
    assert weights_fingerprint({"unet": sd_pipe.unet}) != before


def test_the_manifest_says_what_was_trained(sd_folder, tmp_path):
    settings = tiny_settings(sd_folder, tmp_path, train_batch_size=1, max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    manifest = verify_checkpoint(tmp_path / "checkpoint-1")
    info = manifest["info"]
    assert manifest["step"] == 1 and set(manifest["files"]) == {
        "adapter/config.json", "adapter/diffusion_pytorch_model.safetensors", "optimizer.pt", "state.json",
    }  # fmt: skip
    assert all(len(entry["sha256"]) == 64 and entry["size"] > 0 for entry in manifest["files"].values())
    assert info["world_size"] == 1 and info["config_sha256"] == config_hash(settings)
    assert info["data"] == data_fingerprint(MicroScenes(count=6)) and len(info["base_first_values"]) == 64
    assert len(info["base"]["weights of unet"]) == 64 and info["base"]["scheduler.prediction_type"] == "epsilon"
    assert torch.__version__.startswith(info["versions"]["torch"]) and info["settings"]["seed"] == 0  # without +cu130

    resumed = replace(settings, resume_from_checkpoint="latest", max_train_steps=2)
    for changed in (replace(resumed, seed=1), replace(resumed, data=replace(settings.data, count=7))):
        with pytest.raises(ValueError, match="0 -> 1|6 -> 7"):
            silent_run(changed)
    said = logged()
    forced = silent_run(replace(resumed, seed=1, adam_beta2=0.5, force_resume=True))
    assert forced.state.step == 1 and any("seed: 0 -> 1" in line for line in said)
    assert forced.state.optimizer.param_groups[0]["betas"] == (0.9, 0.5)  # not the checkpoint's
    assert silent_run(replace(resumed, dataloader_num_workers=1, logging_steps=5)).state.step == 1
