"""Trainers by the names, arguments, losses, logs and files of TRL 1.16, on Align's packed engine; TRL is not imported.

from align.trl import DPOConfig, DPOTrainer
"""

from typing import TYPE_CHECKING

from align.lazy import lazily

if TYPE_CHECKING:
    from align.trl.config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
    from align.trl.cpo import CPOTrainer
    from align.trl.dpo import DPOTrainer
    from align.trl.kto import KTOTrainer
    from align.trl.orpo import ORPOTrainer
    from align.trl.replace import patch
    from align.trl.reward import RewardTrainer

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "patch",
]

__getattr__ = lazily(
    __name__,
    {
        "config": ["CPOConfig", "DPOConfig", "KTOConfig", "ORPOConfig", "RewardConfig"],
        "cpo": ["CPOTrainer"],
        "dpo": ["DPOTrainer"],
        "kto": ["KTOTrainer"],
        "orpo": ["ORPOTrainer"],
        "reward": ["RewardTrainer"],
        "replace": ["patch"],
    },
)
