"""No power cut leaves a checkpoint, a preparation or an export that is taken for whole and is not."""

from pathlib import Path

import pytest
from power_cut import PowerCut

from align.manifest import Damaged, check
from align.runs.checkpoints import Checkpoints, numbered
from align.runs.run_directory import RunDirectory
from align.training.train import train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except Damaged:
        return False
    return True


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_checkpoint_that_verifies_is_as_it_was_written(make_recipe, tmp_path, monkeypatch, every):
    """And once there is one, there is always one: an older is dropped when the newer is on the disk."""
    written: dict[str, dict[str, bytes]] = {}
    states = {"whole": 0, "none": 0}
    end = Checkpoints.end

    def ended(self, checkpoint, *, keep):
        end(self, checkpoint, keep=keep)
        written[checkpoint.name] = contents(checkpoint)

    def look(state: str, folder: Path) -> None:
        run = folder / "run"
        whole = [one for one in numbered(run / "checkpoints") if is_whole(one)]
        states["whole" if whole else "none"] += 1
        assert whole or not written, f"{state}: the last checkpoint is gone"
        for one in whole:
            assert contents(one) == written.get(one.name, contents(recorded.root / "run/checkpoints" / one.name)), state
        digests = RunDirectory(run).digests
        if (run / "summary.json").exists() and not digests.problem(["summary.json"]):
            assert not digests.problem(), f"{state}: taken for finished"

    monkeypatch.setattr(Checkpoints, "end", ended)
    settings = {"steps": 3, "save_steps": 1, "keep_checkpoints": 1, "eval_steps": 1, "keep_best": "loss"}
    (tmp_path / "disk").mkdir()
    recipe = make_recipe("disk/run", train=settings, sampling={"prompts": 0, "token_lists": 0})
    with PowerCut(tmp_path / "disk", tmp_path / "state", look, every=every) as recorded:
        train(recipe)
    assert states["whole"] and states["none"] and len(written) == 3 and recorded.moments > 100
