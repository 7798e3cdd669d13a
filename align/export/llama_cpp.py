"""llama.cpp as the engine of GGUF files, by llama-cpp-python; without that, transformers' reader of such files."""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.schema import is_messages
from align.errors import UserError
from align.export.gguf_model import write_gguf
from align.export.heldout import Prompt, token_logprobs
from align.export.made import Made
from align.export.merging import load_float32
from align.export.trained import Trained, read_tokenizer_of, source_of

FLOAT32 = 0
"""ggml's number of the type that keys and values are kept in."""
LONGEST = 8192
"""Tokens of the context at most, of which the logits of a whole vocabulary are kept."""


class Model:
    """A whole model's GGUF file."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        self.file = folder / "model.gguf"
        self.by_transformers: Any = None
        if importlib.util.find_spec("llama_cpp") is None:
            self.said = f"transformers {version('transformers')}'s reader of GGUF"
            self.by_transformers = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=self.file.name, dtype=torch.float32
            ).eval()
        else:
            self._open(str(self.file), trained)

    def _open(self, file: str, trained: Trained, **options: Any) -> None:
        import llama_cpp

        self.said = f"llama-cpp-python {llama_cpp.__version__}"
        threads = torch.get_num_threads()
        context = min(AutoConfig.from_pretrained(source_of(trained)).max_position_embeddings, LONGEST)
        try:
            self.model = llama_cpp.Llama(
                file,
                n_ctx=context,
                n_batch=context,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=True,
                type_k=FLOAT32,
                type_v=FLOAT32,
                verbose=False,
                **options,
            )
        except ValueError as error:
            raise UserError(f"llama.cpp cannot load what was written ({error}), so that it is not kept") from None

    def prompt_ids(self, prompt: Prompt) -> list[int] | None:
        if self.by_transformers is not None or prompt.options:
            return None
        if not is_messages(prompt.text):
            return self.model.tokenize(str(prompt.text).encode(), add_bos=True, special=True)
        if prompt.text[-1]["role"] == "assistant":  # type: ignore[index]
            return None
        return self._chat(prompt.text)

    def _chat(self, messages: Any) -> list[int]:
        """As llama-cpp-python's own chat does it: the file's template, and a start token where that writes none."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.model.metadata.get("tokenizer.chat_template")
        if template is None:
            return []
        start, end = (
            self.model.detokenize([token], special=True).decode() if token >= 0 else ""
            for token in (self.model.token_bos(), self.model.token_eos())
        )
        made = Jinja2ChatFormatter(template=template, bos_token=start, eos_token=end)(messages=messages)
        return self.model.tokenize(made.prompt.encode(), add_bos=not made.added_special, special=True)

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        if self.by_transformers is not None:
            return token_logprobs(self.by_transformers, ids, start)
        self.model.reset()
        self.model.eval(list(ids))
        logits = torch.from_numpy(self.model.scores[start - 1 : len(ids) - 1].copy())
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


class Adapter(Model):
    """An adapter's GGUF file on its base, which is written as GGUF in float32 for that."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        self.by_transformers = None
        model = load_float32(source_of(trained), trained)
        tokenizer = read_tokenizer_of(trained)
        with TemporaryDirectory() as place:
            base = Path(place, "base.gguf")
            write_gguf(model, Made(trained, tokenizer, Path(place), "base", "float32"), base, "float32")
            del model
            self._open(str(base), trained, lora_path=str(folder / "adapter.gguf"))
