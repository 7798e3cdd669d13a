"""The recipe's `rollout` and `online` sections."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from align.section import Free, Grows, Named, Strict
from rewards.config import ScorerConfig

PLAIN_OPTIONS = ("dtype", "quantization", "kv_cache_dtype", "attention_backend", "device", "swap_space", "runner")
"""Arguments of `vllm.LLM` that are text and name no code."""


class Transformers(Strict):
    """transformers' `generate` in this process: slow, and good for every model."""

    name: Literal["transformers"] = "transformers"
    tokens_per_batch: Annotated[PositiveInt, Free()] = 8192
    """Rows times (prompt and completion) tokens of one `generate` at most."""


class Vllm(Strict):
    """vLLM on this machine, in a process of its own; `align doctor --install rollout-cpu` or `rollout` installs it."""

    name: Literal["vllm"] = "vllm"
    cache_gib: Annotated[PositiveFloat, Free()] = 0.5
    """Memory of the key-value cache on a CPU, in GiB; on a GPU vLLM takes half of all, or what `options` says."""
    while_training: Annotated[Literal["auto", "resident", "asleep", "stopped"], Free()] = "auto"
    """What the engine does while the policy trains; auto: resident on a CPU, where sleep frees nothing, else asleep."""
    timeout: Annotated[PositiveFloat, Free()] = 600.0
    """Seconds without a finished prompt after which the engine is taken for stuck and started again."""
    sampler: Literal["auto", "align", "vllm"] = "auto"
    """What draws tokens inside vLLM: our kernel, which also gives every token's log-probability under the policy itself
    and the entropy, or vLLM's own; auto: ours, but in versions of vLLM that it is not known to fit."""
    in_process: bool = False
    """For tests: vLLM in this process, which it changes (threads, random state, environment)."""
    options: dict[str, Any] = {}
    """More arguments of `vllm.LLM`, such as tensor_parallel_size or gpu_memory_utilization; a recipe of a stranger may
    not set one that can name code, such as worker_cls."""

    @field_validator("options")
    @classmethod
    def _is_no_consent(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "trust_remote_code" in value:
            raise ValueError("trust_remote_code is no option: consent is --trust-remote-code, on the command line")
        return value


class VllmServer(Strict):
    """Served models (`vllm serve`, or what speaks its API): requests go to the endpoint with the fewest in flight.

    Start every server with `--generation-config vllm --logprobs-mode processed_logprobs`, and for a policy that changes
    with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and `--enable-lora` (adapter) or VLLM_SERVER_DEV_MODE=1 (merged; keep such a
    server away from other networks). The servers read the weights from the run directory, by the same path. On a CPU
    add `--no-enable-chunked-prefill --max-num-batched-tokens 4096`, or seeded requests can crash it. Servers draw with
    vLLM's own sampler: one seed gives other completions than on this machine, and no raw log-probabilities.
    """

    name: Literal["vllm-server"] = "vllm-server"
    urls: Annotated[tuple[str, ...], Field(min_length=1), Free()]
    """Such as http://127.0.0.1:8000, one for each server."""
    model: str | None = None
    """The served base model's name; by default the first that a server lists."""
    concurrency: Annotated[PositiveInt, Free()] = 16
    """Prompts in flight at each endpoint."""
    tries: Annotated[PositiveInt, Free()] = 6
    """Attempts at a request, and at a server in a row; after its n-th failure it is left alone for 2^(n-1) seconds, 30
    at most."""
    timeout: Annotated[PositiveFloat, Free()] = 600.0
    """Seconds that one request may take."""
    api_key: Annotated[str | None, Free()] = None
    """Name of the environment variable that holds the key; none is sent otherwise."""


EngineConfig = Annotated[Transformers | Vllm | VllmServer, Field(discriminator="name"), Named("vllm")]


class Contrast(Strict):
    """Tokens that the policy finds likelier than it does in a worse context, or than a weaker policy does.

    Drawn from (1 + strength) z - strength z' over the tokens that are at least `plausible` times as likely as the
    likeliest.

    Source: Li et al. (2210.15097); O'Brien and Lewis (2309.09117)
    """

    name: Literal["contrast"] = "contrast"
    against: str = "prompt"
    """`prompt`: the policy itself after the prompt in the template `worse`; `base`: the model without the adapter; or
    the folder of another adapter of the same model."""
    worse: str | None = None
    """A text with `{prompt}`; in a conversation it takes the place of the last user message. By default it asks for an
    unhelpful answer, as `token_rewards.worse` does."""
    strength: PositiveFloat = 0.5
    plausible: Annotated[float, Field(gt=0, le=1)] = 0.1

    @field_validator("worse")
    @classmethod
    def _has_a_place_for_the_prompt(cls, template: str | None) -> str | None:
        if template is not None and ("{prompt}" not in template or "{response}" in template):
            raise ValueError("needs `{prompt}` where the prompt goes, and no `{response}`")
        return template


class TransferQ(Strict):
    """Of the likeliest tokens those after which a good answer follows: Transfer Q*.

    Drawn from z + strength r over the `candidates` likeliest tokens, where r is the reward of the completion so far,
    the token, and what the baseline goes on to write greedily: a token costs `candidates` continuations and rewards.
    For long completions raise `rollout.engine.timeout` too.

    Source: Chakraborty et al. (2405.20495)
    """

    name: Literal["transfer_q"] = "transfer_q"
    reward: ScorerConfig
    """Of the text that the candidate and its continuation make."""
    candidates: PositiveInt = 10
    strength: PositiveFloat = 1.0
    """1 / alpha of the paper."""
    continuation: Annotated[int, Field(ge=0)] = 20
    """Tokens that the baseline adds at most; 0 scores the text as it is."""
    baseline: str | None = None
    """Folder of the model that continues: of the policy's vocabulary, and aligned already, for this reward or another;
    an unaligned one (the policy's base) makes it controlled decoding."""
    baseline_reward: ScorerConfig | None = None
    """What the baseline was trained for, where that is not `reward`: r becomes exp((r - r_baseline) / 2) r."""

    @field_validator("reward", "baseline_reward")
    @classmethod
    def _scores_a_text_alone(cls, reward: Any) -> Any:
        if getattr(reward, "answer_column", None) or getattr(reward, "listwise", False):
            raise ValueError(f"{reward.name} needs a reference answer or a whole list; name a scorer of single texts")
        return reward

    @model_validator(mode="after")
    def _has_a_baseline(self) -> "TransferQ":
        if not self.baseline:
            raise ValueError(
                "baseline: missing; name the folder of an aligned model with the policy's vocabulary, such as what "
                "`align export RUN FOLDER --to transformers` writes (with the unaligned base it would be controlled "
                "decoding)"
            )
        return self


DecodingConfig = Annotated[Contrast | TransferQ, Field(discriminator="name"), Named("contrast")]


class RolloutSection(Strict):
    """Completions that the policy writes: `align rollout`, and the sampling of an online run.

    The prompts are those of `data.sources`; completions that the rows have are not read.
    """

    completions: PositiveInt = 8
    """Of each prompt: the list size."""
    max_tokens: PositiveInt = 64
    """Of a completion, the end token included; a prompt that leaves no room for it is left out, and counted."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Only tokens at least this likely relative to the likeliest."""
    adaptive_temperature: bool = False
    """Multiply the logits of an uncertain position by 1 to 2.4, as its entropy says; needs `engine: transformers`."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion, besides the model's own."""
    reward: ScorerConfig | None = None
    """Scorer of the completions; without one, `align rollout` writes rows without rewards."""
    decoding: DecodingConfig | None = None
    """How the logits are changed before they are sampled, if at all; needs `engine: vllm`."""
    engine: EngineConfig = Vllm()
    """What samples: vllm, vllm-server or transformers."""
    sync: Literal["auto", "adapter", "merged"] = "auto"
    """How a trained policy gets into vLLM: its adapter, or merged with the base; auto: merged on a CPU and where vLLM
    cannot serve the adapter, else the adapter."""
    agreement_prompts: Annotated[int, Field(ge=0), Free()] = 4
    """Prompts on which the engine's log-probabilities are compared with the trainer's after every change of weights."""
    agreement_bound: Annotated[PositiveFloat | None, Free()] = None
    """Nats of a token by which they may differ without a warning; by default 1e-3, or 0.25 in half precision."""

    @model_validator(mode="after")
    def _engine_can_decode(self) -> "RolloutSection":
        if self.decoding and not isinstance(self.engine, Vllm):
            raise ValueError(f"decoding: {self.decoding.name} needs `engine: vllm`, not {self.engine.name}")
        if self.adaptive_temperature and self.engine.name != "transformers":
            raise ValueError(f"adaptive_temperature: {self.engine.name} has none; set `engine: transformers`")
        if self.adaptive_temperature and self.temperature == 0:
            raise ValueError("adaptive_temperature: temperature 0 takes the likeliest token; leave one of them out")
        return self

    @model_validator(mode="after")
    def _lists_vary(self) -> "RolloutSection":
        if self.temperature == 0 and self.completions > 1:
            raise ValueError("temperature 0 gives equal completions; set `completions: 1`, or a higher temperature")
        return self


class OnlineSection(Strict):
    """Sample, score, train, again: every iteration trains on completions of the policy as it then is."""

    iterations: Annotated[PositiveInt, Grows()] = 3
    prompts: PositiveInt | None = None
    """Prompts of an iteration, taken in turn from all of them in a random order; by default all, every time. Those of a
    source of half the weight of another have a turn half as often."""
    reference: Literal["initial", "previous", "moving"] = "initial"
    """The recipe's own reference, the policy before the present iteration, or one that moves every few iterations."""
    reference_every: PositiveInt = 2
    """Iterations between two moves of a `moving` reference."""
    replay: Annotated[int, Field(ge=0)] = 0
    """Earlier iterations whose lists are trained on again: no list is older than this many iterations."""
