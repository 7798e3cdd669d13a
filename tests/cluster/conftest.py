"""One cluster of two cores on this machine for all tests, started when the first one needs it."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from align.cluster.connect import Cluster, on_cluster
from align.cluster.options import LOCAL


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("ray") is None:
        for item in items:
            if "ray" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="Ray is not installed: pip install 'align-lm[cluster]'"))


@pytest.fixture(scope="session")
def running() -> Iterator[Any]:
    """The cluster, with which every later `--ray` of this process works."""
    with on_cluster(LOCAL, 2, None) as cluster:
        yield cluster.ray


@pytest.fixture
def cluster(running) -> Cluster:
    return Cluster(running, 2, None)
