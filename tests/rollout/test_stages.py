"""The stages of an iteration: done once, and again where what they wrote is missing or damaged."""

import json
from pathlib import Path

import pytest
from harm import HARMS

from align.rollout.sample import Stages


def run(folder: Path) -> list[str]:
    """Both stages where they are not done; the names of those that ran."""
    ran = []

    def write(name: str, file: str) -> dict:
        ran.append(name)
        (folder / file).write_text(json.dumps({"id": name}) + "\n")
        return {"rows": 1}

    stages = Stages(folder)
    stages.check()
    for name, file in (("sample", "sampled.jsonl"), ("score", "rows.jsonl")):
        if "score" not in stages.read():
            stages.do(name, lambda name=name, file=file: write(name, file))
    return ran


@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "flipped"])
@pytest.mark.parametrize(
    ("damaged", "ran"),
    [(["rows.jsonl"], ["score"]), (["sampled.jsonl"], []), (["rows.jsonl", "sampled.jsonl"], ["sample", "score"])],
)
def test_a_damaged_file_of_a_stage_is_said_and_made_again(tmp_path, caplog, harm, damaged, ran):
    assert run(tmp_path) == ["sample", "score"] and run(tmp_path) == []
    for file in damaged:
        HARMS[harm](tmp_path / file)
    assert run(tmp_path) == ran
    assert [f"{tmp_path / file}: missing or damaged" in caplog.text for file in damaged] == [bool(ran)] * len(damaged)
    assert run(tmp_path) == []
