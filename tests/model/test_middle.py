"""LoRAs with a trained middle: each factor against its formula in float64, and what of it trains."""

import numpy as np
import pytest
import torch
from peft import PeftConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import UserError
from align.losses.list_loss import build_loss
from align.model.attach import adapter_tensors
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.load import LoadOptions
from align.model.middle import lower_diagonal_upper, nystroem, product, singular
from align.model.middle_adapters import Lofit, LoraLdu, LoraSb, NLora, S2ft, Sorsa, SvFit
from align.model.policy import load_policy
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio
from align.packing.batch import collate

RANK = 4
MATRIX = torch.randn(12, 17, generator=torch.Generator().manual_seed(0))
LOSS = build_loss(LogRatio(beta=0.3), [Logistic()])


def at_first(stats, batch):
    return LOSS(stats, stats.logprobs.detach(), batch)


@pytest.fixture
def load(model_folder, batch):
    def load(adapter, **options):
        section = PolicySection(model=str(model_folder), adapter=adapter)
        return load_policy(section, LoadOptions(init_batches=[batch], init_loss=at_first, **options))

    return load


def given(factors):
    b, m, a = (factor.double().numpy() for factor in factors)
    return b, (np.diag(m) if m.ndim == 1 else m), a


def test_the_leading_singular_triplets():
    b, m, a = given(singular(MATRIX, RANK))
    u, s, v = np.linalg.svd(MATRIX.double().numpy(), full_matrices=False)
    assert_close(b @ m @ a, (u[:, :RANK] * s[:RANK]) @ v[:RANK], atol=1e-5, rtol=0)
    assert_close(np.diag(m), s[:RANK], atol=1e-5, rtol=0)
    assert_close(b.T @ b, np.eye(RANK), atol=1e-5, rtol=0)
    assert_close(a @ a.T, np.eye(RANK), atol=1e-5, rtol=0)


def test_nystroem_is_the_columns_times_the_inverse_of_the_block_times_the_rows():
    b, m, a = given(nystroem(MATRIX, RANK))
    w = MATRIX.double().numpy()
    assert_close(m, np.linalg.inv(w[:RANK, :RANK]), atol=1e-4, rtol=1e-4)
    assert_close(b @ m @ a, w[:, :RANK] @ np.linalg.inv(w[:RANK, :RANK]) @ w[:RANK], atol=1e-4, rtol=1e-4)


def test_lower_diagonal_upper_is_gaussian_elimination_with_row_exchanges():
    b, m, a = given(lower_diagonal_upper(MATRIX, RANK))
    upper = MATRIX.double().numpy().copy()
    order, lower = np.arange(12), np.zeros((12, 12))
    for k in range(12):
        pivot = k + np.abs(upper[k:, k]).argmax()
        for rows in (upper, lower, order):
            rows[[k, pivot]] = rows[[pivot, k]]
        lower[k, k] = 1
        for i in range(k + 1, 12):
            lower[i, k] = upper[i, k] / upper[k, k]
            upper[i] -= lower[i, k] * upper[k]
    diagonal = upper.diagonal()
    assert_close(np.diag(m), diagonal[:RANK].copy(), atol=1e-4, rtol=1e-4)
    assert_close(a, upper[:RANK] / diagonal[:RANK, None], atol=1e-4, rtol=1e-4)
    assert_close(b[order], lower[:, :RANK], atol=1e-4, rtol=1e-4)
    whole_b, whole_m, whole_a = given(lower_diagonal_upper(MATRIX, 12))
    assert_close(whole_b @ whole_m @ whole_a, MATRIX.double().numpy(), atol=1e-5, rtol=0)


def test_a_diagonal_is_a_matrix_with_zeros_beside_it():
    diagonal = torch.randn(5)
    assert_close(product(MATRIX[:, :5], diagonal), MATRIX[:, :5] @ diagonal.diag())


@pytest.mark.parametrize("step", [0.0, 0.01])
def test_lora_sb_starts_from_the_gradient_of_the_recipes_loss_on_the_lists(step, load, model_folder, batch, lists):
    """The gradient in float64 from plain logits: that of -log sigmoid(s_i - s_j) over ordered pairs at s = 0 is that of
    -1/2 * 0.3 * (log p_i - log p_j)."""
    exact = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    total = 0.0
    for row in lists:
        sums = []
        for own in row["completion_ids"]:
            ids = torch.tensor([row["prompt_ids"] + own])
            logits = exact(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            sums.append(logits.gather(1, torch.tensor(own)[:, None]).sum())
        for i, better in enumerate(row["grades"]):
            for j, worse in enumerate(row["grades"]):
                if better > worse:
                    total = total - 0.15 * (sums[i] - sums[j])
    total.backward()
    policy = load(LoraSb(rank=RANK, step=step))
    layer = policy.model.get_base_model().model.layers[1].mlp.down_proj
    gradient = exact.model.layers[1].mlp.down_proj.weight.grad.numpy()
    u, s, v = np.linalg.svd(-np.sign(gradient), full_matrices=False)
    b, m, a = given(
        (layer.lora_B["default"].outer, layer.lora_B["default"].middle.detach(), layer.lora_A["default"].weight)
    )
    assert_close(b @ b.T, u[:, :RANK] @ u[:, :RANK].T, atol=1e-4, rtol=0)
    assert_close(a.T @ a, v[:RANK].T @ v[:RANK], atol=1e-4, rtol=0)
    assert_close(b @ m @ a, step * (u[:, :RANK] * s[:RANK]) @ v[:RANK], atol=1e-5, rtol=0)
    trained = {name.split("lora_")[1] for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {"B.default.middle"}
    assert all(p.grad is None for p in policy.model.parameters())


def test_sorsas_penalty_is_the_mean_distance_of_its_factors_from_orthonormal_ones(load):
    policy = load(Sorsa(rank=RANK, orthonormality=0.7))
    assert policy.penalty().item() < 1e-4
    factors = []
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad and "middle" not in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            matrix = parameter.detach().double()
            factors.append(matrix if "lora_A" in name else matrix.T)
    distances = [(f @ f.T - torch.eye(RANK)).square().sum().sqrt() for f in factors]
    assert len(factors) == 2 * 14
    assert policy.penalty().item() == pytest.approx(0.7 * sum(distances).item() / len(distances), rel=1e-5)
    assert load(SvFit(rank=RANK)).penalty() == 0.0


@pytest.mark.parametrize(
    ("adapter", "trained", "rank"),
    [
        (SvFit(rank=RANK), {"B.default.middle"}, RANK),
        (LoraLdu(rank=RANK), {"B.default.middle"}, RANK),
        (Sorsa(rank=RANK), {"B.default.middle", "B.default.outer", "A.default.weight"}, 2 * RANK),
        (NLora(rank=RANK), {"B.default.middle", "B.default.outer", "A.default.weight"}, 2 * RANK),
    ],
    ids=lambda own: getattr(own, "name", ""),
)
def test_what_trains_and_the_rank_that_it_is_exported_with(adapter, trained, rank, load, tmp_path):
    policy = load(adapter)
    named = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    assert {name.split("lora_")[1] for name, _ in named} == trained
    for _, parameter in named:
        parameter.data *= 1.1
    policy.save_adapter(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).r == rank


def test_s2ft_is_training_of_some_columns_in_place(load, model_folder, batch):
    policy = load(S2ft(heads=1, channels=5), seed=3)
    plain = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    plain.requires_grad_(False)
    columns = {}
    for name, layer in policy.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            columns[name] = layer.lora_A["default"].weight.argmax(dim=1)
            assert layer.lora_A["default"].weight.sum() == len(columns[name])
            plain.get_submodule(name).weight.requires_grad_(True)
    assert {name.split(".")[-1] for name in columns} == {"o_proj", "down_proj"}
    assert all(len(own.unique()) == (8 if "o_proj" in name else 5) for name, own in columns.items())
    assert all(own[0] % 8 == 0 and own[-1] == own[0] + 7 for name, own in columns.items() if "o_proj" in name)
    models = [lambda: score_tokens(plain, batch), lambda: TokenScorer(policy).eval()(batch)]
    for parameters, read in zip((plain.parameters(), policy.model.parameters()), models, strict=True):
        optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05)
        for _ in range(2):
            at_first(read(), batch).sum().backward()
            for name, own in columns.items() if read is models[0] else ():
                kept = torch.zeros_like(plain.get_submodule(name).weight)
                kept[:, own] = 1
                plain.get_submodule(name).weight.grad *= kept
            optimizer.step()
            optimizer.zero_grad()
    expected, found = (read().logprobs.detach() for read in models)
    with policy.reference():
        assert (TokenScorer(policy)(batch).logprobs - found).abs().max() > 1e-2
    assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("adapter", "message"), [(S2ft(heads=3), "heads: .* has 2"), (S2ft(channels=25), "has 24")])
def test_more_columns_than_there_are_are_refused(adapter, message, load):
    with pytest.raises(UserError, match=message):
        load(adapter)


@pytest.mark.parametrize("kind", [LoraSb, SvFit])
def test_a_rank_beyond_a_layers_size_is_refused(kind, load):
    with pytest.raises(UserError, match=r"policy.adapter.rank: 17 is more than model.layers.0\S+ has .* at most 16"):
        load(kind(rank=17))


def test_a_gradient_of_no_loss_is_refused(model_folder):
    section = PolicySection(model=str(model_folder), adapter=LoraSb(rank=RANK))
    lists = [{"prompt_ids": [1, 5], "completion_ids": [[6], [7, 8]], "grades": [1.0, 0.0]}]
    with pytest.raises(UserError, match="gradient of a policy's loss"):
        load_policy(section, LoadOptions(init_batches=[collate(lists, pad_id=2)]))


def test_a_state_has_the_columns_that_were_drawn(load, batch, tmp_path):
    policy = load(S2ft(heads=1, channels=5), seed=1)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.save_state(tmp_path)
    again = load(S2ft(heads=1, channels=5), seed=2)
    again.load_state(tmp_path)
    with torch.no_grad():
        found, expected = (TokenScorer(own).eval()(batch).logprobs for own in (again, policy))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("adapter", [SvFit(rank=RANK), Lofit()])
@pytest.mark.filterwarnings("error")
def test_peft_does_not_warn_of_a_diagonal_or_of_a_layer_without_a_bias(adapter, load):
    adapter_tensors(load(adapter).model, "default")
