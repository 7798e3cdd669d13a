"""One of two processes is killed, or all: nothing is left running, and the same command ends with the same adapter."""

import random
import time
from pathlib import Path

import psutil
import pytest
from table import case

from align.recipe import dump_recipe
from align.runs.checkpoints import numbered


def written(recipe, folder: Path) -> str:
    path = folder / f"{Path(recipe.output).name}.yaml"
    path.write_text(dump_recipe(recipe))
    return str(path)


def adapter(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "adapter").iterdir())}


@pytest.mark.long
@pytest.mark.parametrize("whom", ["0", "1", "all"])
@pytest.mark.parametrize("seed", range(2))
def test_the_same_command_goes_on(make_recipe, start_each, tmp_path, record_property, whom, seed):
    train = {"epochs": 4, "save_steps": 1, "keep_checkpoints": 2}
    whole, killed = (make_recipe(name, train=train, sampling={"prompts": 0}) for name in ("whole", "killed"))
    start_each("align.cli", "train", written(whole, tmp_path)).finish()
    running = start_each("align.cli", "train", written(killed, tmp_path))
    run, draw = Path(killed.output), random.Random(seed)
    while len(numbered(run / "checkpoints")) < 2:
        assert running.process.poll() is None, running.said()
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.5))
    launcher = psutil.Process(running.process.pid)
    children = launcher.children(recursive=True)
    ranks = {one.environ().get("RANK"): one for one in children}
    for one in (*ranks.values(), launcher) if whom == "all" else [ranks[whom]]:
        one.kill()
    assert running.process.wait(timeout=120) != 0
    _, alive = psutil.wait_procs(children, timeout=60)
    again = start_each("align.cli", "train", written(killed, tmp_path))
    code = again.process.wait(timeout=1200)
    same = code == 0 and adapter(run) == adapter(Path(whole.output))
    wrong = f"left running: {alive}" if alive else "" if same else f"lost: {again.said()}"
    record_property(*case(f"train, two processes, {whom} killed, seed {seed}", code=code, wrong=wrong))
    assert not wrong
