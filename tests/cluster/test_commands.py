"""A command with `--ray` writes the bytes that it writes without, also where an actor is killed in the middle."""

import json
import os
import random
import signal
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import letters, llama, saved
from transformers import LlamaForSequenceClassification

from align.cluster import pool as pools
from align.cluster.options import LOCAL
from align.errors import UserError
from align.recipe import parse_recipe
from align.rollout.sample import rollout
from align.scoring import score_rows
from align.scoring.job import Job
from align.scoring.scoring import Part
from align.scoring.window import start_scoring
from align.training.annotate import annotate
from rewards import read_reward

pytestmark = pytest.mark.ray
ON_RAY = {"ray": LOCAL, "actors": 2}


@pytest.fixture
def killed(monkeypatch) -> list[int]:
    """Kills the process of the first actor that is given its second window; its id is in the list then."""
    done: list[int] = []
    processes: dict[Any, int] = {}
    got, hand_out = pools.Pool._got, pools.Pool._hand_out

    def remember(self, answer, *timeout):
        found = got(self, answer, *timeout)
        actor, window = self.asked.get(answer, (None, answer))
        if window is None:
            processes[actor] = int(found.split()[1])
        return found

    def kill(self, left, waiting):
        more = hand_out(self, left, waiting)
        busy = next((actor for actor in self.actors if len(actor.windows) == pools.DEPTH), None)
        if busy and not done:
            done.append(processes[busy])
            os.kill(processes[busy], signal.SIGKILL)
        return more

    monkeypatch.setattr(pools.Pool, "_got", remember)
    monkeypatch.setattr(pools.Pool, "_hand_out", kill)
    return done


def rows_file(path, n: int) -> str:
    """Lists of one to three completions, a text of an earlier window again, and a row that is none."""
    draw = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(draw.choices("abcdefgh", k=draw.randint(1, longest)))

    rows = [{"id": i, "prompt": text(9) + " ", "completions": [text(20) for _ in range(1 + i % 3)]} for i in range(n)]
    lines = [json.dumps(row) for row in rows]
    lines[n // 2], lines[-1] = '{"prompt": "p"}', lines[0]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def classifier(tmp_path) -> str:
    return saved(tmp_path / "classifier", LlamaForSequenceClassification(llama(pad_token_id=0)), letters())


def test_scores_are_the_same_bytes_though_an_actor_is_killed(running, killed, tmp_path, classifier):
    path = rows_file(tmp_path / "rows.jsonl", 60)

    def scored(name: str, **options) -> list[bytes]:
        output = tmp_path / f"{name}.jsonl"
        given = {"rewards": [classifier, {"name": "length", "min": 3}], "on_error": "collect", "window": 8}
        score_rows(path, str(output), **given, cache=tmp_path / f"{name}-cache", **options)
        assert not output.with_name(output.name + ".parts").exists()
        return [output.read_bytes(), output.with_name(output.name + ".errors.jsonl").read_bytes()]

    assert scored("ray", **ON_RAY) == scored("local")
    assert killed


def test_what_was_scored_here_goes_on_in_a_cluster_and_the_cache_serves_both(
    running, tmp_path, classifier, monkeypatch
):
    path = rows_file(tmp_path / "rows.jsonl", 60)
    options = {"rewards": [classifier], "on_error": "collect", "window": 8, "cache": tmp_path / "cache"}
    whole = tmp_path / "whole.jsonl"
    score_rows(path, str(whole), **{**options, "cache": tmp_path / "other"})

    class Stopped(BaseException):
        pass

    write = Job.write_part

    def some(self, number, text):
        if number == 3:
            raise Stopped
        write(self, number, text)

    monkeypatch.setattr(Job, "write_part", some)
    with pytest.raises(Stopped):
        score_rows(path, str(tmp_path / "out.jsonl"), **options)
    monkeypatch.setattr(Job, "write_part", write)
    again = score_rows(path, str(tmp_path / "out.jsonl"), **options, ray=LOCAL, actors=1)
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()
    assert again["cached"] == 0, "the cache is read as it was when the job was started"


def test_the_cache_is_read_for_a_cluster(running, tmp_path, classifier):
    path = rows_file(tmp_path / "rows.jsonl", 20)
    options = {"rewards": [classifier], "on_error": "collect", "window": 8, "cache": tmp_path / "cache"}
    score_rows(path, str(tmp_path / "first.jsonl"), **options)
    score_rows(path, str(tmp_path / "local.jsonl"), **options)
    again = score_rows(path, str(tmp_path / "ray.jsonl"), **options, ray=LOCAL, actors=1)
    assert again["scored"] == 0 and again["cached"] > 0
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()


def test_a_scorer_that_is_another_one_in_the_cluster_is_refused(classifier):
    part = Part(read_reward(classifier).scorer, "0" * 64, 0)
    with pytest.raises(UserError, match="^--ray: the scorer sequence_classifier is another one on a machine of the"):
        start_scoring([part])


def prompts_file(path) -> str:
    """Prompts of several lengths."""
    texts = [" ".join(f"w{3 + (5 * i + j) % 36}" for j in range(1 + i % 5)) + f" w{3 + i}" for i in range(24)]
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


@pytest.fixture
def rolled(tmp_path, tiny_policy):
    """Makes the rows of a rollout by the transformers engine, whose batches are of five rows or so."""

    def roll(name: str, **options) -> bytes:
        tree = {
            "output": str(tmp_path / name),
            "policy": {"model": str(tiny_policy)},
            "data": {"sources": [prompts_file(tmp_path / "prompts.jsonl")], "max_length": 32},
            "objective": {"name": "lambda"},
            "rollout": {
                "engine": {"name": "transformers", "tokens_per_batch": 70},
                "completions": 3,
                "max_tokens": 8,
                "agreement_prompts": 2,
                "reward": {"name": "length", "min": 1},
            },
            "train": {"threads": 1},
        }
        return rollout(parse_recipe(tree, origin="test"), **options).read_bytes()

    return roll


def test_rollouts_draw_the_same_tokens_though_an_actor_is_killed(running, killed, rolled):
    assert rolled("ray", **ON_RAY) == rolled("local")
    assert killed


@pytest.fixture
def blocks_of_five(monkeypatch):
    monkeypatch.setattr("align.model.reference.BLOCK", 5)


def test_annotations_are_the_same_values_though_an_actor_is_killed(
    running, killed, make_recipe, tmp_path, blocks_of_five
):
    contrast = {"name": "contrast", "better": "w30 {prompt}", "worse": "w31 w32 {prompt}"}
    found, figures = [], []
    for name, options in (("local", {}), ("ray", ON_RAY)):
        treg = {"regularizer": {"name": "token_reg"}, "token_rewards": contrast}
        recipe = make_recipe(**treg, reference={"cache_dir": str(tmp_path / name)}, train={"tokens_per_batch": 90})
        figures.append(annotate(recipe, **options))
        found.append(stored(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) > 60
    assert figures[0] == figures[1]
    assert killed


def stored(folder) -> dict[tuple[str, bytes], bytes]:
    """Every value of a cache, to the bit, by its folder and key."""
    values = {}
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        parts = np.split(tensors["values"], np.cumsum(tensors["sizes"])[:-1])
        for key, own in zip(tensors["keys"], parts, strict=True):
            values[file.parent.name, key.tobytes()] = own.tobytes()
    return values
