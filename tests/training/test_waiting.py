"""The host does not wait for the device between two rows of the log.

The device is torch's ``meta``: it computes nothing, so it can give nothing back. ``.item()``, ``.tolist()``,
``.cpu()``, ``float()`` and ``bool()`` of its tensors all raise, and as on a GPU, every tensor of the host must be sent
to it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import silent_run, tiny_settings

from localctl.training import loop, state, updates

META = torch.device("meta")
STEPS = 100


class Arrived(Exception):
    """The last step is done."""


class Traffic(TorchDispatchMode):
    """Counts the copies from the host to the device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        copied = func._overloadpacket == torch.ops.aten._to_copy and not kwargs.get("non_blocking")
        if copied and args[0].device.type == "cpu" and result.device == META:
            self.waits.append(f"{func} {tuple(args[0].shape)}")
        return result


class NotRead:
    """As ``Readback``, of an update that is finite."""

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.device == META and tensor.shape == ()

    def read(self) -> torch.Tensor:
        return torch.tensor(False)


@pytest.fixture
def on_meta(monkeypatch):
    """Trainings run on the meta device, with the optimizer of a GPU."""
    load_models = state.load_models

    def moved(settings, device, *more):
        models = load_models(settings, torch.device("cpu"), *more)
        models.pipe.to(META)
        models.plain_adapter.to(META)
        return type(models)(models.pipe, models.plain_adapter)

    class Fused(torch.optim.AdamW):
        """Looks fused, as torch has no such kernel for this device; leaves out updates as the fused one does."""

        def step(self, closure=None):
            assert self.found_inf.device == META
            found_inf = self.__dict__.pop("found_inf")
            self.param_groups[0]["fused"] = None
            super().step(closure)
            self.param_groups[0]["fused"], self.found_inf = True, found_inf

    def optimizer(parameters, **options):
        made = Fused(parameters, **options)
        made.param_groups[0]["fused"] = True
        return made

    monkeypatch.setattr(torch, "autocast", lambda *given, **options: nullcontext())  # it does not know the device
    monkeypatch.setattr(state, "load_models", moved)
    monkeypatch.setattr(Accelerator, "device", META)
    monkeypatch.setattr(loop, "describe", lambda *given, **more: {})
    monkeypatch.setattr(state, "optimizer_class", lambda settings: optimizer)
    monkeypatch.setattr(updates, "Readback", NotRead)


def train(settings, steps):
    def stop(step):
        if step == steps:
            raise Arrived
        return False

    run = silent_run(settings)
    with Traffic() as traffic, pytest.raises(Arrived):
        run.train(stop)
    assert run.state.step == steps and run.updates.late
    return traffic.waits


def busy_settings(base, folder, kept):
    """All that a step can do, between two rows of the log."""
    settings = tiny_settings(
        base, folder, max_train_steps=STEPS + 20, logging_steps=STEPS + 10, train_batch_size=2, use_ema=True,
        proportion_empty_prompts=0.5,
    )  # fmt: skip
    return replace(settings, data=replace(settings.data, keep_latents=kept))


@pytest.mark.parametrize(("kind", "kept"), [("sd", True), ("sd", False), ("sdxl", False)])
def test_no_step_waits(kind, kept, on_meta, request, tmp_path):
    assert train(busy_settings(request.getfixturevalue(f"{kind}_folder"), tmp_path, kept), steps=2) == []


@pytest.mark.parametrize("schedule", ["constant", "low_noise"])
def test_no_step_waits_for_the_rows_whose_edges_are_compared(schedule, on_meta, sd_folder, tmp_path):
    settings = busy_settings(sd_folder, tmp_path, kept=False)
    loss = replace(settings.loss, filter="edges", schedule=schedule, snr_min=0.1, normalise="mask")
    assert train(replace(settings, loss=loss), steps=2) == []


@pytest.mark.slow
def test_a_hundred_steps_without_waiting(on_meta, sd_folder, tmp_path):
    assert train(busy_settings(sd_folder, tmp_path, kept=False), steps=STEPS) == []


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu])
def test_whatever_reads_from_the_device_would_be_found(read, on_meta, sd_folder, tmp_path, monkeypatch):
    inner = loop.training_step

    def reading(*given):
        output = inner(*given)
        read(output.loss.detach())
        return output

    monkeypatch.setattr(loop, "training_step", reading)
    run = silent_run(tiny_settings(sd_folder, tmp_path, logging_steps=50))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run.train()


def test_a_copy_that_waits_would_be_found(on_meta, sd_folder, tmp_path, monkeypatch):
    inner = loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda *given: (torch.ones(3).to(META), inner(*given))[1])
    assert train(tiny_settings(sd_folder, tmp_path, logging_steps=50), steps=1) == ["aten._to_copy.default (3,)"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_reports_no_wait(sd_folder, tmp_path):
    run = silent_run(busy_settings(sd_folder, tmp_path, kept=False))

    def watch(step):
        torch.cuda.set_sync_debug_mode("error")  # from the second step on
        if step == STEPS:
            raise Arrived
        return False

    try:
        with pytest.raises(Arrived):
            run.train(watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
