"""DeepSpeed's ZeRO gives what one process gives, started as a user would start it."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from equal_runs import assert_equal_runs

from align.errors import UserError
from align.training.train import train
from align.training.zero import check_world

ROOT = Path(__file__).parents[2]
CUT = ("lambda", "kto", "treg", "reward", "full", "best", "parts", "parts_reward")
ON_CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}


ALL_CUT = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 100,
        "reduce_bucket_size": 1000,
    },
    "zero_allow_untested_optimizer": True,
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
}
"""ZeRO-3 as it is for weights that matter: else it leaves these small ones whole on every process."""


def configuration(stage: int, folder: Path) -> str:
    """The shipped configuration, where stage 3 cuts the smallest weights too."""
    shipped = ROOT / f"recipes/accelerate/zero{stage}.yaml"
    if stage == 2:
        return str(shipped)
    (folder / "all_cut.json").write_text(json.dumps(ALL_CUT))
    keys = yaml.safe_load(shipped.read_text())
    keys["deepspeed_config"] = {"deepspeed_config_file": str(folder / "all_cut.json"), "zero3_init_flag": False}
    del keys["mixed_precision"]  # which accelerate takes from one of the two files
    (folder / "all_cut.yaml").write_text(yaml.safe_dump(keys))
    return str(folder / "all_cut.yaml")


@pytest.mark.deepspeed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(make_setting, start_each, tmp_path, stage):
    """And goes on from its own checkpoint."""
    made = {name: make_setting(f"zero{stage}_{name}", name) for name in CUT}
    paths = [path for _, path in made.values()]
    running = start_each(
        "train_each", *paths, f"{made['lambda'][1]}@2", config=configuration(stage, tmp_path), **ON_CPU
    )
    ones = {name: train(make_setting(f"one_{name}", name)[0]).path for name in CUT}
    running.finish()
    for name, (recipe, _) in made.items():
        assert_equal_runs(ones[name], Path(recipe.output))


def test_another_number_of_processes_is_refused_under_deepspeed(tmp_path):
    for rank in range(2):
        file = tmp_path / f"checkpoint-4/global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    check_world(tmp_path / "checkpoint-4", 2)
    with pytest.raises(UserError, match="2 processes wrote it under DeepSpeed, which goes on in as many only"):
        check_world(tmp_path / "checkpoint-4", 3)
    with pytest.raises(UserError, match="not written under DeepSpeed"):
        check_world(tmp_path / "checkpoint-2", 2)
