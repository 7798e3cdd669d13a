"""Checkpoints of scripts for TRL: gone on with when they are whole, named when not, kept until a newer one is."""

import json
import os
import shutil
from pathlib import Path

import pytest
from harm import HARMS
from peft import LoraConfig
from same_script import pairs, trainer

from align.errors import UserError
from align.manifest import check
from align.runs.checkpoints import numbered

PROJECTIONS = ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


def options(folder: Path, **more) -> dict:
    base = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 2}
    return base | more


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=PROJECTIONS)


def adapters(folder: Path) -> bytes:
    return (folder / "checkpoint-3" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def begun(tiny_policy, tmp_path):
    """Starts a trainer of two steps that were done, in a folder of its own."""

    def make(name: str, kind: str = "align.trl", **more):
        given = {"train_dataset": pairs(8), "peft_config": lora()}
        return trainer(kind, "DPO", tmp_path, str(tiny_policy), options(tmp_path / name, **more), **given)

    make("run").train()
    return make


def test_the_newest_that_is_whole_is_gone_on_with_and_the_rest_named(begun, tmp_path, caplog):
    run = tmp_path / "run"
    assert [one.name for one in numbered(run)] == ["checkpoint-2", "checkpoint-3"]
    whole = adapters(run)
    for harm in ("missing", "truncated", "flipped"):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"):
            shutil.copytree(run, tmp_path / f"{harm}-{name}")
            HARMS[harm](tmp_path / f"{harm}-{name}" / "checkpoint-3" / name)
    place = tmp_path / "missing-optimizer.pt"
    begun(place.name).train(resume_from_checkpoint=True)
    assert f"{place}/checkpoint-3 is passed over: {place}/checkpoint-3/optimizer.pt is missing" in caplog.text
    assert adapters(place) == whole and check(place / "checkpoint-3") == {}
    for place in tmp_path.glob("*-*"):
        if place.name != "missing-optimizer.pt":
            with pytest.raises(UserError, match=rf"checkpoint-3/{place.name.partition('-')[2]}\b.*older checkpoint"):
                begun(place.name).train(resume_from_checkpoint=str(place / "checkpoint-3"))


def test_where_none_is_whole_nothing_is_trained_anew_in_silence(begun, tmp_path):
    for checkpoint in numbered(tmp_path / "run"):
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(UserError, match="scheduler.pt is missing; no checkpoint .* is whole"):
        begun("run").train(resume_from_checkpoint=True)


def test_checkpoints_of_trl_have_no_manifest_and_are_gone_on_with(begun, tmp_path):
    begun("theirs", "trl").train()
    newest = tmp_path / "theirs" / "checkpoint-3"
    assert not (newest / "manifest.json").exists()
    begun("theirs", max_steps=5).train(resume_from_checkpoint=True)
    ours = newest.with_name("checkpoint-5")
    check(ours)
    (ours / "manifest.json").unlink()
    with pytest.raises(UserError, match="checkpoint-5/manifest.json is missing"):
        begun("theirs", max_steps=6).train(resume_from_checkpoint=str(ours))


def test_files_have_the_umasks_mode_and_configs_one_order(begun, tmp_path):
    newest = tmp_path / "run" / "checkpoint-3"
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in newest.iterdir()} == {0o666 & ~umask}
    targets = json.loads((newest / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) == 7
