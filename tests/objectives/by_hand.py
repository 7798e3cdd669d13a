"""Every objective a second time: the formula on one list of Python floats, with loops, no tensor and no padding.

`m` is the row's margin, where the objective has a place for one.
"""

from collections.abc import Callable
from itertools import permutations
from math import exp, expm1, log, log1p
from statistics import mean, pstdev

from scipy.optimize import brentq, minimize_scalar

Floats = list[float]


def log_sigmoid(x: float) -> float:
    return -log1p(exp(-x)) if x > 0 else x - log1p(exp(x))


def sigmoid(x: float) -> float:
    return exp(log_sigmoid(x))


def margins(s: Floats, g: Floats, m: float) -> Floats:
    return [si - sj - m for si, gi in zip(s, g, strict=True) for sj, gj in zip(s, g, strict=True) if gi > gj]


def logistic(
    s: Floats, g: Floats, label_smoothing: float = 0.0, margin: float = 0.0, link: float = 0.0, m: float = 0.0
) -> float:
    def linked(d: float) -> float:
        return (1 - sigmoid(d) ** link) / link if link else -log_sigmoid(d)

    eps = label_smoothing
    return sum((1 - eps) * linked(d - margin) + eps * linked(-(d - margin)) for d in margins(s, g, m))


def robust(s: Floats, g: Floats, label_smoothing: float = 0.1, m: float = 0.0) -> float:
    eps = label_smoothing
    return sum((-(1 - eps) * log_sigmoid(d) + eps * log_sigmoid(-d)) / (1 - 2 * eps) for d in margins(s, g, m))


def hinge(s: Floats, g: Floats, m: float = 0.0) -> float:
    return sum(max(0.0, 1 - d) for d in margins(s, g, m))


def squared(s: Floats, g: Floats, beta: float, m: float = 0.0) -> float:
    return sum((d / beta - 1 / (2 * beta)) ** 2 for d in margins(s, g, m))


def exo(s: Floats, g: Floats, label_smoothing: float = 1e-3, m: float = 0.0) -> float:
    total = 0.0
    for d in margins(s, g, m):
        q = sigmoid(d)
        total += q * (log(q) - log(1 - label_smoothing)) + (1 - q) * (log(1 - q) - log(label_smoothing))
    return total


def discopop(s: Floats, g: Floats, temperature: float = 0.05, m: float = 0.0) -> float:
    total = 0.0
    for d in margins(s, g, m):
        share = sigmoid(d / temperature)
        total += -(1 - share) * log_sigmoid(d) + share * exp(-d)
    return total


def odds_ratio(s: Floats, g: Floats, m: float = 0.0) -> float:
    return logistic([log(exp(x) / -expm1(x)) for x in s], g, m=m)


def partial_order(s: Floats, g: Floats, m: float = 0.0) -> float:
    return sum(max(0.0, -d) for d in margins(s, g, m))


def pointwise_mse(s: Floats, g: Floats) -> float:
    return sum((gk - sk) ** 2 for sk, gk in zip(s, g, strict=True))


def pointwise_sigmoid(s: Floats, g: Floats) -> float:
    return -sum(gk * log(sigmoid(sk)) + (1 - gk) * log(1 - sigmoid(sk)) for sk, gk in zip(s, g, strict=True))


def kto(s: Floats, g: Floats, baseline: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> float:
    good = [desirable_weight * (1 - sigmoid(sk - baseline)) for sk, gk in zip(s, g, strict=True) if gk > 0.5]
    bad = [undesirable_weight * (1 - sigmoid(baseline - sk)) for sk, gk in zip(s, g, strict=True) if gk <= 0.5]
    return sum(good) + sum(bad)


def apo_zero_unpaired(s: Floats, g: Floats, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> float:
    good = [desirable_weight * (1 - sigmoid(sk)) for sk, gk in zip(s, g, strict=True) if gk > 0.5]
    bad = [undesirable_weight * sigmoid(sk) for sk, gk in zip(s, g, strict=True) if gk <= 0.5]
    return sum(good) + sum(bad)


def sft(s: Floats, g: Floats) -> float:
    return -mean(sk for sk, gk in zip(s, g, strict=True) if gk == max(g))


def nca(s: Floats, g: Floats, temperature: float = 0.0) -> float:
    if temperature:
        total = sum(exp(gk / temperature) for gk in g)
        weights = [exp(gk / temperature) / total for gk in g]
    else:
        weights = [(gk == max(g)) / g.count(max(g)) for gk in g]
    return -sum(w * log_sigmoid(sk) + log_sigmoid(-sk) / len(s) for w, sk in zip(weights, s, strict=True))


def split(s: Floats, g: Floats) -> tuple[Floats, Floats]:
    chosen = [sk for sk, gk in zip(s, g, strict=True) if gk == max(g)]
    return chosen, [sk for sk, gk in zip(s, g, strict=True) if gk < max(g)]


def bco(s: Floats, g: Floats) -> float:
    chosen, rejected = split(s, g)
    if not rejected:
        return 0.0
    return -mean(log_sigmoid(a) for a in chosen) - mean(log_sigmoid(-b) for b in rejected)


def sppo(s: Floats, g: Floats, beta: float) -> float:
    return sum((sk / beta - (gk - 1 / 2) / beta) ** 2 for sk, gk in zip(s, g, strict=True))


def apo_zero(s: Floats, g: Floats) -> float:
    chosen, rejected = split(s, g)
    if not rejected:
        return 0.0
    return mean(1 - sigmoid(a) for a in chosen) + mean(sigmoid(b) for b in rejected)


def apo_down(s: Floats, g: Floats, m: float = 0.0) -> float:
    if g[0] == g[1]:
        return 0.0
    a, b = s if g[0] > g[1] else s[::-1]
    return sigmoid(a) + 1 - sigmoid(a - b - m)


def list_mle(s: Floats, g: Floats, m: float = 0.0) -> float:
    total = 0.0
    for k in range(len(s)):
        rest = exp(s[k]) + sum(exp(sj + m) for sj, gj in zip(s, g, strict=True) if gj < g[k])
        total -= log(exp(s[k]) / rest)
    return total


def softmax(s: Floats, g: Floats, normaliser: str = "softmax", k: int | None = None, m: float = 0.0) -> float:
    if sum(g) == 0:
        return 0.0
    f = {"softmax": exp, "stablemax": lambda x: 1 + x if x >= 0 else 1 / (1 - x), "softplus": lambda x: log1p(exp(x))}
    share = f[normaliser]
    if k is not None and k < len(s):
        kept = [i for i in range(len(s)) if g[i] > 0 or s[i] >= sorted(s, reverse=True)[k - 1]]
        s, g = [s[i] for i in kept], [g[i] for i in kept]
    total = 0.0
    for sk, gk in zip(s, g, strict=True):
        every = sum(share(sj + (m if gj < gk else 0)) for sj, gj in zip(s, g, strict=True))
        total -= gk / sum(g) * log(share(sk) / every)
    return total


def decoupled_softmax(s: Floats, g: Floats, negatives: str = "equal", m: float = 0.0) -> float:
    total = 0.0
    for sj, gj in zip(s, g, strict=True):
        worse = [(sk, gj - gk) for sk, gk in zip(s, g, strict=True) if gk < gj]
        if worse:
            mean_gap = mean(gap for _, gap in worse) if negatives == "grades" else 1.0
            weighted = [(gap / mean_gap if negatives == "grades" else 1.0) * exp(sk + m) for sk, gap in worse]
            total -= gj * log(exp(sj) / (exp(sj) + sum(weighted)))
    return total


def soft_top_k(s: Floats, g: Floats, k: int = 1, temperature: float = 1.0) -> float:
    if len(s) <= k or sum(g) == 0:
        return 0.0
    t = brentq(lambda t: sum(sigmoid((x - t) / temperature) for x in s) - k, min(s) - 99, max(s) + 99, xtol=1e-14)
    return -sum(gj / sum(g) * log_sigmoid((sj - t) / temperature) for sj, gj in zip(s, g, strict=True))


def robust_softmax(s: Floats, g: Floats, rho: float = 0.2, weakest: float = 0.2, strongest: float = 5.0) -> float:
    if sum(g) == 0:
        return 0.0
    own = sum(gj * sj for sj, gj in zip(s, g, strict=True)) / sum(g)

    def dual(log_t: float) -> float:
        t = exp(log_t)
        top = max(s) - own
        return top + t * log(mean(exp((sk - own - top) / t) for sk in s)) + rho * t

    bounds = (-log(strongest), -log(weakest))
    if weakest == strongest:
        return dual(bounds[0])
    inside = minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-10}).fun
    return min(inside, dual(bounds[0]), dual(bounds[1]))


def spherical(s: Floats, g: Floats, slope: float = 1.0, target: float = 1.0) -> float:
    deviation = pstdev(s) or 1.0
    z = [(sk - mean(s)) / deviation for sk in s]
    shares = [gk / sum(g) if sum(g) else 0.0 for gk in g]
    return -sum(w * log_sigmoid(slope * (zk - target)) / slope for w, zk in zip(shares, z, strict=True))


def exo_list(s: Floats, g: Floats, temperature: float = 1.0) -> float:
    q_total, p_total = sum(exp(x) for x in s), sum(exp(x / temperature) for x in g)
    total = 0.0
    for sk, gk in zip(s, g, strict=True):
        q, p = exp(sk) / q_total, exp(gk / temperature) / p_total
        total += q * log(q / p)
    return total


def orders(s: Floats) -> list[tuple[int, ...]]:
    """Every order of the list that sorts the scores in descending order: several where scores are tied."""
    return [o for o in permutations(range(len(s))) if all(s[i] >= s[j] for i, j in zip(o, o[1:], strict=False))]


def delta(s: Floats, g: Floats, i: int, j: int, log_base: float = 2.0) -> float:
    gaps = []
    for order in orders(s):
        rank_i, rank_j = order.index(i) + 1, order.index(j) + 1
        gaps.append(abs(1 / log(1 + rank_i, log_base) - 1 / log(1 + rank_j, log_base)))
    return abs(2 ** g[i] - 2 ** g[j]) * mean(gaps)


def lambda_loss(s: Floats, g: Floats, log_base: float = 2.0, reduction: str = "list_sum", m: float = 0.0) -> float:
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if g[i] > g[j]]
    total = sum(delta(s, g, i, j, log_base) * log(1 + exp(-(s[i] - s[j] - m))) for i, j in pairs)
    return total / {"list_sum": 1, "list_mean": len(s), "pair_mean": max(len(pairs), 1)}[reduction]


def aft(s: Floats, g: Floats, variant: str = "ranking", margin: float = 0.1, m: float = 0.0) -> float:
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if g[i] > g[j]]
    if variant != "ranking":
        pairs = [(i, j) for i, j in pairs if g[i] == max(g)]
    total = 1.0
    for i, j in pairs:
        total += exp(s[j] + m - s[i])
        if variant in ("boundary", "ranking"):
            total += exp(min(s[k] for k, other in pairs if other == j) - 2 * margin - (s[j] + m))
    return log(total)


BY_HAND: dict[str, Callable[..., float]] = {
    "aft": aft,
    "apo_down": apo_down,
    "apo_zero": apo_zero,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
    "decoupled_softmax": decoupled_softmax,
    "discopop": discopop,
    "exo": exo,
    "exo_list": exo_list,
    "hinge": hinge,
    "kto": kto,
    "lambda": lambda_loss,
    "list_mle": list_mle,
    "logistic": logistic,
    "nca": nca,
    "odds_ratio": odds_ratio,
    "partial_order": partial_order,
    "pointwise_mse": pointwise_mse,
    "pointwise_sigmoid": pointwise_sigmoid,
    "robust": robust,
    "robust_softmax": robust_softmax,
    "sft": sft,
    "soft_top_k": soft_top_k,
    "softmax": softmax,
    "spherical": spherical,
    "sppo": sppo,
    "squared": squared,
}
"""`pl_policy_gradient` draws at random; its own test enumerates all rankings."""
