"""Ollama's Modelfile: the GGUF file, and the chat template in Ollama's own language where its family is known."""

import logging
from typing import Any

from align.export.made import Made

log = logging.getLogger("align")

FILE = "Modelfile"
FAMILIES = {
    "chatml": (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama 3": (
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": (
        '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}\n'
        "{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
        "<end_of_turn>",
    ),
}
"""By family: Ollama's template for it, and what ends a turn."""
TALK = (
    ({"role": "user", "content": "One?"},),
    (
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ),
)
"""Conversations by which a template is known: it is of a family if it writes them as the family does."""


def write_modelfile(made: Made) -> None:
    """A Modelfile beside `model.gguf`; of a template that is of no known family there is none, and that is said."""
    template = made.tokenizer.chat_template
    if template is None:
        lines = ["FROM ./model.gguf", 'TEMPLATE "{{ .Prompt }}"']
    elif (family := family_of(made.tokenizer)) is not None:
        text, end = FAMILIES[family]
        lines = ["FROM ./model.gguf", f'TEMPLATE """{text}"""', f'PARAMETER stop "{end}"']
    else:
        log.warning("no Modelfile: the chat template is of none of %s, and is not guessed", ", ".join(FAMILIES))
        return
    (made.folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def family_of(tokenizer: Any) -> str | None:
    """The family whose turns a tokenizer's chat template writes exactly, system message or start token aside."""
    start = str(tokenizer.bos_token or "")
    for name in FAMILIES:
        try:
            written = [
                tokenizer.apply_chat_template(list(talk), tokenize=False, add_generation_prompt=True) for talk in TALK
            ]
        except Exception:  # whatever a template makes of a conversation that is not its own
            return None
        if [text.removeprefix(start) for text in written] == [as_family(name, talk) for talk in TALK]:
            return name
    return None


def as_family(name: str, messages: Any) -> str:
    """What Ollama makes of a conversation by a family's template."""
    if name == "chatml":
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + (
            "<|im_start|>assistant\n"
        )
    if name == "llama 3":
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        turns = (header.format(m["role"]) + m["content"] + "<|eot_id|>" for m in messages)
        return "".join(turns) + header.format("assistant")
    roles = {"assistant": "model"}
    turns = (f"<start_of_turn>{roles.get(m['role'], m['role'])}\n{m['content']}<end_of_turn>\n" for m in messages)
    return "".join(turns) + "<start_of_turn>model\n"
