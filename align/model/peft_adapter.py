"""PEFT's own kinds of adapters, by PEFT's names."""

import difflib
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from align.model.adapter import InLayers, Targets, as_peft
from align.model.peft_kinds import KINDS, Kind

if TYPE_CHECKING:
    import peft

OF_THEIR_OWN = {"ADALORA": "adalora"}
"""PEFT's types that need more than a configuration."""


class Peft(InLayers):
    """Any other adapter of PEFT's that acts in layers."""

    references: ClassVar = ("initial",)
    name: Literal["peft"] = "peft"
    type: str
    """PEFT's name of it, such as LOHA, VERA or OFT."""
    options: dict[str, Any] = {}
    """Keys of its configuration, as PEFT names them: `{r: 8}`."""
    targets: Targets | None = None
    """Names of the layers it acts on; by default every linear layer but the LM head, or PEFT's choice for a type that
    acts in others."""

    @field_validator("type")
    @classmethod
    def _can_train(cls, value: str) -> str:
        kind = KINDS.get(value.upper(), Kind(""))
        if kind.why_not:
            raise ValueError(f"{value.upper()} {kind.why_not}")
        if value.upper() in OF_THEIR_OWN:
            raise ValueError(f"{value.upper()} plans its ranks; take {{name: {OF_THEIR_OWN[value.upper()]}}}")
        return value.upper()

    def moves_start(self) -> bool:
        return self.kind.moved

    def is_offset(self) -> bool:
        return self.kind.offset

    @property
    def kind(self) -> Kind:
        """What is known of its type; nothing of one that a newer PEFT has."""
        return KINDS.get(self.type, Kind(""))

    def peft(self, *, total_steps: int | None) -> "peft.PeftConfig":
        import peft

        types: dict[Any, Any] = peft.PEFT_TYPE_TO_CONFIG_MAPPING
        if self.type not in types:
            there = ", ".join(sorted({str(own.value) for own in types} - {n for n, k in KINDS.items() if k.why_not}))
            raise ValueError(f"PEFT knows no type {self.type}; it has {there}")
        targets = "all-linear" if self.targets is None and self.kind.linear else self.targets
        given = {"task_type": "CAUSAL_LM", "inference_mode": False, "target_modules": as_peft(targets)}
        known = [own.name for own in fields(types[self.type])]
        if odd := [key for key in self.options if key not in known]:
            near = difflib.get_close_matches(odd[0], known, n=1, cutoff=0.4) or known
            raise ValueError(f"{self.type} has no option `{odd[0]}`; it has {', '.join(near)}")
        made: Any = types[self.type](**given | self.kind.needs | self.options)
        if made.is_prompt_learning:
            raise ValueError(f"{self.type} puts tokens before the prompt, for which a packed row has no place")
        if getattr(made, "init_lora_weights", True) not in (True, "gaussian"):
            raise ValueError(f"init_lora_weights {made.init_lora_weights!r}: take pissa, olora, eva or loftq by name")
        for key in ("bias", "lora_bias"):
            if getattr(made, key, False) not in (False, None, "none"):
                raise ValueError(f"`{key}` trains the base's own biases, which the reference needs as they were")
        return made
