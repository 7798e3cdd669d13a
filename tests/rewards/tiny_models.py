"""Tiny random models of several layouts, with a tokenizer of one token per letter."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Yes", "No", "A", "B", ":", "Verdict"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% else %}{{ eos_token }}{% endif %}"
)


def letters(pad: str = "<pad>", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per letter, a start token before every text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token=pad, model_max_length=128
    )
    fast.chat_template = template
    return fast


def llama(**settings: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(
        **({"vocab_size": len(WORDS), "max_position_embeddings": 128, "num_labels": 1} | sizes | settings)
    )


LANGUAGE_MODELS = {
    "llama": lambda: LlamaForCausalLM(llama()),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_positions=128, n_embd=32, n_layer=2, n_head=2)),
    "gemma2": lambda: Gemma2ForCausalLM(  # a soft-cap, sliding windows, scaled embeddings
        Gemma2Config(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=4,
            final_logit_softcapping=3.0,
            pad_token_id=0,
        )
    ),
}


def bert() -> BertModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=128, pad_token_id=0, **sizes))


def saved(path: Path, model: torch.nn.Module, words: PreTrainedTokenizerFast | None = None, seed: int = 0) -> str:
    """The model's folder, with large random weights, so that a wrong position or a leaking neighbour shows."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    (words or letters()).save_pretrained(path)
    return str(path)


def lists(n: int = 6, k: int = 4, seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts, repeated for each of their completions, and completions of many lengths that may begin alike."""
    draw = random.Random(seed)

    def sentence(longest: int) -> str:
        return " ".join(draw.choices("abcd", k=draw.randint(1, longest)))

    prompts = [sentence(20) + " " for _ in range(n)]
    return [p for p in prompts for _ in range(k)], [sentence(25) for _ in range(n * k)]
