"""What PEFT calls our adapters."""

from collections.abc import Sequence
from typing import Any, Literal

import peft

from align.model.adapters import (
    AdaLora,
    Dora,
    Eva,
    Ia3,
    Loftq,
    Lora,
    LowRank,
    Miss,
    Olora,
    PeftAdapter,
    Pissa,
    RsLora,
    Targets,
)
from align.section import Strict


def peft_config(adapter: PeftAdapter, *, total_steps: int | None, head: Sequence[str] | None = None) -> peft.PeftConfig:
    """What PEFT calls this adapter.

    Args:
        head: modules of a reward model that train whole and are stored with the adapter; None for a language model.

    Raises:
        ValueError: AdaLoRA's schedule does not fit `total_steps`.
    """
    config: Any = _peft_config(adapter, total_steps=total_steps)
    if head is not None:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = list(head)
    return config


def _peft_config(adapter: PeftAdapter, *, total_steps: int | None) -> peft.PeftConfig:
    match adapter:
        case AdaLora():
            return _adalora(**_options(adapter), total_steps=total_steps)
        case Miss():
            return _miss(**_options(adapter))
        case Ia3():
            return _ia3(**_options(adapter))
        case Pissa():
            start = "pissa" if adapter.iterations is None else f"pissa_niter_{adapter.iterations}"
            return _lora(**_low_rank(adapter), init_lora_weights=start)
        case Olora():
            return _lora(**_low_rank(adapter), init_lora_weights="olora")
        case Eva():
            return _lora(**_low_rank(adapter), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=adapter.rho))
        case RsLora():
            return _lora(**_low_rank(adapter), use_rslora=True)
        case Dora():
            return _lora(**_low_rank(adapter), use_dora=True)
        case Lora() | Loftq():
            return _lora(**_low_rank(adapter))


def _lora(*, rank: int, alpha: int, dropout: float, targets: Targets, **variant: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_names(targets),
        **variant,
    )


def _adalora(
    *,
    rank: int,
    initial_rank: int,
    alpha: int,
    dropout: float,
    targets: Targets,
    warmup: float,
    settle: float,
    interval: int,
    orthogonality: float,
    total_steps: int | None,
) -> peft.AdaLoraConfig:
    if total_steps is None:
        raise ValueError("adalora needs the number of steps of the run")
    return peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_r=rank,
        init_r=initial_rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_names(targets),
        tinit=int(warmup * total_steps),
        tfinal=int(settle * total_steps),
        deltaT=interval,
        orth_reg_weight=orthogonality,
        total_step=total_steps,
    )


def _miss(
    *, rank: int, dropout: float, targets: Targets, variant: Literal["balance", "bat", "mini"], mini_rank: int
) -> peft.MissConfig:
    return peft.MissConfig(
        task_type="CAUSAL_LM",
        r=rank,
        miss_dropout=dropout,
        target_modules=_names(targets),
        init_weights=True if variant == "balance" else variant,
        mini_r=mini_rank,
    )


def _ia3(*, targets: tuple[str, ...] | None, feedforward: tuple[str, ...]) -> peft.IA3Config:
    if targets is None:
        return peft.IA3Config(task_type="CAUSAL_LM")
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=list(targets), feedforward_modules=list(feedforward))


def _names(targets: Targets) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def _options(adapter: Strict) -> dict[str, Any]:
    return {name: getattr(adapter, name) for name in type(adapter).model_fields if name != "name"}


def _low_rank(adapter: LowRank) -> dict[str, Any]:
    return {name: getattr(adapter, name) for name in LowRank.model_fields}
