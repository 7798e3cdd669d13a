"""Train the small sentiment scorer that ships in `data/story-scorer`, on sentences labelled positive or negative.

    python data/make_scorer.py --sentences sentences.jsonl.gz --policy data/story-policy --out data/story-scorer

The sentences are JSONL (or .gz) with a `text` and a `label` (1 positive, 0 negative) per row. The scorer is a
transformers sequence classifier with one output, made of the policy's embeddings and first layer. It reads texts of one
to four sentences, whose target is the share of positive ones, so that its output grows with how pleasant a whole story
is. Training texts are written as the stories are: no space before punctuation, a capital letter first.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerBase

HELD_OUT = 1000
QUERY_SCALE = 0.1
"""Attention starts nearly uniform, so that the last position reads the whole text; a language model's looks nearby."""
Labelled = list[tuple[str, int]]


def read_sentences(path: Path) -> Labelled:
    """Sentences with their labels, in file order."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(as_prose(row["text"]), row["label"]) for row in rows]


def as_prose(text: str) -> str:
    """Undo word-by-word tokenisation: `it's n't , really .` becomes `It'sn't, really.`"""
    text = re.sub(r"\s+([.,!?;:%)\]]|n't|'\w+)", r"\1", text.strip())
    text = re.sub(r"([(\[])\s+", r"\1", text).replace("--", "-")
    text = re.sub(r"\bi\b", "I", text)
    return text[:1].upper() + text[1:]


def build_model(policy: Path, layers: int) -> LlamaForSequenceClassification:
    """The policy's embeddings and first layers under a new, zero head."""
    source = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    config = source.config
    config.update({"num_hidden_layers": layers, "num_labels": 1, "architectures": None, "attention_dropout": 0.0})
    config.id2label, config.label2id = {0: "positive"}, {"positive": 0}
    model = LlamaForSequenceClassification(config)
    weights = source.model.state_dict()
    model.model.load_state_dict({name: weights[name] for name in model.model.state_dict()})
    torch.nn.init.zeros_(model.score.weight)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= QUERY_SCALE
    return model


def draw_texts(sentences: Labelled, rows: int, draw: random.Random) -> tuple[list[str], Tensor]:
    """Texts of one, two or four sentences each, with the share of positive ones; `rows` sentences in all."""
    per_text = draw.choice((1, 1, 2, 4))
    texts = [draw.choices(sentences, k=per_text) for _ in range(rows // per_text)]
    targets = torch.tensor([sum(label for _, label in text) / per_text for text in texts])
    return [" ".join(sentence for sentence, _ in text) for text in texts], targets


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
    model.eval()
    chunks = [sentences[i : i + 50] for i in range(0, len(sentences), 50)]
    outputs = torch.cat([logits(model, tokenizer, [text for text, _ in chunk]) for chunk in chunks])
    right = (outputs > 0) == torch.tensor([label == 1 for _, label in sentences])
    model.train()
    return right.float().mean().item()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    draw = random.Random(args.seed)
    sentences = read_sentences(args.sentences)
    training, held_out = sentences[:-HELD_OUT], sentences[-HELD_OUT:]
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    model = build_model(args.policy, args.layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    for step in range(args.steps):
        texts, targets = draw_texts(training, args.rows, draw)
        output = logits(model, tokenizer, texts, args.drop)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(output, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}: loss {loss.item():.3f}, held out {accuracy(model, tokenizer, held_out):.4f}",
                flush=True,
            )
    model = model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    figures = {
        "parameters": model.num_parameters(),
        "held_out_accuracy": round(accuracy(model, tokenizer, held_out), 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--policy", type=Path, default=Path("data/story-policy"))
    parser.add_argument("--out", type=Path, default=Path("data/story-scorer"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", type=int, default=64, help="sentences per step")
    parser.add_argument("--drop", type=float, default=0.15, help="share of tokens replaced in training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())
