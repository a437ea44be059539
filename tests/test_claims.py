"""Claims: every part is made though workers die, and a worker is lost only when it gives no sign of life for a lease of
the observer's own clock."""

from __future__ import annotations

import random
import time

import pytest
import torch.distributed as dist

from diffkern.claims import Claims

LEASE = 60.0


@pytest.fixture(name="clock")
def make_clock(monkeypatch):
    """The seconds that pass: those that are slept, and those that a test adds. The time of day jumps all the while."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(time, "time", lambda: random.uniform(-1e10, 1e10))
    return now


def worker(store, parts, idle=lambda: None):
    return Claims(store, [str(part) for part in range(parts)], idle, LEASE)


def test_workers_share_parts_out(clock):
    store = dist.HashStore()
    a, b = worker(store, 5), worker(store, 5)
    of_a, of_b = iter(a), iter(b)
    taken = [next(of_a), next(of_b), next(of_b)]
    assert taken == [0, 1, 2]
    b.done(1)
    b.done(2)
    assert [next(of_a), next(of_a)] == [3, 4]
    for part in (0, 3, 4):
        a.done(part)
    assert list(of_a) == list(of_b) == []
    assert list(worker(store, 5)) == [], "who comes late finds all done"
    assert [a.is_first(3), b.is_first(3), a.is_first(4)] == [True, False, True]


def test_the_part_of_a_lost_worker_goes_to_another_after_a_lease(clock):
    store = dist.HashStore()
    lost = next(iter(worker(store, 2)))
    began = clock[0]
    b = worker(store, 2)
    made = []
    for part in b:
        made.append((part, clock[0] - began))
        b.done(part)
    assert lost == 0
    assert made[0] == (1, 0.0)
    assert made[1][0] == 0
    assert LEASE <= made[1][1] <= LEASE + 1


def test_a_worker_that_counted_a_part_and_died_before_its_claim_loses_none(clock):
    store = dist.HashStore()
    store.add("next", 1)
    b = worker(store, 2)
    made = []
    for part in b:
        made.append(part)
        b.done(part)
    assert made == [1, 0]
    assert clock[0] == 0.0, "nobody holds it: there is no lease to wait for"


def test_a_slow_worker_keeps_its_part_and_a_stopped_one_learns_that_it_is_done(clock):
    store = dist.HashStore()
    a = worker(store, 1)
    assert next(iter(a)) == 0

    def alive():
        if clock[0] < 10 * LEASE:
            assert a.is_wanted()

    b = worker(store, 1, idle=alive)
    taken = next(iter(b))
    assert taken == 0
    assert 11 * LEASE - LEASE / 6 <= clock[0] <= 11 * LEASE + 1, "a lease after the last sign of life"
    clock[0] += LEASE
    assert a.is_wanted(), "it is lost, but not made: the worker that goes on may be the only one"
    b.done(0)
    clock[0] += LEASE
    assert not a.is_wanted()


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_whoever_dies(clock, seed):
    """Workers take, make, die with a part in hand or between a part and its word, and others come."""
    chance, store, parts, made = random.Random(seed), dist.HashStore(), 7, set()

    def live():
        me = worker(store, parts, idle=lambda: clock.__setitem__(0, clock[0] + 5))
        for part in me:
            yield
            clock[0] += chance.uniform(0, 100)
            me.is_wanted()
            made.add(part)
            yield
            me.done(part)
            yield

    alive, finished = [live() for _ in range(3)], 0
    for _ in range(300):
        one = chance.choice(alive)
        if next(one, "the end") == "the end":
            finished += 1
            assert made == set(range(parts)), "who ends knows that all are made"
        if finished == 3:
            break
        if chance.random() < 0.2:
            one.close()
            alive.append(live())
        alive = [w for w in alive if w.gi_frame is not None] or [live()]
    assert finished == 3
