"""What is given to a trainer besides data: collators, metrics, optimizers, cards, subclasses, older arguments."""

import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig, get_peft_model
from same_script import assert_same_lines, log_histories, pairs, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import align.trl
from align.data.steps import packed_size
from align.errors import UserError
from align.trl import DPOTrainer
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


class Modes(torch.optim.SGD):
    """A schedule-free optimizer: it is told when the model trains and when it is measured."""

    told: list[str] = []

    def train(self):
        self.told.append("train")

    def eval(self):
        self.told.append("eval")


def test_an_optimizer_with_modes_is_told_before_every_step(tiny_policy, tmp_path):
    found = []
    for package in ("trl", "align.trl"):
        Modes.told = []
        model = AutoModelForCausalLM.from_pretrained(tiny_policy)
        given = {"processing_class": tokenizer_of(tiny_policy), "train_dataset": pairs(9)}
        given["optimizers"] = (Modes(model.parameters(), lr=0.01), None)
        trainer(package, "DPO", tmp_path, model, {"max_steps": 2}, **given).train()
        found.append(Modes.told)
    assert found[0] == found[1] and found[1].count("train") >= 2


@pytest.mark.parametrize(
    ("options", "adapter"),
    [({}, {"lora_dropout": 0.5}), ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {})],
)
def test_dropout_is_off_and_reentrant_recomputation_reaches_an_adapter(tiny_policy, tmp_path, options, adapter):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **adapter)
    ours = same("DPO", tiny_policy, tmp_path, FEW | options, peft_config=lambda: config)
    assert all(line["grad_norm"] > 0 for line in ours if "loss" in line)


def test_a_stream_is_read_as_trl_reads_it(tiny_policy, tmp_path):
    def stream():
        return pairs(12).to_iterable_dataset()

    same("DPO", tiny_policy, tmp_path, FEW, train_dataset=stream, peft_config=lora)
    one = made("DPO", tiny_policy, tmp_path, FEW, train_dataset=stream())
    assert one.args.accelerator_config.dispatch_batches is False
    with pytest.raises(ValueError, match="is not supported with IterableDataset"):
        made("DPO", tiny_policy, tmp_path, FEW | {"precompute_ref_log_probs": True}, train_dataset=stream())


def test_a_set_given_after_full_training_cannot_be_measured_from_its_start(tiny_policy, tmp_path):
    class Sizes(DPOTrainer):
        seen = []

        def _reference_sums(self, inputs):
            self.seen.append(len(inputs["input_ids"]) // 2)
            return super()._reference_sums(inputs)

    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4, "max_steps": 1, "learning_rate": 0.1}
    one = made("DPO", tiny_policy, tmp_path, options, cls=Sizes)
    assert Sizes.seen == [4, 4, 1]
    assert one.evaluate(pairs(3))["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
    one.train()
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to `evaluate"):
        one.evaluate(pairs(3))


def test_passes_are_as_large_as_align_says(tiny_policy, tmp_path):
    logs, counts = [], []
    for tokens in (4096, 40):
        one = made("DPO", tiny_policy, tmp_path, FEW | {"align": {"tokens_per_batch": tokens}}, peft_config=lora())
        step = one._step([one.data_collator([one.train_dataset[place] for place in range(4)])])
        sizes = [sum(map(packed_size, lists)) for lists in one._passes(step)]
        assert max(sizes) <= tokens
        counts.append(len(sizes))
        one.train()
        logs.append(one.state.log_history)
    assert counts[0] == 1 < counts[1]
    assert_same_lines(*logs)


def frozen(tiny_policy):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), lora())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


QUANTIZED = {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}
BEFOREHAND = {"sync_ref_model": True, "precompute_ref_log_probs": True}
REFUSED = [
    ("DPO", BEFOREHAND, {}, ValueError, "`sync_ref_model=True` together with `precompute_ref_log_probs=True`"),
    ("DPO", {"sync_ref_model": True}, {"peft_config": lora}, NotImplementedError, "needs a reference of its own"),
    ("DPO", QUANTIZED, {"quantization_config": object}, ValueError, "is both an argument and in `args.model_init"),
    ("DPO", {"pad_token": "nonsense"}, {}, ValueError, "`pad_token` .'nonsense'. is not found in the vocabulary"),
    ("DPO", {}, {"peft_config": dict}, TypeError, "must be a `peft.PeftConfig` instance, got dict"),
    ("DPO", {}, {"train_dataset": list}, TypeError, "must be a `Dataset` or `IterableDataset`, got `list`"),
    ("KTO", {"per_device_train_batch_size": 1}, {}, ValueError, "per_device_train_batch_size must be above 1"),
    ("KTO", {"train_sampling_strategy": "random"}, {}, ValueError, "`train_sampling_strategy` must be 'sequential'"),
    ("KTO", {"loss_type": "bco"}, {}, ValueError, "Unknown loss type: bco"),
    ("Reward", {"eos_token": "nonsense"}, {}, ValueError, "`eos_token` .'nonsense'. is not found"),
]


@pytest.mark.parametrize(("name", "options", "given", "error", "sentence"), REFUSED)
def test_what_cannot_be_is_said_before_training(tiny_policy, tmp_path, name, options, given, error, sentence):
    with pytest.raises(error, match=sentence):
        made(name, tiny_policy, tmp_path, FEW | options, **{key: make() for key, make in given.items()})


def test_an_adapter_that_was_loaded_to_be_used_is_refused(tiny_policy, tmp_path):
    given = {"train_dataset": pairs(9), "processing_class": tokenizer_of(tiny_policy)}
    with pytest.raises(UserError, match="nothing of the model would train: load the adapter with is_trainable=True"):
        trainer("align.trl", "DPO", tmp_path, frozen(tiny_policy), FEW, **given)


def test_tokens_and_templates_of_the_configuration_are_the_models_too(tiny_policy, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}")
    options = {"pad_token": "w5", "eos_token": "w6", "chat_template_path": str(template)}
    one = made("Reward", tiny_policy, tmp_path, options)
    assert one.processing_class.chat_template == template.read_text()
    words = one.processing_class.get_vocab()
    assert one.processing_class.pad_token == "w5" and one.model.config.pad_token_id == words["w5"]
    assert one.processing_class.eos_token == "w6" and one.model.config.eos_token_id == words["w6"]
    assert all(ids[-1] == words["w6"] for ids in one.train_dataset["chosen_ids"])
    rows = [{"chosen_input_ids": [3, 4, 5], "rejected_input_ids": [3, 6]}] * 4
    one = made("Reward", tiny_policy, tmp_path, train_dataset=Dataset.from_list(rows))
    assert one.train_dataset.to_list() == [{"chosen_ids": [3, 4, 5], "rejected_ids": [3, 6]}] * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_was_trained(tiny_policy, tmp_path, name):
    one = made(name, tiny_policy, tmp_path, FEW | {"save_strategy": "steps", "save_steps": 3})
    one.train()
    card = (Path(one.args.output_dir) / "README.md").read_text()
    tag = "reward-trainer" if name == "Reward" else name.lower()
    assert f"- {tag}\n" in card and f"with {one._name} (" in card
    one.create_model_card(model_name="mine", dataset_name="some/rows", tags="own")
    card = (Path(one.args.output_dir) / "README.md").read_text()
    assert "- unsloth\n" not in card
    one.model.config.unsloth_version = "2026.11"
    one.create_model_card(tags="own")
    assert "- unsloth\n" in (Path(one.args.output_dir) / "README.md").read_text()
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
