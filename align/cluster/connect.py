"""The cluster that `--ray` names: found within a minute, or one sentence."""

import importlib
import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState

from align.cluster.options import LOCAL
from align.cluster.pool import Pool, Start, Work, say
from align.errors import UserError
from align.progress import counted, stage

SECONDS = 60.0
"""To connect to a cluster, or to start one, after which nothing more is expected."""
REACH_SECONDS = 10.0
"""To open a connection to the address at all."""

OMP = "OMP_NUM_THREADS"


class Cluster:
    """Makes pools of actors; how many and how large, the options say or what the cluster has."""

    def __init__(self, ray: Any, actors: int | None, gpus: float | None) -> None:
        self.ray, self.actors, self.gpus = ray, actors, gpus

    def pool(self, start: Start, *, devices: int = 1) -> Pool:
        """Actors that each call `start` once, and what it gives for every window.

        An actor computes with as many threads as this process would, since their number moves last digits.

        Args:
            start: is pickled; what it needs on disk lies under the same path on every machine.
            devices: GPUs that one of them needs, where there are any.
        """
        have = self.ray.cluster_resources()
        gpus = (devices if have.get("GPU") else 0) if self.gpus is None else self.gpus
        threads, cores = torch.get_num_threads(), int(have.get("CPU", 1))
        count = self.actors or max(1, int(have.get("GPU", 0) / gpus) if gpus else cores // threads)
        cpus = 1 if gpus else max(1, min(threads, cores // count))
        machines = counted(len(self.ray.nodes()), "machine")
        say(f"up to {counted(count, 'actor')} of {gpus:g} GPUs and {counted(threads, 'thread')} on {machines}")
        resources = {"num_cpus": cpus, "num_gpus": gpus}
        return Pool(self.ray, partial(_start, start, threads, os.environ.get(OMP)), count=count, resources=resources)


def _start(start: Start, threads: int, asked: str | None) -> Work:
    torch.set_num_threads(threads)
    if asked is None:
        os.environ.pop(OMP, None)  # Ray's own, which processes of the actor would read
    else:
        os.environ[OMP] = asked
    return start()


def worked(
    cluster: Cluster | None, start: Start, windows: Iterable[Any], *, devices: int = 1
) -> Iterator[tuple[Any, Any]]:
    """(window, what the work gives for it), in this process where there is no cluster; see `Cluster.pool`."""
    if cluster is None:
        work = start()
        yield from ((window, work(window)) for window in windows)
    else:
        with closing(cluster.pool(start, devices=devices)) as pool:
            yield from pool.map(windows)


@contextmanager
def on_cluster(address: str | None, actors: int | None, gpus: float | None) -> Iterator[Cluster | None]:
    """The cluster that the options name, until the work is done; None without `--ray`.

    Raises:
        UserError: Ray is not installed, no cluster answers there, or there are options or processes that do not fit.
    """
    if address is None:
        if actors is not None or gpus is not None:
            raise UserError("--actors and --gpus-per-actor are of a cluster; add --ray, or leave them out")
        yield None
        return
    if PartialState().num_processes > 1:
        raise UserError("--ray: actors are the processes; start the command once, without `accelerate launch`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unless the user says so
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise UserError("--ray: Ray is not installed; run pip install 'align-lm[cluster]'") from None
    if ray.is_initialized():  # by who calls us from Python, whose cluster it stays
        yield Cluster(ray, actors, gpus)
        return
    _connect(ray, address, actors)
    try:
        yield Cluster(ray, actors, gpus)
    finally:
        ray.shutdown()


@stage("connecting to Ray")
def _connect(ray: Any, address: str, actors: int | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        address = os.environ.get("RAY_ADDRESS", LOCAL)  # as Ray reads it
    if address == LOCAL:  # not in a thread, with which all that it has started would end
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            ray.init(LOCAL, include_dashboard=False, num_cpus=max(cores, actors or 1), **quiet)
        except Exception as error:  # its processes have half a minute, which a busy machine may not give them
            why = " ".join(str(error).split())[:200]
            said = f"--ray: Ray did not start on this machine ({why}); call again, or leave --ray out"
            raise UserError(said) from None
        return
    _reach(address)
    failed: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(address, **quiet)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)  # Ray itself may wait for ever
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        raise _unreachable(address, f"no answer within {SECONDS:.0f} s")
    if failed:
        raise _unreachable(address, " ".join(str(failed[0]).split())[:200])


def _reach(address: str) -> None:
    """Refuse an address at which nothing listens, which Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].partition("?")[0].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None


def _unreachable(address: str, why: str) -> UserError:
    return UserError(
        f"--ray {address}: no Ray cluster can be reached there ({why.rstrip('.')}); see `ray status` on its head, or "
        "leave the address out for a cluster on this machine"
    )
