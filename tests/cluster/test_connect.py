"""What `--ray` says: an address or none, and a sentence where Ray or the cluster is not there."""

import socket
import sys
import time

import pytest

from align.cli import main
from align.cluster import connect
from align.cluster.connect import on_cluster
from align.cluster.options import LOCAL, address
from align.errors import UserError


@pytest.mark.parametrize(
    "given", ["auto", "local", "head:6379", "10.0.0.1:6379", "ray://head:10001", "ray://[::1]:10001"]
)
def test_an_address_is_taken_as_ray_takes_it(given):
    assert address(given) == given


@pytest.mark.parametrize("given", ["rows.jsonl", "recipe.yaml", "train.seed=1", "data/rows", "head", "runs/a:1"])
def test_a_word_that_is_meant_for_the_command_is_no_address(given, capsys):
    with pytest.raises(SystemExit):
        main(["score", "--ray", given, "rows.jsonl", "out.jsonl", "--reward", "length"])
    assert f"argument --ray: {given} is no address of a Ray cluster" in capsys.readouterr().err


def test_without_ray_the_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"run pip install 'align-lm\[cluster\]'$"), on_cluster(LOCAL, None, None):
        pass


@pytest.mark.parametrize(("actors", "gpus"), [(2, None), (None, 1.0), (None, 0.0)])
def test_options_of_a_cluster_without_one_are_refused(actors, gpus):
    with pytest.raises(UserError, match="add --ray"), on_cluster(None, actors, gpus):
        pass


def test_without_the_option_there_is_no_cluster():
    with on_cluster(None, None, None) as cluster:
        assert cluster is None


def test_nothing_listens_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for given in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(UserError, match=f"^--ray {given}: no Ray cluster can be reached there .*refused"):
            connect._reach(given)


def test_what_listens_never_answers(monkeypatch):
    """Ray's own init would try for as long as it is let."""

    class Silent:
        @staticmethod
        def init(*_, **__):
            time.sleep(60)

    monkeypatch.setattr(connect, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^--ray {given}: .* \(no answer within 0 s\)"):
            connect._connect(Silent, given, None)


def test_a_cluster_that_does_not_start_on_this_machine_is_said(monkeypatch):
    """As on one that is so busy that Ray's own processes take longer than it waits for them."""

    class Late:
        @staticmethod
        def init(*_, **__):
            raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"^--ray: Ray did not start on this machine \(The current node .*; call again"):
        connect._connect(Late, LOCAL, None)
