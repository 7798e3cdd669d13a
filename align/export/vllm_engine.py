"""vLLM as what reads an export again: in a process of its own, as it changes threads, environment and random state."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor
from transformers import AutoConfig

from align.errors import UserError
from align.export.formats import Format
from align.export.heldout import HeldOut, Prompt
from align.export.made import Made
from align.export.served import adapter_rank, not_servable, room_for
from align.export.trained import Trained, source_of
from align.export.vllm_start import CACHE_BYTES, check_installed, environment, on_cpu

READS = ("peft", "transformers")
"""Formats that it reads."""
ROOM = 64
"""Tokens by which a prompt may be longer than the policy read it, as with a broken template, and is still compared."""


def check_reads(form: Format, trained: Trained) -> None:
    """Refuse, before a model is loaded, what vLLM cannot read here.

    Raises:
        UserError: it is not installed, or does not serve such a format or adapter.
    """
    if form.name not in READS or trained.outputs:
        what = "reward models" if trained.outputs else f"--to {form.name}"
        raise UserError(f"--engine vllm: language models in {' and '.join(READS)} are compared by it, not {what}")
    check_installed("--engine vllm", "leave it out")
    if form.of_adapter and (why := not_servable(trained.folder)):
        raise UserError(f"--engine vllm: it does not serve {trained.folder} as an adapter, since {why}; add --merge")


class Vllm:
    """A folder that vLLM loads, computed in float32."""

    def __init__(self, process: subprocess.Popen, log: IO[bytes]) -> None:
        self.process, self.log = process, log
        self.said = "vllm"

    def start(self, made: Made, held: HeldOut) -> None:
        """Load what was written.

        Raises:
            UserError: vLLM cannot; with what it says.
        """
        folder, source = str(made.folder), made.folder
        adapter = adapter_rank(made.folder)
        if adapter:
            source = source_of(made.trained)
        longest = ROOM + max(
            len(prompt) + len(own)
            for prompt, every in zip(held.prompt_ids, held.completion_ids, strict=True)
            for own in every
        )
        arguments = {
            "dtype": "float32",
            "tokenizer": folder,  # beside an adapter vLLM takes the base's by itself
            "max_model_len": longest,
            "generation_config": "vllm",
            "trust_remote_code": made.trained.trust_remote_code,
            "disable_log_stats": True,
        }
        if adapter:
            arguments |= {"enable_lora": True, "max_lora_rank": room_for(adapter)}
        if not torch.cuda.is_available():
            arguments |= on_cpu(longest, _cache_bytes(source, made.trained, longest))
        version = self._ask(model=str(source), adapter=folder if adapter else None, arguments=arguments)
        self.said = f"vllm {version}"

    def prompt_ids(self, prompt: Prompt) -> list[int] | None:
        found: list[int] = self._ask(prompt=prompt.text, options=prompt.options)
        return found

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        return torch.tensor(self._ask(ids=list(ids), start=start))

    def _ask(self, **request: Any) -> Any:
        """
        Raises:
            UserError: it cannot, or ended.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline() or "{}")
        except BrokenPipeError:
            reply = {}
        if "answer" not in reply:
            raise UserError(
                f"--engine vllm: the export is not kept, as vLLM ended: {reply.get('error') or self._last()}"
            )
        return reply["answer"]

    def _last(self) -> str:
        """The last line that its process has printed."""
        self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


@contextmanager
def opened(made: Made, held: HeldOut) -> Iterator[Vllm]:
    """vLLM with what was written, for as long as the context lasts."""
    # The one token that is drawn after a text of full length has a place beyond the model's table, and is not read.
    wanted = environment(os.environ) | {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    command = [sys.executable, "-m", "align.export.vllm_worker"]
    with (
        TemporaryFile() as log,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | wanted,
            text=True,
        ) as process,
    ):
        try:
            engine = Vllm(process, log)
            engine.start(made, held)
            yield engine
        finally:
            process.kill()


def _cache_bytes(source: Path, trained: Trained, longest: int) -> int:
    """Keys and values of one text in float32, at most, twice."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trained.trust_remote_code).get_text_config()
    return max(CACHE_BYTES, 2 * longest * config.num_hidden_layers * config.hidden_size * 2 * 4)
