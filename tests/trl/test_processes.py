"""Trainers by TRL's names in two processes: TRL's figures under the same launch, and one process's."""

import json
import os
from pathlib import Path

import pytest
from same_script import assert_same_lines
from train_trl import OF_LISTS, SETTINGS, logged

HERE = Path(__file__).parent
OF_RANK_ZERO = ("num_tokens", "rewards/", "logps/", "logits/", "entropy", "mean_token_accuracy", "accuracy", "reward")
"""Where a mean over a process's rows is no mean over all, or TRL counts otherwise."""


@pytest.mark.slow
def test_two_processes_log_what_trl_logs_and_step_as_one(tiny_policy, start_each, tmp_path):
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
    start_each("train_trl", str(tiny_policy), str(tmp_path), PYTHONPATH=path).finish()
    for setting in SETTINGS:
        theirs, ours = (json.loads((tmp_path / f"{p}-{setting}.json").read_text()) for p in ("trl", "align.trl"))
        assert_same_lines(theirs, ours)
        if setting != "KTO":  # whose baseline is a micro-batch's over all processes
            assert_same_lines(logged("align.trl", setting, str(tiny_policy), tmp_path, 1), ours, without=OF_RANK_ZERO)
    for setting in OF_LISTS:
        ours = json.loads((tmp_path / f"align.trl-{setting}.json").read_text())
        assert_same_lines(logged("align.trl", setting, str(tiny_policy), tmp_path, 1), ours)
