"""Sample and score the lists that ship in `data/story-lists`: K completions per story opening, with their rewards.

    python data/make_lists.py --corpus stories.jsonl.gz --policy data/story-policy --scorer data/story-scorer \
        --out data/story-lists --work /tmp/story-lists

The openings are first sentences of the corpus's last 1,000 rows, which `make_policy.py` keeps apart, each once. A
completion is sampled at temperature 1 and ends after its last whole sentence. Run the command again after an
interruption: it goes on from the rows in `--work`.
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from make_policy import HELD_OUT, read_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.evaluate.sampling import sample_completions
from rewards import Scorer, load_scorer

SENTENCE_END = re.compile(r"[.!?]+[\"']?(?=\s+[\"'A-Z]|\s*$)")
CHUNK = 20
"""Prompts that are sampled and written at once."""


def openings(texts: list[str]) -> list[str]:
    """The first sentence of each text, or the first two where it is short; every opening once."""
    found = {}
    for text in texts:
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        end = next((end for end in ends[:2] if end >= 45), None)
        if end is not None and end <= 160:
            found[text[:end]] = None
    return list(found)


def whole_sentences(completion: str) -> str:
    """The completion up to its last sentence end; unchanged where it has none."""
    ends = [match.end() for match in SENTENCE_END.finditer(completion)]
    return completion[: ends[-1]] if ends else completion


def rows_of(
    prompts: list[str],
    *,
    first: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    args: argparse.Namespace,
) -> Iterator[dict]:
    """Canonical rows with rewards rounded to four digits; `first` numbers them."""
    sampled = sample_completions(
        model,
        tokenizer,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        max_tokens=args.max_tokens,
        seed=args.seed,
        per_prompt=args.per_prompt,
    )
    for number, (prompt, texts) in enumerate(zip(prompts, sampled, strict=True), first):
        completions = [whole_sentences(text) for text in texts]
        rewards = scorer.score([prompt] * len(completions), completions)
        yield {
            "id": f"story/{number}",
            "prompt": prompt,
            "completions": completions,
            "rewards": [round(reward, 4) for reward in rewards],
        }


def write_rows(path: Path, lines: list[str]) -> None:
    """A gzip file that holds nothing but the lines, so that equal rows make equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write("".join(lines).encode())


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    wanted = args.train + args.heldout
    prompts = openings(read_corpus(args.corpus)[-HELD_OUT // 2 :])[:wanted]
    if len(prompts) < wanted:
        raise SystemExit(f"{args.corpus}: only {len(prompts)} different openings for {wanted} prompts")
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
    scorer = load_scorer(str(args.scorer))
    args.work.mkdir(parents=True, exist_ok=True)
    done = args.work / "rows.jsonl"
    done.touch()
    lines = [line for line in done.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    done.write_text("".join(lines))
    while len(lines) < wanted:
        chunk = prompts[len(lines) : len(lines) + CHUNK]
        rows = rows_of(chunk, first=len(lines), model=model, tokenizer=tokenizer, scorer=scorer, args=args)
        new = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with done.open("a") as file:
            file.writelines(new)
        lines += new
        print(f"{len(lines)} of {wanted} prompts", flush=True)
    write_rows(args.out / "train.jsonl.gz", lines[: args.train])
    write_rows(args.out / "heldout.jsonl.gz", lines[args.train :])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--policy", type=Path, default=Path("data/story-policy"))
    parser.add_argument("--scorer", type=Path, default=Path("data/story-scorer"))
    parser.add_argument("--out", type=Path, default=Path("data/story-lists"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the rows made so far")
    parser.add_argument("--train", type=int, default=400, help="training prompts")
    parser.add_argument("--heldout", type=int, default=100, help="held-out prompts")
    parser.add_argument("--per-prompt", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
