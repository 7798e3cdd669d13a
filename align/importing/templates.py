"""How other tools join messages to a text: their templates by name, as small tables, and what stands for them here.

Sources: LLaMA-Factory's data/template.py, ms-swift's template/templates/*.py, axolotl's utils/chat_templates
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from align.data.messages import Message
from align.importing.plan import Plan


class Pieces(NamedTuple):
    """What stands around the contents of messages."""

    user: str
    assistant: str
    system: str = "{}\n\n"
    bos: bool = False
    """Whether the start token opens the text."""
    default_system: str = ""
    """What is said where the row has no system text."""
    in_user: bool = False
    """Whether the system text stands within the first user message."""
    eos: bool = False
    """Whether the tokenizer's end token ends an answer."""
    models: str = "(?!)"
    """The models whose own template this is, as a pattern of their names."""


CHATML = Pieces(
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "{}<|im_end|>\n",
    "<|im_start|>system\n{}<|im_end|>\n",
    models=r"smollm2?-.*instruct|chatml|hermes",
)
QWEN = CHATML._replace(
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", models=r"qwen-?2(\.5)?-.*"
)
LLAMA3 = Pieces(
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "{}<|eot_id|>",
    "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    bos=True,
    models=r"llama-3-.*instruct",
)
GEMMA = Pieces(
    "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "{}<end_of_turn>\n",
    bos=True,
    in_user=True,
    models=r"gemma-?[23]?-.*it",
)
MISTRAL = Pieces("[INST] {}[/INST]", " {}", bos=True, in_user=True, eos=True, models=r"mi[sx]tral-.*instruct")
TEMPLATES: Mapping[str, Pieces] = {
    "chatml": CHATML,
    "qwen": QWEN,
    "qwen2_5": QWEN,
    "qwen_25": QWEN,
    "qwen3_nothink": CHATML._replace(models=r"qwen-?3-.*(instruct|2507)"),
    "yi": CHATML._replace(models=r"yi-.*chat"),
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "mistral": MISTRAL,
    "phi4": Pieces(
        "<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",
        "{}<|im_end|>",
        "<|im_start|>system<|im_sep|>{}<|im_end|>",
        models="phi-4.*",
    ),
    "deepseek3": Pieces("<｜User｜>{}<｜Assistant｜>", "{}", bos=True, eos=True, models="deepseek-v3.*"),  # noqa: RUF001
    "zephyr": Pieces("<|user|>\n{}</s>\n<|assistant|>\n", "{}</s>\n", "<|system|>\n{}</s>\n", models="zephyr-.*"),
    "vicuna": Pieces(
        "USER: {} ASSISTANT:",
        "{}",
        "{} ",
        eos=True,
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        models="vicuna-.*",
    ),
    "default": Pieces("Human: {}\nAssistant:", "{}\n", "System: {}\n", eos=True),
    "alpaca": Pieces(
        "### Instruction:\n{}\n\n### Response:\n",
        "{}\n\n",
        eos=True,
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
}
"""Name -> its pieces."""
OWN: Mapping[str, str] = {
    "qwen3": r"qwen-?3-.*",
    "llama3_1": r"llama-3\.1-.*instruct",
    "llama3_2": r"llama-3\.[23]-.*instruct",
    "qwen3_5": r"qwen-?3\.5-.*",
    "mistral_small": r"mistral-small-.*",
    "phi_3": r"phi-3-.*",
    "phi_35": r"phi-3\.5-.*",
    "phi_4": r"phi-4-.*",
    "gpt_oss": r"gpt-oss-.*",
}
"""Templates that depend on more than their messages -> the models whose own they are."""
OF_TOKENIZER = ("tokenizer_default", "jinja", "auto", "default_tokenizer")


def write_template(plan: Plan, key: str) -> None:
    """The template by its name: the model's own where it is that, else a Jinja text beside the recipe.

    Raises:
        UserError: a name that is not known here.
    """
    name = plan.template = plan.text(key)
    if not name or name in OF_TOKENIZER or name.startswith("tokenizer_default"):
        plan.drop(key, "the tokenizer's own chat template, as here")
        return
    model = str(plan.value("model_name_or_path")).lower().rpartition("/")[2]
    pattern = TEMPLATES[name].models if name in TEMPLATES else OWN.get(name)
    if pattern is not None and re.search(pattern, model):
        plan.drop(key, "it is the model's own chat template; `--check` compares the token ids")
        return
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        remedy = f"remove it to take the tokenizer's own, or give one of {known}"
        raise plan.mistake(key, f"is no chat template that is known here for {model}; {remedy}")
    plan.chat_template = jinja_text(TEMPLATES[name], bare_end=plan.tool == "axolotl")
    plan.put("policy.chat_template", f"{name}.jinja", (key,), "written beside the recipe from that template's rules")
    if not TEMPLATES[name].eos and plan.tool != "axolotl":  # whose TRL ends every side with the tokenizer's end token
        plan.put("data.append_eos", False, (), "the template's own mark ends an answer")


def jinja_text(pieces: Pieces, *, bare_end: bool = False) -> str:
    """The pieces as a chat template.

    Args:
        bare_end: whether the last answer loses the white space behind it, as axolotl's do.
    """
    system = _around(pieces.system, "ns.system")
    parts = ["{%- set ns = namespace(system=" + _quoted(pieces.default_system) + ") -%}"]
    parts += ["{{- bos_token or '' -}}"] if pieces.bos else []
    parts.append(
        "{%- if messages[0].role == 'system' -%}{%- set ns.system = messages[0].content -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}"
    )
    if not pieces.in_user:
        parts.append(f"{{%- if ns.system -%}}{{{{- {system} -}}}}{{%- endif -%}}")
    fused = f"(({system}) if loop.first and ns.system else '') + message.content"
    content = fused if pieces.in_user else "message.content"
    opening, _, rest = pieces.user.partition("{}")
    answer = _around(pieces.assistant, "message.content") + (" + (eos_token or '')" if pieces.eos else "")
    if bare_end and pieces.assistant != pieces.assistant.rstrip():
        whole, bare = answer, _around(pieces.assistant.rstrip(), "message.content")
        answer = f"({bare}) if loop.last else ({whole})"
    parts.append(
        "{%- for message in messages -%}{%- if message.role == 'user' -%}"
        f"{{{{- {_quoted(opening)} + {content} + {_quoted(rest)} -}}}}"
        "{%- elif message.role == 'assistant' -%}"
        f"{{{{- {answer} -}}}}"
        "{%- endif -%}{%- endfor -%}"
    )
    return "".join(parts) + "\n"


def _around(piece: str, content: str) -> str:
    before, _, after = piece.partition("{}")
    return f"{_quoted(before)} + {content} + {_quoted(after)}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def elements(pieces: Pieces, messages: list[Message]) -> list[str | None]:
    """A conversation as the texts that a tool encodes one by one; None stands for the start token.

    Every answer is one element of its own.
    """
    system = pieces.default_system
    if messages and messages[0]["role"] == "system":
        system, messages = str(messages[0]["content"]), messages[1:]
    found: list[str | None] = [None] if pieces.bos else []
    opening = pieces.system.format(system) if system else ""
    if opening and not pieces.in_user:
        found.append(opening)
    for place, message in enumerate(messages):
        content = str(message["content"])
        if message["role"] == "assistant":
            found.append(pieces.assistant.replace("{}", content))
            continue
        fused = opening + content if pieces.in_user and place == 0 else content
        found.append(pieces.user.replace("{}", fused))
    return found
