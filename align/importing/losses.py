"""What a tool's loss is here: its name and numbers -> `task`, `score`, `objective`, `wpo`.

Sources: TRL 1.16's trainers, LLaMA-Factory's train/dpo/trainer.py, ms-swift's rlhf_trainers
"""

from collections.abc import Mapping
from typing import Any

import yaml

from align.errors import UserError
from align.importing.plan import Plan
from align.objectives import REFUSED, TRL_NAMES

WHOLE = "the `sft` term is the mean over each list's tokens; {tool} takes that over a micro-batch's tokens"
ORPO_PROMPT = "TRL's ORPO learns the prompt's tokens too in its likelihood term; here the completion's alone"
KTO = (
    "the baseline is estimated over the whole step; {tool} pairs completions within a micro-batch, so its noise differs"
)
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "js": "js",
    "alpha_divergence": "alpha",
}
OF_OTHERS = ("kto", "apo_zero_unpaired", "orpo", "simpo")
"""Losses that are a method of their own, and none of DPO's."""
INSTEAD: Mapping[str, str] = {
    "sft": "`task: sft` trains each row's completion: `align init sft`",
    "pt": "pretraining is no part of Align; start from the model that it gives",
    "pretrain": "pretraining is no part of Align; start from the model that it gives",
    "ppo": "online training is `align init online` (LiPO on lists that the policy samples and a scorer ranks)",
    "grpo": "online training is `align init online` (LiPO on lists that the policy samples and a scorer ranks)",
    "gdpo": "online training is `align init online` (LiPO on lists that the policy samples and a scorer ranks)",
    "rloo": "online training is `align init online` (LiPO on lists that the policy samples and a scorer ranks)",
    "online_dpo": "online training is `align init online` (LiPO on lists that the policy samples and a scorer ranks)",
    "gkd": "distillation from a teacher's logits is no part of Align; rank a teacher's answers and train on the lists",
    "ebft": "energy-based fine-tuning is no part of Align; take a preference objective",
    "prm": "process reward models are no part of Align; `task: reward` judges whole completions",
}
"""Methods that are not imported -> what Align has instead."""


def write_loss(plan: Plan, method: str, *, honours_smoothing: bool) -> None:
    """Write the loss of a preference method.

    Args:
        method: dpo, cpo, simpo, orpo, kto or reward.
        honours_smoothing: whether the tool's sigmoid loss reads its label smoothing.

    Raises:
        UserError: a loss that has no counterpart.
    """
    if method == "reward":
        plan.put("task", "reward", ("method",))
        center = plan.number("center_rewards_coefficient") if plan.on("center_rewards_coefficient") else 0.0
        objective = {"name": "bradley_terry", **({"center": center} if center else {})}
        plan.put("objective", objective, ("loss_type", "center_rewards_coefficient"))
        return
    plan.put("task", "preference", ())
    plan.comments.pop("task")
    known = {"dpo": _dpo, "cpo": _cpo, "simpo": _simpo, "orpo": _orpo, "kto": _kto}
    if method not in known:
        raise UserError(f"{plan.file}: `{method}` is no method that is imported; {', '.join(known)} and reward are")
    known[method](plan, honours_smoothing)


def _dpo(plan: Plan, honours_smoothing: bool) -> None:
    losses = _names(plan)
    weights = _weights(plan, len(losses))
    scores = [yaml.safe_load(_translated(plan, name)).get("score", {}) for name in losses]
    terms = [_term(plan, name, weight, honours_smoothing) for name, weight in zip(losses, weights, strict=True)]
    beta = plan.number("beta")
    own = {"name": "log_ratio", "beta": beta}
    if plan.on("ld_alpha"):
        own = {"name": "length_desensitised", "alpha": plan.number("ld_alpha"), "beta": beta}
    divergence = _divergence(plan)
    for term, score in zip(terms, scores, strict=True):
        if score and len(terms) > 1:
            term["score"] = {**score, "beta": beta, **divergence}
    own = {**scores[0], "beta": beta} if len(terms) == 1 and scores[0] else own
    if any(loss != "sft" and not (len(terms) > 1 and score) for loss, score in zip(losses, scores, strict=True)):
        names = ("beta", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "reference_free")
        plan.put("score", {**own, **divergence}, names)
    why = _extra_terms(plan, terms)
    named = ("method", "loss_type", "loss_weights", "label_smoothing", "discopop_tau", "rpo_alpha", "bco_weight")
    plan.put("objective", terms[0] if len(terms) == 1 else terms, named, why, differs=bool(why))
    if plan.on("use_weighting"):
        plan.put("wpo", "unclamped", ("use_weighting",))
    if plan.on("sync_ref_model"):
        every, mixture = int(plan.number("ref_model_sync_steps")), plan.number("ref_model_mixup_alpha")
        of = ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
        plan.put("reference", {"name": "moving", "every": every, "mixture": mixture}, of)


def _names(plan: Plan) -> list[str]:
    """The losses, of one or of several."""
    value = plan.value("loss_type") or "sigmoid"
    return [str(one) for one in value] if isinstance(value, list | tuple) else str(value).split()


def _weights(plan: Plan, count: int) -> list[float]:
    value = plan.value("loss_weights")
    if value in (None, "", []):
        return [1.0] * count
    weights = value if isinstance(value, list | tuple) else str(value).split()
    if len(weights) != count:
        raise plan.mistake("loss_weights", f"has {len(weights)} weights for {count} losses; give one for each")
    return [plan.as_number("loss_weights", one) for one in weights]


def _translated(plan: Plan, name: str) -> str:
    if name in TRL_NAMES and not name.startswith("cpo_") and name not in OF_OTHERS:
        return TRL_NAMES[name]
    problem = REFUSED.get(name, f"there is no objective for `{name}`; take one of {', '.join(sorted(TRL_NAMES))}")
    raise plan.mistake("loss_type", f"cannot be imported: {problem}")


def _term(plan: Plan, name: str, weight: float, honours_smoothing: bool) -> dict[str, Any]:
    """One objective with the options of its loss."""
    term: dict[str, Any] = dict(yaml.safe_load(_translated(plan, name))["objective"])
    smoothing = plan.number("label_smoothing") if plan.on("label_smoothing") else 0.0
    if smoothing and (name in ("robust", "exo_pair") or name == "sigmoid" and honours_smoothing):
        term["label_smoothing"] = smoothing
    elif smoothing:
        plan.drop("label_smoothing", f"{plan.tool}'s `{name}` does not read it, and the loss is as it was there")
    if name == "discopop":
        term["temperature"] = plan.number("discopop_tau")
    if weight != 1.0:
        term["weight"] = weight
    return term


def _divergence(plan: Plan) -> dict[str, Any]:
    name = str(plan.value("f_divergence_type") or "reverse_kl").rpartition(".")[2].lower()
    if name not in DIVERGENCES:
        raise plan.mistake("f_divergence_type", f"is no divergence here; take one of {', '.join(DIVERGENCES)}")
    if DIVERGENCES[name] == "reverse_kl":
        return {}
    alpha = {"alpha": plan.number("f_alpha_divergence_coef")} if DIVERGENCES[name] == "alpha" else {}
    return {"divergence": {"name": DIVERGENCES[name], **alpha}}


def _extra_terms(plan: Plan, terms: list[dict[str, Any]]) -> str:
    """Add what a tool adds to its loss; says what differs of it."""
    if plan.on("bco_weight"):
        share = plan.number("bco_weight")
        if share < 0:
            raise plan.mistake("bco_weight", "is below 0; write a weight")
        for term in terms:
            term["weight"] = round(term.get("weight", 1.0) / (1 + share), 6)
        terms.append({"name": "bco", "weight": round(share / (1 + share), 6)})
    if plan.on("rpo_alpha"):
        terms.append({"name": "sft", "weight": plan.number("rpo_alpha")})
    means = plan.tool != "LLaMA-Factory" and any(term["name"] == "sft" for term in terms)
    return WHOLE.format(tool=plan.tool) if means else ""


def _cpo(plan: Plan, honours_smoothing: bool) -> None:
    loss = str((_names(plan) or ["sigmoid"])[0])
    if loss == "simpo":
        _simpo(plan, honours_smoothing)
        return
    known = {"sigmoid": "logistic", "hinge": "hinge", "ipo": "squared"}
    if loss not in known:
        raise plan.mistake("loss_type", f"has no counterpart; take one of {', '.join(known)} or simpo")
    term: dict[str, Any] = {"name": known[loss]}
    if loss == "sigmoid" and plan.on("label_smoothing"):
        term["label_smoothing"] = plan.number("label_smoothing")
    score = "likelihood_mean" if loss == "ipo" else "likelihood"
    plan.put("score", {"name": score, "beta": plan.number("beta")}, ("beta",))
    terms = [term, *_likelihood(plan)]
    of = ("method", "loss_type", "cpo_alpha", "label_smoothing")
    why = WHOLE.format(tool=plan.tool) if len(terms) > 1 else ""
    plan.put("objective", terms if len(terms) > 1 else term, of, why, differs=bool(why))


def _likelihood(plan: Plan) -> list[dict[str, Any]]:
    """CPO's likelihood term, which has weight 1 unless the file says otherwise."""
    weight = plan.number("cpo_alpha") if plan.value("cpo_alpha") is not None else 0
    return [{"name": "sft", **({"weight": weight} if weight != 1 else {})}] if weight else []


def _simpo(plan: Plan, _: bool) -> None:
    plan.put("score", {"name": "likelihood_mean", "beta": plan.number("beta")}, ("beta",))
    term: dict[str, Any] = {"name": "logistic", "margin": plan.number("simpo_gamma")}
    if plan.on("label_smoothing"):
        term["label_smoothing"] = plan.number("label_smoothing")
    terms = [term, *_likelihood(plan)]
    if plan.on("rpo_alpha"):
        terms.append({"name": "sft", "weight": plan.number("rpo_alpha")})
    of = ("method", "loss_type", "simpo_gamma", "cpo_alpha", "label_smoothing", "rpo_alpha")
    added = len(terms) > 1 and not plan.given("cpo_alpha") and not plan.on("rpo_alpha")
    why = f"{plan.tool} adds a likelihood term to SimPO unless `cpo_alpha: 0` is set, and so does this" if added else ""
    plan.put("objective", terms if len(terms) > 1 else term, of, why)


def _orpo(plan: Plan, _: bool) -> None:
    plan.put("score", {"name": "likelihood_mean", "beta": 1.0}, ())
    plan.comments["score"] = "both terms act on mean token log-probabilities"
    terms = [{"name": "sft"}, {"name": "odds_ratio", "weight": plan.number("beta")}]
    whole = plan.tool != "LLaMA-Factory"
    of = ("method", "loss_type", "beta")
    plan.put("objective", terms, of, ORPO_PROMPT if whole else "", differs=whole)


def _kto(plan: Plan, _: bool) -> None:
    name = str((_names(plan) or ["kto"])[0]) if plan.given("loss_type") else "kto"
    if name not in ("kto", "apo_zero_unpaired"):
        raise plan.mistake("loss_type", "has no counterpart for KTO; take kto or apo_zero_unpaired")
    weights = {key: plan.number(key) for key in ("desirable_weight", "undesirable_weight")}
    plan.put("score", {"name": "log_ratio", "beta": plan.number("beta")}, ("beta",))
    objective: Any = {"name": name, **{key: value for key, value in weights.items() if value != 1}}
    of = ("method", "loss_type", *weights)
    terms = [objective, {"name": "sft", "weight": plan.number("rpo_alpha")}] if plan.on("rpo_alpha") else objective
    why = KTO.format(tool=plan.tool) if name == "kto" else ""
    plan.put("objective", terms, (*of, "rpo_alpha"), why, differs=bool(why))
