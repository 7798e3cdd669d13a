"""The courses that a learning rate can take, and their options; a test compares them with transformers' own."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, model_validator

from align.section import Named, Strict

Name = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
    "refined",
]
_PLATEAU = "factor patience threshold threshold_mode cooldown min_lr eps"
OPTIONS: dict[str, str] = {
    "linear": "",
    "cosine": "num_cycles",
    "cosine_with_restarts": "num_cycles",
    "polynomial": "lr_end power",
    "constant": "",
    "constant_with_warmup": "",
    "inverse_sqrt": "timescale",
    "reduce_lr_on_plateau": _PLATEAU,
    "cosine_with_min_lr": "num_cycles min_lr min_lr_rate",
    "cosine_warmup_with_min_lr": "num_cycles min_lr min_lr_rate warmup_lr_rate",
    "warmup_stable_decay": (
        "num_decay_steps num_stable_steps warmup_type decay_type min_lr_ratio num_cycles decay_ratio"
    ),
    "greedy": f"{_PLATEAU} warmup max_lr smooth window_size reset_start",
    "refined": "path",
}
"""Schedule -> the options of transformers' function of that name; `decay_ratio` and `path` are ours."""
NEEDED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("decay_ratio", "num_decay_steps"),
    "greedy": ("min_lr",),  # whose own, 1e-3, is above most rates
    "refined": ("path",),
}
"""Schedule -> options of which it needs one."""
REFINED = "refined_schedule.json"
"""A run's file of what its gradients' norms make of the schedule."""
BY_FIGURE = ("reduce_lr_on_plateau", "greedy")
"""Schedules that act by held-out figures, not by the step."""


class ScheduleSection(Strict):
    """The course of the learning rate: a name, or a name and options as transformers calls them."""

    model_config = ConfigDict(extra="allow")

    name: Name = "linear"
    """Of transformers' `lr_scheduler_type`, or `refined`, the file that `align report RUN --refine` writes."""

    @model_validator(mode="after")
    def _has_its_options(self) -> "ScheduleSection":
        known, needed = OPTIONS[self.name].split(), NEEDED.get(self.name, ())
        if unknown := sorted(self.options.keys() - set(known)):
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"`{unknown[0]}` is no option of `{self.name}`; {takes}")
        if needed and not any(option in self.options for option in needed):
            raise ValueError(f"`{self.name}` needs {' or '.join(needed)}: {{name: {self.name}, {needed[0]}: ...}}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What its function is told besides."""
        return dict(self.model_extra or {})

    def plain(self) -> Any:
        """As one writes it: the name alone where it is all that is said."""
        return {"name": self.name} | self.options if self.options else self.name


ScheduleConfig = Annotated[ScheduleSection, Named("linear")]
