"""Loss and parameter gradients of one step against TRL 1.16 itself, on a two-layer model with random weights."""

import copy
import os
from types import SimpleNamespace

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.objectives import OBJECTIVES, SCORES
from align.objectives.modifiers import wpo_list_weights, wpo_weights

trl = pytest.importorskip("trl", "1.16")

WORDS = [f"w{i}" for i in range(29)]
PAIRS = [
    ("w1 w2 w3", " w4 w5 w6 w7", " w8 w9"),
    ("w10 w11", " w12 w13", " w14 w15 w16 w17 w18"),
    ("w19", " w20 w21 w22", " w23 w24 w25"),
    ("w26 w27 w28 w1 w2", " w3", " w5 w4 w3 w2 w1 w0"),
]
BETA = 0.3


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.35, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def settings(**extra) -> dict:
    return {
        "beta": BETA, "bf16": False, "use_cpu": True, "report_to": [], "gradient_checkpointing": False, **extra,
    }  # fmt: skip


@pytest.fixture(scope="module")
def dpo(tokenizer, tmp_path_factory):
    """A real DPOTrainer; its loss is chosen by setting the attributes that its loss function reads."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    args = trl.DPOConfig(
        str(tmp_path_factory.mktemp("dpo")), per_device_train_batch_size=4, use_weighting=True, **settings()
    )
    return trl.DPOTrainer(
        tiny_model(1), tiny_model(2), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def theirs(trainer, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def batch_of(trainer, rows: slice) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(*rows.indices(len(trainer.train_dataset)))])


def token_stats(model, inputs: dict, prefix: str = "") -> tuple[Tensor, Tensor]:
    """log p of each next token and log sum p^2, by plain torch on the whole matrix of logits."""
    ids = inputs[prefix + "input_ids"]
    logits = model(input_ids=ids, attention_mask=inputs[prefix + "attention_mask"]).logits[:, :-1]
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0], (2 * logprobs).logsumexp(dim=-1)


def plain_copies(trainer) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The trainer's weights in models whose forward TRL did not patch."""
    copies = tiny_model(0), tiny_model(0)
    for plain, source in zip(copies, (trainer.model, trainer.ref_model), strict=True):
        plain.load_state_dict(copy.deepcopy(source.state_dict()))
    return copies


def ours(trainer, inputs, objective, options, score, score_options, wpo) -> tuple[Tensor, dict[str, Tensor]]:
    model, reference = plain_copies(trainer)
    lists = inputs["input_ids"].shape[0] // 2
    mask = inputs["completion_mask"][:, 1:].bool()
    list_index = torch.arange(lists).repeat(2)  # TRL puts all chosen before all rejected
    policy_logprobs, sum_sq = token_stats(model, inputs)
    with torch.no_grad():
        reference_logprobs, _ = token_stats(reference, inputs)
    scores = SCORES[score](policy_logprobs, reference_logprobs, mask, list_index, **score_options)
    grades = torch.tensor([[1.0, 0.0]]).expand(lists, 2)
    list_mask = torch.ones(lists, 2, dtype=torch.bool)
    losses = OBJECTIVES[objective](scores.view(2, lists).T, grades, list_mask, **options)
    if wpo:
        weights = wpo_weights(policy_logprobs, sum_sq, mask).view(2, lists).T
        losses = losses * wpo_list_weights(weights, list_mask, clamp=False)
    losses.mean().backward()
    return losses.mean().detach(), {name: p.grad for name, p in model.named_parameters()}


CASES = {
    "sigmoid": ("logistic", {}),
    "hinge": ("hinge", {}),
    "ipo": ("squared", {"beta": BETA}),
    "exo_pair": ("exo", {"label_smoothing": 0.1}),
    "nca_pair": ("nca", {}),
    "robust": ("robust", {"label_smoothing": 0.1}),
    "bco_pair": ("bco", {}),
    "sppo_hard": ("sppo", {"beta": BETA}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {"temperature": 0.05}),
    "sft": ("sft", {}),
    "sigmoid_norm": ("logistic", {}),
}
OWN_SCORE = {"ipo": "log_ratio_mean", "sigmoid_norm": "log_ratio_mean", "sft": "likelihood_mean"}
LINKS = {
    "forward_kl": {"name": "forward_kl"},
    "js_divergence": {"name": "js"},
    "alpha_divergence": {"name": "alpha", "alpha": 0.4},
}


def agree(trainer, monkeypatch, loss_type, *, link=None, ld_alpha=None, wpo=False):
    """One step of both, same loss and same gradient of every parameter."""
    set_to = {
        "loss_types": [loss_type], "label_smoothing": 0.1, "ld_alpha": ld_alpha, "use_weighting": wpo,
        "f_divergence_type": link or "reverse_kl", "f_alpha_divergence_coef": 0.4,
    }  # fmt: skip
    for name, value in set_to.items():
        monkeypatch.setattr(trainer, name, value)
    inputs = batch_of(trainer, slice(0, 1) if loss_type == "sft" else slice(0, 4))  # TRL's sft averages over tokens
    score, score_options = OWN_SCORE.get(loss_type, "log_ratio"), {"beta": 1.0 if loss_type == "sft" else BETA}
    if link:
        score_options["divergence"] = LINKS[link]
    if ld_alpha is not None:
        score, score_options["alpha"] = "length_desensitised", ld_alpha
    objective, options = CASES[loss_type]
    loss, gradients = ours(trainer, inputs, objective, options, score, score_options, wpo)
    their_loss, their_gradients = theirs(trainer, inputs)
    assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    scale = max(gradient.abs().max() for gradient in their_gradients.values()).item()
    assert scale > 1e-4
    for name, gradient in their_gradients.items():
        assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("loss_type", CASES)
def test_loss_types(dpo, monkeypatch, loss_type):
    agree(dpo, monkeypatch, loss_type)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"])
def test_divergences(dpo, monkeypatch, loss_type, link):
    agree(dpo, monkeypatch, loss_type, link=link)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
def test_length_desensitised(dpo, monkeypatch, loss_type, ld_alpha):
    agree(dpo, monkeypatch, loss_type, ld_alpha=ld_alpha)


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "sigmoid_norm", "apo_zero"])
def test_wpo_weights(dpo, monkeypatch, loss_type):
    """Not with hinge: TRL 1.16 changes that loss in place and then fails in the backward pass."""
    agree(dpo, monkeypatch, loss_type, wpo=True)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_unpaired(tokenizer, tmp_path, loss_type):
    rows = [{"prompt": p, "completion": c, "label": good} for p, a, b in PAIRS for c, good in ((a, True), (b, False))]
    args = trl.KTOConfig(
        str(tmp_path), loss_type=loss_type, per_device_train_batch_size=6, desirable_weight=1.5,
        undesirable_weight=0.7, **settings(),
    )  # fmt: skip
    trainer = trl.KTOTrainer(
        tiny_model(2), tiny_model(1), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    inputs = batch_of(trainer, slice(0, 6))
    model, reference = plain_copies(trainer)
    mask = inputs["completion_mask"][:, 1:].bool()
    logprobs, reference_logprobs = token_stats(model, inputs)[0], token_stats(reference, inputs)[0].detach()
    scores = SCORES["log_ratio"](logprobs, reference_logprobs, mask, torch.arange(6), beta=BETA)
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    if loss_type == "kto":
        kl_mask = inputs["KL_completion_mask"][:, 1:]
        kl_ratios = token_stats(model, inputs, "KL_")[0] - token_stats(reference, inputs, "KL_")[0]
        options["baseline"] = BETA * (kl_ratios * kl_mask).sum(dim=1).mean().clamp(min=0)
        assert options["baseline"] > 0
    grades = torch.as_tensor(inputs["label"]).float()[:, None]
    losses = OBJECTIVES[loss_type](scores[:, None], grades, grades >= 0, **options)
    losses.mean().backward()
    their_loss, their_gradients = theirs(trainer, inputs)
    assert_close(losses.mean().detach(), their_loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, their_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "objective", "options"),
    [
        ("sigmoid", "logistic", {"label_smoothing": 0.1}),
        ("hinge", "hinge", {}),
        ("ipo", "squared", {"beta": 2.0}),
        ("simpo", "logistic", {"label_smoothing": 0.1, "margin": 0.7}),
    ],
)
def test_reference_free(loss_type, objective, options):
    """CPO's loss function takes log-probabilities; whether they are sums or means is the score's business."""
    from trl.experimental.cpo import CPOTrainer

    stub = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type=loss_type, simpo_gamma=0.7, label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    logprobs = -torch.rand(8, 2, dtype=torch.float64) * 3
    expected, _, _ = CPOTrainer.cpo_loss(stub, logprobs[:, 0], logprobs[:, 1])
    grades = torch.tensor([[1.0, 0.0]]).double().expand(8, 2)
    assert_close(OBJECTIVES[objective](2.0 * logprobs, grades, grades >= 0, **options), expected)


def test_odds_ratio():
    from trl.experimental.orpo import ORPOTrainer

    stub = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    logprobs = -torch.rand(8, 2) * 3 - 0.01
    expected = -ORPOTrainer.odds_ratio_loss(stub, logprobs[:, 0], logprobs[:, 1])[0]
    grades = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    assert_close(OBJECTIVES["odds_ratio"](logprobs, grades, grades >= 0), expected, rtol=1e-5, atol=1e-5)
