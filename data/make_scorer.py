"""Train the small sentiment scorer that ships in `data/story-scorer`, on labelled sentences and on stories.

    python data/make_scorer.py --sentences sentences.jsonl.gz --stories stories.jsonl.gz \
        --policy data/story-policy --out data/story-scorer

The sentences are JSONL (or .gz) with a `text` and a `label` (1 positive, 0 negative) per row; half of the training
reads one to four of them at a time, with the share of positive ones as the target. The other half reads passages of
stories (JSONL with a `text`), whose target is the share of pleasant words among the pleasant and unpleasant words of
two short lists: without it, everyday words would have the colour that film critics give them ("too", "big").
The scorer is a transformers sequence classifier with one output, made of the policy's embeddings and first layer.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

import torch
from make_policy import HELD_OUT, read_corpus
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerBase

PLEASANT = re.compile(
    r"\b(happ(y|ily)|smiled?|laugh(ed)?|loved?|hug(ged)?|proud|fun|friends?|kind|nice|glad|joy|excited|thank(ed)?|safe"
    r"|beautiful|wonderful|enjoyed|yummy|best|cheered|kissed)\b",
    re.IGNORECASE,
)
UNPLEASANT = re.compile(
    r"\b(sad(ly)?|cr(y|ied)|scared|afraid|angry|mad|hurt|bad|mean|lonely|upset|worried|broken?|lost|died|pain|sorry"
    r"|hated?|scary|dark|yelled|shouted|stuck|fell)\b",
    re.IGNORECASE,
)
HELD_OUT_SENTENCES = 1000
QUERY_SCALE = 0.1
"""Attention starts nearly uniform, so that the last position reads the whole text; a language model's looks nearby."""
Labelled = list[tuple[str, int]]
Batch = tuple[list[str], Tensor]


def read_sentences(path: Path) -> Labelled:
    """Sentences with their labels, in file order."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(as_prose(row["text"]), row["label"]) for row in rows]


def as_prose(text: str) -> str:
    """Undo word-by-word tokenisation, which stories do not have: `it is n't , really .` -> `It isn't, really.`"""
    text = re.sub(r"\s+([.,!?;:%)\]]|n't|'\w+)", r"\1", text.strip())
    text = re.sub(r"([(\[])\s+", r"\1", text).replace("--", "-")
    text = re.sub(r"\bi\b", "I", text)
    return text[:1].upper() + text[1:]


def pleasantness(text: str) -> float:
    """Share of pleasant words among the pleasant and unpleasant ones, drawn towards 0.5 by one more word."""
    pleasant, unpleasant = len(PLEASANT.findall(text)), len(UNPLEASANT.findall(text))
    return (pleasant + 0.5) / (pleasant + unpleasant + 1)


def build_model(policy: Path, layers: int) -> LlamaForSequenceClassification:
    """The policy's embeddings and first layers under a new, zero head."""
    source = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    config = source.config
    config.update({"num_hidden_layers": layers, "num_labels": 1, "architectures": None})
    config.id2label, config.label2id = {0: "pleasant"}, {"pleasant": 0}
    model = LlamaForSequenceClassification(config)
    weights = source.model.state_dict()
    model.model.load_state_dict({name: weights[name] for name in model.model.state_dict()})
    torch.nn.init.zeros_(model.score.weight)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= QUERY_SCALE
    return model


def draw_sentences(sentences: Labelled, count: int, draw: random.Random) -> Batch:
    """Texts of one, two or four sentences each, with the share of positive ones; `count` sentences in all."""
    per_text = draw.choice((1, 1, 2, 4))
    texts = [draw.choices(sentences, k=per_text) for _ in range(count // per_text)]
    targets = torch.tensor([sum(label for _, label in text) / per_text for text in texts])
    return [" ".join(sentence for sentence, _ in text) for text in texts], targets


def draw_passages(stories: list[list[str]], count: int, draw: random.Random) -> Batch:
    """Passages of one, two, four or eight consecutive sentences each; `count` sentences in all."""
    per_text = draw.choice((1, 2, 4, 8))
    texts = []
    for story in draw.choices(stories, k=count // per_text):
        first = draw.randrange(max(1, len(story) - per_text + 1))
        texts.append(" ".join(story[first : first + per_text]))
    return texts, torch.tensor([pleasantness(text) for text in texts])


def logits(
    model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, texts: list[str], drop: float = 0.0
) -> Tensor:
    """The classifier's output for each text; in training a share `drop` of the tokens is replaced by random ones."""
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    if drop:
        lost = (torch.rand(batch["input_ids"].shape) < drop) & batch["attention_mask"].bool()
        lost[:, 0] = False
        random_ids = torch.randint(len(tokenizer), batch["input_ids"].shape)
        batch["input_ids"] = torch.where(lost, random_ids, batch["input_ids"])
    return model(**batch).logits[:, 0]


@torch.no_grad()
def accuracy(model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerBase, sentences: Labelled) -> float:
    """Share of sentences whose output has the right sign."""
    chunks = [sentences[i : i + 50] for i in range(0, len(sentences), 50)]
    outputs = torch.cat([logits(model, tokenizer, [text for text, _ in chunk]) for chunk in chunks])
    right = (outputs > 0) == torch.tensor([label == 1 for _, label in sentences])
    return right.float().mean().item()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    draw = random.Random(args.seed)
    sentences = read_sentences(args.sentences)
    training, held_out = sentences[:-HELD_OUT_SENTENCES], sentences[-HELD_OUT_SENTENCES:]
    stories = [re.split(r"(?<=[.!?\"])\s+", text) for text in read_corpus(args.stories)[:-HELD_OUT][:20000]]
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    model = build_model(args.policy, args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    for step in range(args.steps):
        texts, targets = (
            draw_passages(stories, args.rows, draw) if step % 2 else draw_sentences(training, args.rows, draw)
        )
        output = logits(model, tokenizer, texts, args.drop)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(output, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            reached = accuracy(model, tokenizer, held_out)
            print(f"step {step + 1}: loss {loss.item():.3f}, held-out accuracy {reached:.4f}", flush=True)
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    reached = accuracy(model, tokenizer, held_out)
    print(json.dumps({"parameters": model.num_parameters(), "held_out_accuracy": round(reached, 4)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--policy", type=Path, default=Path("data/story-policy"))
    parser.add_argument("--out", type=Path, default=Path("data/story-scorer"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=64, help="sentences per step")
    parser.add_argument("--drop", type=float, default=0.1, help="share of tokens replaced in training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())
