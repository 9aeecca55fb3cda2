"""Schedules survive JSON, and bad ones are refused by name."""

import pytest

from simclr_fast.large_batch.schedule import Schedule, Stage, uniform


def test_json_and_back():
    stages = Stage(3, input="once", turn="mask"), Stage(1, inner="kept", wide="kept")
    schedule = Schedule(64, stages, False, 10**9, 5)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.blocks == 4
    assert uniform(2, 8, last="once").stages == (Stage(1, last="once"),) * 2


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Stage(0), "blocks must be at least 1, got 0"),
        (lambda: Stage(1, wide="once"), "wide must be one of kept, again, got 'once'"),
        (lambda: Stage(1, turn="bits"), "turn must be one of kept, mask, again, got 'bits'"),
        (lambda: Schedule(0, (Stage(1),)), "micro_batch must be at least 1, got 0"),
        (lambda: Schedule(1, ()), "stages must hold"),
        (lambda: uniform(1, 1, output="never"), "output must be one of kept, once, again"),
        (lambda: Schedule(1, (Stage(1),), device_bytes=-1), "device_bytes must be at least 0"),
        (lambda: Schedule(1, (Stage(1),), host_bytes=-1), "host_bytes must be at least 0"),
        (lambda: Schedule.from_json('{"micro_batch": 1}'), "a schedule has the fields"),
        (lambda: Schedule.from_json('{"stages": [{"all": 1}]}'), "a schedule has the fields"),
        (lambda: Schedule.from_json("[]"), "a schedule has the fields"),
    ],
)
def test_bad_schedules(build, says):
    with pytest.raises(ValueError, match=says):
        build()
