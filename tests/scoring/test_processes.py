"""Two processes give what one gives, through the command that a user would type."""

import json
import random
from pathlib import Path

import pytest
from tiny_models import letters, llama, saved
from transformers import LlamaForSequenceClassification

from align.scoring import score_rows


@pytest.mark.slow
def test_two_gloo_processes_equal_one(start_two, tmp_path):
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
    options = ["--reward", classifier, "--window", "20", "--no-cache", "--on-error", "collect"]
    start_two("score", str(path), str(two), *options).finish()
    for ending in ("", ".errors.jsonl"):
        assert Path(f"{two}{ending}").read_bytes() == Path(f"{one}{ending}").read_bytes()
    summaries = [json.loads(Path(f"{output}.summary.json").read_text()) for output in (one, two)]
    for name in ("rows", "errors", "completions", "scored", "tokens", "truncated"):
        assert summaries[1][name] == summaries[0][name], name
