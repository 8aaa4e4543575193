import json
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter
from log_helpers import logged
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.adapter import LocalAdapter
from localctl.training.checkpoints import list_checkpoints
from localctl.training.settings import DataConfig, LossConfig


def weights(run):
    return [p.detach().clone() for p in run.state.models.plain_adapter.parameters()]


def moments(run):
    return [t for entry in run.state.optimizer.state_dict()["state"].values() for t in entry.values()]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def straight(sd_folder, tmp_path_factory):
    """Train an uninterrupted run of 5 steps over epochs of 1.5 steps, logged every 3: (settings, run)."""
    folder, small = tmp_path_factory.mktemp("straight"), {"data": DataConfig(count=3), "train_batch_size": 2}
    settings = tiny_settings(sd_folder, folder, max_train_steps=5, logging_steps=3, **small)
    run = silent_run(settings)
    run.train()
    return settings, run


@pytest.mark.parametrize("stops", [(2,), (1, 4)])
def test_stop_and_resume_is_the_uninterrupted_run(straight, tmp_path, stops):
    """Parameters, moments and the log, bit for bit; over the end of an epoch, and in the middle of a logging period."""
    settings, whole = straight
    settings = replace(settings, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    for stop in stops:
        result = silent_run(settings).train(stop=lambda step, stop=stop: step == stop)
        assert result.interrupted and result.step == stop
    run = silent_run(settings)
    assert run.state.step == stops[-1]
    result = run.train()
    assert not result.interrupted and result.step == 5
    assert same(weights(run), weights(whole)) and same(moments(run), moments(whole))
    log = loss_log(tmp_path)
    assert log == loss_log(Path(whole.settings.output_dir)) and [row["step"] for row in log] == [3, 5]


def test_halves_at_once_resume_bit_for_bit_and_learn_the_same(straight, tmp_path):
    torch.set_num_threads(2)
    settings, one_thread = straight
    settings = replace(settings, resume_from_checkpoint="latest")
    whole = silent_run(replace(settings, output_dir=str(tmp_path / "whole")))
    whole.train()
    for stop in (3, 5):
        run = silent_run(replace(settings, output_dir=str(tmp_path / "stopped")))
        run.train(stop=lambda step, stop=stop: step == stop)
    assert same(weights(run), weights(whole)) and same(moments(run), moments(whole))
    log = loss_log(tmp_path / "whole")
    assert log == loss_log(tmp_path / "stopped")
    for row, other in zip(log, loss_log(Path(one_thread.settings.output_dir)), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_local_term_may_start_later_and_until_then_nothing_differs(straight, tmp_path):
    settings, _ = straight

    def log(name, **loss):
        run = silent_run(replace(settings, output_dir=str(tmp_path / name), logging_steps=1, loss=LossConfig(**loss)))
        run.train()
        return loss_log(tmp_path / name)

    late = log("late", filter="mse", weight=5.0, start=0.5)  # of 5 steps the last two
    assert late[:3] == log("none", filter="none")[:3]
    assert [row["local"] > 0 for row in late] == [False, False, False, True, True]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_validation_and_the_global_random_state_change_nothing(straight, tmp_path, workers):
    settings, whole = straight
    torch.rand(3)
    watched = replace(settings, output_dir=str(tmp_path / "a"), validation_steps=2, dataloader_num_workers=workers)
    run = silent_run(watched)
    before = torch.random.get_rng_state()
    result = run.train(stop=lambda step: bool(torch.rand(1) > 2))
    assert not torch.equal(torch.random.get_rng_state(), before)  # only by our own torch.rand
    assert loss_log(tmp_path / "a") == loss_log(Path(settings.output_dir))
    assert same(weights(run), weights(whole)) and result.fidelity is not None
    assert sorted(p.name for p in (tmp_path / "a" / "validation").iterdir()) == [
        f"step-{step:06d}.png" for step in (2, 4, 5)
    ]


def test_training_leaves_the_global_random_state_alone(straight, tmp_path):
    settings = replace(straight[0], output_dir=str(tmp_path), max_train_steps=2, validation_steps=1)
    before = torch.random.get_rng_state()
    silent_run(settings).train()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_seed_matters(straight, tmp_path):
    run = silent_run(replace(straight[0], output_dir=str(tmp_path), seed=1))
    run.train()
    assert loss_log(tmp_path)[0]["loss"] != loss_log(Path(straight[0].output_dir))[0]["loss"]


def test_accumulation_is_a_larger_batch(straight, tmp_path):
    settings, whole = straight
    small = replace(settings, output_dir=str(tmp_path), train_batch_size=1, gradient_accumulation_steps=2)
    run = silent_run(small)
    assert run.train().step == 5
    for a, b in zip(loss_log(tmp_path), loss_log(Path(settings.output_dir)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
    for a, b in zip(weights(run), weights(whole), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_only_the_adapter_moves_and_all_of_it(sd_folder, tmp_path):
    run = silent_run(tiny_settings(sd_folder, tmp_path, max_train_steps=2, lr_warmup_steps=0, adam_weight_decay=0.0))
    frozen = {n: [p.clone() for p in part.parameters()] for n, part in run.state.models.frozen.items()}
    start = weights(run)
    run.train()
    for name, part in run.state.models.frozen.items():
        assert same(list(part.parameters()), frozen[name]), name
        assert all(p.grad is None for p in part.parameters())
    names = [name for name, _ in run.state.models.plain_adapter.named_parameters()]
    assert [n for n, a, b in zip(names, start, weights(run), strict=True) if torch.equal(a, b)] == []


def test_v_prediction_and_conditions_with_three_channels(v_folder, tmp_path):
    settings = tiny_settings(v_folder, tmp_path, max_train_steps=2)
    run = silent_run(replace(settings, condition=replace(settings.condition, kind="segmentation"), validation_steps=2))
    assert run.state.models.prediction_type == "v_prediction"
    run.train()
    assert all(torch.isfinite(t).all() for t in weights(run))
    assert run.state.models.plain_adapter.channels_of_condition == 3


def test_bf16_trains_a_float32_adapter(sd_folder, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = silent_run(tiny_settings(sd_folder, tmp_path, max_train_steps=2, mixed_precision="bf16"))
        assert run.state.models.dtype == torch.bfloat16
        run.train()
        assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in weights(run))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_what_a_run_leaves_behind(sd_folder, tmp_path):
    settings = tiny_settings(sd_folder, tmp_path, max_train_steps=3, validation_steps=3, checkpointing_steps=1)
    said = logged()
    run = silent_run(replace(settings, report_to="tensorboard"))
    run.train()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "README.md", "adapter", "t2iadapter", "config.yaml", "stats.jsonl", "logs", "validation",
        "checkpoint-2", "checkpoint-3",
    }  # fmt: skip
    x = torch.rand(1, 2, 128, 128)
    with torch.no_grad():
        trained = run.state.models.plain_adapter(x)
        adapter = LocalAdapter.from_pretrained(tmp_path / "adapter")
        assert same(adapter(x), trained)
        plain = T2IAdapter.from_pretrained(tmp_path / "t2iadapter")(x[:, :1])
        assert same(plain, run.state.models.plain_adapter.adapter(x[:, :1]))
    assert adapter.config.condition["low"] == 50 and adapter.config.base == str(sd_folder)
    text = "\n".join(said)
    for word in (str(sd_folder), "canny", "box", "sobel", "parameters", "to 3", str(tmp_path)):
        assert word in text


def test_others_may_read_what_the_umask_lets_them(straight, tmp_path):
    former = os.umask(0o027)
    try:
        settings = replace(straight[0], output_dir=str(tmp_path), max_train_steps=1, checkpointing_steps=1)
        run = silent_run(settings)
        run.train()
    finally:
        os.umask(former)
    weights_files = [p for p in tmp_path.rglob("*.safetensors")]
    assert len(weights_files) == 3 and {p.stat().st_mode & 0o777 for p in weights_files} == {0o640}
    for folder in (tmp_path / "adapter", tmp_path / "t2iadapter"):
        for path in (*folder.iterdir(), folder):
            path.chmod(path.stat().st_mode & ~0o222)
    x = torch.rand(1, 2, 128, 128)
    with torch.no_grad():
        assert same(LocalAdapter.from_pretrained(tmp_path / "adapter")(x), run.state.models.plain_adapter(x))
        T2IAdapter.from_pretrained(tmp_path / "t2iadapter")


def test_resuming_a_finished_run_only_exports_again(straight, tmp_path):
    settings = replace(straight[0], output_dir=str(tmp_path), max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    (tmp_path / "README.md").unlink()
    run = silent_run(replace(settings, resume_from_checkpoint="latest"))
    assert run.train().step == 1 and (tmp_path / "README.md").exists() and len(loss_log(tmp_path)) == 1


def test_going_back_to_a_named_checkpoint(straight, tmp_path):
    settings = replace(
        straight[0], output_dir=str(tmp_path), checkpointing_steps=1, checkpoints_total_limit=None, logging_steps=1
    )
    silent_run(settings).train(stop=lambda step: step == 4)
    said = logged()
    back = replace(settings, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run = silent_run(back)
    assert run.state.step == 2 and sum("abandoned" in line for line in said) == 2
    run.train()
    assert list(list_checkpoints(tmp_path)) == [1, 2, 3, 4, 5]
    assert [row["step"] for row in loss_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert same(weights(run), weights(straight[1]))


def test_latest_without_any_is_said_and_a_bad_path_is_an_error(straight, tmp_path):
    said = logged()
    settings = replace(straight[0], output_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert silent_run(settings).state.step == 0
    assert "from the beginning" in said[0]
    with pytest.raises(ValueError, match="no checkpoint"):
        silent_run(replace(settings, resume_from_checkpoint=str(tmp_path / "checkpoint-9")))


def test_a_checkpoint_of_another_shape_is_refused(straight, tmp_path):
    settings = replace(straight[0], output_dir=str(tmp_path), max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    other = replace(settings, adapter=replace(settings.adapter, num_res_blocks=1), resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="adapter.num_res_blocks: None -> 1"):
        silent_run(other)
    with pytest.raises(ValueError, match="another shape"):
        silent_run(replace(other, force_resume=True))


def test_ctrl_c_leaves_a_checkpoint(straight, tmp_path):
    settings = replace(straight[0], output_dir=str(tmp_path), dataloader_num_workers=1)

    def press(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    result = silent_run(settings).train(stop=press)
    assert result.interrupted and result.step in (2, 3)
    assert list(list_checkpoints(tmp_path)) == [result.step]
    assert not (tmp_path / "adapter").exists()


def test_nan_stops_before_the_update_and_names_the_step(straight, tmp_path):
    run = silent_run(replace(straight[0], output_dir=str(tmp_path)))
    with torch.no_grad():
        run.state.models.vae.encoder.conv_in.weight[0] = torch.nan
    before = weights(run)
    with pytest.raises(RuntimeError, match="not finite at step 1 .*basic-train-"):
        run.train()
    assert same(weights(run), before)


def test_the_only_checkpoint_may_lie_on_another_disk(straight, tmp_path):
    settings = replace(straight[0], output_dir=str(tmp_path / "out"), checkpointing_steps=1)
    silent_run(settings).train(stop=lambda step: step == 2)
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "else")
    (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "other")
    (tmp_path / "out" / "checkpoint-2").symlink_to(tmp_path / "else")
    run = silent_run(replace(settings, resume_from_checkpoint="latest"))
    assert run.state.step == 2
    run.train()
    assert same(weights(run), weights(straight[1])) and (tmp_path / "else" / "state.json").exists()


FORGED = {
    "another step": lambda path: rewrite(path, step=-5),
    "no step": lambda path: rewrite(path, step=None),
    "brackets": lambda path: (path / "state.json").write_text("[" * 100_000),
    "a payload": lambda path: (path / "optimizer.pt").write_bytes(pickle.dumps(os.getcwd)),
    "no moments": lambda path: (path / "optimizer.pt").unlink(),
    "no adapter": lambda path: (path / "adapter" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
}


def rewrite(path, **changes):
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps({name: value for name, value in state.items() if value is not None}))


@pytest.mark.parametrize("forgery", FORGED)
def test_a_checkpoint_sealed_by_somebody_else_is_one_sentence(straight, tmp_path, forgery):
    run = silent_run(replace(straight[0], output_dir=str(tmp_path), max_train_steps=1, checkpointing_steps=1))
    run.train()
    path = tmp_path / "checkpoint-1"
    FORGED[forgery](path)
    with pytest.raises(ValueError, match="checkpoint-1 cannot be used .*; use another one") as error:
        run.state.load(path, 1)
    assert "\n" not in str(error.value)


def test_no_clipping_learns_as_a_limit_never_reached(straight, tmp_path):
    runs = [
        silent_run(replace(straight[0], output_dir=str(tmp_path / str(limit)), max_grad_norm=limit))
        for limit in (None, 1e9, 1e-3)
    ]
    for run in runs:
        run.train()
    assert same(weights(runs[0]), weights(runs[1])) and not same(weights(runs[0]), weights(runs[2]))


def test_which_setting_ends_the_run_stands_on_a_line_of_the_steps(sd_folder, tmp_path):
    said = logged()
    silent_run(tiny_settings(sd_folder, tmp_path, max_train_steps=1, num_train_epochs=1000)).train()
    steps = [line for text in said for line in text.splitlines() if line.startswith("steps  ")]
    assert any("max_train_steps=1 sets the end" in line for line in steps), said
