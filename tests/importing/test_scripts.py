"""Shell scripts and Python scripts are read, and nothing of them is run."""

import pytest

from align.errors import UserError
from align.importing.run import plan_of

SHELL = """
# a comment
nproc_per_node=2
STEPS=$((4 * 2))
CUDA_VISIBLE_DEVICES=0,1 \\
NPROC_PER_NODE=$nproc_per_node \\
swift rlhf \\
    --rlhf_type dpo \\
    --model org/model \\
    --dataset 'org/rows#100' \\
    --loss_type sigmoid sft \\
    --loss_weights 1.0 0.5 \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\
    --save_steps $STEPS
"""
UNSLOTH = """
import os
from unsloth import FastLanguageModel
from trl import DPOConfig, DPOTrainer
from datasets import load_dataset
open({marker!r}, "w")
length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(model_name="org/model", max_seq_length=length, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=32, target_modules=["q_proj"], bias="none")
rows = load_dataset("org/rows", "en", split="train")
rows = rows.map(lambda row: row)
trainer = DPOTrainer(
    model=model,
    ref_model=None,
    args=DPOConfig(learning_rate=5e-6, per_device_train_batch_size=2, gradient_accumulation_steps=4, output_dir="out"),
    beta=0.2,
    train_dataset=rows,
    tokenizer=tokenizer,
    max_length=length // 2,
)
trainer.train()
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def written(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return written


def test_a_shell_command_is_read_with_its_variables(write):
    tree = plan_of(write("run.sh", SHELL)).tree
    assert tree["train.lists_per_step"] == 2 * 8 * 2 and tree["train.save_steps"] == 8
    assert tree["objective"] == [{"name": "logistic"}, {"name": "sft", "weight": 0.5}]
    assert tree["data.limit"] == 100


SHELL_MISTAKES = [
    ((" $STEPS", " $(cat steps)"), "is computed by the shell"),
    (("swift rlhf", "echo"), "no training command"),
    (("# a comment", "swift rlhf --model m"), "2 training commands"),
    (("swift rlhf", "megatron rlhf"), "Megatron"),
]


@pytest.mark.parametrize(("change", "problem"), SHELL_MISTAKES)
def test_a_shell_script_that_cannot_be_read_says_why(write, change, problem):
    with pytest.raises(UserError, match=problem):
        plan_of(write("run.sh", SHELL.replace(*change)))


def test_a_script_is_read_and_never_run(write, tmp_path):
    marker = tmp_path / "was_run"
    plan = plan_of(write("train.py", UNSLOTH.format(marker=str(marker))))
    assert not marker.exists()
    tree = plan.tree
    assert plan.tool == "Unsloth" and tree["policy.model"] == "org/model" and tree["policy.quantization"] == "4bit"
    assert tree["policy.adapter"] == {"name": "lora", "rank": 64, "alpha": 32, "targets": ["q_proj"]}
    assert tree["data.sources"] == [{"path": "org/rows", "split": "train", "config": "en"}]
    assert tree["score"]["beta"] == 0.2 and tree["data.max_length"] == 1024 and tree["train.lists_per_step"] == 8
    assert any("data.sources" in line.ours and ".map()" in line.why and line.differs for line in plan.lines)


SCRIPT_MISTAKES = [
    (("learning_rate=5e-6", "learning_rate=float(os.environ['LR'])"), "only known when the script runs"),
    (("learning_rate=5e-6", "**settings"), "is not read"),
    (("DPOTrainer(\n", "GRPOTrainer(\n"), "trains by `grpo`"),
    (("trainer = DPOTrainer(\n", "trainer = Other(\n"), "calls none of TRL's trainers"),
    (("learning_rate=5e-6", "learning_rte=5e-6"), "`learning_rte` is no key"),
]


@pytest.mark.parametrize(("change", "problem"), SCRIPT_MISTAKES)
def test_a_script_that_cannot_be_read_says_why(write, change, problem):
    text = UNSLOTH.format(marker="x")
    assert change[0] in text
    with pytest.raises(UserError, match=problem):
        plan_of(write("train.py", text.replace(*change)))


@pytest.mark.parametrize(("asked", "on"), [('"unsloth"', True), ("True", True), ("False", False), ("None", False)])
def test_unsloths_word_for_recomputation_is_taken_and_said_once(write, asked, on):
    text = UNSLOTH.format(marker="m").replace('bias="none"', f'bias="none", use_gradient_checkpointing={asked}')
    plan = plan_of(write("dpo.py", text))
    assert plan.tree["train.gradient_checkpointing"] is on
    said = [line for line in plan.lines if any("gradient_checkpointing" in key for key in line.names)]
    assert [(line.names, line.verdict) for line in said] == [(("use_gradient_checkpointing",), "kept")]


def test_a_script_that_parses_a_command_line_says_what_to_give(write):
    text = (
        "from trl import DPOConfig, DPOTrainer, TrlParser\n"
        "args, = TrlParser((DPOConfig,)).parse_args_and_config()\n"
        "DPOTrainer('m', args=args)\n"
    )
    with pytest.raises(UserError, match="takes its settings from the command line"):
        plan_of(write("dpo.py", text))


FUNCTIONS = """
import argparse
import settings as chosen
from settings import BASE
from peft import LoraConfig, PeftModel, TaskType
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from datasets import load_dataset

def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("-l", "--learning-rate", type=float, default=2e-6)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--rows")
    return parser.parse_args()

def settings_of(folder: str, batch: int, epochs: int = 2, accumulate=4) -> DPOConfig:
    return DPOConfig(
        output_dir=f"{folder}/dpo",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs,
        learning_rate=args.learning_rate,
        beta=args.beta,
        bf16=torch.cuda.is_bf16_supported(),
        fp16=not torch.cuda.is_bf16_supported(),
        max_length=chosen.LENGTH if chosen.LONG else 256,
    )

args = options()
table = {"r": 8, "alpha": 2 * 8}
model = AutoModelForCausalLM.from_pretrained(BASE)
lora = LoraConfig(r=table["r"], lora_alpha=table["alpha"], task_type=TaskType.CAUSAL_LM)
trainer = DPOTrainer(
    model=model,
    args=settings_of("runs", batch=3),
    train_dataset=load_dataset("org/rows", split="train"),
    peft_config=lora,
)
"""
SETTINGS = 'BASE = "org/model"\nLENGTH = 2 * 512\nLONG = True\n'


def test_a_script_is_read_through_its_functions_options_and_the_files_beside_it(write):
    write("settings.py", SETTINGS)
    plan = plan_of(write("old.py", FUNCTIONS))
    tree = plan.tree
    assert tree["policy.model"] == "org/model" and tree["output"] == "runs/dpo"
    assert tree["train.lists_per_step"] == 3 * 4 and tree["train.epochs"] == 2
    assert tree["train.learning_rate"] == 2e-6 and tree["data.max_length"] == 1024
    assert tree["score"]["beta"] == 0.3
    assert tree["policy.adapter"]["rank"] == 8 and tree["policy.adapter"]["alpha"] == 16
    assert "--beta, --learning_rate" in plan.comments["task"]


UNKNOWN = [
    (("default=0.3", "required=True"), "beta=args.beta"),
    (('BASE = "org/model"', "BASE = pick()"), "is only known when the script runs|names no model"),
    (("LONG = True", "LONG = ask()"), "max_length"),
    (('settings_of("runs", batch=3)', 'settings_of("runs", batch=n)'), "per_device_train_batch_size"),
    (
        ('settings_of("runs", batch=3)', 'settings_of("runs", batch=3), callbacks=[settings_of("other", batch=5)]'),
        "output_dir",
    ),
]


@pytest.mark.parametrize(("change", "problem"), UNKNOWN)
def test_what_only_running_could_tell_stops(write, change, problem):
    write("settings.py", SETTINGS.replace(*change))
    with pytest.raises(UserError, match=problem):
        plan_of(write("old.py", FUNCTIONS.replace(*change)))


def test_an_adapter_on_a_base_goes_on(write):
    first, rest = UNSLOTH.replace("{marker!r}", "'x'").split("model, tokenizer = ")
    lines = rest.split("\n", 2)
    assert lines[1].startswith("model = ")
    made = ['base = AutoModelForCausalLM.from_pretrained("org/model")']
    made.append('model = PeftModel.from_pretrained(base, "runs/sft", is_trainable=True)')
    tree = plan_of(write("old.py", first + "\n".join([*made, lines[2]]))).tree
    assert tree["policy.start_adapter"] == "runs/sft" and tree["policy.model"] == "org/model"


def test_files_that_import_each_other_are_read(write):
    write("settings.py", "import old\n" + SETTINGS)
    assert plan_of(write("old.py", FUNCTIONS)).tree["policy.model"] == "org/model"
