"""Recipes of every kind that one process and several must train alike, and what alike means."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from align.training.trainer import AlignTrainer

TRAIN = {"lists_per_step": 7, "epochs": 1, "eval_steps": 2, "save_steps": 2, "keep_checkpoints": 9}
TRAIN["tokens_per_batch"] = 80
"""24 lists in steps of 7: processes never hold equal shares, and the last step has 3."""
SAMPLING = {"prompts": 0, "token_lists": 0}
"""Not compared, and dear."""
IN_PARTS = TRAIN | {"tokens_per_batch": 26, "gradient_checkpointing": False}
"""Some lists are larger than a pass: two parts or three in one process while another has none."""
TIMES = {"seconds", "lists_per_second", "completion_tokens_per_second", "rank_wait_share", "crc32"}
MOVING = {"name": "moving", "every": 2, "mixture": 0.5}
CONTRAST = {"name": "contrast", "better": "w3 {prompt}", "worse": "w4 {prompt}"}
RM = {"task": "reward", "objective": {"name": "bradley_terry", "center": 0.01}}
FULL = {"policy": {"adapter": {"name": "full"}}}

SETTINGS = {
    "lambda": {"objective": {"name": "lambda"}, "sampling": {"prompts": 2}},
    "kto": {"objective": {"name": "kto"}, "rows": "labelled"},
    "weighted": {"objective": [{"name": "lambda"}, {"name": "kto"}], "rows": "weighted", "reference": MOVING},
    "treg": {"regularizer": {"name": "token_reg"}, "token_rewards": CONTRAST, "rows": "weighted"},
    "reward": RM | {"rows": "weighted"},
    "more": RM | {"reward": {"balance": "more"}, "rows": "pairs weighted"},
    "full": FULL | {"reference": {"cache": False}},
    "best": FULL | {"train": TRAIN | {"keep_best": "ndcg", "eval_steps": 1}},
    "trajectories": {"objective": {"name": "lambda"}, "rows": "trajectories", "policy": {"chat_template": "plain"}},
    "adalora": {"policy": {"adapter": {"name": "adalora", "rank": 2}}},
    "parts": {"train": IN_PARTS, "reference": {"cache": False}},
    "parts_reward": RM | {"train": IN_PARTS},
    "parts_padded": {"train": IN_PARTS | {"packing": False}, "rows": "weighted", **FULL},
}


def written_rows(folder: Path, kind: str) -> str:
    """Rows with labels, or pairs, those of one kind with weights and margins."""
    path = folder / f"{kind}.jsonl"
    if kind == "labelled":
        lines = [{"prompt": f"w{10 + i}", "completion": " w3" * (1 + i % 4), "label": i % 3 == 0} for i in range(24)]
    elif kind == "trajectories":
        lines = [_trajectories(i) for i in range(24)]
    else:
        lines = [{"prompt": f"w{10 + i}", "chosen": " w3" * (1 + i % 4), "rejected": " w5 w6"} for i in range(24)]
    if kind == "weighted":
        lines = [line | {"weight": 0.5 + i % 5, "margin": i % 3} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def _trajectories(i: int) -> dict:
    """Answers of several messages, one of which weighs less: what is learnt of a list lies in pieces, and differs."""
    turns = [("assistant", "w3 " * (1 + i % 3)), ("user", "w7"), ("assistant", "w4 " * (1 + i % 2))]
    better = [{"role": role, "content": text.strip()} for role, text in turns]
    better[0] |= {"weight": 0.5} if i % 2 else {}
    worse = [{"role": "assistant", "content": "w5 w6"}]
    worse += [better[1], {"role": "assistant", "content": "w8"}] if i % 2 else []
    return {"prompt": [{"role": "user", "content": f"w{10 + i}"}], "chosen": better, "rejected": worse}


def assert_best_is_not_last(run: Path) -> None:
    """What is exported is no later weights than those of the best evaluation, which others follow."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line["eval_ndcg"] for line in lines if "eval_ndcg" in line]
    assert found.index(max(found)) < len(found) - 1


def trained(run: Path) -> dict:
    (file,) = (run / "adapter").glob("*.safetensors")
    return load_file(file)


def assert_equal_runs(one: Path, many: Path, *, closely: float = 1e-5) -> None:
    """The same losses, norms of gradients and other figures in every line, and the same trained weights."""
    for name, tensor in trained(one).items():
        assert_close(
            trained(many)[name], tensor, rtol=1e-3, atol=closely, msg=lambda said, name=name: f"{name}: {said}"
        )
    own, theirs = ([json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (one, many))
    assert len(own) == len(theirs)
    for a, b in zip(own, theirs, strict=True):
        assert a.keys() - TIMES == b.keys() - TIMES
        for key in a.keys() - TIMES:
            assert b[key] == pytest.approx(a[key], abs=closely, rel=closely), (key, a["step"])


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(monkeypatch, step: int) -> None:
    original = AlignTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", training_step)
