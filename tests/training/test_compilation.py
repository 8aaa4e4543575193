"""Compiled parts train as others do, without a break in a graph; torch's ``aot_eager`` needs no C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ddp_worker import settings_for, small_pictures, weights
from log_helpers import logged
from process_helpers import checkpoint_contents, difference, finish, start_ranks
from torch._dynamo.utils import counters
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.adapter import LocalAdapter
from localctl.distributed import leave
from localctl.training import data as run_data

# Graphs of the tiny U-Nets' blocks, one for each shape; of the tiny Stable Diffusion's finest level one
# more, as nothing needs gradients before the adapter's first features arrive.
GRAPHS = {"sd": 18, "sdxl": 11}
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend(BACKEND)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.set_default_backend(before)
    torch.compiler.reset()


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def ends(run):
    return [p.detach().clone() for p in run.state.models.plain_adapter.parameters()]


def furthest(first, second) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


@pytest.fixture
def settings(sd_folder, tmp_path):
    """Each step is saved and validated, with controls in the U-Net."""
    return tiny_settings(
        sd_folder, tmp_path / "whole", compile=True, use_ema=True, max_train_steps=2, checkpointing_steps=1,
        validation_steps=1, learning_rate=1e-4, train_batch_size=2,
    )  # fmt: skip


@pytest.mark.slow
def test_a_compiled_training_is_saved_resumed_and_exported_as_any_other(settings, tmp_path):
    run, said = silent_run(settings), logged()
    run.train()
    assert run.state.compilation.active and graphs() == GRAPHS["sd"] + 1
    assert not [line for line in said if "warning" in line]
    plain = silent_run(replace(settings, compile=False, output_dir=str(tmp_path / "plain")))
    plain.train()
    assert plain.state.compilation is None and graphs() == GRAPHS["sd"] + 1
    assert furthest(ends(run), ends(plain)) < 1e-6
    names = run.state.models.plain_adapter.state_dict().keys()
    assert names == plain.state.models.plain_adapter.state_dict().keys()
    exported = LocalAdapter.from_pretrained(tmp_path / "whole" / "adapter")
    assert furthest(list(exported.parameters()), run.state.ema.shadow_params) == 0

    cut = replace(settings, output_dir=str(tmp_path / "cut"), resume_from_checkpoint="latest")
    silent_run(cut).train(stop=lambda step: step == 1)
    silent_run(cut).train()
    saved = [checkpoint_contents(tmp_path / name / "checkpoint-2") for name in ("whole", "cut")]
    assert difference(*saved) == [] and loss_log(tmp_path / "whole") == loss_log(tmp_path / "cut")


@pytest.mark.parametrize(
    ("kind", "threads"), [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("sdxl", 1), ("sd", 1), ("sd", 2))]
)
def test_with_checkpointing_and_accumulation(kind, threads, settings, request, tmp_path):
    """One graph for each shape, also where activations are computed again, and by the two halves of a batch at once."""
    torch.set_num_threads(threads)
    base = replace(settings.base, name=str(request.getfixturevalue(f"{kind}_folder")))
    small = replace(
        settings, base=base, validation_steps=0, checkpointing_steps=0, gradient_checkpointing=True,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    found = []
    for compiled in (True, False):
        run = silent_run(replace(small, compile=compiled, output_dir=str(tmp_path / str(compiled))))
        run.train()
        found.append(ends(run))
        if compiled:
            assert run.state.compilation.active
            made = graphs()
    assert made == graphs() == GRAPHS[kind] + 1
    assert furthest(*found) < 1e-6


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiler_that_fails_is_said_once_and_done_without(backward, settings, tmp_path):
    def broken(graph, inputs):
        if not backward:
            raise OSError("there is no compiler")
        return BrokenBackward.apply_to(graph)

    torch.compiler.set_default_backend(broken)
    settings = replace(settings, validation_steps=0, checkpointing_steps=0)
    run, said = silent_run(settings), logged()
    run.train()
    warned = [line for line in said if "warning" in line]
    assert len(warned) == 1 and "compile=true failed" in warned[0] and "there is no compiler" in warned[0]
    assert warned[0].endswith("the training goes on without it.") and not run.state.compilation.active
    plain = silent_run(replace(settings, compile=False, output_dir=str(tmp_path / "plain")))
    plain.train()
    assert furthest(ends(run), ends(plain)) == 0


class BrokenBackward(torch.autograd.Function):
    """Compiles, but fails when gradients are wanted, as a backend whose graph of the backward pass is compiled late."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise OSError("there is no compiler")

    @classmethod
    def apply_to(cls, graph):
        return lambda *inputs: tuple(cls.apply(value) for value in graph(*inputs))


def one_of_two(base, folder):
    torch.compiler.set_default_backend(BACKEND)
    run_data.make_source = small_pictures
    run = silent_run(settings_for(base, folder, "sobel", 2, compile=True, max_train_steps=3))
    run.train()
    assert run.state.compilation.active and not counters["graph_break"]
    if run.main:
        torch.save(weights(run), folder / "weights.pt")
    leave()


@pytest.mark.slow
def test_two_processes_compile_for_themselves(sd_folder, tmp_path, monkeypatch):
    assert [finish(process, 300) for process in start_ranks(2, one_of_two, sd_folder, tmp_path)] == [0, 0]
    monkeypatch.setattr(run_data, "make_source", small_pictures)
    alone = silent_run(settings_for(sd_folder, tmp_path / "alone", "sobel", 1, max_train_steps=3))
    alone.train()
    both = torch.load(tmp_path / "weights.pt")
    assert max((both[name] - value).abs().max().item() for name, value in weights(alone).items()) < 1e-6
