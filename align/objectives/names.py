"""What each objective declares, what TRL calls it, and what to say of a name that is none."""

import difflib

from align.objectives.base import Properties

_MARGINS = Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False)
_POINTS = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False)
_SPLIT = Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False)
_SINGLE = Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, min_list_size=1)

PROPERTIES: dict[str, Properties] = {
    "aft": _MARGINS,
    "apo_down": Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False, max_list_size=2),
    "apo_zero": _SPLIT,
    "apo_zero_unpaired": _SINGLE,
    "bco": _SPLIT,
    "discopop": _MARGINS,
    "exo": _MARGINS,
    "exo_list": Properties(shift_invariant=True, zero_when_tied=False, dpo_at_two=False),
    "hinge": _MARGINS,
    "kto": _SINGLE,
    "lambda": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True, grades="exponent"),
    "list_mle": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True),
    "logistic": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=True),
    "nca": _POINTS,
    "odds_ratio": Properties(shift_invariant=False, zero_when_tied=True, dpo_at_two=False, score="likelihood_mean"),
    "partial_order": _MARGINS,
    "pl_policy_gradient": Properties(shift_invariant=True, zero_when_tied=True, dpo_at_two=False, grades="relevance"),
    "pointwise_mse": _POINTS,
    "pointwise_sigmoid": Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, grades="unit"),
    "robust": _MARGINS,
    "sft": _SINGLE,
    "softmax": Properties(shift_invariant=True, zero_when_tied=False, dpo_at_two=False, grades="nonnegative"),
    "sppo": Properties(shift_invariant=False, zero_when_tied=False, dpo_at_two=False, grades="unit"),
    "squared": _MARGINS,
}

_SORTS = "it sorts across the batch, so its loss is no function of one list and would change with the batch size"
REFUSED: dict[str, str] = {
    "aot": f"`aot` is not provided: {_SORTS}; use `logistic` or `robust`",
    "aot_unpaired": f"`aot_unpaired` is not provided: {_SORTS}; use `logistic` or `bco`",
    "alphapo": "`alphapo` is not provided: use `logistic` with a margin on the score `likelihood_mean` (SimPO)",
}

TRL_NAMES: dict[str, str] = {
    "sigmoid": "{objective: {name: logistic}}",
    "hinge": "{objective: {name: hinge}}",
    "ipo": "{objective: {name: squared}, score: {name: log_ratio_mean}}",
    "exo_pair": "{objective: {name: exo}}",
    "nca_pair": "{objective: {name: nca}}",
    "robust": "{objective: {name: robust}}",
    "bco_pair": "{objective: {name: bco}}",
    "sppo_hard": "{objective: {name: sppo}}",
    "apo_zero": "{objective: {name: apo_zero}}",
    "apo_down": "{objective: {name: apo_down}}",
    "discopop": "{objective: {name: discopop}}",
    "sft": "{objective: {name: sft}}",
    "sigmoid_norm": "{objective: {name: logistic}, score: {name: log_ratio_mean}}",
    "kto": "{objective: {name: kto}}",
    "apo_zero_unpaired": "{objective: {name: apo_zero_unpaired}}",
    "cpo_sigmoid": "{objective: [{name: logistic}, {name: sft}], score: {name: likelihood}}",
    "cpo_hinge": "{objective: [{name: hinge}, {name: sft}], score: {name: likelihood}}",
    "cpo_ipo": "{objective: [{name: squared}, {name: sft}], score: {name: likelihood_mean, beta: 0.1}}",
    "simpo": "{objective: {name: logistic, margin: 0.5}, score: {name: likelihood_mean, beta: 2.0}}",
    "orpo": "{objective: [{name: sft}, {name: odds_ratio, weight: 0.1}]}",
}
"""What TRL 1.16 calls a loss, as our recipe keys; those missing here are in `REFUSED`."""


def unknown_objective(name: str) -> str:
    """What to say to someone who asks for an objective that is not here: TRL's names are translated."""
    if name in TRL_NAMES:
        return f"TRL's `{name}` is {TRL_NAMES[name]} here"
    near = difflib.get_close_matches(name, PROPERTIES, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else f"; there are {', '.join(PROPERTIES)}"
    return REFUSED.get(name, f"there is no objective `{name}`{hint}")
