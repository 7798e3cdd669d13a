"""Characters become tokens: pieces between added tokens, each tokenised once, give what whole texts give."""

import os
import random
import re

import pytest
from conftest import BUILT
from tokenizers import AddedToken

from align.data.boundary import special_tokens
from align.data.encoding import encoder
from align.data.learnt import token_spans

TAGS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "[INST]")
WORDS = ("the cat", " sat", "\n", "\n\n", " ", "a", "time is t", "en", "<b", ">", "[", "<|x|>", "on the mat", "")


OTHERS = ({}, {"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"normalized": True})
"""How an added token may look for more than itself; only the first lets texts be parted."""


def with_tags(tokenizer, **looks):
    added = [AddedToken(tag, **{"normalized": False, "special": tag != "<tool_call>", **looks}) for tag in TAGS]
    tokenizer.add_tokens(added)
    return tokenizer


def by_whole_prefixes(text, ids, spans, encode):
    """The same definition, every prefix tokenised whole."""

    def place(border):
        head = encode([text[:border]])[0]
        return next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))

    return [(at, weight) for start, end, weight in spans for at in range(place(start), place(end))]


@pytest.mark.parametrize("looks", OTHERS, ids=lambda own: next(iter(own), "alone"))
@pytest.mark.parametrize("name", BUILT)
def test_tokens_of_pieces_are_those_of_whole_texts(name, looks):
    tokenizer = with_tags(BUILT[name](), **looks)
    special_tokens(tokenizer)
    encode, draw, merged = encoder(tokenizer), random.Random(name), 0

    def plainly(texts):
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    for _ in range(300):
        text = "".join(draw.choice(TAGS if draw.random() < 0.3 else WORDS) for _ in range(draw.randrange(1, 12)))
        inside = {i for tag in re.finditer("|".join(map(re.escape, TAGS)), text) for i in range(*tag.span())[1:]}
        places = [i for i in range(len(text) + 1) if i not in inside]
        borders = sorted(draw.choice(places) for _ in range(2 * draw.randrange(1, 4)))
        spans = [(a, b, draw.random()) for a, b in zip(borders[::2], borders[1::2], strict=True)]
        [ids] = plainly([text])
        assert encode([text, text[::-1]]) == [ids, *plainly([text[::-1]])], text
        found, moved = token_spans(text, ids, spans, encode)
        each = [(at, weight) for start, end, weight in found for at in range(start, end)]
        assert each == by_whole_prefixes(text, ids, spans, plainly), (text, spans)
        heads = plainly([text[:a] for a, _, _ in spans])
        assert moved == [len(head) - len(os.path.commonprefix([head, ids])) for head in heads]
        merged += sum(moved)
    assert merged or name == "bytes"
