"""Checkpoints as folders: which is gone on with, and which are dropped when."""

import shutil
from pathlib import Path

import pytest
from harm import HARMS

from align.errors import UserError
from align.manifest import Damaged, check, seal
from align.runs.checkpoints import Checkpoints, numbered, step_of


@pytest.fixture
def metrics(tmp_path) -> Path:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    return file


def of(metrics: Path, recipe: str = "r") -> Checkpoints:
    return Checkpoints(metrics.with_name("checkpoints"), metrics, lambda: {"recipe": recipe})


def write(checkpoints: Checkpoints, *steps: int, keep: int = 9) -> None:
    """Checkpoints of two files, one of them in a folder, as the parts of several processes are."""
    for step in steps:
        folder = checkpoints.begin(step)
        (folder / "optimizer").mkdir(parents=True)
        (folder / "policy.safetensors").write_text(f"weights of step {step}")
        (folder / "optimizer" / "__0_0.distcp").write_text(f"moments of step {step}")
        checkpoints.end(folder, keep=keep)


def steps(checkpoints: Checkpoints) -> list[int]:
    return [step_of(one) for one in numbered(checkpoints.folder)]


@pytest.mark.parametrize("harm", [name for name in HARMS if name != "unreadable"])
@pytest.mark.parametrize("file", ["policy.safetensors", "optimizer/__0_0.distcp", "metrics.jsonl", "manifest.json"])
def test_the_newest_that_is_whole_is_taken_and_what_is_passed_over_named(metrics, caplog, harm, file):
    write(of(metrics), 2, 4, 6)
    folder = of(metrics).folder
    HARMS[harm](folder / "checkpoint-6" / file)
    assert of(metrics).newest() == folder / "checkpoint-4"
    assert f"{folder}/checkpoint-6 is passed over: {folder}/checkpoint-6/{file}" in caplog.text
    assert [step_of(one) for one in of(metrics).whole()] == [2, 4]


@pytest.mark.parametrize("place", [i / 40 for i in range(41)])
def test_a_flipped_bit_anywhere_in_a_manifest_is_found(metrics, place):
    write(of(metrics), 2)
    manifest = of(metrics).folder / "checkpoint-2" / "manifest.json"
    HARMS["flipped"](manifest, place)
    with pytest.raises(Damaged, match="manifest.json"):
        check(manifest.parent)


def test_damaged_ones_are_dropped_and_never_the_last_that_is_whole(metrics):
    """With one kept, and a damaged checkpoint of a later step than the run has come to again."""
    write(of(metrics), 2, 4, 6)
    HARMS["flipped"](of(metrics).folder / "checkpoint-6" / "policy.safetensors")
    resumed = of(metrics)
    assert step_of(resumed.newest()) == 4
    write(resumed, 5, keep=1)
    assert steps(resumed) == [5] and step_of(of(metrics).newest()) == 5
    write(resumed, 6, 8, 10, keep=2)
    assert steps(resumed) == [8, 10]


def test_what_a_kill_kept_from_being_dropped_is_dropped_when_the_run_goes_on(metrics):
    """It came when the newest was on the disk; no later checkpoint need follow."""
    write(of(metrics), 2, 4, 6)
    resumed = of(metrics)
    resumed.drop_older(resumed.newest(), keep=2)
    assert steps(resumed) == [4, 6]
    HARMS["flipped"](of(metrics).folder / "checkpoint-6" / "policy.safetensors")
    resumed = of(metrics)
    resumed.drop_older(resumed.newest(), keep=1)
    assert steps(resumed) == [4, 6], "what is passed over stays until there is a newer one"


def test_a_checkpoint_under_another_name_or_of_another_run_is_not_gone_on_with(metrics, caplog):
    write(of(metrics), 2)
    folder = of(metrics).folder
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-7")
    assert of(metrics).newest() == folder / "checkpoint-2"
    assert "checkpoint-7 is passed over: it is a copy of checkpoint-2" in caplog.text
    with pytest.raises(UserError, match=r"checkpoint-2: a checkpoint of another run \(of other recipe\); move it away"):
        of(metrics, "another").newest()


def test_a_new_checkpoint_has_nothing_of_an_older_one_of_its_name(metrics):
    write(of(metrics), 2)
    (of(metrics).folder / "checkpoint-2" / "rng_state_7.pth").write_text("of an eighth process")
    write(of(metrics), 2)
    assert not (of(metrics).folder / "checkpoint-2" / "rng_state_7.pth").exists()


def test_files_that_nobody_else_may_read_get_the_folders_mode(tmp_path):
    (tmp_path / "a").mkdir(mode=0o750)
    (tmp_path / "a" / "weights").write_text("")
    (tmp_path / "a" / "weights").chmod(0o600)
    seal(tmp_path / "a")
    assert (tmp_path / "a" / "weights").stat().st_mode & 0o777 == 0o640
