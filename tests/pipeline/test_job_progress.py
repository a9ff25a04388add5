"""The time left for a whole run, by a clock that the test moves."""

from __future__ import annotations

import pytest

from qwlora.pipeline.job_progress import JobProgress
from qwlora.progress import OneCall, call_share, timed, untracked


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def job(clock: Clock) -> JobProgress:
    return JobProgress({"quantize": 100.0, "train/a": 200.0, "verify": 100.0}, untracked, clock)


def test_before_the_first_stage_all_estimates_are_left(job: JobProgress) -> None:
    assert (job.seconds_left, job.share) == (400.0, 0.0)


def test_a_run_that_keeps_to_its_estimates_counts_down(job: JobProgress, clock: Clock) -> None:
    for stage, seconds, left in (("quantize", 100, 300), ("train/a", 200, 100), ("verify", 100, 0)):
        job.begin(stage)
        clock.now += seconds / 2
        assert job.seconds_left == pytest.approx(left + seconds / 2)
        clock.now += seconds / 2
        job.end()
        assert job.seconds_left == pytest.approx(left)
    assert job.share == 1.0


def test_a_slow_stage_makes_the_others_longer(job: JobProgress, clock: Clock) -> None:
    job.begin("quantize")
    clock.now += 300.0
    job.end()
    assert job.seconds_left == pytest.approx(300 * (30 + 300) / (30 + 100))


def test_a_stage_over_its_estimate_always_has_time_left(job: JobProgress, clock: Clock) -> None:
    job.begin("quantize")
    for _ in range(50):
        clock.now += 100.0
        assert job.seconds_left > 300.0
        assert 0 < job.share < 1


def test_a_stage_is_as_long_as_its_own_items_say_once_half_of_them_are_done(
    job: JobProgress, clock: Clock
) -> None:
    job.begin("train/a")
    steps = job.track(range(10), "training", 10)
    for done, _ in enumerate(steps):
        if done == 5:
            break
        clock.now += 4.0  # 40 s instead of 200
    assert job.seconds_left == pytest.approx(200 + 20)


def test_a_track_yields_the_items_and_forgets_a_step_that_was_left(job: JobProgress) -> None:
    job.begin("train/a")
    assert list(job.track("abc", "training", 3)) == ["a", "b", "c"]
    with timed(job.track, "capturing", 5.0):
        assert job.seconds_left > 0
    steps = job.track("abc", "training", 3)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert job.seconds_left == pytest.approx(400.0)


def test_a_single_call_approaches_its_end_but_never_reaches_it() -> None:
    shares = [call_share(seconds, 10.0) for seconds in (0, 5, 9, 10, 20, 1e6)]
    assert shares[:3] == pytest.approx([0, 0.5, 0.9])
    assert shares == sorted(shares)
    assert shares[-1] < 1


def test_timed_reports_one_item_also_when_the_block_fails() -> None:
    seen = []

    def track(items, description, total=None):  # type: ignore[no-untyped-def]
        seen.append((items, description, total))
        yield from items
        seen.append("ended")

    with pytest.raises(ValueError, match="inside"), timed(track, "capturing", 7.0):
        raise ValueError("inside")
    assert seen == [(OneCall(7.0), "capturing", 1), "ended"]
