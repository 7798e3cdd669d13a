"""Write `data/formats/`: the same four small lists in every row format that Align reads, one file per format.

python data/make_formats.py
"""

import json
from pathlib import Path

LISTS = [
    ("Name a fruit that is yellow.", ["A banana.", "Lemons, which are sour.", "A cherry."], [3, 2, 0]),
    ("How many legs does a spider have?", ["It has eight legs.", "Eight.", "Six legs."], [2, 1, 0]),
    ("Wish me a good night.", ["Sleep well and dream of the sea.", "Good night!", "Night."], [3, 2, 1]),
    ("What do I take on a walk in the rain?", ["A raincoat and boots.", "An umbrella.", "Nothing."], [4, 3, 1]),
]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def ranks(grades: list[int]) -> list[int]:
    """1 for the best."""
    return [1 + sum(other > grade for other in grades) for grade in grades]


FORMATS = {
    "canonical": lambda p, c, g: {"prompt": p, "completions": c, "grades": g, "meta": {"topic": "small talk"}},
    "canonical_chat": lambda p, c, g: {"prompt": user(p), "completions": [answer(x) for x in c], "grades": g},
    "completions_ranks": lambda p, c, g: {"prompt": p, "completions": c, "ranks": ranks(g)},
    "responses_rewards": lambda p, c, g: {"prompt": p, "responses": c, "rewards": [x / 2 for x in g]},
    "messages_answers_ratings": lambda p, c, g: {"messages": user(p), "answers": c, "ratings": g},
    "generated_scores": lambda p, c, g: {
        "prompt_id": "0f",
        "prompt": p,
        "all_generated_responses": c,
        "all_rm_scores": [x / 8 for x in g],
        "chosen": user(p) + answer(c[0]),
        "rejected": user(p) + answer(c[2]),
    },
    "items_scores": lambda p, c, g: {
        "prompt": p,
        "items": [{"text": x, "score": y} for x, y in zip(c, g, strict=True)],
    },
    "items_ranks_chat": lambda p, c, g: {
        "messages": user(p),
        "items": [{"text": x, "rank": y - 1} for x, y in zip(c, ranks(g), strict=True)],
    },
    "items_grades": lambda p, c, g: {
        "prompt": p,
        "items": [{"completion": x, "grade": y} for x, y in zip(c, g, strict=True)],
    },
    "completion_objects": lambda p, c, g: {
        "instruction": p,
        "completions": [{"model": "m", "response": x, "overall_score": y} for x, y in zip(c, g, strict=True)],
    },
    "answer_objects": lambda p, c, g: {
        "prompt": f"\n\nHuman: {p}\n\nAssistant: ",
        "answers": [{"answer": x, "model": "m", "rank": float(y)} for x, y in zip(c, ranks(g), strict=True)],
    },
    "context_completions": lambda p, c, g: {
        "context": user(p),
        "completions": [{"rank": y - 1, "completion": answer(x)} for x, y in zip(c, ranks(g), strict=True)],
        "task_name": "talk",
    },
    "preference": lambda p, c, g: {"prompt": p, "chosen": c[0], "rejected": c[2], "margin": g[0] - g[2]},
    "preference_sets": lambda p, c, g: {"prompt": p, "chosen": c[:2], "rejected": [c[2]]},
    "preference_chat": lambda p, c, g: {"prompt": user(p), "chosen": answer(c[0]), "rejected": answer(c[2])},
    "preference_whole_chat": lambda p, c, g: {
        "prompt": p,
        "chosen": user(p) + answer(c[0]),
        "rejected": user(p) + answer(c[2]),
    },
    "preference_implicit": lambda p, c, g: {"chosen": f"Q: {p}\nA: {c[0]}", "rejected": f"Q: {p}\nA: {c[2]}"},
    "preference_implicit_chat": lambda p, c, g: {
        "chosen": user(p) + answer(c[0]),
        "rejected": user(p) + answer(c[2]),
    },
    "preference_messages": lambda p, c, g: {
        "messages": user(p),
        "chosen": answer(c[0])[0],
        "rejected": answer(c[2])[0],
    },
    "dialogue_text": lambda p, c, g: {
        "chosen": f"\n\nHuman: {p}\n\nAssistant: {c[0]}",
        "rejected": f"\n\nHuman: {p}\n\nAssistant: {c[2]}",
    },
    "unpaired": lambda p, c, g: {"prompt": p, "completion": c[0], "label": g[0] > 2},
    "unpaired_chat": lambda p, c, g: {"prompt": user(p), "completion": answer(c[0]), "label": g[0] > 2},
    "labelled_messages": lambda p, c, g: {"messages": user(p) + answer(c[0]), "label": g[0] > 2},
    "sft": lambda p, c, g: {"prompt": p, "completion": c[0]},
    "sft_messages": lambda p, c, g: {"messages": user(p) + answer(c[0])},
    "sampled": lambda p, c, g: {
        "prompt": p,
        "completions": c,
        "prompt_ids": list(p.encode()),
        "completion_ids": [[*x.encode(), 0] for x in c],
        "rewards": g,
        "policy_version": 40,
    },
    "token_ids": lambda p, c, g: {
        "prompt_ids": list(p.encode()),
        "completions_ids": [list(x.encode()) for x in c],
        "grades": g,
    },
    "token_ids_pair": lambda p, c, g: {
        "prompt_ids": list(p.encode()),
        "chosen_ids": list(c[0].encode()),
        "rejected_ids": list(c[2].encode()),
    },
}


def main() -> None:
    folder = Path(__file__).parent / "formats"
    folder.mkdir(exist_ok=True)
    for name, shape in FORMATS.items():
        lines = [json.dumps(shape(*content)) + "\n" for content in LISTS]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
