"""vLLM's second model runner on a CPU: its Triton kernels run in Triton's interpreter, slowly.

`second_runner.py FOLDER DECODING SAMPLING PROMPTS CONTEXTS` prints what the engine samples as a line of JSON. Needs a
real `triton` (the CPU environment has an empty one).
"""

import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


class InterpretedDriver:
    """Stands in for the CPU driver that Triton's wheel does not have."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(folder: str, decoding: str, sampling: str, prompts: str, contexts: str) -> None:
    import triton.backends
    from triton.runtime.driver import driver

    triton.backends.backends["cpu"] = SimpleNamespace(driver=InterpretedDriver, compiler=None)
    driver.set_active(InterpretedDriver())

    from align.rollout.engine import Sampling
    from align.rollout.vllm_arguments import VllmArguments
    from align.rollout.vllm_engine import VllmEngine

    arguments = VllmArguments(folder, "float32", 256, cache_bytes=16 << 20, decoding=json.loads(decoding))
    engine = VllmEngine(arguments)
    drawn = engine.sample(json.loads(prompts), Sampling(**json.loads(sampling)), json.loads(contexts))
    completions = {place: [asdict(one) for one in own] for place, own in drawn}
    core = engine.llm.llm_engine.engine_core.engine_core
    runner = type(core.model_executor.driver_worker.worker.model_runner).__module__
    print(json.dumps({"runner": runner, "completions": completions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
