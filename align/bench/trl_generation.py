"""TRL's generation as GRPO calls it, in a process of its own: its vLLM compiles, and changes the process."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from align.rollout.engine import Sampling

CACHE_GIB = "1"


class TrlFailed(RuntimeError):
    """TRL's path does not run here; the message is its exception's."""


class TrlProcess:
    """A GRPO trainer that never trains; weights are those of the checkpoint, so nothing is synchronised."""

    def __init__(self, model: str, prompts: list[list[int]], sampling: Sampling, *, vllm: bool, log_file: Path) -> None:
        """Start it, with a batch that holds every completion of the prompts.

        Args:
            model: folder of the policy; its tokens that end a completion are the ones that TRL looks for.
            vllm: in the trainer's process ("colocate"), else transformers' `generate`.
            log_file: what the process prints is added there.

        Raises:
            TrlFailed: it did not start.
        """
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, model, prompts, sampling, vllm, log_file)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that its death ends our wait
        self.figures = self._reply()
        """Versions, what the model is run in, and the seconds that the start took."""

    def tokens(self) -> int:
        """Complete every prompt, and count."""
        self.pipe.send("generate")
        return self._reply()["tokens"]

    def close(self) -> None:
        """End the process."""
        self.pipe.send("end")
        self.process.join(timeout=60)
        self.process.kill()

    def _reply(self) -> dict[str, Any]:
        try:
            reply = self.pipe.recv()
        except EOFError:
            self.process.join()
            reply = {"error": f"its process ended with exit code {self.process.exitcode}"}
        if "error" in reply:
            raise TrlFailed(reply["error"])
        return reply


def _serve(pipe: Connection, model: str, prompts: list[list[int]], sampling: Sampling, vllm: bool, log: Path) -> None:
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    try:
        began = time.perf_counter()
        trainer, figures = _trainer(model, prompts, sampling, vllm, log.parent / "trl")
        pipe.send(figures | {"start_seconds": time.perf_counter() - began})
        repeated = [ids for ids in prompts for _ in range(sampling.completions)]
        while pipe.recv() == "generate":
            completions, _ = trainer._generate_single_turn(repeated, None, {}, sampling.completions)
            pipe.send({"tokens": sum(map(len, completions))})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _trainer(
    model: str, prompts: list[list[int]], sampling: Sampling, vllm: bool, folder: Path
) -> tuple[Any, dict[str, Any]]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": CACHE_GIB}
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    count = len(prompts) * sampling.completions
    config = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=count,
        steps_per_generation=1,
        num_generations=sampling.completions,
        max_completion_length=sampling.max_tokens,
        temperature=sampling.temperature,
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_max_model_length=max(map(len, prompts)) + sampling.max_tokens,
        seed=sampling.seed,
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=_no_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["unused"] * count}),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer._last_loaded_step = trainer.state.global_step  # else it would synchronise, which fails on a CPU
    figures: dict[str, Any] = {"trl": trl.__version__, "dtype": "float32"}
    if vllm:  # there is no argument for its dtype: it takes a half precision
        settings = trainer.vllm_generation.llm.llm_engine.vllm_config
        figures["dtype"] = str(settings.model_config.dtype).removeprefix("torch.")
        figures["compiled"] = settings.compilation_config.mode.name != "NONE"
    return trainer, figures


def _no_reward(completions: list[Any], **_: Any) -> list[float | None]:
    return [None] * len(completions)
