"""Tables of positions: how long they are, by running into their end, and what happens to longer rows."""

import json

import pytest
import torch
import transformers as t

from align.errors import UserError
from align.evaluate.rows import evaluate_rows
from align.model.load import positions
from align.training.train import train
from rewards import load_scorer
from rewards.positions import table_size

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
ENCODER = SIZES | {"max_position_embeddings": 34, "pad_token_id": 1}
LMS = {
    "gpt2": lambda: t.GPT2Config(**GPT),
    "opt": lambda: t.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
    "gpt neo": lambda: t.GPTNeoConfig(
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=8,
    ),
    "gpt-j": lambda: t.GPTJConfig(**GPT, rotary_dim=4),
    "codegen": lambda: t.CodeGenConfig(**GPT | {"n_head": 4}, rotary_dim=4),
    "ctrl": lambda: t.CTRLConfig(**GPT, dff=24),
    "openai-gpt": lambda: t.OpenAIGPTConfig(**GPT),
    "biogpt": lambda: t.BioGptConfig(**SIZES, max_position_embeddings=32),
    "mpt": lambda: t.MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=40, max_seq_len=32),
    "gpt bigcode": lambda: t.GPTBigCodeConfig(**GPT),
    "bloom": lambda: t.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2),
    "falcon, alibi": lambda: t.FalconConfig(**SIZES, alibi=True, max_position_embeddings=32),
    "llama": lambda: t.LlamaConfig(**SIZES, max_position_embeddings=32),
    "gpt neox": lambda: t.GPTNeoXConfig(**SIZES, max_position_embeddings=32),
}
CLASSIFIERS = {
    "bert": lambda: t.BertConfig(**ENCODER),
    "electra": lambda: t.ElectraConfig(**ENCODER, embedding_size=16),
    "distilbert": lambda: t.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=34
    ),
    "roberta": lambda: t.RobertaConfig(**ENCODER),
    "roberta, pad 0": lambda: t.RobertaConfig(**ENCODER | {"pad_token_id": 0}),
    "xlm-r": lambda: t.XLMRobertaConfig(**ENCODER),
    "camembert": lambda: t.CamembertConfig(**ENCODER),
    "mpnet": lambda: t.MPNetConfig(**ENCODER),
    "deberta": lambda: t.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type="p2c|c2p"),
    "deberta v2, relative only": lambda: t.DebertaV2Config(
        **ENCODER, relative_attention=True, position_biased_input=False, pos_att_type="p2c|c2p"
    ),
    "modernbert": lambda: t.ModernBertConfig(**ENCODER | {"num_hidden_layers": 3}),
}
WITHOUT_TABLE = {"bloom", "falcon, alibi", "llama", "gpt neox", "deberta v2, relative only", "modernbert"}


def made(name):
    torch.manual_seed(0)
    if name in LMS:
        return t.AutoModelForCausalLM.from_config(LMS[name]()).eval()
    return t.AutoModelForSequenceClassification.from_config(CLASSIFIERS[name]()).eval()


@pytest.mark.parametrize("name", [*LMS, *CLASSIFIERS])
def test_a_table_ends_where_the_model_fails(name):
    model = made(name)
    table = table_size(model)
    assert (table is None) == (name in WITHOUT_TABLE)

    def run(length):
        ids = torch.arange(length)[None] % 30 + 5
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    run(table or 100)
    if table is not None:
        with pytest.raises((IndexError, RuntimeError)):
            run(table + 1)


@pytest.fixture
def long_rows(tmp_path):
    """Rows of 8 and, the second, 60 tokens."""
    path = tmp_path / "long.jsonl"
    lines = [
        {
            "id": str(n),
            "prompt": f"w{5 + n} w4",
            "completions": [" w3" * (4 + 54 * (n == 1)), " w5 w6"],
            "grades": [1, 0],
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def saved(tmp_path, save_tokenizer):
    def save(name):
        made(name).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt-j"])
def test_rows_beyond_the_table_are_refused_before_training(name, saved, long_rows, make_recipe):
    model = saved(name)
    table, _ = positions(model)
    data = {"sources": [str(long_rows)], "eval_fraction": 0.0}
    recipe = make_recipe(policy={"model": model}, data=data, train={"steps": 1})
    with pytest.raises(UserError, match=rf"row 2: .*data.max_length 1024 is beyond the {table} positions of the model"):
        train(recipe)
    assert train(make_recipe("short", policy={"model": model}, data=data | {"max_length": table}, train={"steps": 1}))
    with pytest.raises(UserError, match=rf"row 2: .* beyond the {table} positions"):
        evaluate_rows(str(long_rows), model=model)


def test_samples_beyond_the_table_are_refused_before_training(saved, long_rows, make_recipe):
    data = {"sources": [str(long_rows)], "eval_fraction": 0.5, "max_length": 32}
    recipe = make_recipe(policy={"model": saved("gpt2")}, data=data, sampling={"prompts": 2, "max_tokens": 31})
    with pytest.raises(UserError, match="sampling.max_tokens: 31 behind a prompt of .* 32 positions .* at most"):
        train(recipe)


def test_rows_beyond_what_a_rotary_model_was_made_for_are_a_line_in_the_audit(saved, long_rows, make_recipe, capsys):
    data = {"sources": [str(long_rows)], "eval_fraction": 0.0}
    result = train(make_recipe(policy={"model": saved("llama")}, data=data, train={"steps": 1}))
    assert result.summary["data"]["beyond_positions"] == 1 and result.summary["data"]["positions"] == 32
    assert "completions with an end beyond" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-r", "mpnet"])
def test_a_scorer_cuts_at_the_table_and_counts(name, saved, tmp_path):
    model = made(name)
    model.config.id2label, model.config.label2id = {0: "score"}, {"score": 0}
    config = model.config
    config.num_labels = 1
    t.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    saved("llama")
    t.AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "reward")
    for wanted in (None, 100):
        scorer = load_scorer({"name": "sequence_classifier", "model": str(tmp_path / "reward"), "max_length": wanted})
        assert scorer.max_length == table_size(scorer.model)
        assert len(scorer.score(["w5 "], ["w6 " * 80])) == 1
        assert scorer.tally.truncated == 1
