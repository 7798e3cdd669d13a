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
    "openai_preference": lambda p, c, g: {
        "input": {"messages": user(p), "tools": [], "parallel_tool_calls": True},
        "preferred_output": answer(c[0]),
        "non_preferred_output": answer(c[2]),
    },
    "gemini_preference": lambda p, c, g: {
        "system_instruction": {"parts": [{"text": "Be brief."}]},
        "contents": [{"role": "user", "parts": [{"text": p}]}],
        "completions": [
            {"score": float(x == c[0]), "completion": {"role": "model", "parts": [{"text": x}]}} for x in (c[2], c[0])
        ],
    },
    "nova_preference": lambda p, c, g: {
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"text": p}]},
            {
                "role": "assistant",
                "candidates": [
                    {"content": [{"text": c[0]}], "preferenceLabel": "preferred"},
                    {"content": [{"text": c[2]}], "preferenceLabel": "non-preferred"},
                ],
            },
        ],
    },
    "sharegpt": lambda p, c, g: {
        "conversations": [{"from": "human", "value": p}],
        "chosen": {"from": "gpt", "value": c[0]},
        "rejected": {"from": "gpt", "value": c[2]},
    },
    "swift_pair": lambda p, c, g: {"messages": user(p) + answer(c[0]), "rejected_response": c[2]},
    "alpaca": lambda p, c, g: {
        "instruction": "Answer in a sentence.",
        "input": p,
        "history": [["Hello.", "Hello, what is it?"]],
        "chosen": c[0],
        "rejected": c[2],
    },
    "orca_pair": lambda p, c, g: {"system": "Be brief.", "question": p, "chosen": c[0], "rejected": c[2]},
    "distilabel": lambda p, c, g: {
        "instruction": p,
        "generations": c,
        "ratings": g,
        "rationales": ["so"] * 3,
        "raw_generation_responses": [f" {x}\n" for x in c],
        "chosen": user(p) + answer(c[0]),
        "rejected": user(p) + answer(c[2]),
    },
    "distilabel_pair": lambda p, c, g: {
        "conversation": [{"input": p, "output": c[1]}],
        "original_response": c[1],
        "generation_prompt": [f"You are a helpful assistant. {p}"],
        "raw_generation_responses": [c[2], "Something else."],
        "prompt": p,
        "chosen": user(p) + answer(c[0]),
        "rejected": user(p) + answer(c[2]),
        "rating_chosen": g[0],
        "rating_rejected": g[2],
    },
    "whole_completion": lambda p, c, g: {"completion": user(p) + answer(c[0]), "label": g[0] > 2},
    "argilla_record": lambda p, c, g: {
        "fields": {"instruction": p, **{f"generations-{k}": x for k, x in enumerate(c)}},
        "responses": {
            f"generations-{k}-rating": [{"value": y, "user_id": "one"}, {"value": y + 1, "user_id": "two"}]
            for k, y in enumerate(g)
        },
        "suggestions": {"generations-0-rating": {"value": 1, "agent": "a model"}},
        "status": "completed",
    },
    "chosen_response": lambda p, c, g: {
        "instruction": p,
        "chosen_response": c[0],
        "rejected_response": c[2],
        "chosen_avg_rating": float(g[0]),
        "rejected_avg_rating": float(g[2]),
    },
    "prometheus": lambda p, c, g: {
        "orig_instruction": p,
        "orig_response_A": c[2],
        "orig_response_B": c[0],
        "orig_preference": "B",
        "orig_criteria": "Is it true?",
        "instruction": f"###Task: which is better? {p}",
    },
    "step_pair": lambda p, c, g: {
        "prompt": p,
        "initial_reason_steps": "Step 1: I think of it.\nStep 2: ",
        "chosen": c[0],
        "rejected": c[2],
        "full_chosen": f"Step 1: I think of it.\nStep 2: {c[0]} The end.",
        "full_rejected": f"Step 1: I think of it.\nStep 2: {c[2]} The end.",
    },
}


RATED = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def talk(prompt: str, text: str) -> list[dict[str, str]]:
    return user(prompt) + answer(text)


def node(identity: str, role: str, text: str, rank: int | None, replies: list[dict]) -> dict:
    return {"message_id": identity, "role": role, "text": text, "rank": rank, "deleted": False, "replies": replies}


def tree(p: str, c: list[str], g: list[int]) -> dict:
    answers = [node(f"{p}/{k}", "assistant", x, y - 1, []) for k, (x, y) in enumerate(zip(c, ranks(g), strict=True))]
    return {"message_tree_id": p, "tree_state": "ready_for_export", "prompt": node(p, "prompter", p, None, answers)}


def messages_of(p: str, c: list[str], g: list[int]) -> list[dict]:
    """The same tree with a row for each message."""
    root = tree(p, c, g)["prompt"]
    rows = [(root, None), *((reply, p) for reply in root["replies"])]
    own = [{key: value for key, value in message.items() if key != "replies"} for message, _ in rows]
    return [{**row, "parent_id": parent, "message_tree_id": p} for row, (_, parent) in zip(own, rows, strict=True)]


VOTES = {
    "helpsteer": lambda p, c, g: [
        {"prompt": p, "response": x, **dict.fromkeys(RATED, 2), "helpfulness": y} for x, y in zip(c, g, strict=True)
    ],
    "helpsteer2_preference": lambda p, c, g: {
        "split": "train",
        "prompt": p,
        "response_1": c[0],
        "response_2": c[2],
        "preference_strength": -2,
        "preference_statement": "The first is better than the second.",
    },
    "helpsteer3": lambda p, c, g: {
        "domain": "general",
        "language": "english",
        "context": user(p),
        "response1": c[2],
        "response2": c[0],
        "overall_preference": 3,
        "individual_preference": [
            {"score": 3, "reasoning": "It is right.", "feedback1": "Wrong.", "feedback2": "Right."}
        ],
    },
    "arena": lambda p, c, g: {
        "question_id": "0f",
        "model_a": "m",
        "model_b": "n",
        "winner": "model_b",
        "conversation_a": talk(p, c[2]),
        "conversation_b": talk(p, c[0]),
        "turn": 1,
        "language": "English",
    },
    "arena_table": lambda p, c, g: {
        "model_a": "m",
        "model_b": "n",
        "prompt": json.dumps([p]),
        "response_a": json.dumps([c[0]]),
        "response_b": json.dumps([c[2]]),
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    },
    "safe_rlhf": lambda p, c, g: {
        "prompt": p,
        "response_0": c[2],
        "response_1": c[0],
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "numbered_pair": lambda p, c, g: {
        "instruction": p,
        "output_1": c[2],
        "output_2": c[0],
        "preference": 2,
        "raw_preference": 4,
    },
    "shp": lambda p, c, g: {
        "post_id": "0f",
        "history": p,
        "human_ref_A": c[0],
        "human_ref_B": c[2],
        "labels": 1,
        "score_A": 10 * g[0],
        "score_B": 1,
        "score_ratio": 10.0 * g[0],
    },
    "webgpt": lambda p, c, g: {
        "question": {"dataset": "triviaqa", "id": "0f", "full_text": p},
        "quotes_0": {"title": ["Fruit"], "extract": ["Bananas are yellow."]},
        "answer_0": c[0],
        "score_0": 0.5,
        "answer_1": c[2],
        "score_1": -0.5,
    },
    "summary_comparison": lambda p, c, g: {
        "info": {"id": "t3_0f", "subreddit": "AskReddit", "title": p, "post": f"I would like to know. {p}"},
        "summaries": [
            {"text": f" {c[2]}", "policy": "sup", "note": ""},
            {"text": f" {c[0]}", "policy": "ref", "note": ""},
        ],
        "choice": 1,
        "worker": "w",
    },
    "summary_axes": lambda p, c, g: {
        "info": {"id": "0f", "title": p, "article": f"Somebody asked this. {p}"},
        "summary": {
            "text": f" {c[0]}",
            "policy": "sup",
            "note": "",
            "axes": {"overall": 6, "accuracy": 7, "coverage": None},
        },
        "worker": "w",
    },
    "stack_exchange": lambda p, c, g: {
        "qid": 5,
        "question": p,
        "answers": [
            {"answer_id": 6, "text": x, "pm_score": y, "selected": y == max(g)} for x, y in zip(c, g, strict=True)
        ],
        "date": "2020/01/01",
        "metadata": ["https://example.com/q/5"],
    },
    "ultrafeedback": lambda p, c, g: {
        "source": "s",
        "instruction": p,
        "models": ["m", "m", "m"],
        "completions": [
            {
                "model": "m",
                "custom_system_prompt": "Be helpful.",
                "response": x,
                "overall_score": float(y),
                "annotations": {"helpfulness": {"Rating": str(y), "Rationale": "So."}, "honesty": {"Rating": "N/A"}},
            }
            for x, y in zip(c, g, strict=True)
        ],
    },
    "oasst_tree": tree,
    "oasst_messages": messages_of,
}
"""Votes, ratings and rankings as they were published; where several rows are one list, all of them."""


def main() -> None:
    folder = Path(__file__).parent / "formats"
    folder.mkdir(exist_ok=True)
    for name, shape in (FORMATS | VOTES).items():
        made = [shape(*content) for content in LISTS]
        rows = [row for own in made for row in (own if isinstance(own, list) else [own])]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
