"""Train the story-writing policy that ships in `data/story-policy` from scratch, on any corpus of short texts.

    python data/make_policy.py --corpus stories.jsonl.gz --out data/story-policy --work /tmp/story-policy

The corpus is JSONL (or .gz) with a `text` per row. Its last 2,000 rows are never trained on: the first half of them is
the validation set, the second half gives the prompts of `make_lists.py`. Run the command again after an interruption:
it goes on from the last checkpoint in `--work`.
"""

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = 2000
CONTEXT = 512
BOS, EOS, PAD = "<|story|>", "<|endoftext|>", "<|pad|>"


def read_corpus(path: Path) -> list[str]:
    """The corpus's texts, in file order."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 tokens that puts the start token before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one row of token ids, each framed by its start and end token."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*text.ids, eos], dtype=np.int32) for text in encoded])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, then a cosine down to a twentieth of the peak."""
    if step < 200:
        return peak * (step + 1) / 200
    return peak * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - 200) / (steps - 200))))


def batch_at(tokens: np.ndarray, step: int, args: argparse.Namespace) -> torch.Tensor:
    """The windows of one step, a function of (step, seed) alone so that an interrupted run goes on exactly.

    Most of the training reads half the context, where attention costs half as much; the last eighth reads all of it.
    """
    window, rows = (CONTEXT // 2, args.rows) if step < args.steps * 7 // 8 else (CONTEXT, args.rows // 2)
    starts = np.random.default_rng((args.seed, step)).integers(0, len(tokens) - window, rows)
    return torch.from_numpy(np.stack([tokens[s : s + window] for s in starts]).astype(np.int64))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Nats per token over consecutive windows of the validation stories."""
    rows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].astype(np.int64)).view(-1, CONTEXT)
    losses = [loss_of(model, chunk) * len(chunk) for chunk in rows[:256].split(16)]
    return float(torch.stack(losses).sum() / min(len(rows), 256))


def save_checkpoint(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, both Adam moments and the step in one file that appears whole or not at all."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        tensors |= {f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    save_file(tensors, work / "checkpoint.tmp", metadata={"step": str(step)})
    os.replace(work / "checkpoint.tmp", work / "checkpoint.safetensors")
    (work / "step").write_text(str(step))


def load_checkpoint(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    path = work / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors, step = load_file(path), int((work / "step").read_text())
    for name, p in model.named_parameters():
        p.data.copy_(tensors[f"model.{name}"])
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"exp_avg.{name}"],
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
        }
    return step


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    texts = read_corpus(args.corpus)
    training, validation = texts[:-HELD_OUT], texts[-HELD_OUT : -HELD_OUT // 2]
    if not (args.work / "tokenizer.json").exists():
        train_tokenizer(training[:30000]).save_pretrained(args.work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work)
    tokens = pack(tokenizer, training)
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    start = load_checkpoint(args.work, model, optimizer)
    print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} tokens, from step {start} of {args.steps}", flush=True
    )
    began = time.monotonic()
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = loss_of(model, batch_at(tokens, step, args))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) * args.rows * CONTEXT // 2 / (time.monotonic() - began)
            print(f"step {step + 1}: loss {loss.item():.3f}, {rate:,.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0:
            save_checkpoint(args.work, model, optimizer, step + 1)
    export(args.out, model, tokenizer, validation_loss(model, pack(tokenizer, validation)))


def export(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss: float) -> None:
    """The bfloat16 checkpoint that transformers loads, and the figures for its card."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"parameters": model.num_parameters(), "validation_nats_per_token": round(loss, 4)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("data/story-policy"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and checkpoints of the run")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=16, help=f"windows of {CONTEXT // 2} tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())
