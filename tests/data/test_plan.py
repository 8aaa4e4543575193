from collections import Counter

import pytest

from localctl.data.plan import PlanSampler, SamplePlan


def refs(**kwargs):
    options = {"plan": SamplePlan(10, 0), "batch_size": 4, "start": 0, "stop": 10, **kwargs}
    return list(PlanSampler(**options))


def test_every_epoch_visits_every_sample_once_in_another_order():
    plan = SamplePlan(10, 0)
    visits = [plan.at(position) for position in range(30)]
    for epoch in range(3):
        part = visits[10 * epoch : 10 * epoch + 10]
        assert sorted(ref.sample for ref in part) == list(range(10))
        assert {ref.epoch for ref in part} == {epoch}
    orders = {tuple(ref.sample for ref in visits[i : i + 10]) for i in (0, 10, 20)}
    assert len(orders) == 3


def test_the_seed_decides_the_order():
    assert [SamplePlan(50, 1).at(i) for i in range(50)] != [SamplePlan(50, 2).at(i) for i in range(50)]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_starting_later_continues_the_same_stream(step):
    assert refs(start=step) == refs()[step:]
    assert refs(start=step, accumulation=3) == refs(accumulation=3)[3 * step :]


def test_batches_reach_over_the_end_of_an_epoch():
    batch = refs()[2]
    assert [ref.epoch for ref in batch] == [0, 0, 1, 1]
    assert all(len(batch) == 4 for batch in refs())


def test_two_processes_share_what_one_would_take():
    one = refs(batch_size=4)
    parts = [refs(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == one


def test_accumulation_takes_the_same_samples_as_a_larger_batch():
    micro = refs(batch_size=2, accumulation=2)
    assert [a + b for a, b in zip(micro[::2], micro[1::2], strict=True)] == refs(batch_size=4)


def test_length_and_counts():
    sampler = PlanSampler(SamplePlan(10, 0), 4, 0, 5)
    assert len(sampler) == 5 == len(list(sampler))
    assert set(Counter(ref.sample for batch in sampler for ref in batch).values()) == {2}


def test_a_batch_larger_than_the_data_set():
    batch = refs(plan=SamplePlan(3, 0), batch_size=8, stop=1)[0]
    assert [ref.epoch for ref in batch] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_no_data():
    with pytest.raises(ValueError, match="empty"):
        SamplePlan(0, 0)
