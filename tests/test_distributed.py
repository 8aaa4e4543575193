"""Processes part without waiting for each other."""

from __future__ import annotations

import torch
from process_helpers import finish, start_ranks
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from localctl.distributed import joined, leave, processes


def meet(folder, number):
    rank, count = processes()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=count)
    model = DistributedDataParallel(torch.nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    total = torch.ones(1)
    distributed.all_reduce(total)
    leave()
    return int(total)


def meet_often(folder):
    """Of the last exchange nothing may be left when the group goes: without the moment given to it, one of the first
    ten times never ends."""
    assert [meet(folder, number) for number in range(12)] == [2] * 12
    return 0


def test_a_group_is_left_without_waiting_for_ever(tmp_path):
    assert [finish(process) for process in start_ranks(2, meet_often, tmp_path)] == [0, 0]


def join():
    with joined() as (rank, count):
        assert distributed.is_initialized() and count == 2
    assert not distributed.is_initialized()
    return rank


def test_joined_processes_part_again():
    assert [finish(process) for process in start_ranks(2, join)] == [0, 1]


def test_one_process_alone_has_nothing_to_leave():
    leave()
    with joined() as place:
        assert place == (0, 1)
