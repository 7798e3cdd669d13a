"""A plan, which holds no weight, against models that do: their parameters, their steps and torch's allocator."""

import json
import time
import tracemalloc
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from small_kinds import SMALL
from transformers import LlamaConfig, TrainingArguments
from transformers.trainer import Trainer

from align.bench.measure import allocated_bytes
from align.data.steps import micro_batches, packed_size, width
from align.errors import UserError
from align.model.attach import adapter_tensors
from align.model.checkpoint import saved_tensors
from align.model.checkpointing import checkpoint_layers
from align.model.load import LoadOptions
from align.model.peft_kinds import KINDS
from align.model.policy import load_policy
from align.packing.batch import collate
from align.planning.activations import Measure
from align.planning.check import refuse_unfit
from align.planning.devices import of_launch, size_of
from align.planning.empty import empty_model, read_config
from align.planning.lengths import cells_of, of_run
from align.planning.measure import measured_rate
from align.planning.memory import WAYS, of_model, optimizer_bytes, workspace
from align.planning.plan import MARGIN, Devices, make_plan
from align.planning.remedies import remedies
from align.runs.build import prepare
from align.training.arguments import planned_steps, training_arguments
from align.training.train import train

RANK = {"rank": 4}
"""As many directions as the narrowest layer has."""
ADAPTERS = [
    *("lora", "rslora", "dora", "adalora", "ia3", "full"),
    *({"name": name} | RANK for name in ("pissa", "olora", "miss", "lora_sb", "sorsa", "svfit", "nlora", "lora_ldu")),
    {"name": "lora_sb", "step": 0.1} | RANK,
    {"name": "s2ft", "channels": 4},
    *("lofit", {"name": "lofit", "share": 0.5}),
]
FROM_WEIGHTS = ["BOFT", "FROD", "SHIRA", "UNILORA"]
"""What PEFT cannot make of tensors without values."""
OF_PEFT = [
    {"name": "peft", "type": name, "options": SMALL.get(name, {"r": 4})}
    for name, kind in KINDS.items()
    if not (kind.why_not or kind.instead or name in FROM_WEIGHTS)
    and (name != "ADAMSS" or find_spec("sklearn") is not None)
]
CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, save_llama):
    """Seven layers of which no tensor is as small as an allocation's own cost."""
    return save_llama(tmp_path_factory.mktemp("wide"), **SIZES | {"num_hidden_layers": 7})


def lists(count=3, k=2):
    row = {
        "completion_ids": [[3 + i, *range(4, 27)] for i in range(k)],
        "grades": [float(i) for i in range(k)],
    }
    return [row | {"prompt_ids": [3 + number, *range(4, 35)]} for number in range(count)]


def size(tensor):
    return tensor.numel() * tensor.element_size()


def empty(recipe):
    return empty_model(recipe, read_config(recipe.policy), total_steps=10)


@pytest.mark.parametrize("adapter", [*ADAPTERS, *OF_PEFT], ids=str)
def test_a_plan_has_the_parameters_of_the_model_that_is_built(adapter, make_recipe):
    recipe = make_recipe(policy={"adapter": adapter})
    first = [collate(lists(), pad_id=2)]
    options = LoadOptions(total_steps=10, init_batches=first, init_loss=lambda stats, batch: stats.logprobs.sum(1))
    real = load_policy(recipe.policy, options, keep_reference=False).model
    planned = of_model(empty(recipe), recipe, needs_reference=True)
    own = [p for name, p in real.named_parameters() if ".reference" not in name]
    held = [own for name, own in real.named_buffers() if ".reference" not in name]
    assert planned.numbers == sum(p.numel() for p in own if p.requires_grad)
    assert planned.trained == sum(map(size, (p for p in own if p.requires_grad)))
    assert planned.frozen == sum(map(size, (p for p in own if not p.requires_grad))) + sum(map(size, held))
    copies = [p for name, p in real.named_parameters() if ".reference" in name]
    assert planned.copy == sum(map(size, copies))
    assert planned.saved + planned.copy == sum(map(size, saved_tensors(real).values()))
    if recipe.policy.adapter.name != "full":
        assert planned.exported == sum(map(size, adapter_tensors(real, "default").values()))


def test_a_package_that_an_adapter_lacks_is_named(make_recipe, monkeypatch):
    def lacking(*given, **keys):
        raise ImportError("it needs a package: pip install that")

    monkeypatch.setattr("align.model.adapters.Lora.peft", lacking)
    with pytest.raises(UserError, match=r"policy\.adapter: it needs a package: pip install that"):
        empty(make_recipe())


@pytest.mark.parametrize("kind", FROM_WEIGHTS)
def test_what_cannot_be_planned_is_said_and_trained_all_the_same(kind, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(policy={"adapter": {"name": "peft", "type": kind, "options": SMALL.get(kind, {"r": 4})}})
    with pytest.raises(UserError, match=f"no plan can be made of {kind}, which PEFT makes out of the weights"):
        empty(recipe)
    monkeypatch.setattr("align.planning.check.FAR_BELOW", 2**40)
    refuse_unfit(recipe, training_arguments(recipe.train, checkpoints=tmp_path, run_name="test"))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "VBLORA", "WAVEFT"])
def test_a_pass_that_looks_at_values_is_not_planned(kind, make_recipe):
    recipe = make_recipe(policy={"adapter": {"name": "peft", "type": kind, "options": SMALL.get(kind, {"r": 4})}})
    measure = Measure(recipe, read_config(recipe.policy), lists(), steps=10, again=True)
    with pytest.raises(UserError, match=f"no plan can be made of {kind}, whose pass looks at values"):
        measure.passes(0)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_the_optimizers_table_is_what_a_real_step_leaves(name, tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40, 24), (24, 8), (16,))]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    optimizer = kind(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert optimizer_bytes(parameters, name) == sum(x.numel() * x.element_size() for x in tensors if x.ndim)


@pytest.mark.parametrize(
    ("adapter", "packing", "checkpointed"),
    [
        *(("lora", True, count) for count in (0, 3, 6)),
        *(("lora", False, 0), ("lora", False, 6), ("full", True, 0), ("sorsa", True, 0), ("svfit", True, 0)),
    ],
)
def test_activations_are_what_the_allocator_counts(adapter, packing, checkpointed, make_recipe, wide):
    """The peak of a real forward and backward pass; the plan traces two and three of the seven layers."""
    recipe = make_recipe(policy={"model": str(wide), "adapter": {"name": adapter}}, train={"packing": packing})
    policy = load_policy(recipe.policy, LoadOptions(packing=packing), keep_reference=False)
    scorer, batch = policy.scorer().train(), policy.collate(lists())
    if checkpointed:
        checkpoint_layers(policy.model, checkpointed)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def step():
        scorer(batch, ("logprob", "entropy")).logprobs.sum().backward()

    step()
    needs = Measure(recipe, read_config(recipe.policy), lists(), steps=10, again=True).passes(checkpointed)
    head = workspace(of_model(empty(recipe), recipe, needs_reference=False), 144, device="cpu")
    found = allocated_bytes(step, CPU)  # with a tile for the logits that is there already
    assert needs.kept + needs.more + head - 4 * 144 * 40 == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_kept_is_what_autograd_saves(packing, make_recipe, wide):
    recipe = make_recipe(policy={"model": str(wide)}, train={"packing": packing})
    policy = load_policy(recipe.policy, LoadOptions(packing=packing), keep_reference=False)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        stats = policy.scorer().train()(policy.collate(lists()))
    assert stats.logprobs.requires_grad
    needs = Measure(recipe, read_config(recipe.policy), lists(), steps=10, again=True).passes(0)
    found = sum(size for place, size in saved.items() if place not in own)
    assert needs.kept == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_pass_and_the_tokens_are_those_of_the_batches(packing, make_recipe):
    recipe = make_recipe(train={"packing": packing, "tokens_per_batch": 80, "epochs": 2})
    prepared = prepare(recipe)
    found = of_run(recipe, prepared.train, processes=1)
    plan = planned_steps(recipe.train, prepared.train)
    policy = load_policy(recipe.policy, LoadOptions(packing=packing))
    steps = [[prepared.train[row] for row in rows] for rows in plan]
    cut = [micro_batches(step, tokens_per_batch=80, packed=packing) for step in steps]
    sizes = [policy.collate(own).input_ids.numel() for step in cut for own in step]
    assert found.steps == len(plan)
    assert found.per_step == max(map(len, cut))
    largest = policy.collate([one | {"grades": [0.0] * len(one["completion_ids"])} for one in found.largest])
    if packing:  # what completions begin with alike is not looked for, so that a plan is rather too large
        assert found.tokens == sum(packed_size(one) for step in steps for one in step) >= sum(sizes)
        assert largest.input_ids.numel() >= max(sizes)
    else:
        assert largest.input_ids.numel() == max(sizes)


def test_prompts_of_the_same_length_are_not_taken_for_one(make_recipe):
    """As a system prompt would be, which lists are brought together for: two of these fit a pass."""
    rows = [{"prompt_ids": [4 + number] * 150, "completion_ids": [[3] * 20, [5] * 20]} for number in range(4)]
    many = Dataset.from_list([row | {"weight": 1.0} for row in rows])
    recipe = make_recipe(train={"lists_per_step": 4, "epochs": 1, "steps": None, "tokens_per_batch": 400})
    found = of_run(recipe, many, processes=1)
    own = micro_batches(rows, tokens_per_batch=400, packed=True)
    assert found.per_step == len(own) == 2
    assert sum(map(packed_size, found.largest)) == sum(map(packed_size, own[0])) == 2 * 190


def test_planning_holds_lengths_and_no_tokens(make_recipe):
    """Of rows of 800 tokens, of which a Python list alone takes 6,400 bytes, less than 1,000 bytes each."""
    prompts, completions = [7] * 400, [[7] * 250, [7] * 150]
    rows = {"prompt_ids": [prompts] * 1000, "completion_ids": [completions] * 1000, "weight": [1.0] * 1000}
    many = Dataset.from_dict(rows)
    recipe = make_recipe(train={"epochs": 1, "lists_per_step": 100})
    of_run(recipe, many.select(range(200)), processes=1)  # what is made once is not the rows'
    tracemalloc.start()
    found = of_run(recipe, many, processes=1)
    sizes = {packed: cells_of(many, packed=packed) for packed in (True, False)}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = {"prompt_ids": prompts, "completion_ids": completions}
    assert (found.tokens, found.completions) == (1000 * packed_size(one), 1000 * 400)
    assert sizes == {True: 1000 * packed_size(one), False: 1000 * 2 * width(one)}
    assert peak < 1000 * 1000


def test_sharing_divides_what_is_shared(make_recipe):
    recipe = make_recipe(policy={"adapter": {"name": "full"}})
    model = of_model(empty(recipe), recipe, needs_reference=True)
    held = {way: own(model, 4) for way, own in WAYS.items()}
    assert held["one"]["optimizer"] == 2 * model.trained == 8 * model.numbers
    assert held["ddp"] == held["one"] | {"buckets": model.trained}
    assert held["zero2"]["trained weights"] == model.trained
    for way, parts in {"zero2": ("gradients", "optimizer"), "fsdp2": held["one"], "zero3": held["one"]}.items():
        assert all(held[way][part] == held["one"][part] // 4 for part in parts)


def test_a_plan_that_does_not_fit_names_what_helps(make_recipe, wide):
    recipe = make_recipe(policy={"model": str(wide), "adapter": {"name": "full"}})
    prepared = prepare(recipe)
    plan = make_plan(recipe, prepared.train, prepared.heldout, Devices("cpu", 2, 10**5))
    assert not any(plan.fits(way) for way in WAYS)
    said = " ".join(remedies(recipe, plan, "one"))
    assert "policy.adapter=lora" in said and "policy.dtype=bfloat16" in said
    assert plan.hours(2e12) == pytest.approx(sum(plan.operations.values()) / 4e12 / 3600)


def test_a_measured_rate_is_that_of_passes_and_of_the_recipes_update(make_recipe, monkeypatch):
    recipe = make_recipe(train={"optimizer": "adagrad", "steps": 3, "lists_per_step": 2})
    prepared = prepare(recipe)
    plan = make_plan(recipe, prepared.train, prepared.heldout, Devices("cpu", 2, 10**10))
    updates, clock = [], iter((5.0, 5.25))
    monkeypatch.setattr("torch.optim.Adagrad.step", lambda self: updates.append(len(self.param_groups[0]["params"])))
    monkeypatch.setattr("align.planning.measure.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("align.planning.measure._seconds", lambda *_: 1.5)
    found = measured_rate(recipe, prepared, plan)
    read = sum(packed_size(prepared.train[row]) for row in (0, len(prepared.train) // 2))
    assert updates == 2 * [len([p for p in empty(recipe).parameters() if p.requires_grad])]
    step = 1.5 * plan.tokens / 6 / read + 0.25
    assert found == pytest.approx(plan.operations["training"] / 6 / step)


def test_training_what_cannot_fit_is_refused_before_rows_and_weights(make_recipe, tmp_path, save_tokenizer):
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=40, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "huge")
    save_tokenizer(tmp_path / "huge")
    recipe = make_recipe(policy={"model": str(tmp_path / "huge"), "adapter": {"name": "full"}})
    began = time.monotonic()
    with pytest.raises(UserError, match=r"needs about .* GB before its activations .*policy\.adapter=lora"):
        train(recipe)
    assert time.monotonic() - began < 20


def test_what_fits_by_the_margin_is_not_refused(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(policy={"adapter": {"name": "full"}})
    arguments = training_arguments(recipe.train, checkpoints=tmp_path, run_name="test")
    held = sum(WAYS["one"](of_model(empty(recipe), recipe, needs_reference=True), 1).values())
    for memory, refused in ((int(held / MARGIN) + 1, False), (int(held / MARGIN) - 1, True)):
        monkeypatch.setattr("align.planning.devices.host_memory", lambda memory=memory: memory)
        if refused:
            with pytest.raises(UserError):
                refuse_unfit(recipe, arguments)
        else:
            refuse_unfit(recipe, arguments)
    assert of_launch(arguments)[1] == "one"


@pytest.mark.parametrize(
    ("auto", "least"),
    [
        ({"tokens_per_batch": "auto", "gradient_checkpointing": False}, {"tokens_per_batch": 40}),
        pytest.param({"gradient_checkpointing": "auto"}, {"gradient_checkpointing": True}, marks=pytest.mark.long),
    ],
)
def test_auto_is_refused_where_the_least_that_it_can_choose_is_too_much(auto, least, make_recipe, wide, monkeypatch):
    monkeypatch.setattr("align.planning.check.FLOOR", 40)
    recipe = make_recipe(policy={"model": str(wide)}, train=auto | {"steps": 1})
    smallest = recipe.model_copy(update={"train": recipe.train.model_copy(update=least)})
    prepared = prepare(recipe)
    needs = make_plan(smallest, prepared.train, prepared.heldout, Devices("cpu", 1, 2**40)).total("one")
    monkeypatch.setattr("align.planning.devices.host_memory", lambda: int(needs / MARGIN) - 1)
    with pytest.raises(UserError, match="with its activations"):
        train(recipe)
    monkeypatch.setattr("align.planning.devices.host_memory", lambda: int(needs / MARGIN) + 1)
    train(recipe)


def test_offload_is_refused_on_a_cpu(make_recipe):
    with pytest.raises(UserError, match=r"train\.activation_offload: on a CPU"):
        train(make_recipe(train={"activation_offload": True}))


def test_doctor_prints_the_plan_as_json(make_recipe, tmp_path, capsys):
    from align.cli import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe().model_dump(mode="json", exclude_unset=True)))
    main(["doctor", "--plan", str(recipe), "--devices", "2", "--memory", "24GiB", "--rate", "100", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["memory"]) == set(WAYS)
    assert found["devices"] == {"kind": "cuda", "count": 2, "memory": 24 * 2**30}
    assert found["hours"] == pytest.approx(sum(found["operations"].values()) / 2e14 / 3600)


def test_sizes_are_read():
    assert size_of("80GB") == 80 * 10**9
    assert size_of("1.5 TiB") == 1.5 * 2**40
    with pytest.raises(UserError, match="80GB"):
        size_of("a lot")
