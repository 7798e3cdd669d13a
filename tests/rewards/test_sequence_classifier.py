"""Rewards against transformers run one text at a time; and what makes a checkpoint unfit to be a scorer."""

import random

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TEMPLATE, WORDS, letters, llama, saved
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rewards import ScorerError, load_scorer


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
    path = saved(tmp_path, ARCHITECTURES[architecture](), letters(pad))
    prompts, completions = texts()
    ends = [" </s>", " <pad>", ""]  # a text may itself end in the token that pads others
    completions = [c + ends[i % 3] for i, c in enumerate(completions)]
    rewards = load_scorer({"model": path, "tokens_per_batch": tokens_per_batch, "device": "cpu"}).score(
        prompts, completions
    )
    expected = one_by_one(path, [p + c for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3, "a hundred times the tolerance"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(tmp_path, side):
    words = letters()
    words.padding_side = side
    path = saved(tmp_path, ARCHITECTURES["llama"](), words)
    prompts, completions = texts()
    expected = one_by_one(path, [p + c for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(
        torch.tensor(load_scorer(path).score(prompts, completions)), expected, atol=1e-5, rtol=1e-5
    )


def test_messages_go_through_the_chat_template(tmp_path):
    path = saved(tmp_path, ARCHITECTURES["llama"](), letters(template=TEMPLATE))
    prompt, completion = [{"role": "user", "content": "a b"}], [{"role": "assistant", "content": "c d"}]
    rewards = load_scorer(path).score([prompt, prompt, "a b"], [completion, "c d", completion])
    # The tokenizer puts the start token itself here, so the template's own must not come twice.
    expected = one_by_one(path, ["u a b a c d </s>"]).expand(3)
    torch.testing.assert_close(torch.tensor(rewards), expected, atol=1e-6, rtol=1e-6)


def test_a_start_token_in_the_text_is_not_doubled(tmp_path):
    path = saved(tmp_path, ARCHITECTURES["llama"](), letters())
    with_token, without = load_scorer(path).score(["<s> a b ", "a b "], ["c", "c"])
    assert with_token == pytest.approx(without, abs=1e-6)


def test_the_output_is_chosen_by_name_or_number(tmp_path):
    config = llama(num_labels=3, pad_token_id=0, id2label={0: "kind", 1: "true", 2: "short"})
    path = saved(tmp_path, LlamaForSequenceClassification(config), letters())
    for label in ("short", 2):
        rewards = load_scorer({"model": path, "label": label}).score(["a b "], ["c d"])
        torch.testing.assert_close(torch.tensor(rewards), one_by_one(path, ["a b c d"], output=2), atol=1e-6, rtol=1e-6)
    for label in (None, "long", 3):
        with pytest.raises(ScorerError, match="kind, true, short"):
            load_scorer({"model": path, "label": label})


def test_a_long_text_keeps_its_first_token_and_its_end(tmp_path, caplog):
    path = saved(tmp_path, ARCHITECTURES["llama"](), letters())
    rewards = load_scorer({"model": path, "max_length": 4}).score(["a b c ", "a "], ["d e", "b"])
    torch.testing.assert_close(torch.tensor(rewards), one_by_one(path, ["c d e", "a b"]), atol=1e-6, rtol=1e-6)
    assert "1 of 2 texts are cut to max_length=4" in caplog.text


def test_what_cannot_be_a_scorer_is_refused(tmp_path):
    head_less = saved(tmp_path / "lm", LlamaForCausalLM(llama()), letters())
    scorer = saved(tmp_path / "scorer", ARCHITECTURES["llama"](), letters())
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


def test_several_outputs_are_a_weighted_sum_by_name(tmp_path):
    names = {0: "helpfulness", 1: "verbosity", 2: "other"}
    config = llama(num_labels=3, pad_token_id=0, id2label=names)
    path = saved(tmp_path, LlamaForSequenceClassification(config), letters())
    spec = {"model": path, "weights": {"verbosity": -0.4, "helpfulness": 0.65}}
    outputs = [one_by_one(path, ["a b c d", "a e"], output=k).double() for k in range(2)]
    expected = 0.65 * outputs[0] - 0.4 * outputs[1]
    rewards = load_scorer(spec).score(["a b ", "a "], ["c d", "e"])
    torch.testing.assert_close(torch.tensor(rewards).double(), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ScorerError, match="helpfulness, verbosity, other"):
        load_scorer({"model": path, "weights": {"helpful": 1.0}})
    with pytest.raises(ScorerError, match="give one of the two"):
        load_scorer({**spec, "label": 1})


@pytest.mark.parametrize(
    ("layout", "outputs", "bias"),
    [("v_head.summary", 1, True), ("regression_layer", 4, False), ("value_head", 1, False)],
)
def test_heads_of_other_names_are_found(tmp_path, layout, outputs, bias):
    """A language model's files with a head beside them, as TRL, ArmoRM and OpenRLHF write them."""
    saved(tmp_path, LlamaForCausalLM(llama(pad_token_id=0)), letters())
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{layout}.weight"] = torch.randn(outputs, 32)
    if bias:
        weights[f"{layout}.bias"] = torch.randn(outputs)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = LlamaForCausalLM.from_pretrained(tmp_path).model
    ids = letters()("a b c d", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = weights[f"{layout}.weight"] @ base(ids).last_hidden_state[0, -1] + weights.get(f"{layout}.bias", 0)
    spec = {"model": str(tmp_path)} | ({"label": 2} if outputs > 1 else {})
    rewards = load_scorer(spec).score(["a b "], ["c d"])
    assert rewards == pytest.approx([expected[2 if outputs > 1 else 0].item()], rel=1e-5, abs=1e-5)


def test_an_adapter_brings_its_head(tmp_path):
    base = saved(tmp_path / "base", LlamaForCausalLM(llama(pad_token_id=0)), letters())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path / "adapter")
    letters().save_pretrained(tmp_path / "adapter")
    ids = letters()("a b c d", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[0, 0].item()
    assert load_scorer(str(tmp_path / "adapter")).score(["a b "], ["c d"]) == pytest.approx([expected], abs=1e-5)


def test_a_soft_cap_of_the_attention_is_kept(tmp_path, save_tokenizer):
    """Gemma 2's, which the sdpa of transformers before 5.24 leaves out and later ones refuse."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "num_labels": 1}
    config = transformers.Gemma2Config(**sizes | heads, attn_logit_softcapping=0.5)
    torch.manual_seed(3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    text = "w5 w6 w7 w8 w9 w10 w11"
    found = load_scorer(str(tmp_path)).score([text], [""])[0]
    rewards = {}
    for cap in (0.5, None):
        options = {"attn_implementation": "eager", "attn_logit_softcapping": cap, "dtype": torch.float32}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).eval()
        ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
        rewards[cap] = model(input_ids=ids).logits.item()
    assert abs(rewards[0.5] - rewards[None]) > 1e-3
    assert found == pytest.approx(rewards[0.5], abs=1e-5)
