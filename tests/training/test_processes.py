"""Two processes do what one does, through the command that a user would type."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from align.recipe import dump_recipe
from align.training.train import train


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", str(free_port())]
    command = [*launcher, "-m", "align.cli", "train", str(path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # --cpu itself starts one process only
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-12000:]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["lambda", "kto"])
def test_two_gloo_processes_equal_one(make_recipe, tmp_path, objective):
    """24 lists in steps of 7: the two processes never hold equal shares, and the last step has 3."""
    sections = {"train": {"lists_per_step": 7, "epochs": 1, "eval_steps": 2, "tokens_per_batch": 80}}
    if objective == "kto":
        rows = tmp_path / "labelled.jsonl"
        lines = [{"prompt": f"w{10 + i}", "completion": " w3" * (1 + i % 4), "label": i % 3 == 0} for i in range(24)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sections["data"] = {"sources": [str(rows)]}
    sections["objective"] = {"name": objective}
    one = train(make_recipe("one", **sections))
    recipe = make_recipe("two", **sections)
    launch(recipe, tmp_path)
    two = Path(recipe.output)
    for name, tensor in load_file(one.path / "adapter/adapter_model.safetensors").items():
        assert_close(load_file(two / "adapter/adapter_model.safetensors")[name], tensor, rtol=1e-3, atol=1e-5)
    ours, theirs = ([json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (one.path, two))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "lists_per_second", "completion_tokens_per_second"}:
            assert b[key] == pytest.approx(a[key], abs=1e-5, rel=1e-5), key
