"""What `align evaluate rewards` prints."""

from collections.abc import Iterable
from typing import Any

from align.tables import Table

ALL = "all"
"""The group of rows that name none."""


def tables(figures: dict[str, Any]) -> Iterable[Table]:
    """Groups, benchmarks and reliability."""
    columns = ("", "lists", "accuracy", "best of n", "MRR", "margin")
    table = Table(*columns, title=f"{figures['reward'] or 'rewards of the rows'}", title_justify="left")
    groups = figures["groups"]
    for name, f in [*groups.items(), (ALL, figures["overall"])]:
        cells = (f"{f[key]:.4f}" for key in ("accuracy", "best_of_n", "reciprocal_rank"))
        table.add_row(name, str(f["lists"]), *cells, f"{f['margin']:+.3f}", end_section=name in list(groups)[-1:])
    yield table
    if figures.get("buckets"):
        yield _buckets(figures["buckets"])
    benchmarks = {
        "RewardBench sections": figures["sections"],
        "RewardBench 2": figures.get("rewardbench2"),
        "RAG-RewardBench": figures.get("rag-rewardbench"),
    }
    for title, scores in benchmarks.items():
        if scores:
            table = Table(*scores, title=title, title_justify="left")
            table.add_row(*(f"{value:.4f}" for value in scores.values()))
            yield table
    for domain, cells in figures.get("rm-bench", {}).get("domains", {}).items():
        yield _style_table(domain, cells)
    yield _reliability(figures["calibration"])


def _style_table(domain: str, cells: dict[str, Any]) -> Table:
    table = Table("chosen", "plain", "detailed", "Markdown", title=f"RM-Bench, {domain}", title_justify="left")
    for name, row in zip(("plain", "detailed", "Markdown"), cells["matrix"], strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in row))
    table.caption = f"hard {cells['hard']:.4f}, normal {cells['normal']:.4f}, easy {cells['easy']:.4f}"
    return table


def _buckets(parts: list[dict[str, Any]]) -> Table:
    table = Table("from", "to", "lists", "accuracy", "best of n", "margin", title="buckets", title_justify="left")
    for f in parts:
        rates = (f"{f[key]:.4f}" for key in ("accuracy", "best_of_n"))
        table.add_row(f"{f['low']:g}", f"{f['high']:g}", str(f["lists"]), *rates, f"{f['margin']:+.3f}")
    return table


def _reliability(figures: dict[str, Any]) -> Table:
    table = Table("sigmoid(margin)", "pairs", "confidence", "accuracy", title="reliability", title_justify="left")
    for b in figures["bins"]:
        place = f"{b['low']:.2f} to {b['high']:.2f}"
        table.add_row(place, str(b["count"]), f"{b['confidence']:.4f}", f"{b['accuracy']:.4f}")
    return table


def sentences(figures: dict[str, Any]) -> Iterable[str]:
    """Calibration, length and the off-topic probe, a line each."""
    if figures["text_rows"]["without_template"]:
        yield f"{figures['text_rows']['without_template']} text rows scored without the model's chat template"
    if figures["text_rows"]["as_messages"]:
        yield f"{figures['text_rows']['as_messages']} text rows put into the model's chat template, as RewardBench does"
    length, raw, fitted = figures["length"], figures["calibration"], figures["calibration_at_temperature"]
    at = (
        f"; at temperature {figures['temperature']:.3g} {fitted['error']:.4f}, {fitted['log_loss']:.4f}"
        if fitted
        else ""
    )
    yield f"calibration error {raw['error']:.4f}, log loss {raw['log_loss']:.4f}{at}"
    longer, shorter = length["accuracy_longer"], length["accuracy_shorter"]
    yield f"length: correlation {length['correlation']:+.3f}; `longer wins` is right in {length['longer_wins']:.4f}"
    yield f"accuracy where the better one is longer {longer:.4f}, where it is shorter {shorter:.4f}"
    if figures.get("off_topic", {}).get("pairs"):
        probe = figures["off_topic"]
        yield f"short on topic beats long off topic in {probe['accuracy']:.4f} of {probe['pairs']} pairs"
    if figures["ties"] and figures["sections"]:
        yield "a tie counts one half; RewardBench counts it as wrong (--benchmark rewardbench)"
