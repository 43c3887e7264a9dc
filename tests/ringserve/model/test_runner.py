"""What a rank reports of a step: where its seconds went."""

import random
from array import array
from pathlib import Path

from ringserve.plan import RankOutput
from ringserve.sampling_params import SamplingParams
from ringserve.updates import AddRequest
from tests.families import VOCABULARY
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.thread_ranks import thread_engine


def reports_of(directory: Path, ring_size: int) -> list[RankOutput]:
    engine = thread_engine(directory, ring_size, "pass-kv")
    rng = random.Random(0)
    prompt = array("I", [rng.randrange(VOCABULARY) for _ in range(300)])
    try:
        engine.add(AddRequest(request_id="a", token_ids=prompt.tobytes(), end_token_ids=(),
                              params=SamplingParams(max_tokens=3, temperature=0)))
        reports: list[RankOutput] = []
        while engine.has_work:
            done = engine.executor.execute(plan := engine.scheduler.schedule())
            engine.scheduler.update(plan, done)
            reports += done.ranks
    finally:
        engine.executor.close()
    return reports


def test_the_seconds_of_a_step_are_told_apart(family_directory: FamilyDirectory) -> None:
    reports = reports_of(family_directory("llama"), 2)
    assert any(sum(report.bytes_sent) for report in reports)
    for report in reports:
        times = report.times
        parts = (times.attention, times.packing, times.wait)
        assert min(parts) >= -1e-6 and sum(parts) <= times.total + 1e-6, times
        assert times.packing > 0 or not sum(report.bytes_sent)


def test_a_ring_of_one_waits_for_nobody(family_directory: FamilyDirectory) -> None:
    for report in reports_of(family_directory("llama"), 1):
        assert report.times.wait == 0 and sum(report.bytes_sent) == 0
