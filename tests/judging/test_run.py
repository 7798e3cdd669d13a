"""A trained run against what it was: its divergence, its samples, and the page."""

from pathlib import Path
from statistics import fmean

import pytest
import torch

from align.data.schema import Row
from align.evaluate.rows import load_run
from align.judging.cases import Case, build_cases
from align.judging.command import evaluate_policy
from align.judging.judges import Opinion
from align.judging.page import write_page
from align.judging.sides import Written
from align.rollout.journal import read_lines
from align.training.train import train

CALL = {"judges": ["{name: regex, pattern: w3}"], "samples": 2, "max_tokens": 6, "limit": 8, "temperature": 1.0}


@pytest.fixture
def run(make_recipe) -> str:
    """Of a policy far from its start."""
    settings = {"steps": 4, "learning_rate": 0.3, "warmup_ratio": 0.0}
    recipe = make_recipe(train=settings, sampling={"prompts": 0, "max_tokens": 6, "temperature": 0.7})
    train(recipe)
    return recipe.output


def divergence(run: str, lines: list[dict]) -> list[float]:
    """Of each prompt, in float64, a completion at a time through the Hugging Face model alone."""
    policy, _ = load_run(Path(run), None, "cpu")
    model = policy.model.double().eval()

    def logprob(line, own):
        ids = torch.tensor([line["prompt_ids"] + own])
        table = model(input_ids=ids).logits[0, len(line["prompt_ids"]) - 1 : -1].log_softmax(-1)
        return table.gather(1, torch.tensor(own)[:, None]).sum().item()

    with torch.no_grad():
        after = [[logprob(line, own) for own in line["completion_ids"]] for line in lines]
        with model.disable_adapter():
            before = [[logprob(line, own) for own in line["completion_ids"]] for line in lines]
    return [fmean(a - b for a, b in zip(*pair, strict=True)) for pair in zip(after, before, strict=True)]


def test_a_run_meets_what_it_was_and_its_divergence_is_that_of_its_samples(run, rows_file, tmp_path, tiny_policy):
    call = CALL | {"cache": str(tmp_path / "cache"), "prompts": str(rows_file)}
    found = evaluate_policy([run], **call)
    assert (tmp_path / "cache").is_dir() and found["against"] == "before"
    files = [list(read_lines(file)) for file in Path(run).glob("evaluate/samples/*/sampled.jsonl")]
    own = min(files, key=lambda lines: abs(fmean(divergence(run, lines)) - found["kl"]["mean"]))
    expected = divergence(run, own)
    assert found["kl"]["mean"] == pytest.approx(fmean(expected), abs=1e-4) and found["kl"]["mean"] > 0.1
    tokens = sum(len(ids) for line in own for ids in line["completion_ids"])
    assert found["kl_per_token"] == pytest.approx(2 * sum(expected) / tokens, abs=1e-4)
    base = evaluate_policy([run], **call, against=str(tiny_policy), output=str(tmp_path / "base"))
    assert base["win_rate"] == found["win_rate"] and base["kl"] == found["kl"], (
        "before is the base, with the same seeds"
    )
    cooler = evaluate_policy([run], **call | {"temperature": 0.7}, output=str(tmp_path / "cooler"))
    assert cooler["kl"] is None, "cooler samples are not the policy's own"


def test_the_page_shows_what_flipped_and_escapes_it(tmp_path):
    row = Row("r", "<script>prompt</script>", ("<b>good</b>", "bad & ugly"), None, None, {}, "file", 1)
    case = Case(row, {"new": [0], "old": [1]}, {("new", "old"): [(0, 1)]}, [])
    figures = {
        **{"policy": "new", "against": "old", "left_out": {}, "prompts": 2, "comparisons": 2, "agreement": []},
        **{"kl": None, "ranking": None, "best_of_n": [0.5], "best_of_n_against": [0.1]},
        **{
            f"{key}{side}": 1.0
            for key in ("length", "distinct_1", "distinct_2", "repetition")
            for side in ("", "_against")
        },
        **dict.fromkeys(("reward", "reward_against", "ended", "ended_against")),
    }
    rate = {"mean": 0.5, "low": 0.2, "high": 0.8, "standard_error": 0.1}
    judge = {
        "judge": "<i>j</i>",
        "name": "<i>n</i>",
        "wins": 0.5,
        "losses": 0.5,
        "ties": 0.0,
        "position_flips": None,
        "labels": None,
    }
    judge |= {"without_a_verdict": 0, "win_rate": rate, "win_rate_discrete": rate, "win_rate_lc": None}
    figures["judges"] = [judge | {"position_bias": None, "reward_change": None}]
    said = [Opinion([1.0, 0.0], {}), Opinion([0.0, 2.0], {})]
    write_page(tmp_path / "page.html", figures, [case, case], said)
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;prompt" in page and "<script>prompt" not in page and "<b>good" not in page
    assert "&lt;i&gt;n" in page and "<i>" not in page.partition("<body>")[2]
    worse, better = page.index("The other side is better (1 prompts)"), page.index("The policy is better (1 prompts)")
    assert worse < page.index("−2.00") < better < page.index("+1.00")


def test_texts_of_a_conversation_become_messages_and_equal_ones_are_one():
    row = Row("r", [{"role": "user", "content": "p"}], (), None, None, {}, "file", 1)
    written = Written("a", {"r": [[{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "x"}]]})
    written.rows = {"r": row}
    other = Written("rows", {"r": ["x", "y", "z"]})
    own = Row("r", row.prompt, ("x", "y", "z"), (1.0, 1.0, 0.0), None, {}, "file", 1)
    (case,) = build_cases([written, other], {"r": own}, samples=8, seed=0)
    assert [case.text(k) for k in range(3)] == ["x", "y", "z"]
    assert all(text[0]["role"] == "assistant" for text in case.row.completions)
    assert case.pairs == {("a", "rows"): [(0, 0), (0, 1), (0, 2)]}
    assert sorted(case.labels) == [(0, 2), (1, 2)]
    assert case.compared == [(0, 1), (0, 2), (1, 2)]
