"""Every way of training: the reference before and after, what is saved, and going on."""

import importlib.util
import warnings
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.export.served import adapter_rank, not_servable
from align.model.adapters import ADAPTER, AdaLora, Dora, Eva, Full, Ia3, Loftq, Lora, Miss, Olora, Pissa, Ranks, RsLora
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.load import LoadOptions
from align.model.middle_adapters import Lofit, LoraLdu, LoraSb, NLora, S2ft, Sorsa, SvFit
from align.model.peft_adapter import Peft
from align.model.policy import load_policy
from align.model.reference import check_reference_identity
from align.packing.batch import collate

ADAPTERS = [
    Lora(rank=3),
    Lora(rank=3, targets=("q_proj", "lm_head")),
    Lora(rank=3, ranks=Ranks(name="sensitivity")),
    RsLora(rank=3),
    Dora(rank=3),
    Pissa(rank=3),
    Pissa(rank=3, iterations=2),
    Pissa(rank=3, targets=("q_proj", "lm_head")),
    Olora(rank=3),
    Eva(rank=3),
    AdaLora(rank=2, initial_rank=4),
    LoraSb(rank=3),
    Sorsa(rank=3),
    SvFit(rank=3),
    NLora(rank=3),
    LoraLdu(rank=3),
    S2ft(heads=1, channels=5),
    Lofit(share=0.5),
    Miss(rank=4),
    Miss(rank=4, variant="bat"),
    Miss(rank=4, variant="mini", mini_rank=2),
    Ia3(),
    Peft(type="LOHA", options={"r": 3, "alpha": 8}, targets=("q_proj", "up_proj")),
    Full(),
]
STEPS = 6


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.name)
def adapter(request):
    return request.param


def test_every_adapter_that_trains_without_a_gpu_is_tested_here_and_says_what_it_is():
    without = {own for own in ADAPTER.classes.values() if not own.needs_quantization}
    assert {type(own) for own in ADAPTERS} == without
    assert all(own.__doc__ for own in ADAPTER.classes.values())


@pytest.mark.parametrize("adapter", [own for own in ADAPTERS if own != Full()], ids=lambda adapter: adapter.name)
def test_an_adapter_needs_the_number_of_steps_where_it_says_so(adapter):
    if adapter.needs_steps:
        with pytest.raises(ValueError, match="number of steps"):
            adapter.peft(total_steps=None)
    assert adapter.peft(total_steps=STEPS if adapter.needs_steps else None)


def test_what_vllm_can_serve_is_exported_with_no_larger_a_rank_than_it_was_told(load, adapter, tmp_path):
    load(adapter).save_adapter(tmp_path)
    told = adapter.served_rank()
    assert bool(not_servable(tmp_path)) == (told is None)
    assert told is None or adapter_rank(tmp_path) <= told


@pytest.fixture
def load(model_folder, batch):
    def load(adapter, *, keep_reference=True, **options):
        section = PolicySection(model=str(model_folder), adapter=adapter)
        return load_policy(
            section,
            LoadOptions(total_steps=STEPS, init_batches=[batch], init_loss=likelihood, **options),
            keep_reference=keep_reference,
        )

    return load


def likelihood(stats, batch):
    return -batch.to_lists(stats.logprobs.sum(dim=1)).sum(dim=1)


def train(policy, batch, *, first=1, last=STEPS, optimizer=None):
    """Some steps up the log-likelihood; returns the optimizer."""
    scorer = TokenScorer(policy).train()
    optimizer = optimizer or torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], lr=0.02)
    for step in range(first, last + 1):
        (policy.penalty() - scorer(batch).logprobs.sum()).backward()
        optimizer.step()
        policy.after_step(step)
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def logprobs(policy, batch):
    return TokenScorer(policy).eval()(batch).logprobs


def reference(policy, batch):
    with policy.reference():
        return TokenScorer(policy)(batch).logprobs


def test_the_reference_is_the_base_and_stays_bit_for_bit_while_the_policy_moves(load, model_folder, batch, adapter):
    policy = load(adapter)
    base = score_tokens(AutoModelForCausalLM.from_pretrained(model_folder), batch).logprobs
    check_reference_identity(policy, batch)
    before = reference(policy, batch)
    assert_close(before, base, atol=1e-4, rtol=1e-4)
    assert_close(logprobs(policy, batch), before, atol=1e-5, rtol=1e-5)
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    train(policy, batch)
    assert torch.equal(reference(policy, batch), before)
    assert (logprobs(policy, batch) - before)[batch.completion_mask].abs().max() > 0.1
    assert trainable == [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert not any(".reference." in name for name in trainable)


def test_what_is_saved_gives_the_trained_policy_on_the_original_base(load, model_folder, batch, adapter, tmp_path):
    policy = load(adapter)
    train(policy, batch)
    policy.save_adapter(tmp_path)
    if isinstance(adapter, Full):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config.attention_dropout == 0.3
    else:
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path)
        assert again.peft_config["default"].base_model_name_or_path == str(model_folder)
    assert_close(score_tokens(again.eval(), batch).logprobs, logprobs(policy, batch), atol=1e-5, rtol=1e-5)


def test_going_on_from_a_state_is_as_if_never_stopped(load, batch, adapter, tmp_path):
    check_going_on(load, batch, adapter, tmp_path, stop=3)


def test_adalora_goes_on_with_the_ranks_it_has_settled_on(load, batch, tmp_path):
    check_going_on(load, batch, AdaLora(rank=2, initial_rank=4, settle=0.2), tmp_path, stop=STEPS - 1)


def check_going_on(load, batch, adapter, tmp_path, *, stop):
    straight = load(adapter)
    optimizer = train(straight, batch, last=stop)
    straight.save_state(tmp_path)
    state = deepcopy(optimizer.state_dict())
    train(straight, batch, first=stop + 1, optimizer=optimizer)

    stopped = load(adapter)
    stopped.load_state(tmp_path)
    optimizer = torch.optim.Adam([p for p in stopped.model.parameters() if p.requires_grad], lr=0.02)
    optimizer.load_state_dict(state)
    train(stopped, batch, first=stop + 1, optimizer=optimizer)
    assert torch.equal(logprobs(stopped, batch), logprobs(straight, batch))
    assert torch.equal(reference(stopped, batch), reference(straight, batch))


@pytest.mark.parametrize("adapter", [Pissa(rank=3, iterations=1), Olora(rank=3)], ids=["pissa", "olora"])
def test_a_state_whose_start_differs_moves_the_base_with_it(load, batch, tmp_path, adapter):
    policy = load(adapter, seed=1)
    with torch.no_grad():  # another machine's decomposition: the same product in the base, another start
        for name, parameter in policy.model.named_parameters():
            if "lora_A" in name:
                parameter.neg_()
    for layer in policy._layers:
        layer.get_base_layer().weight.data += 2 * layer.get_delta_weight("default").neg()
    expected = logprobs(policy, batch)
    policy.save_state(tmp_path)
    again = load(adapter, seed=2)
    again.load_state(tmp_path)
    assert_close(logprobs(again, batch), expected, atol=1e-4, rtol=1e-4)
    assert_close(reference(again, batch), expected, atol=1e-4, rtol=1e-4)


def test_a_state_of_another_base_or_adapter_is_refused(load, batch, tmp_path):
    policy = load(Lora(rank=3))
    policy.save_state(tmp_path)
    with pytest.raises(UserError, match="another adapter"):
        load(Lora(rank=4)).load_state(tmp_path)
    policy.base["base"] = "another"
    with pytest.raises(UserError, match="another base"):
        policy.load_state(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        policy.load_state(tmp_path / "nothing")


def test_the_start_follows_the_seed_alone(load, adapter):
    torch.manual_seed(11)
    first = load(adapter, seed=4)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    torch.rand(5)
    second = load(adapter, seed=4)
    for (name, a), (_, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), drawn), "loading used up random numbers of the caller"


def test_eva_looks_at_tokens_not_at_padding(model_folder, lists):
    starts = []
    for pad in (2, 7):
        batches = [collate(lists, pad_id=pad)]
        policy = load_policy(
            PolicySection(model=str(model_folder), adapter=Eva(rank=3)), LoadOptions(init_batches=batches)
        )
        starts.append({n: p for n, p in policy.model.named_parameters() if "lora_A" in n})
    assert starts[0].keys() == starts[1].keys()
    for name, start in starts[0].items():
        assert_close(start, starts[1][name])


def test_a_start_adapter_is_trained_on_and_is_the_reference(load, model_folder, batch, tmp_path):
    for adapter in (Lora(rank=3), Dora(rank=3), Pissa(rank=3), Eva(rank=3), Miss(rank=4, variant="bat"), Ia3()):
        folder = tmp_path / f"{adapter.name}"
        sft = load(adapter)
        train(sft, batch, last=3)
        sft.save_adapter(folder)
        policy = load_policy(PolicySection(model=str(model_folder), start_adapter=str(folder)))
        check_reference_identity(policy, batch)
        before = reference(policy, batch)
        assert_close(before, logprobs(sft, batch), atol=1e-5, rtol=1e-5)
        train(policy, batch)
        assert torch.equal(reference(policy, batch), before)
        assert (logprobs(policy, batch) - before).abs().max() > 0.1
        policy.save_adapter(folder / "next")
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        again = PeftModel.from_pretrained(base, folder / "next").eval()
        assert_close(score_tokens(again, batch).logprobs, logprobs(policy, batch), atol=1e-5, rtol=1e-5)


def test_an_odd_start_adapter_is_refused(load, model_folder, batch, tmp_path):
    with pytest.raises(UserError, match="adapter_config.json"):
        load_policy(PolicySection(model=str(model_folder), start_adapter=str(tmp_path)))
    load(Lora(rank=3)).save_adapter(tmp_path / "lora")
    with pytest.raises(UserError, match="keep one of them"):
        load_policy(PolicySection(model=str(model_folder), start_adapter=str(tmp_path / "lora"), adapter=Dora()))
    load(AdaLora(rank=2, initial_rank=4)).save_adapter(tmp_path / "adalora")
    with pytest.raises(UserError, match="ADALORA"):
        load_policy(PolicySection(model=str(model_folder), start_adapter=str(tmp_path / "adalora")))
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace("layers.1.mlp.up_proj", "layers.1.mlp.no_proj"))
    with pytest.raises(UserError, match="counterpart|another base"):
        load_policy(PolicySection(model=str(model_folder), start_adapter=str(tmp_path / "lora")))


def test_dropout_is_the_adapters_own_unless_the_models_is_asked_for(load, batch):
    def differs(policy):
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        scorer = TokenScorer(policy).train()
        return not torch.equal(scorer(batch).logprobs, scorer(batch).logprobs)

    assert not differs(load(Lora(rank=3)))
    assert differs(load(Lora(rank=3, dropout=0.5)))
    assert differs(load(Lora(rank=3), dropout=True))


def test_the_reference_has_no_dropout_and_leaves_the_mode_alone(load, batch):
    policy = load(Pissa(rank=3, dropout=0.5), dropout=True)
    scorer = TokenScorer(policy).train()
    assert torch.equal(reference(policy, batch), reference(policy, batch))
    assert scorer.training and policy.model.training
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert scorer.training and scorer(batch).logprobs.requires_grad


def test_adalora_moves_its_ranks_and_keeps_its_factors_orthogonal(load, batch):
    policy = load(AdaLora(rank=1, initial_rank=4, warmup=0.0, settle=0.2, orthogonality=0.7))
    factors = {n: p for n, p in policy.model.named_parameters() if "lora_A" in n or "lora_B" in n}
    grams = [p @ p.T if "lora_A" in n else p.T @ p for n, p in factors.items()]
    expected = 0.7 * sum((g - torch.eye(4)).square().sum().sqrt() for g in grams) / len(grams)
    assert_close(policy.penalty(), expected)
    train(policy, batch)
    values = [p for n, p in policy.model.named_parameters() if "lora_E" in n]
    assert sum(int((p != 0).sum()) for p in values) == len(values)
    assert load(Lora(rank=3)).penalty() == 0.0


def test_full_training_without_a_copy_knows_its_reference_until_the_first_step(load, batch):
    policy = load(Full(), keep_reference=False)
    assert torch.equal(reference(policy, batch), logprobs(policy, batch))
    assert not reference(policy, batch).requires_grad
    train(policy, batch, last=1)
    with pytest.raises(RuntimeError, match="initial weights are gone"), policy.reference():
        pass


def test_a_reference_that_differs_is_noticed(load, batch):
    policy = load(Lora(rank=3))
    train(policy, batch, last=2)
    with pytest.raises(RuntimeError, match="before the first step"):
        check_reference_identity(policy, batch)


@pytest.mark.parametrize(
    ("adapter", "section", "message"),
    [
        (Lora(targets=("no_such_layer",)), {}, "no_such_layer"),
        (Eva(rank=3), {}, "eva starts from training rows"),
        (Loftq(rank=3), {}, "loftq mends a quantised base"),
        (AdaLora(), {}, "number of steps"),
        (Dora(targets=("lm_head",)), {}, "LM head"),
        (Lora(targets=("lm_head",), dropout=0.1), {}, "LM head"),
        (Lora(), {"quantization": "4bit"}, "needs a GPU"),
        (Olora(), {"quantization": "4bit"}, "use loftq"),
        (Full(), {"quantization": "4bit"}, "quantised weights cannot train"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(model_folder, adapter, section, message):
    with pytest.raises(UserError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_policy(PolicySection(model=str(model_folder), adapter=adapter, **section))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantisation_says_what_to_install(model_folder):
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_policy(
            PolicySection(model=str(model_folder), adapter=Lora(), quantization="4bit"), LoadOptions(device="cuda")
        )


def test_nothing_trainable_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr("align.model.policy.attach_adapter", lambda base, *args, **options: base.requires_grad_(False))
    with pytest.raises(UserError, match="nothing of .* would train"):
        load_policy(PolicySection(model=str(model_folder), adapter=Lora()))


@pytest.mark.parametrize("adapter", [Lora(rank=4), Pissa(rank=4), AdaLora(rank=2, initial_rank=4), Full()], ids=str)
def test_a_trained_public_model_starts_where_its_reference_is(shared_data, adapter):
    path = str(shared_data / "models" / "stories260k")
    policy = load_policy(PolicySection(model=path, adapter=adapter, dtype="bfloat16"), LoadOptions(total_steps=10))
    ids = policy.tokenizer("Once upon a time there was a little cat.")["input_ids"]
    batch = collate([{"prompt_ids": ids[:4], "completion_ids": [ids[4:], ids[5:]], "grades": [1.0, 0.0]}], pad_id=2)
    check_reference_identity(policy, batch)
    assert logprobs(policy, batch)[0].mean() > -3, "a story's beginning is likely under a model of stories"


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_rank_beyond_a_layers_size_is_refused(model_folder, name):
    """PEFT shrinks such a layer's factors, and the frozen copy would not fit them."""
    adapter = {"pissa": Pissa, "olora": Olora}[name](rank=17)
    with pytest.raises(
        UserError, match=r"policy.adapter.rank: 17 is more than model.layers.0\S+ has directions; give at most 16"
    ):
        load_policy(PolicySection(model=str(model_folder), adapter=adapter))
