"""Small templates of the structures that models ship, one habit each, and a tokenizer that knows their tokens."""

from copy import deepcopy

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>")
SPECIAL += ("<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|return|>", "<|start|>", "<|channel|>")
PLAIN_ADDED = ("<think>", "</think>")

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # reasoning from its own key or out of the content, in the last turn only; nothing is thought where that is asked
    "qwen3": (
        "{% for m in messages %}{% set c = namespace(text=m.content, thought=m.reasoning_content or '') %}"
        "{% if m.role == 'assistant' and '</think>' in c.text %}"
        "{% set c.thought = c.text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set c.text = c.text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + c.thought + '\n</think>\n\n' }}{% endif %}"
        "{{ c.text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    ),
    # cuts at </think> in every turn, and its generation prompt begins to think
    "r1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    ),
    # the system text in the first user's turn
    "gemma": (
        "{{ bos_token }}{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{{ (s if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # a system text is written before the last user's turn, so in the middle of a longer conversation
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.revindex < 3 and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    # no end of turn, and what is thought only from its key
    "glm": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "{{ '<think>' + (m.reasoning_content or '') | trim + '</think>\n' }}{% endif %}"
        "{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    # its own name for what is thought, and a default in the place of any system text
    "harmony": (
        "{{ '<|start|>system You are a machine.' }}"
        "{% for m in messages if m.role != 'system' %}{{ '<|start|>' + m.role }}"
        "{% if m.thinking and loop.last %}{{ '<|channel|>analysis ' + m.thinking + '<|end|><|start|>assistant' }}"
        "{% endif %}{{ '<|channel|>final ' + m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "r1": "</s>", "gemma": "<end_of_turn>"}
END |= {"mistral": "</s>", "harmony": "<|return|>"}
"""What a template writes behind an answer; glm nothing."""


def with_their_tokens(tokenizer):
    """A tokenizer like the given one that has a token for each of the templates' too."""
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL)})
    tokenizer.add_tokens(list(PLAIN_ADDED))
    return tokenizer
