"""Structures of chat templates for conversations of several turns: TRL's wheel is read in place, the others are here.

Ours follow the structure that the named models document (end of turn, where tool results stand, what of earlier turns
is written otherwise), not their wording.
"""

import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import trl

SHIPPED = Path(trl.__file__).parent / "chat_templates"
PLAIN = Path(__file__).parents[2] / "recipes" / "templates" / "plain.jinja"

CALLS = "{% for c in m.tool_calls %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}"
CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}" + CALLS + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(head, end, answer="assistant", *, calls=CALLS, start="{{ bos_token }}", behind=""):
    """A template whose turns have a head with the role and an end token."""
    role = "('" + answer + "' if m.role == 'assistant' else m.role)"
    begin, close = head.split("ROLE")
    return (
        start
        + "{% for m in messages %}{{ '"
        + begin
        + "' + "
        + role
        + " + '"
        + close
        + "' + m.content }}"
        + calls
        + "{{ "
        + end
        + " }}"
        + behind
        + "{% endfor %}{% if add_generation_prompt %}{{ '"
        + begin
        + answer
        + close
        + "' }}{% endif %}"
    )


OWN = {
    "chatml": CHATML,
    # a space before an answer, no generation prompt, the system text before the last question (so it moves)
    "mistral": (
        "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% if m == asked[-1] and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% elif m.tool_calls %}"
        "{{ '[TOOL_CALLS]' + m.tool_calls[0].function | tojson + eos_token }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
    ),
    "granite": turns("<|start_of_role|>ROLE<|end_of_role|>", "'<|end_of_text|>\n'", start=""),
    "zephyr": turns("<|ROLE|>\n", "eos_token + '\n'", start=""),
    "olmo": turns(
        "<|ROLE|>\n",
        "(eos_token if m.role == 'assistant' else '')",
        behind="{% if m.role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}",
    ),
    "phi4": turns("<|im_start|>ROLE<|im_sep|>", "'<|im_end|>'", start=""),
    "command_r": (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(m.role, '<|SYSTEM_TOKEN|>') }}"
        "{{ '<results>' + m.content + '</results>' if m.role == 'tool' else m.content | trim }}"
        + CALLS
        + "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    # the answer to a tool's result goes on in the same turn, without a head of its own
    "deepseek": (
        "{{ bos_token }}{% set ns = namespace(asked=false) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.asked = true %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{% if ns.asked %}{{ '<|Assistant|>' }}{% endif %}{% set ns.asked = false %}"
        "{{ m.content }}" + CALLS + "{{ eos_token }}"
        "{% elif m.role == 'tool' %}{{ '<|tool_output|>' + m.content + '<|tool_output_end|>' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and ns.asked %}{{ '<|Assistant|>' }}{% endif %}"
    ),
    # what is thought stands in the turns behind the last question only; a call and its result keep it
    "thinking": (
        "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.reasoning_content and loop.index0 > ns.asked %}"
        "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # the reasoning and the call each on a channel; a final answer ends otherwise once others follow
    "harmony": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% for c in m.tool_calls %}{{ '<|start|>assistant<|channel|>commentary ' + c.function | tojson + '<|call|>' }}"
        "{% endfor %}{% if not m.tool_calls %}"
        "{{ '<|start|>assistant<|channel|>final ' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
        "{% else %}{{ '<|start|>' + m.role + ' ' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    # no end of turn: generation stops at the special token that opens the next one
    "glm": (
        "{% for m in messages %}{{ '<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>' }}"
        "{{ '\n' + m.content }}" + CALLS + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "plain": PLAIN.read_text(),
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}" + CALLS + "{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
OWN["marks_too_much"] = OWN["marked"].replace(
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}",
    "{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
)


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    calls = [{"type": "function", "id": "abcdefghi", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(text):
    return {"role": "tool", "content": text, "name": "add", "tool_call_id": "abcdefghi"}


def said(role, content, **keys):
    return {"role": role, "content": content, **keys}


ASKED = [said("user", "What is 2 + 2?")]
CONVERSATIONS = {
    "tools": [
        *(call("add", a=2, b=2), result("4"), said("assistant", "It is four.")),
        *(said("user", "And 3 + 4?"), call("add", a=3, b=4), result("7"), said("assistant", "Seven.")),
        *(said("user", "Sure?"), said("assistant", "Yes, quite.")),
    ],
    "turns": [
        *(said("assistant", "It is four."), said("user", "And 3 + 4?"), said("assistant", "Seven.")),
        *(said("user", "Sure?"), said("assistant", "Yes, quite.")),
    ],
    "thinking": [
        {**call("add", a=2, b=2), "reasoning_content": "I add."},
        result("4"),
        said("assistant", "It is four.", reasoning_content="The tool says so."),
        said("user", "Sure?"),
        said("assistant", "Yes, quite.", reasoning_content="I am."),
    ],
    "steps": [
        *({**call("add", a=2, b=2), "reasoning_content": "I add."}, result("4")),
        *({**call("add", a=4, b=1), "reasoning_content": "I add again."}, result("5")),
        said("assistant", "Five.", reasoning_content="The tool says so."),
    ],
}
"""Of three turns each, from one question on; `steps` has no further question."""


@dataclass(frozen=True)
class Structure:
    """A template, a conversation that it can write, and what is known of the two."""

    name: str
    conversation: str
    end: str
    """The tokens of which the first ends a turn; empty where the next turn's first token does."""
    rewritten: tuple[int, ...] = ()
    """Messages of the completion, from 1, that generation would see otherwise than they stand in the whole."""
    shipped: bool = False

    @property
    def template(self):
        return (SHIPPED / f"{self.name}.jinja").read_text() if self.shipped else OWN[self.name]


def own(name, conversation, end, *rewritten):
    return Structure(name, conversation, end, rewritten)


def shipped(name, conversation, end, *rewritten):
    return Structure(name, conversation, end, rewritten, shipped=True)


CHAT_END, COHERE_END = "<|im_end|>", "<|END_OF_TURN_TOKEN|>"
STRUCTURES = [
    own("chatml", "tools", CHAT_END),
    own("chatml", "turns", CHAT_END),
    own("marked", "tools", CHAT_END),
    own("marks_too_much", "tools", CHAT_END),
    own("thinking", "steps", CHAT_END),
    own("thinking", "thinking", CHAT_END, 1, 3),
    own("mistral", "tools", "</s>"),
    own("granite", "tools", "<|end_of_text|>"),
    own("zephyr", "tools", "</s>"),
    own("olmo", "tools", "</s>"),
    own("phi4", "tools", CHAT_END),
    own("command_r", "tools", COHERE_END),
    own("deepseek", "tools", "</s>"),
    own("harmony", "tools", "<|call|><|return|>", 3, 7),
    own("glm", "tools", ""),
    own("plain", "turns", "</s>"),
    shipped("qwen2_5", "tools", CHAT_END),
    shipped("qwen2_5_training", "tools", CHAT_END),
    shipped("qwen3_instruct_2507", "tools", CHAT_END),
    shipped("qwen3", "steps", CHAT_END),
    shipped("qwen3", "thinking", CHAT_END, 1, 3),
    shipped("qwen3_training", "thinking", CHAT_END),
    shipped("qwen3_5_think", "thinking", CHAT_END, 1, 3),
    shipped("llama3", "turns", "<|eot_id|>"),
    shipped("llama3_1", "tools", "<|eot_id|>"),
    shipped("gemma", "turns", "<end_of_turn>"),
    shipped("gemma3", "turns", "<end_of_turn>"),
    shipped("phi3", "turns", "<|end|>"),
    shipped("phi3_5", "turns", "<|end|>"),
    shipped("cohere", "turns", COHERE_END),
    shipped("cohere2", "turns", COHERE_END),
    shipped("deepseek_r1_distill", "turns", "<｜end▁of▁sentence｜>", 1, 3),
    shipped("lfm2_v2", "tools", CHAT_END),
    shipped("gptoss", "turns", "<|return|>", 1, 3),
    shipped("glm4moe", "turns", ""),
]


def with_its_tokens(tokenizer, structure):
    """A tokenizer like the given one, with a token for each of the template's; those of XML are not special."""
    tokenizer = deepcopy(tokenizer)
    tags = set(re.findall(r"<[|｜][^<>\s]+[|｜]>|<\w+_of_\w+>|\[/?[A-Z_]+\]", structure.template))
    tags |= {"<|observation|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"}
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(tags)})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer
