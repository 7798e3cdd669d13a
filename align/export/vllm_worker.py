"""vLLM's process: `python -m align.export.vllm_worker` reads requests as lines of JSON and writes replies so.

The first names the model; it ends when its input closes.
"""

import json
import os
import sys
import traceback
from typing import Any


class Reader:
    """A model that vLLM has loaded, with its adapter."""

    def __init__(self, model: str, adapter: str | None, arguments: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        self.llm = LLM(model, **arguments)
        self.params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self.lora = LoRARequest("export", 1, adapter) if adapter else None
        if self.lora:
            self.llm.llm_engine.add_lora(self.lora)  # a bad one raises here; inside a request it would never end

    def version(self) -> str:
        from vllm import __version__

        return __version__

    def logprobs(self, ids: list[int], start: int) -> list[float]:
        """Of the tokens from place `start` on; nats."""
        given = self._only(self.llm.generate({"prompt_token_ids": ids}, **self._how())).prompt_logprobs
        return [place[token].logprob for token, place in zip(ids[start:], given[start:], strict=True)]

    def prompt_ids(self, prompt: Any, options: dict[str, Any]) -> list[int]:
        """As vLLM's users give it one: a text, or messages; none where it has no template for these."""
        if isinstance(prompt, str):
            return self._ids(self.llm.generate(prompt, **self._how()))
        goes_on = prompt[-1]["role"] == "assistant"
        try:
            found = self.llm.chat(
                prompt,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                chat_template_kwargs=options,
                **self._how(),
            )
        except ValueError:  # of a tokenizer without a template
            traceback.print_exc()
            return []
        return self._ids(found)

    def _how(self) -> dict[str, Any]:
        return {"sampling_params": self.params, "lora_request": self.lora, "use_tqdm": False}

    def _ids(self, outputs: list[Any]) -> list[int]:
        return list(self._only(outputs).prompt_token_ids)

    def _only(self, outputs: list[Any]) -> Any:
        (output,) = outputs
        return output


def main() -> None:
    """Answer until the input closes."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    reader: Reader | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        try:
            if reader is None:
                reader = Reader(**request)
                answer = reader.version()
            else:
                answer = reader.logprobs(**request) if "ids" in request else reader.prompt_ids(**request)
            reply = {"answer": answer}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
