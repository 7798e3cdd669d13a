"""Rewards against transformers run one text at a time; and what makes a checkpoint unfit to be a scorer."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rewards import ScorerError, load_scorer

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' ' }}{% endfor %}{{ eos_token }}"


def tokenizer(pad: str = "<pad>", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per letter, a start token before every text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token=pad, model_max_length=64
    )
    fast.chat_template = template
    return fast


def llama(**settings: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(
        **({"vocab_size": len(WORDS), "max_position_embeddings": 64, "num_labels": 1} | sizes | settings)
    )


def saved(path: Path, model: torch.nn.Module, words: PreTrainedTokenizerFast) -> str:
    # Large weights, so that a wrong position or a leaking neighbour shows.
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


def texts(n: int = 24) -> tuple[list[str], list[str]]:
    draw = random.Random(0)
    sentence = lambda longest: " ".join(draw.choices("abcdefghij", k=draw.randint(1, longest)))  # noqa: E731
    return [sentence(9) + " " for _ in range(n)], [sentence(30) for _ in range(n)]


@torch.no_grad()
def one_by_one(path: str, rows: list[str], output: int = 0) -> torch.Tensor:
    """The plain loop: each text alone, unpadded, through transformers."""
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(path),
        PreTrainedTokenizerFast.from_pretrained(path),
    )
    return torch.stack(
        [model(**words(row, return_tensors="pt", return_token_type_ids=False)).logits[0, output] for row in rows]
    )


ARCHITECTURES = {
    "llama": lambda: LlamaForSequenceClassification(llama(pad_token_id=0)),
    "llama_pad_is_eos": lambda: LlamaForSequenceClassification(llama(pad_token_id=2)),
    "llama_without_pad": lambda: LlamaForSequenceClassification(llama(pad_token_id=None)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=0)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            num_labels=1,
            pad_token_id=0,
        )
    ),
}


@pytest.mark.parametrize("tokens_per_batch", [1, 70, 8192])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rewards_are_those_of_one_text_at_a_time(tmp_path, architecture, tokens_per_batch):
    pad = "</s>" if architecture == "llama_pad_is_eos" else "<pad>"
    path = saved(tmp_path, ARCHITECTURES[architecture](), tokenizer(pad))
    prompts, completions = texts()
    ends = [" </s>", " <pad>", ""]  # a text may itself end in the token that pads others
    completions = [c + ends[i % 3] for i, c in enumerate(completions)]
    rewards = load_scorer({"model": path, "tokens_per_batch": tokens_per_batch, "device": "cpu"}).score(
        prompts, completions
    )
    expected = one_by_one(path, [p + c for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(tmp_path, side):
    words = tokenizer()
    words.padding_side = side
    path = saved(tmp_path, ARCHITECTURES["llama"](), words)
    prompts, completions = texts()
    expected = one_by_one(path, [p + c for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(
        torch.tensor(load_scorer(path).score(prompts, completions)), expected, atol=1e-5, rtol=1e-5
    )


def test_messages_go_through_the_chat_template(tmp_path):
    path = saved(tmp_path, ARCHITECTURES["llama"](), tokenizer(template=TEMPLATE))
    prompt, completion = [{"role": "user", "content": "a b"}], [{"role": "assistant", "content": "c d"}]
    rewards = load_scorer(path).score([prompt, prompt, "a b"], [completion, "c d", completion])
    # The tokenizer puts the start token itself here, so the template's own must not come twice.
    expected = one_by_one(path, ["u a b a c d </s>"]).expand(3)
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-6, rtol=1e-6)


def test_a_start_token_in_the_text_is_not_doubled(tmp_path):
    path = saved(tmp_path, ARCHITECTURES["llama"](), tokenizer())
    with_token, without = load_scorer(path).score(["<s> a b ", "a b "], ["c", "c"])
    assert with_token == pytest.approx(without, abs=1e-6)


def test_the_output_is_chosen_by_name_or_number(tmp_path):
    config = llama(num_labels=3, pad_token_id=0, id2label={0: "kind", 1: "true", 2: "short"})
    path = saved(tmp_path, LlamaForSequenceClassification(config), tokenizer())
    for label in ("short", 2):
        rewards = load_scorer({"model": path, "label": label}).score(["a b "], ["c d"])
        torch.testing.assert_close(torch.tensor(rewards), one_by_one(path, ["a b c d"], output=2), atol=1e-6, rtol=1e-6)
    for label in (None, "long", 3):
        with pytest.raises(ScorerError, match="kind, true, short"):
            load_scorer({"model": path, "label": label})


def test_a_long_text_keeps_its_first_token_and_its_end(tmp_path, caplog):
    path = saved(tmp_path, ARCHITECTURES["llama"](), tokenizer())
    rewards = load_scorer({"model": path, "max_length": 4}).score(["a b c ", "a "], ["d e", "b"])
    torch.testing.assert_close(torch.tensor(rewards), one_by_one(path, ["c d e", "a b"]), atol=1e-6, rtol=1e-6)
    assert "1 of 2 texts are cut to max_length=4" in caplog.text


def test_what_cannot_be_a_scorer_is_refused(tmp_path):
    head_less = saved(tmp_path / "lm", LlamaForCausalLM(llama()), tokenizer())
    scorer = saved(tmp_path / "scorer", ARCHITECTURES["llama"](), tokenizer())
    cases = [
        (str(tmp_path / "absent"), "cannot be loaded"),
        (head_less, "no trained reward head .*score.weight"),
        ({"model": scorer, "lable": 0}, "lable"),
    ]
    for spec, message in cases:
        with pytest.raises(ScorerError, match=message):
            load_scorer(spec)
    with pytest.raises(ScorerError, match="no chat template"):
        load_scorer(scorer).score([[{"role": "user", "content": "a"}]], ["b"])
