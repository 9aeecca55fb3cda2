"""Ranks agree on the step after which a signal stops them, in whatever steps they are."""

import threading
import time

import pytest
import torch.distributed as dist

from simclr_fast.utils.rank_watch import RankWatch

LAST = 2000


class Ranks:
    """Main threads of `size` ranks that are free to be in different steps, as hosts of GPUs are."""

    def __init__(self, seconds, limit=LAST):
        self.size, self.seconds, self.limit = len(seconds), seconds, limit
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.caught = [[] for _ in seconds]
        self.steps, self.ended = [0] * self.size, [None] * self.size
        self.threads = [
            threading.Thread(target=self.run, args=(rank, store)) for rank in range(self.size)
        ]
        for thread in self.threads:
            thread.start()

    def run(self, rank, store):
        watch = RankWatch(store, rank, self.size, 60)
        try:
            for step in range(1, self.limit + 1):
                watch.mark(step, "training")
                time.sleep(self.seconds[rank])
                self.steps[rank] = step
                if step < self.limit and (number := watch.stop_signal(step, self.caught[rank])):
                    self.ended[rank] = (step, number)
                    return
            self.ended[rank] = (self.limit, None)
        finally:
            watch.leave()

    def wait(self):
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        return self.ended


@pytest.mark.parametrize("who", [[0], [2], [0, 1, 2]])
def test_all_stop_after_the_same_step(who):
    ranks = Ranks([0.004, 0.001, 0.002])
    while min(ranks.steps) < 20:
        time.sleep(0.01)
    before = max(ranks.steps)
    for rank in who:
        ranks.caught[rank].append(10 + rank)
    ended = ranks.wait()
    assert len({step for step, _ in ended}) == 1, ended
    assert len({number for _, number in ended}) == 1
    assert before <= ended[0][0] < LAST
    assert ended[0][1] in [10 + rank for rank in who]


def test_if_a_rank_has_finished_all_finish():
    """Rank 1 is done before the signal arrives; rank 0 has the same steps to do."""
    ranks = Ranks([0.05, 0.0], limit=40)
    while ranks.ended[1] is None:
        time.sleep(0.01)
    ranks.caught[0].append(15)
    assert ranks.wait() == [(40, None), (40, None)]
