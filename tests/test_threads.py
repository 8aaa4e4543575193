"""Programs let waiting threads sleep, before torch is loaded, and leave the user's own choice alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localctl.__main__ import COMMANDS
from localctl.threads import SPINS, waiting_note, yield_waiting_cores

ROOT = Path(__file__).parents[1]
# All commands' modules are loaded as the programs load them; then the first one runs, up to its list of settings.
PROGRAM = f"""
import importlib, os, sys
modules = [importlib.import_module(name) for name in {[module for module, _ in COMMANDS.values()]}]
assert "torch" not in sys.modules, "torch is loaded before the programs choose how its threads wait"
assert os.environ.get("GOMP_SPINCOUNT") == (sys.argv[1] or None), "importing a module is no choice"
try:
    modules[int(sys.argv[2])].main(["--version"])
except SystemExit:
    pass
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_NUM_THREADS"))
"""


def run(program: int, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", PROGRAM, environment.get("GOMP_SPINCOUNT", ""), str(program)]
    paths = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=plain | paths | environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize("program", [0, 1])  # `train` reports its errors in its own way, all others in the common one
def test_a_program_chooses_before_torch_is_loaded(program: int) -> None:
    assert run(program) == f"{SPINS} None"


def test_the_users_own_setting_stays() -> None:
    assert run(0, GOMP_SPINCOUNT="7", OMP_NUM_THREADS="3") == "7 3"
    assert run(1, OMP_WAIT_POLICY="active") == "None None"


def test_once_torch_is_loaded_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setitem(sys.modules, "torch", sys)
    yield_waiting_cores(environment)
    assert environment == {} and waiting_note(environment) == ""


def test_the_note_is_about_this_choice_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    yield_waiting_cores(environment)
    assert environment == {"GOMP_SPINCOUNT": SPINS} and SPINS in waiting_note(environment)
    assert waiting_note({"GOMP_SPINCOUNT": "300000"}) == ""
