"""Encoders over texts alone against themselves over padded rows, and attention against softmax written out."""

import pytest
import torch
import transformers as t
from torch.testing import assert_close

from align.packing.unpadded import Texts, enable_unpadding, texts_sdpa

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
ENCODER = SIZES | {"intermediate_size": 24, "max_position_embeddings": 64, "num_labels": 2}
MODERN = ENCODER | {"num_hidden_layers": 3, "local_attention": 6, "global_attn_every_n_layers": 2}
TAKEN = {
    "modernbert": lambda: t.ModernBertConfig(**MODERN, classifier_pooling="cls"),
    "modernbert, mean": lambda: t.ModernBertConfig(**MODERN, classifier_pooling="mean"),
    "bert": lambda: t.BertConfig(**ENCODER),
    "roberta": lambda: t.RobertaConfig(**ENCODER | {"pad_token_id": 1}),
    "xlm-r": lambda: t.XLMRobertaConfig(**ENCODER | {"pad_token_id": 1}),
    "distilbert": lambda: t.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64, num_labels=2
    ),
    "electra": lambda: t.ElectraConfig(**ENCODER, embedding_size=16),
}


def classifier(config):
    """With weights so large that a wrong place or a leaking neighbour shows."""
    torch.manual_seed(3)
    model = t.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def rows(pad):
    """Texts of 1 to 20 tokens, two of one size."""
    mask = torch.arange(20) < torch.tensor([20, 7, 1, 7, 13])[:, None]
    return torch.randint(2, 40, mask.shape).masked_fill(~mask, pad or 0), mask.long()


@pytest.mark.parametrize("name", TAKEN)
def test_values_and_gradients_are_those_of_padded_rows(name, caplog):
    model = classifier(TAKEN[name]())
    ids, mask = rows(model.config.pad_token_id)
    weights, parameters = torch.randn(5, 2), [*model.parameters()]

    def read():
        logits = model(input_ids=ids, attention_mask=mask).logits
        return logits.detach(), torch.autograd.grad((weights * logits).sum(), parameters, allow_unused=True)

    expected, wanted = read()
    assert enable_unpadding(model.base_model, name=name), caplog.text
    read_by_first = []
    first = next(module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_pre_hook(lambda module, given: read_by_first.append(given[0].shape[:-1].numel()))
    found, gradients = read()
    assert read_by_first == [20 + 7 + 1 + 7 + 13]
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        if want is not None:
            assert (gradient - want).norm() <= 1e-5 * max(1, want.norm())
    whole = ids[:1], mask[:1]
    assert_close(model(*whole).logits, expected[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (False, 3), (True, None)])
def test_each_text_attends_to_itself_alone(causal, window):
    """softmax(Q K' / sqrt(D)) V over the places of the own text, less than a window apart, not ahead if causal."""
    sizes, module = (4, 4, 1, 7), torch.nn.Module()
    module.is_causal = causal
    query, key, value = torch.randn(3, 1, 2, sum(sizes), 8, dtype=torch.float64).unbind()
    own = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    apart = torch.arange(sum(sizes))[:, None] - torch.arange(sum(sizes))
    seen = own[:, None] == own
    seen &= apart.abs() < (window or 99)
    seen &= (apart >= 0) | (not causal)
    logits = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~seen, -torch.inf)
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True)) @ value
    texts = Texts(sizes)
    found, _ = texts_sdpa(module, query, key, value, None, texts=texts, sliding_window=window)
    assert_close(found, expected.transpose(1, 2))
    assert texts.runs == [(4, 2), (1, 1), (7, 1)] and texts.told == [window]


def silent(own):
    """Attention that does not tell what it calls of the texts."""
    return lambda self, *given, texts=None, **others: own(self, *given, **others)


def test_a_model_that_is_then_another_stays_as_it_was(caplog, monkeypatch):
    model = classifier(TAKEN["bert"]())
    ids, mask = rows(0)
    expected = model(input_ids=ids, attention_mask=mask).logits
    attention = type(model.bert.encoder.layer[0].attention.self)
    monkeypatch.setattr(attention, "forward", silent(attention.forward))
    assert not enable_unpadding(model.bert, name="mine")
    assert "mine (bert): texts run as padded rows, since packed, its states differ by" in caplog.text
    assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, atol=0, rtol=0)
    pooled = classifier(t.AlbertConfig(**ENCODER, embedding_size=16))
    assert not enable_unpadding(pooled.base_model, name="with a pooler of its own")
    relative = classifier(t.DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type="p2c|c2p"))
    assert not enable_unpadding(relative.base_model, name="other")
    assert (
        "other (deberta-v2): texts run as padded rows, since there is no packed form of attention eager" in caplog.text
    )
