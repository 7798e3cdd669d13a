"""`python tests/trl/run_trl_scripts.py CHECKOUT [--float32]`: TRL's public scripts as they are and with our import.

CHECKOUT is a checkout of github.com/huggingface/trl. Every script runs four steps, full and with LoRA, in processes of
its own: as it stands, and as a copy in which `from trl import DPOTrainer` and the like say `align.trl`. The table says
how far the losses and gradient norms of the two are apart. Some scripts leave a model in the bfloat16 of its files,
whatever --dtype says; with --float32 the files are float32.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = 4
COMMON = (
    *("--use_cpu", "--bf16", "False", "--report_to", "none", "--max_steps", str(STEPS), "--logging_steps", "1"),
    *("--save_steps", str(STEPS), "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"),
    *("--eval_strategy", "steps", "--eval_steps", "2", "--dtype", "float32"),
)
LORA = ("--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj")
MODEL = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"
PAIRS, MARKED = "zen/standard_preference", "zen/standard_unpaired_preference"
TALKS = "zen/conversational_preference"
# Left out are scripts with images (dpo_vlm.py, mpo_vlm.py), whose rows are refused by name.
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "trl/scripts/dpo.py": (PAIRS, ()),
    "trl/scripts/kto.py": (MARKED, ()),
    "trl/scripts/reward.py": ("zen/standard_implicit_prompt_preference", ("--lora_task_type", "SEQ_CLS")),
    "examples/scripts/kto.py": (MARKED, ()),
    "examples/scripts/reward_modeling.py": (TALKS, ("--lora_task_type", "SEQ_CLS")),
    "examples/scripts/cpo.py": (TALKS, ("--no_remove_unused_columns",)),
    "examples/scripts/orpo.py": (TALKS, ("--no_remove_unused_columns",)),
}
"""Data set and what its command says besides."""
SEEDED = "import torch; torch.manual_seed(0)\n"
"""A reward model's head is made before a trainer sets the seed."""
OURS = re.compile(r"(?:DPO|KTO|Reward|CPO|ORPO)(?:Config|Trainer)")
IMPORT = re.compile(r"^( *)from (trl(?:\.experimental\.\w+)?) import (\([^)]*\)|.*)$", re.MULTILINE)


def with_our_import(source: str) -> str:
    """A script whose imports of our trainers and configurations say `align.trl`; nothing else is changed."""

    def split(found: re.Match[str]) -> str:
        indent, module, names = found.groups()
        each = [name.strip() for name in names.strip("()").split(",") if name.strip()]
        lines = {
            "align.trl": [name for name in each if OURS.fullmatch(name)],
            module: [name for name in each if not OURS.fullmatch(name)],
        }
        return "\n".join(f"{indent}from {room} import {', '.join(kept)}" for room, kept in lines.items() if kept)

    return IMPORT.sub(split, source)


def run(source: str, arguments: Sequence[str], folder: Path) -> list[dict[str, Any]] | str:
    """A script's log, or the last line of what it said when it failed."""
    folder.mkdir(parents=True)
    script = folder / "script.py"
    script.write_text(SEEDED + source, encoding="utf-8")
    command = [sys.executable, str(script), *arguments, "--output_dir", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return ([line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exit)", line)] or ["killed"])[-1]
    state = json.loads((folder / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text(encoding="utf-8"))
    return [line for line in state["log_history"] if "loss" in line or "eval_loss" in line]


def apart(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> float:
    """Largest difference of losses and gradient norms, in parts of 1 or of the figure, whichever is larger.

    Raises:
        ValueError: they are not of the same steps.
    """
    names = ("loss", "grad_norm", "eval_loss", "learning_rate")
    both = [
        (a[name], b[name]) for a, b in zip(theirs, ours, strict=True) for name in names if (name in a) or (name in b)
    ]
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in both)


def main() -> None:
    """Build what the scripts load, run them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--float32", action="store_true", help="from files of float32")
    parser.add_argument("--only", default="", help="a regular expression that a script's path has")
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "align-trl-lookalikes")
    arguments = parser.parse_args()
    os.environ |= {"HF_HOME": str(arguments.home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in (path for path in SCRIPTS if re.search(arguments.only, path)):
            for adapter, more in (("full", ()), ("LoRA", LORA)):
                name = f"{path}, {adapter}"
                table[name] = _both(arguments, path, more, Path(folder, f"{Path(path).stem}{len(table)}"))
                print(f"{name}: {table[name]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


def _both(arguments: argparse.Namespace, path: str, more: Sequence[str], folder: Path) -> str:
    import lookalikes

    lookalikes.build(arguments.checkout, arguments.home, {MODEL})
    rows, own = SCRIPTS[path]
    model = _in_float32(arguments.home) if arguments.float32 else MODEL
    given = ["--model_name_or_path", model, "--dataset_name", str(arguments.home / "sets/trl-internal-testing" / rows)]
    source = (arguments.checkout / path).read_text(encoding="utf-8")
    given += [*COMMON, *more, *(own if more or "--lora_task_type" not in own else ())]
    theirs, ours = (run(s, given, folder / n) for n, s in (("trl", source), ("align", with_our_import(source))))
    if isinstance(theirs, str):
        return f"TRL's own fails ({theirs}); ours: {ours if isinstance(ours, str) else 'ran'}"
    return ours if isinstance(ours, str) else f"ran, {apart(theirs, ours):.1e} apart"


def _in_float32(home: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = home / "float32" / MODEL
    if not folder.exists():
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
