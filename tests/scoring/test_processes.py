"""Two processes give what one gives, through the command that a user would type."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import letters, llama, saved
from transformers import LlamaForSequenceClassification

from align.scoring import score_rows


@pytest.mark.slow
def test_two_gloo_processes_equal_one(tmp_path):
    draw = random.Random(0)
    rows = [
        {"prompt": " ".join(draw.choices("abc", k=1 + i % 7)) + " ", "completions": ["d " * (1 + i % 5), "e", "e f"]}
        for i in range(50)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    classifier = saved(tmp_path / "rm", LlamaForSequenceClassification(llama(pad_token_id=0)), letters())
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    score_rows(str(path), str(one), rewards=[classifier], window=20, on_error="collect", use_cache=False)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", str(port)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    score = ["-m", "align.cli", "score", str(path), str(two), "--reward", classifier, "--window", "20", "--no-cache"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *score, "--on-error", "collect"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # --cpu itself starts one process only
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for ending in ("", ".errors.jsonl"):
        assert Path(f"{two}{ending}").read_bytes() == Path(f"{one}{ending}").read_bytes()
    summaries = [json.loads(Path(f"{output}.summary.json").read_text()) for output in (one, two)]
    for name in ("rows", "errors", "completions", "scored", "tokens", "truncated"):
        assert summaries[1][name] == summaries[0][name], name
