"""A Modelfile's template gives what the chat template gives, read as Go reads it; another family is not guessed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from align.export.modelfile import FAMILIES, write_modelfile
from align.shipped import with_shipped_paths

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}" + (
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n" + (
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TALK = [
    {"role": "user", "content": " Who?\n"},
    {"role": "assistant", "content": "You."},
    {"role": "user", "content": "And {{ .Role }}?"},
]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(with_shipped_paths("data/story-policy")))


@pytest.mark.parametrize(("family", "template"), [("chatml", CHATML), ("llama 3", LLAMA), ("gemma", GEMMA)])
def test_a_known_familys_template_is_what_the_chat_template_writes(tokenizer, tmp_path, family, template):
    tokenizer.chat_template = template
    write_modelfile(SimpleNamespace(tokenizer=tokenizer, folder=tmp_path))
    text = (tmp_path / "Modelfile").read_text()
    found = re.fullmatch(r'FROM \./model\.gguf\nTEMPLATE """(.*)"""\nPARAMETER stop "(.*)"\n', text, re.DOTALL)
    written = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert found and as_go(found[1], TALK) == written.removeprefix(tokenizer.bos_token)
    assert f"You.{found[2]}" in written and len(FAMILIES) == 3


@pytest.mark.parametrize(
    "template", [CHATML.replace("\n{{", ": {{"), "{{ messages[0]['content'] }}", "{{ nothing() }}"]
)
def test_another_template_is_not_guessed(tokenizer, tmp_path, template):
    tokenizer.chat_template = template
    write_modelfile(SimpleNamespace(tokenizer=tokenizer, folder=tmp_path))
    assert not (tmp_path / "Modelfile").exists()


def as_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of one range over the messages; `{{-` takes the white space before it."""
    template = re.sub(r"\s*\{\{-", "{{", template)
    before, inner, after = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()

    def turn(message: dict[str, str]) -> str:
        def chosen(match: re.Match[str]) -> str:
            return match[2] if message["role"] == match[1] else match[3]

        text = re.sub(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}', chosen, inner)
        return re.sub(r"\{\{ \.(Role|Content) \}\}", lambda match: message[match[1].lower()], text)

    return before + "".join(turn(message) for message in messages) + after
