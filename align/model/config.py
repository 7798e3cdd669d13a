"""The recipe's `policy`, `reference` and `token_rewards` sections: the models, and what the frozen ones say."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from align.model.adapters import AdapterConfig, Lora
from align.section import Free, Strict


class PolicySection(Strict):
    """The model that is trained."""

    model: str
    """A local folder, or a hub name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are held in; float16 trains poorly, bfloat16 is the usual choice on a GPU."""
    adapter: AdapterConfig = Lora()
    """How it is trained: an adapter by name, or `{name: full}`."""
    start_adapter: str | None = None
    """An existing (say SFT) adapter to go on training; it is then also the reference."""
    start_run: str | None = None
    """A finished run of the same model and adapter: start from what it trained, and keep the reference as it is."""
    quantization: Literal["4bit"] | None = None
    """QLoRA: 4-bit base weights; needs bitsandbytes and a GPU."""
    attention: str | None = None
    """transformers' attention implementation; by default its own choice."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template; `plain` names one that ships and suits base models."""
    trust_remote_code: bool = False
    """Run model code from the hub. Off unless you ask."""


class ReferenceSection(Strict):
    """What the policy is held against, and where its log-probabilities come from."""

    name: Literal["initial", "moving"] = "initial"
    """`initial`: the policy's start. `moving`: it follows the policy (TR-DPO), so that training computes it in every
    step; what is held out is measured against the start."""
    every: PositiveInt = 512
    """Optimizer steps between two moves."""
    mixture: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy's weights in the moved reference, the rest are its own; 1 is a hard update."""
    cache: bool = True
    """Compute them once and keep them on disk; off: a second forward pass in every step."""
    cache_dir: Annotated[str | None, Free()] = None
    """Folder of the cache; by default below the user's cache folder."""


class ContrastSection(Strict):
    """Token rewards from the reference's own opinion: a completion's tokens read under two opposite instructions."""

    name: Literal["contrast"] = "contrast"
    better: str | None = None
    """Text with `{prompt}` (in a conversation it becomes the last user message), perhaps with `{response}`; by default
    it says that the answer is helpful, correct, coherent and concise."""
    worse: str | None = None
    """The same for the opposite."""

    @field_validator("better", "worse")
    @classmethod
    def _has_a_prompt(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("a template needs a `{prompt}`, the place of the row's prompt")
        return value


class TrainedSection(Strict):
    """Token rewards from a model that was trained on preferences: its log-ratio to the reference."""

    name: Literal["log_ratio"] = "log_ratio"
    model: str
    """A run directory, an adapter's folder, a model's folder or a hub name; of the policy's tokenizer."""
    squash: bool = True
    """sigmoid(log-ratio) - 0.5, as for the contrast; off: the log-ratio itself, in nats."""


TokenRewards = Annotated[ContrastSection | TrainedSection, Field(discriminator="name")]
