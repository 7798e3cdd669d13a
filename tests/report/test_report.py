"""The page of a run against the run's files: parsed as a browser does, each figure computed a second time."""

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import align.report
from align.errors import UserError
from align.report import write_report

STEPS = 45
LOGGED = {
    "loss": lambda s: 0.7 - 0.01 * s,
    "rewards/margins": lambda s: 0.02 * s - 0.1,
    "logps/chosen": lambda s: -123.4 - s,
    "logps/rejected": lambda s: -130.0 - 3 * s,
    "best_fell_share": lambda s: s / 60,
    "best_logprob_change": lambda s: -0.3 * s,
    "grad_norm": lambda s: 1.5 + s % 7,
    "learning_rate": lambda s: 5e-7 * (1 - s / 50),
    "ndcg": lambda s: 0.9,
    "kl": lambda s: 1e-5 * s,
    "custom/metric": lambda s: 1e6 * s,
}
"""Names in metrics.jsonl, of every size that an axis must show."""
VOID = {"meta", "line", "path", "polyline", "input", "br"}
HOSTILE = '</script></pre></style><script>alert("1")</script><img src=x onerror=alert(2)> & "quoted" \'q\' {{ 7 * 7 }}'


class Page(HTMLParser):
    """Elements in their order, each with its attributes and all text inside; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        self.close()
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        parents = [e["index"] for e in self.open]
        element = {"tag": tag, "text": "", "index": len(self.elements), "parents": parents, **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag=None, cls=None, inside=None):
        return [
            e
            for e in self.elements
            if (tag is None or e["tag"] == tag)
            and (cls is None or cls in (e.get("class") or "").split())
            and (inside is None or inside["index"] in e["parents"])
        ]

    def one(self, *args, **kwargs):
        (element,) = self.all(*args, **kwargs)
        return element


def write_run(folder: Path, *, steps: int = STEPS, seed: int = 0, **recipe) -> Path:
    """A run directory as `align train` leaves it."""
    folder.mkdir(parents=True)
    tree = {
        "output": str(folder),
        "policy": {"model": "some/model", "adapter": {"name": "lora"}},
        "objective": {"name": "lambda"},
        "train": {"learning_rate": 5e-7, "seed": seed},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | recipe))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "seconds": 1.5 * step, **{name: f(step + seed) for name, f in LOGGED.items()}}
            file.write(json.dumps(line | {"epoch": step / steps}) + "\n")
            if step % 10 == 0:
                evaluated = {"step": step, "seconds": 1.5 * step, "eval_loss": 0.6 - 0.01 * step, "eval_margin": 0.3}
                file.write(json.dumps(evaluated) + "\n")
    summary = {
        "data": {"read": 8, "used": 7, "heldout_lists": 25},
        "steps": steps,
        "train_seconds": 67.5,
        "eval_before": {"loss": 0.7, "pair_accuracy": 0.5, "ndcg": 0.9, "best_fell_share": 0.0, "kl": 0.0},
        "eval_after": {"loss": 0.5, "pair_accuracy": 0.66, "ndcg": 0.9001, "best_fell_share": 0.875, "kl": 0.25},
        "eval_change": {
            "loss": {"difference": -0.2, "standard_error": 0.03, "lists": 25},
            "pair_accuracy": {"difference": 0.16, "standard_error": 0.09, "lists": 25},
            "ndcg": {"difference": 0.0001, "standard_error": 0.00001, "lists": 25},
            "best_fell_share": {"difference": 0.875, "standard_error": 0.07, "lists": 25},
        },
        "samples": [{"prompt": "One", "before": "bad", "after": "good", "reward_before": -1.0, "reward_after": 2.0}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"device": "abacus"}))
    return folder


def token_list(id: str = "row/1", prompt: str = "Say it:", rewards: bool = True, words: tuple[str, ...] = ("a", " b")):
    """One list of three completions with values from a seeded generator."""
    generator = random.Random(id)
    completions = []
    for size in (5, 40, 13):

        def values(low, high, size=size):
            return [generator.uniform(low, high) for _ in range(size)]

        completions.append(
            {
                "tokens": [words[i % len(words)] for i in range(size)],
                "token_rewards": values(-0.4, 0.4) if rewards else None,
                "implicit_before": [0.0] * size,
                "implicit_after": values(-0.1, 0.2),
                "logprob_before": values(-9, 0),
                "logprob_after": values(-9, 0),
            }
        )
    return {"id": id, "prompt": prompt, "grades": [0.25, 0.75, 0.5], "completions": completions}


def write_tokens(run: Path, *lists: dict) -> None:
    (run / "token_view.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lists))


def page_of(*runs: Path) -> Page:
    return Page(write_report(runs).read_text(encoding="utf-8"))


def points(line: dict, power: str) -> list[tuple[float, float]]:
    """The (step, value) pairs that a polyline draws."""
    pairs = [pair.split(",") for pair in line["points"].split()]
    return [(float(x), float(y) * 10.0 ** int(power)) for x, y in pairs]


def logged(run: Path, name: str) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def number(text: str) -> float:
    return float(text.replace("−", "-").replace("+", ""))


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


def test_every_logged_metric_is_drawn_with_a_point_per_step(run):
    page = page_of(run)
    series = page.all("g", "series")
    assert sorted(s["data-metric"] for s in series) == sorted(LOGGED)
    for s in series:
        drawn = points(page.one("polyline", "raw", inside=s), s["data-power"])
        expected = logged(run, s["data-metric"])
        assert len(drawn) == STEPS
        assert [x for x, _ in drawn] == [x for x, _ in expected]
        assert [y for _, y in drawn] == pytest.approx([y for _, y in expected], rel=1e-6)


def test_curves_lie_where_the_tick_labels_say(run):
    page = page_of(run)
    for svg in page.all("svg"):
        box = [float(n) for n in svg["viewbox"].split()]
        for axis, place in (("x", 0), ("y", 1)):
            ticks = [(number(t["text"]), float(t[axis])) for t in page.all("text", axis, inside=svg)]
            (low, low_at), (high, high_at) = ticks[0], ticks[-1]
            assert high > low and len(ticks) >= 3
            for line in page.all("polyline", inside=svg):
                group = next(g for g in page.all("g", "series", inside=svg) if g["index"] in line["parents"])
                a, b, c, d, e, f = (
                    float(n) for n in re.findall(r"[-\d.e+]+", line["transform"].removeprefix("matrix"))
                )
                assert b == c == 0
                for step, value in points(line, group["data-power"]):
                    at = (a * step + e, d * value / 10.0 ** int(group["data-power"]) + f)[place]
                    label = low_at + ((step, value)[place] - low) / (high - low) * (high_at - low_at)
                    assert at == pytest.approx(label - (3.5 if axis == "y" else 0), abs=0.15)  # y labels sit lower
                    assert 0 <= at <= box[2 + place]


def test_the_strong_line_is_the_mean_over_the_window_that_the_page_names(run):
    page = page_of(run)
    curves = next(section for section in page.all("section") if section["id"] == "curves")
    window = int(re.search(r"\((\d+) steps\)", curves["text"])[1])
    group = next(g for g in page.all("g", "series") if g["data-metric"] == "grad_norm")
    values = [y for _, y in logged(run, "grad_norm")]
    expected = []
    for i in range(len(values)):
        near = [v for j, v in enumerate(values) if abs(i - j) <= (window - 1) / 2]
        expected.append(sum(near) / len(near))
    smooth = points(page.one("polyline", "smooth", inside=group), group["data-power"])
    assert window > 1 and [y for _, y in smooth] == pytest.approx(expected, rel=1e-6)


def test_held_out_figures_are_dots_on_the_metric_of_the_same_meaning(run):
    page = page_of(run)
    groups = {g["data-metric"]: g for g in page.all("g", "series")}
    for metric, name in (("loss", "eval_loss"), ("rewards/margins", "eval_margin")):
        dots = page.one("path", "held-out", inside=groups[metric])
        pairs = re.findall(r"M(\S+) (\S+?)h0", dots["d"])
        drawn = [(float(x), float(y) * 10.0 ** int(groups[metric]["data-power"])) for x, y in pairs]
        assert [n for pair in drawn for n in pair] == pytest.approx([n for pair in logged(run, name) for n in pair])
    assert len(page.all("path", "held-out")) == 2


def test_values_that_cannot_be_drawn_are_counted(run):
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[3]["grad_norm"], lines[4]["grad_norm"] = math.inf, math.nan
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(run)
    group = next(g for g in page.all("g", "series") if g["data-metric"] == "grad_norm")
    assert len(points(page.one("polyline", "raw", inside=group), group["data-power"])) == STEPS - 2
    assert [w["text"] for w in page.all("p", "warning")] == [
        "Not drawn, since infinite or not a number: 2 logged values."
    ]


def test_the_table_is_the_summary_s_figures_and_says_which_way_is_better(run):
    page = page_of(run)
    rows = {}
    for row in page.all("tr"):
        cells = [c["text"].strip() for c in page.all(inside=row) if c["tag"] in ("th", "td")]
        rows[cells[0]] = cells[1:]
    assert rows["loss"] == ["0.7000", "0.5000", "−0.2000 ± 0.0300 better"]
    assert rows["pair accuracy by implicit reward"] == ["0.5000", "0.6600", "+0.1600 ± 0.0900 within noise"]
    assert rows["NDCG by implicit reward"] == ["0.9000", "0.9001", "+0.0001 ± 0.0000"]
    assert rows["share of lists whose best completion fell"] == ["0.000", "0.875", "+0.875 ± 0.070 worse"]
    assert rows["kl"] == ["0.0000", "0.2500", "+0.2500"]


def test_the_words_at_the_top_sort_the_figures(run):
    page = page_of(run)
    words = page.one("div", "words")
    texts = {c: page.one("div", c, inside=words)["text"] for c in ("better", "worse", "within-noise")}
    assert "from 0.7000 to 0.5000" in texts["better"] and "66.0 %" in texts["within-noise"]
    assert "In 87.5 % of the lists the best completion is less probable" in texts["worse"]
    assert "up to 10 points" in page.one("div", "run")["text"]  # 0.5 / sqrt(25)
    assert "25 held-out lists show large changes only" in page.one("div", "run")["text"]


def test_a_run_that_did_not_keep_how_sure_it_is_gets_no_verdict(run):
    summary = json.loads((run / "summary.json").read_text())
    del summary["eval_change"]
    summary["data"]["heldout_lists"] = 30
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run)
    assert [card["class"] for card in page.all("li", inside=page.one("ul", "cards"))] == ["", "", ""]
    assert (
        not page.all("small", inside=page.all("table", "figures")[0])
        and "show large changes only" not in page.one("div", "run")["text"]
    )


def test_the_diagnosis_of_displacement_is_told(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["displacement"] = {"lists": 8, "fell_share": 0.375, "rank_correlation": 0.5}
    (run / "summary.json").write_text(json.dumps(summary))
    notes = " ".join(note["text"] for note in page_of(run).all("p", "note"))
    assert "In 38% of 8 held-out lists the best completion lost probability" in " ".join(notes.split())


@pytest.mark.parametrize("rewards", [True, False])
def test_tokens_carry_their_values_and_colours(run, rewards):
    shown = [token_list("row/1", rewards=rewards), token_list("row/2", rewards=rewards)]
    write_tokens(run, *shown)
    page = page_of(run)
    tokens = [
        c for one in shown for _, c in sorted(zip(one["grades"], one["completions"], strict=True), key=lambda p: -p[0])
    ]
    texts = page.all("div", "text")
    assert len(texts) == 6
    names = ("token_rewards", "implicit_before", "implicit_after", "logprob_before", "logprob_after")
    values = {n: [v for c in tokens for v in c[n] or []] for n in names}
    sizes = {"reward": values["token_rewards"], "after": values["implicit_before"] + values["implicit_after"]}
    for mode, known in sizes.items():
        if not known:
            continue
        ends = [
            number(s["text"]) for s in page.all("span", inside=page.one("div", mode, inside=page.one("div", "view")))
        ]
        assert -ends[0] == ends[1]
        covered = sum(abs(v) <= ends[1] * 1.05 for v in known) / len(known)
        assert covered >= 0.97 and ends[1] <= max(map(abs, known)) * 1.05
        name = {"reward": "token_rewards", "after": "implicit_after"}[mode]
        spans = [span for text in texts for span in page.all("span", inside=text)]
        drawn = [float(re.search(rf"--{mode}:([-\d.]+)", span["style"])[1]) for span in spans]
        assert drawn == pytest.approx([max(-1, min(1, v / ends[1])) for v in values[name]], abs=0.03)
    for text, completion in zip(texts, tokens, strict=True):
        assert text["text"] == "".join(completion["tokens"])
        for i, span in enumerate(page.all("span", inside=text)):
            numbers = [float(n) if n else None for n in span["data-v"].split(" ")]
            expected = [completion[n][i] if completion[n] else None for n in names]
            assert numbers == [e if e is None else pytest.approx(e, rel=1e-4) for e in expected]
    modes = [i["value"] for i in page.all("input")]
    assert modes == ["reward"] * rewards + ["before", "after"]
    assert ("holds no token rewards" in page.one("div", "view")["text"]) != rewards


def test_tokens_that_are_read_only_have_no_value_and_no_colour(run):
    one = token_list()
    write_tokens(run, one)
    assert "not learnt" not in page_of(run).one("div", "view")["text"]
    for completion in one["completions"]:
        for values in (completion[name] for name in completion if name != "tokens"):
            values[1:4] = [None] * 3
    write_tokens(run, one)
    page = page_of(run)
    for text in page.all("div", "text"):
        for i, span in enumerate(page.all("span", inside=text)):
            read = i in (1, 2, 3)
            assert (span.get("class") == "read") == read == (span["data-v"].split(" ") == [""] * 5)
            assert ("--after:" in span["style"]) == (not read)
    assert "read and not learnt" in page.one("div", "view")["text"]
    best = one["completions"][1]
    after, before = (sum(v for v in best[name] if v is not None) for name in ("logprob_after", "logprob_before"))
    head = page.one("summary", inside=page.all("details", "list")[0])["text"].split()
    assert number(head[-2]) == pytest.approx(after - before, abs=0.06)


def test_a_list_says_how_its_completions_rank_and_whether_the_best_fell(run):
    one = token_list()
    write_tokens(run, one)
    page = page_of(run)
    items = page.all("li", inside=page.one("ol", "completions"))
    order = [1, 2, 0]  # grades 0.75, 0.5, 0.25
    totals = [sum(c["implicit_after"]) for c in one["completions"]]
    changes = [sum(c["logprob_after"]) - sum(c["logprob_before"]) for c in one["completions"]]
    for item, i in zip(items, order, strict=True):
        place = sorted(totals, reverse=True).index(totals[i]) + 1
        grade, implicit, change = (d["text"].split() for d in page.all("dd", inside=item))
        assert float(grade[0]) == one["grades"][i] and ("best" in grade) == (i == 1)
        assert number(implicit[0]) == pytest.approx(totals[i], abs=0.006) and implicit[1:] == [str(place), "of", "3"]
        assert number(change[0]) == pytest.approx(changes[i], abs=0.06)
    head = page.one("summary", inside=page.all("details", "list")[0])["text"].split()
    assert ("fell" in head) == (changes[1] < 0) and number(head[-2]) == pytest.approx(changes[1], abs=0.06)


def test_more_lists_and_samples_than_fit_are_counted(run):
    write_tokens(run, *(token_list(str(i)) for i in range(23)))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"samples": summary["samples"] * 40}))
    page = page_of(run)
    sections = {section["id"]: section for section in page.all("section")}
    for name, total in (("tokens", 23), ("samples", 40)):
        shown = len(page.all("details", "list", inside=sections[name]))
        assert 0 < shown < total and f"first {shown} of {total}" in sections[name]["text"]


def test_what_comes_from_files_stays_text(tmp_path):
    run = write_run(tmp_path / 'r"><b onload=x>', objective={"name": HOSTILE}, extra=HOSTILE)
    write_tokens(run, token_list(HOSTILE, HOSTILE, words=(HOSTILE, "\n", "")))
    summary = json.loads((run / "summary.json").read_text())
    summary["samples"] = [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}]
    summary["eval_before"][HOSTILE] = summary["eval_after"][HOSTILE] = 1.0
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "environment.json").write_text(json.dumps({"device": HOSTILE}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS + 1, "loss": 1.0, HOSTILE: 2.0}) + "\n")
    page = page_of(run)
    assert page.one("script")["text"] == Path(align.report.__file__).with_name("script.js").read_text()
    assert not page.all("img") and not [k for e in page.elements for k in e if k.startswith("on")]
    assert page.one("h1")["text"] == run.name
    texts = [e["text"] for e in page.elements]
    for tag in ("dd", "h3", "pre"):
        assert any(HOSTILE in e["text"] or "alert(" in e["text"] for e in page.all(tag)), tag
    assert sum(text == HOSTILE for text in texts) > 10
    spans = [s["text"] for s in page.all("span", inside=page.all("div", "text")[0])]
    assert spans[:3] == [HOSTILE, "↵\n", "▫"]


def test_the_page_loads_nothing(run):
    write_tokens(run, token_list())
    text = write_report([run]).read_text()
    page = Page(text)
    for element in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert element.get(name, "#").startswith("#"), element
    assert not page.all("link") and not page.all("iframe")
    style = page.one("style")["text"]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    script = page.one("script")["text"]
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    for target in page.all("a"):
        assert [e for e in page.elements if e.get("id") == target["href"][1:]]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("summary.json", "This run is not finished"),
        ("metrics.jsonl", "No step has been logged yet"),
        ("environment.json", "holds no environment.json"),
        ("token_view.jsonl", "no list token by token"),
    ],
)
def test_a_run_without_an_optional_file_says_so(run, missing, said):
    write_tokens(run, token_list())
    assert said not in page_of(run).one("main")["text"]
    (run / missing).unlink()
    assert said in page_of(run).one("main")["text"]


def test_a_run_that_was_told_to_keep_no_lists_says_so_too(run):
    write_tokens(run)
    assert "no list token by token" in page_of(run).one("main")["text"]


def test_a_run_of_one_step_and_one_without_held_out_lists(tmp_path):
    run = write_run(tmp_path / "short", steps=1)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"eval_before": {}, "eval_after": {}, "samples": []}))
    page = page_of(run)
    assert len(page.all("path", "lone")) == len(LOGGED), "a line of one point is a dot"
    assert "held no lists out" in page.one("div", "run")["text"]


def test_several_runs_are_laid_over_each_other(tmp_path):
    runs = [write_run(tmp_path / name, steps=steps, seed=seed) for name, steps, seed in (("a", 20, 0), ("b", 30, 3))]
    written = write_report(runs)
    assert written == tmp_path / "report.html"
    page = Page(written.read_text())
    for metric in LOGGED:
        first, second = (g for g in page.all("g", "series") if g["data-metric"] == metric)
        assert first["class"] != second["class"]
        for run, group, steps in ((runs[0], first, 20), (runs[1], second, 30)):
            drawn = points(page.one("polyline", "raw", inside=group), group["data-power"])
            assert len(drawn) == steps
            assert [y for _, y in drawn] == pytest.approx([y for _, y in logged(run, metric)], rel=1e-6)
    rows = page.all("tr", inside=page.one("table", "recipe"))
    cells = [[c["text"] for c in page.all(inside=row) if c["tag"] in ("th", "td")] for row in rows]
    assert cells == [["key", "a", "b"], ["train.seed", "0", "3"]]


def test_the_last_line_may_be_cut(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 46, "lo')
    page = page_of(run)
    group = next(g for g in page.all("g", "series") if g["data-metric"] == "loss")
    assert len(points(page.one("polyline", "raw", inside=group), group["data-power"])) == STEPS


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, \n', "metrics.jsonl, line 2: is not JSON"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1: is not a JSON object"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.5, "crc32": 7}\n', "metrics.jsonl, line 1: is damaged, its checksum"),
        ("metrics.jsonl", '{"loss": 0.5}\n', "metrics.jsonl, line 1: has no `step`"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "metrics.jsonl, line 1: `loss` is not a number"),
        ("summary.json", "{", "summary.json: is not JSON"),
        ("recipe.yaml", "a: [", "recipe.yaml: is not YAML"),
        ("recipe.yaml", "", "recipe.yaml: is not a recipe"),
        ("token_view.jsonl", '{"id": "x"}\n', "token_view.jsonl, line 1: prompt: Field required"),
    ],
)
def test_a_broken_file_is_named(run, file, content, message):
    (run / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{run}/{message}")):
        write_report([run])
    assert not (run / "report.html").exists()


def test_tokens_and_values_must_match(run):
    one = token_list()
    one["completions"][1]["logprob_after"].pop()
    write_tokens(run, token_list(), one)
    with pytest.raises(UserError, match=r"line 2: completions\.1.*logprob_after has 39 values for 40 tokens"):
        write_report([run])
    one["completions"][1]["logprob_after"].append(None)
    write_tokens(run, one)
    with pytest.raises(UserError, match=r"line 1: completions\.1.*logprob_after has null at other tokens than"):
        write_report([run])


def test_what_cannot_be_written_or_told_apart_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="named twice"):
        write_report([run, tmp_path / "x" / ".." / "run"])
    with pytest.raises(UserError, match="cannot be told apart"):
        write_report([tmp_path / str(i) for i in range(9)])
    with pytest.raises(UserError, match=re.escape(f"{run}: cannot be written")):
        write_report([run], run)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_keep_their_contrast(scheme):
    css = Path(align.report.__file__).with_name("style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for ground in ("page", "surface"):
        for text in ("ink", "muted", "link", "better", "worse"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for token in ("positive", "negative"):
        assert contrast(colours["ink"], colours[token]) >= 4.5, token
    for curve in (name for name in colours if re.fullmatch(r"c\d", name)):
        assert contrast(colours[curve], colours["surface"]) >= 3, curve


def interval(mean: float, low: float | None = None, high: float | None = None) -> dict:
    return {"mean": mean, "low": low, "high": high, "standard_error": None}


def measure(run: Path, name: str = "length") -> dict[str, dict]:
    """What the other commands leave in a run's folder and in an export's, of random figures."""
    draw = random.Random(0).random
    judges = [
        {
            "name": own,
            "win_rate": interval(draw(), draw(), draw()),
            "win_rate_discrete": interval(draw()),
            "win_rate_lc": None,
            "position_bias": interval(-draw(), -draw(), draw()) if own == "other" else None,
            "reward_change": None,
        }
        for own in (name, "other")
    ]
    files = {
        "evaluate/evaluate.json": {"policy": "run", "against": "before", "prompts": 7, "judges": judges},
        "benchmarks.json": {
            "tasks": {
                "arc": {
                    "acc": {"before": 0.5, "after": 0.25, "change": -0.25, "standard_error": 0.0625, "forgot": True},
                    "nll": {"before": None, "after": 1.5, "change": None, "standard_error": None, "forgot": False},
                }
            }
        },
        "gguf/export.json": {
            "engine": "llama.cpp",
            "tokens": 321,
            "mean_logprob_difference": 1.5e-3,
            "max_logprob_difference": 0.5,
            "pair_accuracy_before": 0.75,
            "pair_accuracy_after": 0.625,
        },
    }
    for path, figures in files.items():
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_text(json.dumps(figures))
    return files


def test_what_was_measured_after_training_is_on_the_page(run):
    assert not any(e.get("id") == "measured" for e in page_of(run).elements), "nothing was measured yet"
    files = measure(run)
    write_report([run], exports=[run / "gguf"])
    page = Page((run / "report.html").read_text())
    section = next(e for e in page.elements if e.get("id") == "measured")
    cells = [
        " ".join(e["text"].split())
        for e in page.elements
        if e["tag"] in ("td", "th") and section["index"] in e["parents"]
    ]
    told = "{mean:.3f} {low:.3f} to {high:.3f}".format
    judges = files["evaluate/evaluate.json"]["judges"]
    bias = judges[1]["position_bias"]
    expected = [
        *("", "length", "other"),
        *("win rate", *(told(**judge["win_rate"]) for judge in judges)),
        *("win rate, discrete", *(f"{judge['win_rate_discrete']['mean']:.3f}" for judge in judges)),
        *("bias for the first shown", "", f"{bias['mean']:+.3f} {bias['low']:+.3f} to {bias['high']:+.3f}"),
        *("task", "figure", "before", "after", "change"),
        *("arc", "acc", "0.5000", "0.2500", "−0.2500 ± 0.0625 forgot"),
        *("arc", "nll", "", "1.5000", ""),
        *("folder", "engine", "tokens", "mean", "largest", "pair accuracy"),
        *(str(run / "gguf"), "llama.cpp", "321", "1.5e-03", "5.0e-01", "0.7500 → 0.6250"),
    ]
    assert cells == expected


def test_a_judge_with_a_hostile_name_stays_text(run):
    measure(run, HOSTILE)
    page = page_of(run)
    assert not page.all("img") and any(e["tag"] == "th" and e["text"] == HOSTILE for e in page.elements)


@pytest.mark.parametrize(
    ("file", "broken", "said"),
    [
        ("evaluate/evaluate.json", "{", "not valid JSON"),
        ("evaluate/evaluate.json", '{"judges": []}', "policy: Field required"),
        ("benchmarks.json", '{"tasks": {"arc": {"acc": {"after": "x"}}}}', "tasks.arc.acc"),
        ("gguf/export.json", "[]", "restore the file"),
        ("gguf/export.json", None, "give a folder that `align export` wrote"),
    ],
)
def test_damaged_figures_are_named(run, file, broken, said):
    measure(run)
    (run / file).unlink() if broken is None else (run / file).write_text(broken)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        write_report([run], exports=[run / "gguf"])
    assert str(run / file.split("/")[0]) in str(error.value)
