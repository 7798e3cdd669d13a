"""What is given to a trainer besides data: collators, metrics, optimizers, cards, subclasses, older arguments."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig
from same_script import assert_same_lines, log_histories, pairs, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import align.trl
from align.errors import UserError
from align.trl.overrides import NEVER_CALLED
from align.trl.replace import ROOMS
from align.trl.rows import DataCollatorForPreference

NAMES = tuple(ROOMS)
FEW = {"max_steps": 3, "learning_rate": 1e-3}
EVALUATED = FEW | {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def tokenizer_of(tiny_policy):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def same(name, tiny_policy, tmp_path, options, **given) -> list[dict]:
    given = {"train_dataset": pairs(12), "processing_class": tokenizer_of(tiny_policy)} | given
    theirs, ours = log_histories(
        name, tmp_path, str(tiny_policy), options, packages=(ROOMS[name], "align.trl"), **given
    )
    assert_same_lines(theirs, ours, without=("logits/", "seen") if name in ("CPO", "ORPO") else ())
    return ours


def made(name, tiny_policy, tmp_path, options=None, cls=None, **given):
    given = {"train_dataset": pairs(9), "processing_class": tokenizer_of(tiny_policy)} | given
    module, own = import_module("align.trl"), f"{name}Trainer"
    if cls is None:
        return trainer("align.trl", name, tmp_path, str(tiny_policy), options or {}, **given)
    before, _ = getattr(module, own), setattr(module, own, cls)
    try:
        return trainer("align.trl", name, tmp_path, str(tiny_policy), options or {}, **given)
    finally:
        setattr(module, own, before)


class LeftPadded(DataCollatorForPreference):
    """A collator of someone else's: padding on the left, columns that nobody asked for, another width."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        turned = {name: torch.zeros_like(values) for name, values in batch.items()}
        for row, seen in enumerate(batch["attention_mask"].bool()):
            for name, values in batch.items():
                turned[name][row, len(seen) - int(seen.sum()) :] = values[row][seen]
        wider = {name: torch.nn.functional.pad(values, (3, 0)) for name, values in turned.items()}
        return wider | {"mine": torch.ones(1)}


def test_a_foreign_collators_rows_are_found_whichever_way_they_are_padded(tiny_policy, tmp_path):
    collators = (None, LeftPadded(0))
    logs = []
    for collator in collators:
        one = made("DPO", tiny_policy, tmp_path, FEW, data_collator=collator, peft_config=lora())
        one.train()
        logs.append(one.state.log_history)
    assert_same_lines(*logs, without=("total_flos",))  # which transformers counts with the padding


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("DPO", "attention_mask"), ("KTO", "attention_mask"), ("Reward", "input_ids"), ("CPO", "chosen_attention_mask")],
)
def test_a_collator_of_another_trainers_is_answered(tiny_policy, tmp_path, name, lacks):
    def collate(rows):
        return {"chosen_input_ids" if name == "CPO" else "some_ids": torch.ones(len(rows), 3, dtype=torch.long)}

    one = made(name, tiny_policy, tmp_path, FEW | {"remove_unused_columns": False}, data_collator=collate)
    with pytest.raises(UserError, match="data_collator: a batch has no '.*', only "):
        one.train()


def seen(prediction) -> dict[str, float]:
    logits = np.asarray(prediction.predictions, dtype=np.float64)
    return {"seen": float(np.abs(logits[logits != -100]).mean()), "width": float(logits.shape[-1])}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_ones_own_get_what_trl_gives_them(tiny_policy, tmp_path, name):
    given = {"eval_dataset": pairs(6, seed=1), "compute_metrics": lambda: seen}
    ours = same(name, tiny_policy, tmp_path, EVALUATED, **given)
    assert any("eval_seen" in line for line in ours)


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward"])
def test_several_sets_are_evaluated_by_name(tiny_policy, tmp_path, name):
    sets = {"one": pairs(6, seed=1), "two": pairs(3, seed=2)}
    ours = same(name, tiny_policy, tmp_path, EVALUATED, eval_dataset=lambda: dict(sets))
    for key in sets:
        assert any(f"eval_{key}_loss" in line for line in ours)


def test_an_optimizer_and_a_schedule_of_ones_own(tiny_policy, tmp_path):
    logs = []
    for package in ("trl", "align.trl"):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        given = {"processing_class": tokenizer_of(tiny_policy), "optimizers": (optimizer, schedule)}
        one = trainer(package, "DPO", tmp_path, model, {"max_steps": 6}, train_dataset=pairs(22), **given)
        one.train()
        logs.append(one.state.log_history)
    assert_same_lines(*logs)
    assert [line["learning_rate"] for line in logs[1] if "loss" in line][:4] == [0.03, 0.03, 0.015, 0.015]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_was_trained(tiny_policy, tmp_path, name):
    one = made(name, tiny_policy, tmp_path, FEW | {"save_strategy": "steps", "save_steps": 3})
    one.train()
    card = (Path(one.args.output_dir) / "README.md").read_text()
    tag = "reward-trainer" if name == "Reward" else name.lower()
    assert f"- {tag}\n" in card and f"with {one._name} (" in card
    one.create_model_card(model_name="mine", dataset_name="some/rows", tags="own")
    card = (Path(one.args.output_dir) / "README.md").read_text()
    for text in ("# mine", "some/rows", "- own\n", "- align\n", "model_name: mine"):
        assert text in card


def test_pushing_offline_is_said_at_once(tiny_policy, tmp_path):
    with pytest.raises(OfflineModeIsEnabled, match="offline mode is enabled"):
        made("DPO", tiny_policy, tmp_path, {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": "x"})


def test_pushing_writes_the_card_and_the_model(tiny_policy, tmp_path, monkeypatch):
    sent = {}
    api = SimpleNamespace(upload_folder=lambda **given: sent.update(given))
    monkeypatch.setattr(import_module("transformers.trainer"), "hf_api", lambda: api)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/mine"))
    one = made("DPO", tiny_policy, tmp_path, {"hub_model_id": "me/mine"}, peft_config=lora())
    one.push_to_hub(dataset_name="some/rows")
    assert sent["repo_id"] == "me/mine"
    folder = Path(sent["folder_path"])
    assert "some/rows" in (folder / "README.md").read_text() and (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_trls_is_called_here_or_refused_in_a_subclass(name):
    """A release of TRL that brings a new method shows here."""

    def methods(cls):
        return {m for c in cls.__mro__[: cls.__mro__.index(Trainer)] for m in vars(c) if not m.startswith("__")}

    theirs = getattr(import_module(ROOMS[name]), f"{name}Trainer")
    called = methods(getattr(align.trl, f"{name}Trainer")) | set(dir(Trainer))
    data = {m for m in methods(theirs) if not callable(getattr(theirs, m))}
    assert methods(theirs) - data - called - NEVER_CALLED == {"_send_telemetry"}  # which nothing here does


@pytest.mark.parametrize("name", NAMES)
def test_what_is_never_called_is_refused_by_name(tiny_policy, tmp_path, name):
    base = getattr(align.trl, f"{name}Trainer")
    for method in sorted(NEVER_CALLED):
        cls = type("Old", (base,), {method: lambda self, *_: None, "__module__": "mine"})
        with pytest.raises(UserError, match=rf"^Old\.{method} would never be called: {name}Trainer takes"):
            made(name, tiny_policy, tmp_path, cls=cls)


def test_training_step_is_called_for_every_micro_batch(tiny_policy, tmp_path):
    class Timed(align.trl.DPOTrainer):
        calls = 0

        def training_step(self, *given, **named):
            Timed.calls += 1
            return super().training_step(*given, **named)

    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "per_device_train_batch_size": 2}
    timed = made("DPO", tiny_policy, tmp_path, options, cls=Timed, peft_config=lora())
    timed.train()
    plain = made("DPO", tiny_policy, tmp_path, options, peft_config=lora())
    plain.train()
    assert Timed.calls == 4
    assert_same_lines(timed.state.log_history, plain.state.log_history)


OLDER_OF_CONFIGURATIONS = [
    *[(name, "max_prompt_length", 3, None) for name in ("DPO", "KTO", "CPO", "ORPO")],
    *[(name, "max_completion_length", 2, None) for name in ("DPO", "KTO")],
    *[(name, "generate_during_eval", True, "generate_during_eval has no effect") for name in NAMES],
    *[(name, "padding_value", 0, "padding_value has no effect") for name in NAMES],
    *[(name, "label_pad_token_id", -100, "label_pad_token_id has no effect") for name in NAMES],
    *[(name, "is_encoder_decoder", True, UserError) for name in NAMES],
    *[(name, field, "x", UserError) for name in ("DPO", "KTO") for field in ("model_adapter_name", "ref_adapter_name")],
    ("DPO", "rpo_alpha", 0.5, None),
    ("DPO", "reference_free", True, None),
    ("DPO", "use_liger_loss", True, "use_liger_loss has no effect"),
    ("DPO", "force_use_ref_model", True, "force_use_ref_model has no effect"),
]


@pytest.mark.parametrize(("name", "field", "value", "answer"), OLDER_OF_CONFIGURATIONS)
def test_fields_of_older_releases_are_taken_or_answered(tiny_policy, tmp_path, caplog, name, field, value, answer):
    if answer is UserError:
        with pytest.raises(UserError, match=rf"^{field}: "):
            made(name, tiny_policy, tmp_path, {field: value})
        return
    one = made(name, tiny_policy, tmp_path, {field: value} | FEW)
    if answer:
        assert answer in caplog.text
    if field in ("max_prompt_length", "max_completion_length"):
        assert one.train_dataset[0] != made(name, tiny_policy, tmp_path).train_dataset[0]
    if name == "DPO":
        one.train()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_older_constructors_are_taken_or_answered(tiny_policy, tmp_path, name, caplog):
    tokenizer = tokenizer_of(tiny_policy)
    one = made(name, tiny_policy, tmp_path, processing_class=None, tokenizer=tokenizer, max_length=30)
    assert one.processing_class is tokenizer and one.args.max_length == 30
    made(name, tiny_policy, tmp_path, padding_value=0, generate_during_eval=True)
    assert "padding_value has no effect" in caplog.text and "generate_during_eval has no effect" in caplog.text
    for argument in ("model_init", "formatting_func", "max_target_length"):
        with pytest.raises(UserError, match=f"^{argument}: no release of TRL 1 takes it; use "):
            made(name, tiny_policy, tmp_path, **{argument: 3})
    with pytest.raises(TypeError, match=f"{name}Trainer.__init__.. got an unexpected keyword argument 'nonsense'"):
        made(name, tiny_policy, tmp_path, nonsense=1)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_refused_by_name(tiny_policy, tmp_path, name):
    rows = Dataset.from_list([row | {"images": ["a"]} for row in pairs(3).to_list()])
    with pytest.raises(UserError, match=rf"rows with images are not supported; use trl.{name}Trainer for them"):
        made(name, tiny_policy, tmp_path, train_dataset=rows)


@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_several_devices_in_one_process_are_refused(tiny_policy, tmp_path, monkeypatch, name):
    """What transformers would wrap into nn.DataParallel: a process that sees two GPUs and was not launched."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=rf"{name}Trainer does not support `nn.DataParallel`: start .* `torchrun`"):
        trainer("align.trl", name, tmp_path, str(tiny_policy), {}, train_dataset=pairs(6))
