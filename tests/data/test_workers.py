"""Data workers end with whoever reads from them."""

import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from localctl.data.workers import WorkerError, loading


class Numbers:
    """Yield 0, 1, 2 ...; call ``trouble`` at 3."""

    def __init__(self, trouble=None, count=20):
        self.trouble, self.count = trouble, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == 3 and self.trouble is not None:
            self.trouble()
        return index


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def end():
    os._exit(3)


def sleep():
    time.sleep(600)


def full():
    raise OSError(28, "No space left on device", "/dev/shm/x")


def refuse():
    raise ValueError("a value\nover two lines")


def bug():
    raise ZeroDivisionError("a mistake of ours")


def read(trouble, workers=2):
    with loading(Numbers(trouble), workers, batch_size=None) as batches:
        return list(batches)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_everything_is_read_in_order_and_nobody_is_left(workers):
    before = signal.getsignal(signal.SIGCHLD)
    assert read(None, workers) == list(range(20))
    assert multiprocessing.active_children() == [] and signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize(("trouble", "words"), [(die, r"SIGKILL; out of memory\?"), (end, "exit code 3")])
def test_a_killed_worker_is_one_sentence(trouble, words, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))  # seconds; torch's are 5
    with pytest.raises(WorkerError, match=f"A data worker was killed \\({words}\\)"):
        read(trouble)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [(full, OSError, "No space left on device"), (refuse, ValueError, "over two lines")],
)
def test_an_error_of_a_worker_is_one_line(trouble, kind, words):
    with pytest.raises(kind) as error:
        read(trouble)
    assert "\n" not in str(error.value) and words in str(error.value)
    assert multiprocessing.active_children() == []


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="in bug"):
        read(bug)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_busy_workers_do_not_keep_an_end_waiting(error):
    """One is in the middle of something that takes ten minutes, and ignores whatever is mild."""
    began = time.monotonic()
    with pytest.raises(error), loading(Numbers(sleep), 2, batch_size=None) as batches:
        assert next(batches) == 0
        raise error
    assert multiprocessing.active_children() == [] and time.monotonic() - began < 60


def test_a_worker_that_dies_meanwhile_does_not_disturb_what_is_done_between_batches():
    with pytest.raises(WorkerError), loading(Numbers(), 2, batch_size=None) as batches:
        next(batches)
        for process in multiprocessing.active_children():
            process.kill()
        time.sleep(0.5)  # such as saving: torch would raise here
        saved = True
        next(batches)
    assert saved
