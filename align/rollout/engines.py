"""The recipe's engine, and how a trained policy gets into it."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from align.errors import UserError
from align.export.served import RANKS, adapter_rank, not_servable
from align.export.vllm_start import check_installed
from align.model.adapters import Full
from align.model.load import load_tokenizer, model_folder
from align.progress import stage
from align.recipe import Recipe
from align.rollout.config import Contrast, TransferQ, Transformers, Vllm, VllmServer
from align.rollout.engine import Engine
from align.rollout.process import EngineProcess
from align.rollout.server import VllmServers
from align.rollout.transformers_engine import TransformersEngine
from align.rollout.vllm_arguments import VllmArguments
from align.rollout.vllm_engine import VllmEngine
from align.rollout.weights import Kind
from rewards.loading import folder_of
from rewards.types import ScorerError

log = logging.getLogger("align")


@stage("starting the engine")
def open_engine(recipe: Recipe, folder: Path) -> Engine:
    """The engine that `rollout.engine` names, with the base model loaded or ready to be.

    Args:
        folder: where a process of its own writes what it prints, to engine.log.

    Raises:
        UserError: vLLM is not installed, or a server does not answer.
    """
    check_engine(recipe)
    policy, config = recipe.policy, recipe.rollout.engine
    base = model_folder(policy.model, policy.revision, trust_remote_code=policy.trust_remote_code)
    if isinstance(config, VllmServer):
        return VllmServers(**{name: value for name, value in config if name != "name"})
    if isinstance(config, Transformers):
        tokenizer = load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
        options = {"dtype": policy.dtype, "tokens_per_batch": config.tokens_per_batch}
        return TransformersEngine(base, tokenizer, trusted=policy.trust_remote_code, **options)  # type: ignore[arg-type]
    kind, rank = sync_kind(recipe)
    arguments = VllmArguments(
        folder=str(base),
        dtype=policy.dtype,
        max_length=recipe.data.max_length,
        lora_rank=rank if kind == "adapter" else 0,
        cache_bytes=int(config.cache_gib * 2**30),
        trusted=policy.trust_remote_code,
        sampler=config.sampler,
        decoding=recipe.rollout.decoding.model_dump() if recipe.rollout.decoding else None,
        options=config.options,
    )
    if config.in_process:
        return VllmEngine(arguments)
    return EngineProcess(arguments, timeout=config.timeout, log_file=folder / "engine.log")


def _check_baseline(recipe: Recipe) -> None:
    """Refuse a baseline that reads the policy's tokens as other ones."""
    decoding, policy = recipe.rollout.decoding, recipe.policy
    if isinstance(decoding, TransferQ) and decoding.baseline:
        folder = Path(decoding.baseline).expanduser()
        if not folder.is_dir():
            raise UserError(f"rollout.decoding.baseline: there is no folder {decoding.baseline}; name a model's")
        own = load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
        theirs = load_tokenizer(str(folder), trust_remote_code=policy.trust_remote_code)
        if own.get_vocab() != theirs.get_vocab():
            raise UserError(
                f"rollout.decoding.baseline: {decoding.baseline} has another vocabulary than {policy.model}; name a "
                "model of the same family"
            )


def check_engine(recipe: Recipe) -> None:
    """Refuse an engine that is not installed, before there is a run directory.

    Raises:
        UserError: says how to install it, or to do without.
    """
    if isinstance(recipe.rollout.engine, Vllm):
        check_installed("rollout.engine", "set `rollout.engine=transformers`")
    decoding, policy = recipe.rollout.decoding, recipe.policy
    if isinstance(decoding, Contrast) and decoding.against == "base" and not (policy.start_run or policy.start_adapter):
        raise UserError(
            "rollout.decoding.against: the policy starts as the base model; give it policy.start_run, or `prompt`"
        )
    if isinstance(decoding, Contrast):
        sync_kind(recipe)  # which refuses adapters that cannot be held against each other
    _check_baseline(recipe)
    _check_scorers(recipe)


def _check_scorers(recipe: Recipe) -> None:
    """Refuse rewards whose model is not there before anything is sampled."""
    configs: dict[str, Any] = {"rollout.reward": recipe.rollout.reward, "sampling.reward": recipe.sampling.reward}
    for name in ("reward", "baseline_reward"):
        configs[f"rollout.decoding.{name}"] = getattr(recipe.rollout.decoding, name, None)
    for key, config in configs.items():
        if getattr(config, "model", None):
            try:
                folder_of(config.model, getattr(config, "revision", None))
            except ScorerError as error:
                raise UserError(f"{key}: {error}") from None


def sync_kind(recipe: Recipe) -> tuple[Kind, int]:
    """How the trained policy gets into the engine, and its adapter's rank there."""
    asked, why = recipe.rollout.sync, ""
    rank = 0
    if recipe.policy.start_adapter:
        folder = Path(recipe.policy.start_adapter).expanduser()
        why, rank = not_servable(folder), adapter_rank(folder)
    else:
        why, rank = _of_config(recipe)
    if isinstance(recipe.rollout.engine, Transformers):
        return ("merged" if isinstance(recipe.policy.adapter, Full) else "adapter"), rank
    decoding = recipe.rollout.decoding
    if isinstance(decoding, Contrast) and decoding.against != "prompt":
        if why:
            raise UserError(f"rollout.decoding.against: vLLM cannot serve the policy as an adapter, since {why}")
        if asked == "merged":
            log.info("rollout.sync: a policy that is held against other weights is served as an adapter, not merged")
        return "adapter", max(rank, _other_rank(decoding.against))
    if why:
        if asked == "adapter":
            log.info("rollout.sync: vLLM cannot serve this adapter, since %s; it is merged with the base instead", why)
        return "merged", rank
    on_cpu = isinstance(recipe.rollout.engine, Vllm) and not torch.cuda.is_available()
    if asked == "auto":
        return ("merged" if on_cpu else "adapter"), rank
    return asked, rank


def _of_config(recipe: Recipe) -> tuple[str, int]:
    """Why vLLM cannot serve the recipe's adapter, if it cannot, and the largest rank that it has when exported."""
    adapter = recipe.policy.adapter
    rank = adapter.served_rank()
    if rank is None:
        return f"its kind is {adapter.name}", 0
    return (f"its rank is above {RANKS[-1]}" if rank > RANKS[-1] else ""), rank


def _other_rank(against: str) -> int:
    """Rank of the adapter that the policy is held against.

    Raises:
        UserError: it is no adapter that vLLM can serve.
    """
    if against == "base":
        return 0
    folder = Path(against).expanduser()
    if (folder / "recipe.yaml").is_file():  # a run directory
        folder = folder / "adapter"
    if not folder.is_dir():
        raise UserError(
            f"rollout.decoding.against: there is no folder {against}; name an adapter's, `base` or `prompt`"
        )
    if why := not_servable(folder):
        raise UserError(f"rollout.decoding.against: {against} is no adapter that vLLM can serve, since {why}")
    return adapter_rank(folder)


def rests(recipe: Recipe) -> Literal["resident", "asleep", "stopped"]:
    """What the engine does while the policy trains."""
    config = recipe.rollout.engine
    if isinstance(config, Transformers):
        return "stopped"
    if isinstance(config, VllmServer):
        return "resident"
    if config.while_training == "auto":
        awake = "stopped" if isinstance(recipe.rollout.decoding, TransferQ) else "asleep"  # its baseline cannot sleep
        return awake if torch.cuda.is_available() else "resident"  # type: ignore[return-value]
    return config.while_training
