"""Windows through actors: every window once whatever dies, few at a time, and a sentence where nothing helps."""

import os
import signal
import time

import pytest
import torch

from align.cluster import pool as pools
from align.cluster.pool import DEATHS, DEPTH
from align.errors import UserError

pytestmark = pytest.mark.ray


@pytest.fixture
def make(running):
    """A pool of two actors, which need not load torch."""
    return lambda start: pools.Pool(running, start, count=2, resources={"num_cpus": 1, "num_gpus": 0})


def squares():
    return lambda window: window**2


def dying(folder, deaths: dict[int, int]):
    """Work that kills its own process so many times at some windows; a file counts each time."""

    def start():
        def work(window: int) -> int:
            if len(list(folder.glob(f"{window}-*"))) < deaths.get(window, 0):
                (folder / f"{window}-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return window**2

        return work

    return start


def test_every_window_comes_back_once_with_what_the_work_gives(make):
    pool = make(squares)
    for _ in range(2):  # the same actors again
        assert sorted(pool.map(range(20))) == [(n, n**2) for n in range(20)]
    assert len(pool.actors) == 2
    pool.close()


def test_a_dead_actor_costs_no_window(make, tmp_path):
    """One dies at its first window, one window costs as many as it may, and the last one a single one."""
    pool = make(dying(tmp_path, {0: 1, 7: DEATHS - 1, 11: 1}))
    assert sorted(pool.map(range(12))) == [(n, n**2) for n in range(12)]
    assert len(list(tmp_path.iterdir())) == 1 + (DEATHS - 1) + 1
    pool.close()


def test_a_window_that_kills_every_actor_is_given_up_in_one_sentence(make, tmp_path):
    pool = make(dying(tmp_path, {3: 99}))
    with pytest.raises(UserError, match=f"^--ray: {DEATHS} actors died one after the other of the same window of rows"):
        list(pool.map(range(6)))
    # A death also counts against a window whose answer it took along, so that there may be some more.
    assert DEATHS <= len(list(tmp_path.iterdir())) < 3 * DEATHS and not pool.actors


def test_windows_are_read_when_there_is_room_for_them(make):
    read = given = 0

    def windows():
        nonlocal read
        while read < 60:
            read += 1
            yield read

    def start():
        return lambda window: time.sleep(0.01) or b"x" * 2**20

    pool = make(start)
    for given, _ in enumerate(pool.map(windows()), start=1):
        assert read - given < 2 * DEPTH + 1
    assert given == read == 60
    pool.close()


def test_a_reader_that_leaves_ends_the_actors(make):
    pool = make(squares)
    results = pool.map(range(20))
    next(results)
    results.close()
    assert not pool.actors and not pool.asked


def test_what_the_work_raises_is_raised_as_it_is(make):
    def start():
        def work(window):
            raise UserError(f"row {window}: no reference answer")

        return work

    with pytest.raises(UserError, match="^row 5: no reference answer$") as caught:
        list(make(start).map([5]))
    assert type(caught.value) is UserError


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "raises"])
def test_actors_that_cannot_start(make, dies):
    def start():
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("no model at /nowhere")

    sentence = f"^--ray: {DEATHS} actors in a row died before they had started" if dies else "^no model at /nowhere$"
    with pytest.raises(UserError, match=sentence):
        list(make(start).map(range(3)))


def test_an_actor_that_finds_no_room_ends_in_one_sentence(running, monkeypatch):
    monkeypatch.setattr(pools, "START_SECONDS", 2.0)
    pool = pools.Pool(running, squares, count=1, resources={"num_cpus": 1, "num_gpus": 64})
    with pytest.raises(UserError, match="no actor has started within 2 s; the cluster has no room for 1 cores and 64"):
        list(pool.map([1]))


def test_an_actor_computes_with_the_threads_and_the_folder_of_the_command(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)

    def start():
        return lambda window: (torch.get_num_threads(), os.getcwd())

    pool = cluster.pool(start)
    assert list(pool.map([0])) == [(0, (2, str(tmp_path)))]
    pool.close()
