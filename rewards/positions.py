"""How many tokens a model has positions for, where that is a table that ends."""

import re
from typing import Any

from torch import nn

TABLE = re.compile(r"(?:^|\.)(?:wpe|embed_positions|positions?_embed\w*|pos_embed\w*|pos_emb)$")
BY_CONFIG = {"gptj": "n_positions", "codegen": "n_positions", "ctrl": "n_positions", "mpt": "max_seq_len"}
"""Models whose table is no embedding: the config's key that says how long it is."""


def table_size(model: nn.Module) -> int | None:
    """Tokens that a model's table of positions holds; None for rotary, relative and ALiBi positions, which go on.

    RoBERTa and its like begin behind the padding token's id, OPT and BART behind an offset.

    Args:
        model: of transformers; its weights are not read, so they may be on the meta device.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    if key := BY_CONFIG.get(text.model_type):
        return int(getattr(text, key))
    sizes = [_size(module) for name, module in model.named_modules() if TABLE.search(name) and _is_text(name, module)]
    return min(sizes, default=None)


def _is_text(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not re.search(r"vision|image|visual|audio|encoder_decoder", name)


def _size(module: Any) -> int:
    if hasattr(module, "offset"):
        return module.num_embeddings - module.offset
    return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
