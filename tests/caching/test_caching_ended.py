"""A caching program that is killed or interrupted loses nothing, and writes nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caching_helpers import cache_settings, contents

from localctl.caching.cache import cache
from localctl.data import DataConfig
from localctl.encodings.store import Store


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), [("images", signal.SIGKILL), ("captions", signal.SIGINT)])
def test_ended_while_encoding_nothing_is_twice_or_missing(tmp_path, moment, number):
    """With Ray, on the embedded base: kill -9 of the program, or Ctrl-C to all of its processes, after its first
    finished rows; then the same again."""
    data, encodings = DataConfig(count=200), tmp_path / "encodings"
    command = [sys.executable, "-m", "localctl", "cache", "--encodings_dir", str(encodings), "data.count=200"]
    command += ["--num_workers", "1"]
    ended = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_rows(encodings, moment, ended)
    (os.killpg if number == signal.SIGINT else os.kill)(ended.pid, number)
    said, _ = ended.communicate()
    if number == signal.SIGINT:
        assert ended.returncode == 130 and said.strip().endswith("the same command goes on from there.")
        assert "Traceback" not in said
    finished = len(list(encodings.glob(f"{moment}/*/.parts/*.parquet")))
    assert finished and not list(encodings.glob(f"{moment}/*/manifest.json"))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{moment:<11}" in again.stdout and "were encoded before, by a run that was stopped" in again.stdout
    for kind, rows in (("images", 200), ("captions", None)):
        [folder] = encodings.glob(f"{kind}/*")
        store = Store(folder)
        ids = list(store.ids)
        assert len(set(ids)) == len(ids) == sum(shard["rows"] for shard in store.manifest.shards)
        assert rows is None or len(ids) == rows
        assert not store.damaged() and not (folder / ".parts").exists()
    whole = tmp_path / "whole"
    cache(cache_settings(Path("micro"), whole, data))
    assert contents(encodings) == contents(whole)


def wait_for_rows(encodings: Path, kind: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not list(encodings.glob(f"{kind}/*/.parts/*.parquet")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
