"""The optimizer's options: 8 bits, averages, gradient checkpointing."""

import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import T2IAdapter
from process_helpers import checkpoint_contents, difference
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.adapter import LocalAdapter
from localctl.data import MaskedSamples, MicroScenes, SampleRef, collate
from localctl.masks import MaskConfig
from localctl.training import loop
from localctl.training.models import load_models
from localctl.training.optimizer import optimizer_class
from localctl.training.step import sample_noise, training_step
from localctl.training.updates import NotFiniteError

CPU = torch.device("cpu")


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_gradient_checkpointing_changes_nothing_but_memory(kind, request, tmp_path):
    base = request.getfixturevalue(f"{kind}_folder")
    batch = collate([MaskedSamples(MicroScenes(count=1), MaskConfig(), 0)[SampleRef(0, 0)]])
    gradients, kept = [], []
    for checkpointing in (False, True):
        settings = tiny_settings(base, tmp_path, gradient_checkpointing=checkpointing)
        models = load_models(settings, CPU, None)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = training_step(
                batch, models, settings, sample_noise(batch, models.latent_shape(128, 128), settings)
            ).loss
        loss.backward()
        gradients.append([p.grad for p in models.plain_adapter.parameters()])
        kept.append(count)
    assert kept[1] < 0.5 * kept[0]
    assert sum(bool(gradient.any()) for gradient in gradients[0]) > 0.8 * len(gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, a.abs().max())


def test_8_bit_adam_is_asked_for_before_slow_work(sd_folder, tmp_path, monkeypatch):
    settings = tiny_settings(sd_folder, tmp_path, use_8bit_adam=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("localctl.training.state.load_models", None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes.*pip install bitsandbytes") as error:
        silent_run(settings)
    assert "\n" not in str(error.value)


def test_8_bit_adam_is_bitsandbytes_own(sd_folder, tmp_path, monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    fake = types.ModuleType("bitsandbytes")
    fake.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert optimizer_class(tiny_settings(sd_folder, tmp_path)) is torch.optim.AdamW
    assert optimizer_class(tiny_settings(sd_folder, tmp_path, use_8bit_adam=True)) is AdamW8bit


def test_averages_are_exported_saved_and_resumed(sd_folder, tmp_path):
    settings = tiny_settings(
        sd_folder, tmp_path / "whole", use_ema=True, ema_decay=0.5, max_train_steps=3, checkpointing_steps=2
    )
    run = silent_run(settings)
    steps = [parameters(run.state.models.plain_adapter)]
    run.train(stop=lambda step: bool(steps.append(parameters(run.state.models.plain_adapter))))
    # (1 + n) / (10 + n) is 2/11 and 3/12 at the second and third update; the first one takes the weights as they are.
    expected = steps[1]
    for decay, weights in ((2 / 11, steps[2]), (3 / 12, steps[3])):
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    exported = LocalAdapter.from_pretrained(tmp_path / "whole" / "adapter")
    plain = T2IAdapter.from_pretrained(tmp_path / "whole" / "t2iadapter")
    for a, b, raw in zip(exported.parameters(), expected, steps[3], strict=True):
        assert torch.allclose(a, b, atol=1e-7)
        assert not torch.equal(a, raw)
    assert same(parameters(plain), parameters(exported))
    assert same(parameters(run.state.models.plain_adapter), steps[3])  # the weights of the training are restored

    cut = replace(settings, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest")
    silent_run(cut).train(stop=lambda step: step == 2)
    silent_run(cut).train()
    assert same(parameters(LocalAdapter.from_pretrained(tmp_path / "cut" / "adapter")), parameters(exported))
    assert loss_log(tmp_path / "cut") == loss_log(tmp_path / "whole")


def test_an_update_that_is_left_out_is_not_averaged(sd_folder, tmp_path, monkeypatch):
    settings = tiny_settings(
        sd_folder, tmp_path, use_ema=True, max_train_steps=2, max_nonfinite_steps=1, checkpointing_steps=2
    )
    run, averages = silent_run(settings), []
    monkeypatch.setattr(loop, "sample_noise", lambda *given: poisoned(sample_noise(*given), run.state.step == 1))
    run.train(stop=lambda step: bool(averages.append([p.clone() for p in run.state.ema.shadow_params])))
    assert (run.state.step, run.state.skipped, run.state.ema.optimization_step) == (2, 1, 1)
    assert same(*averages)
    run.state.optimizer = types.SimpleNamespace(step_was_skipped=True)  # by the scaler of fp16
    run.state.update_ema()
    assert run.state.ema.optimization_step == 1

    changed = replace(settings, ema_decay=0.25, max_train_steps=3, resume_from_checkpoint="latest", force_resume=True)
    ema = silent_run(changed).state.ema
    assert same(ema.shadow_params, averages[1]) and (ema.decay, ema.optimization_step) == (0.25, 1)


def poisoned(sampled, wanted):
    if wanted:
        sampled.noise[0] = torch.nan
    return sampled


def test_averages_leave_the_training_alone_and_must_be_in_the_checkpoint(sd_folder, tmp_path):
    settings = tiny_settings(sd_folder, tmp_path, max_train_steps=1, checkpointing_steps=1)
    silent_run(settings).train()
    with pytest.raises(ValueError, match="holds no averaged weights; set use_ema=false"):
        silent_run(replace(settings, use_ema=True, resume_from_checkpoint="latest", force_resume=True))


def fused(monkeypatch):
    """The optimizer is as on a GPU: fused, so that it leaves out updates itself."""
    monkeypatch.setattr(
        "localctl.training.state.optimizer_class", lambda settings: partial(torch.optim.AdamW, fused=True)
    )


def ends(run):
    """All that a training has when it ends."""
    state = run.state
    moments = [value.clone() for one in state.optimizer.state_dict()["state"].values() for value in one.values()]
    return [*parameters(state.models.plain_adapter), *moments, *(p.clone() for p in state.ema.shadow_params)]


def test_a_verdict_read_a_step_late_changes_nothing(sd_folder, tmp_path, monkeypatch):
    fused(monkeypatch)
    settings = tiny_settings(
        sd_folder, tmp_path / "late", use_ema=True, ema_decay=0.5, max_train_steps=6, max_nonfinite_steps=2,
        checkpointing_steps=4, logging_steps=3, gradient_accumulation_steps=2,
    )  # fmt: skip
    monkeypatch.setattr(loop, "sample_noise", lambda *given: poisoned(sample_noise(*given), run.state.step in (1, 2)))
    late = run = silent_run(settings)
    late.train()
    at_once = run = silent_run(replace(settings, output_dir=str(tmp_path / "at once")))
    assert late.updates.late and at_once.updates.late
    at_once.updates.late = False
    at_once.train()
    assert late.state.skipped == at_once.state.skipped == 2 and late.state.ema.optimization_step == 4
    assert same(ends(late), ends(at_once))
    assert str(loss_log(tmp_path / "late")) == str(loss_log(tmp_path / "at once"))
    saved = [checkpoint_contents(tmp_path / name / "checkpoint-4") for name in ("late", "at once")]
    assert difference(*saved) == []

    cut = run = silent_run(replace(settings, resume_from_checkpoint=str(tmp_path / "late" / "checkpoint-4")))
    cut.train()
    assert same(ends(cut), ends(late))


@pytest.mark.parametrize("steps", [2, 4])
def test_a_late_verdict_stops_before_anything_else_changes(steps, sd_folder, tmp_path, monkeypatch):
    """At the next step, and at the last one."""
    fused(monkeypatch)
    settings = tiny_settings(sd_folder, tmp_path, use_ema=True, max_train_steps=steps, logging_steps=9)
    run, seen = silent_run(settings), []
    monkeypatch.setattr(loop, "sample_noise", lambda *given: poisoned(sample_noise(*given), run.state.step == 1))
    with pytest.raises(
        NotFiniteError, match=r"The loss is not finite at step 2 \(samples basic-train-\d\); the adapter was"
    ):
        run.train(stop=lambda step: bool(seen.append(ends(run))))
    assert run.state.step == 1 and len(seen) == 2
    assert same(parameters(run.state.models.plain_adapter), seen[0][: len(parameters(run.state.models.plain_adapter))])
    assert run.state.ema.optimization_step == 1


@pytest.mark.parametrize("kinds", [(False, True), (True, False)])
def test_a_fused_optimizer_resumes_the_state_of_another(kinds, sd_folder, tmp_path, monkeypatch):
    """As when a training goes on from a CPU to a GPU, or back."""
    settings = tiny_settings(sd_folder, tmp_path, max_train_steps=2, checkpointing_steps=1, use_ema=True)
    found = []
    for kind in kinds:
        with monkeypatch.context() as patch:
            if kind:
                fused(patch)
            run = silent_run(replace(settings, resume_from_checkpoint="latest"))
            assert [group.get("fused") or False for group in run.state.optimizer.param_groups] == [kind]
            found.append(ends(run))
            run.train(stop=lambda step, run=run: bool(found.append(ends(run)) or step == 1))
    _, first, resumed, second = found
    assert same(first, resumed) and not same(resumed, second)
