"""What only a fresh process can show: which modules each part loads, that nothing is printed by the way, and that keys
and token ids do not depend on the process. One process for all of it, as importing the libraries takes seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from localctl.seeding import key_seed
from research.micro_base.clip import new_tokenizer

ROOT = Path(__file__).parents[1]
BED = "The silver bed was situated to the right of the white couch."
WATCHED = (
    "torch numpy diffusers pydantic hydra datasets torchmetrics localctl.micro localctl.metrics localctl.weight_search"
)

# Each part prints a line of JSON last: its result, and which of the watched modules are loaded by then.
PROGRAM = """
import importlib, json, runpy, sys
base, xl, out, watched, bed, modules = sys.argv[1:7]

def told(part, result=None):
    print(json.dumps([result, [name for name in watched.split() if name in sys.modules]]))
    for stream in (sys.stdout, sys.stderr):
        print("=====", file=stream, flush=True)

def run(start, where, *argv):
    sys.argv = [where, *argv]
    try:
        start(where, run_name="__main__")
    except SystemExit as end:
        return end.code or 0

import localctl
dir(localctl)
told("package")
from localctl.cli import sample
told("sample", sample.main(
    ["--prompt", "a b", "--base", base, "--num_inference_steps", "1", "--output_dir", out + "/sampled"]
))
from localctl.pipelines import SCHEDULERS, load_pipeline, set_scheduler
for folder in (base, xl):
    pipe = load_pipeline(folder)
    for name in SCHEDULERS:
        set_scheduler(pipe, name)
told("pipelines")
import localctl.data.files
for module in json.loads(modules):
    importlib.import_module(module)
told("metrics")
from localctl.seeding import key_seed
from research.micro_base.clip import new_tokenizer
told("keys", [key_seed(3, "mask", 9), new_tokenizer().get_vocab()])
told("predict", run(runpy.run_module, "localctl.layout_predictor", bed, "--output", out + "/layout.png"))
told("train", run(
    runpy.run_path, "train_adapter.py", "base=" + base, "--output_dir", out + "/trained", "data.count=8",
    "--train_batch_size", "2", "--max_train_steps", "2", "--validation_steps", "2", "validation.count=2",
    "validation.num_inference_steps=2",
))
"""
PARTS = ("package", "sample", "pipelines", "metrics", "keys", "predict", "train")


class Part(NamedTuple):
    """What a part of the process returned, the watched modules it had loaded by then, and the lines that it printed;
    progress bars are left out."""

    result: Any
    loaded: set[str]
    out: list[str]
    errors: list[str]


def lines(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line]


@pytest.fixture(scope="module")
def parts(sd_folder: Path, sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """The parts by name, run in the order of ``PARTS``."""
    measuring = [f"localctl.metrics.{path.stem}" for path in (ROOT / "localctl" / "metrics").glob("[a-z]*.py")]
    measuring += ["localctl.evaluation.plain", "localctl.evaluation.compare", "localctl.evaluation.fid"]
    words = [str(sd_folder), str(sdxl_folder), str(tmp_path_factory.mktemp("fresh")), WATCHED, BED]
    hashing = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # another than here
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": hashing, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *words, json.dumps(measuring)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, out, errors in zip(PARTS, done.stdout.split("=====\n"), done.stderr.split("=====\n"), strict=False):
        *printed, last = lines(out)
        result, loaded = json.loads(last)
        found[name] = Part(result, set(loaded), printed, lines(errors))
    return found


def test_the_package_alone_loads_nothing_heavy(parts: dict[str, Part]) -> None:
    assert parts["package"].loaded == set()


def test_plain_sampling_loads_no_metrics_and_no_micro_scenes(parts: dict[str, Part]) -> None:
    assert parts["sample"].result == 0
    assert parts["sample"].loaded == {"torch", "numpy", "diffusers", "pydantic"}


def test_metrics_files_and_photos_load_no_micro(parts: dict[str, Part]) -> None:
    assert {"localctl.metrics", "torchmetrics"} <= parts["metrics"].loaded
    assert "localctl.micro" not in parts["metrics"].loaded


def test_keys_and_token_ids_are_the_same_in_every_process(parts: dict[str, Part]) -> None:
    assert parts["keys"].result == [key_seed(3, "mask", 9), new_tokenizer().get_vocab()]


@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_printed_on_stderr_but_progress(parts: dict[str, Part], name: str) -> None:
    assert [line for line in parts[name].errors if not line.startswith(("sample.py: ", "training: "))] == []


def test_the_first_screens_are_clean(parts: dict[str, Part]) -> None:
    assert parts["package"].out == parts["pipelines"].out == []
    predicted, trained = parts["predict"], parts["train"]
    assert predicted.result == trained.result == 0
    phrases = [line.partition(" position")[0] for line in predicted.out[:2]]
    assert phrases == ["The silver bed", "the white couch"]
    assert trained.out[0].startswith("base ") and "warning" not in "\n".join(trained.out).lower()
