"""What ships in `data/` is whole, small, and what its README says: policy, scorer, and lists graded by that scorer."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards import load_scorer

DATA = Path(__file__).parents[2] / "data"
POLICY, SCORER, LISTS = DATA / "story-policy", DATA / "story-scorer", DATA / "story-lists"


def rows(name: str) -> list[dict]:
    with gzip.open(LISTS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(DATA)


def test_sizes():
    size = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in (POLICY, SCORER, LISTS)}
    assert size[POLICY] <= 8_000_000 and size[SCORER] <= 4_000_000 and size[LISTS] <= 2_000_000


def test_lists_are_whole_and_no_prompt_is_on_both_sides():
    train, heldout = rows("train"), rows("heldout")
    assert (len(train), len(heldout)) == (400, 100)
    both = train + heldout
    assert len({row["prompt"] for row in both}) == len({row["id"] for row in both}) == 500
    for row in both:
        assert len(row["completions"]) == len(row["rewards"]) == 8
        assert all(text.strip() for text in row["completions"])


def test_lists_have_something_to_learn():
    spread = torch.tensor([row["rewards"] for row in rows("train")]).std(dim=1)
    assert (spread > 0.1).float().mean() > 0.95


def test_rewards_are_the_shipped_scorers():
    scorer = load_scorer(str(SCORER))
    for row in rows("heldout")[:5]:
        assert scorer.score([row["prompt"]] * 8, row["completions"]) == pytest.approx(row["rewards"], abs=2e-3)


def test_completions_are_as_likely_as_the_policys_own_samples():
    """At temperature 1 the mean log-probability of a sampled token is minus the policy's entropy there."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    surprise, entropy = [], []
    for row in rows("train")[:6]:
        start = len(tokenizer(row["prompt"])["input_ids"])
        for text in row["completions"]:
            ids = torch.tensor([tokenizer(row["prompt"] + text)["input_ids"]])
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)[start - 1 : -1]
            surprise += (-logprobs.gather(1, ids[0, start:, None])).flatten().tolist()
            entropy += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
    assert len(surprise) > 1000
    assert sum(surprise) / len(surprise) == pytest.approx(sum(entropy) / len(entropy), rel=0.1)


def test_the_policy_ends_its_stories_itself():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == "<|endoftext|>"
    assert tokenizer("One day")["input_ids"][0] == tokenizer.bos_token_id
    assert model.config.head_dim in (32, 64) and model.dtype == torch.bfloat16
    story = (
        "Once upon a time, there was a little dog named Max. Max liked to play in the park with his friend Sue.\n"
        "One day, Max lost his ball. He was sad. Sue looked under a big tree and found the ball.\n"
        "Max was very happy. They played all day, and then they went home. The end."
    )
    with torch.no_grad():
        probs = model(tokenizer(story, return_tensors="pt")["input_ids"]).logits[0].float().softmax(-1)
    at_end = probs[:, tokenizer.eos_token_id]
    assert at_end[-1] > 0.3
    assert at_end[:-1].max() < 0.05


def test_the_scorer_prefers_pleasant_stories():
    scorer = load_scorer(str(SCORER))
    pleasant = ["They laughed and played all day. It was a wonderful day.", "Her mom smiled and gave her a big hug."]
    sad = ["He was bored and sad. It was a terrible, stupid day.", "She fell. It was bad, and nothing helped."]
    good, bad = (scorer.score(["One day, Tim went to the park. "] * 2, texts) for texts in (pleasant, sad))
    assert min(good) > max(bad)


def test_openings_and_sentence_ends(scripts):
    from make_lists import openings, whole_sentences

    first = "Once upon a time, there was a little girl named Lily."
    assert openings([f"{first} She ran. Then.", f"{first} Other.", "Short. And short.", "No end at all"]) == [first]
    speech = 'One sunny day, little Ann said, "Hello! Good day!" to a very big dog.'
    assert openings([f"{speech} It barked.", "One day, it rained. Ann had no coat and no hat. She ran."]) == [
        speech,
        "One day, it rained. Ann had no coat and no hat.",
    ]
    assert whole_sentences(' She said, "Go away!" Then she we') == ' She said, "Go away!"'
    assert whole_sentences(" without any end") == " without any end"


def test_review_sentences_become_prose(scripts):
    from make_scorer import as_prose

    assert as_prose("it 's n't bad , i think ( really ) !") == "It'sn't bad, I think (really)!"


def test_pleasantness_is_the_smoothed_share_of_pleasant_words(scripts):
    from make_scorer import pleasantness

    assert pleasantness("The box was big.") == 0.5
    assert pleasantness("Happy Tim smiled. The sadness was gone, but Sue CRIED.") == (2 + 0.5) / (2 + 1 + 1)
