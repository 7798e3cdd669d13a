"""What a step costs with each adapter, beside LoRA: processor time, memory, and what its export is.

Every adapter trains a small random Llama on one packed batch, LoRA in alternation with it, so that what else the
machine does falls on both. Matrices are small; what an adapter computes on whole ones grows with the width.
"""

import importlib.util
import logging
import tempfile
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.bench.measure import allocated_bytes, alternate, machine
from align.losses.list_loss import build_loss
from align.model.adapters import ADAPTER
from align.model.config import PolicySection
from align.model.forward import TokenScorer, score_tokens
from align.model.load import LoadOptions
from align.model.packing import enable_packing
from align.model.peft_kinds import KINDS
from align.model.policy import Policy, load_policy
from align.objectives.pairwise import Logistic
from align.objectives.scores import LogRatio
from align.packing.batch import Example, collate

RANK, WIDTH, VOCABULARY, ROUNDS = 8, 128, 512, 5
OWN: dict[str, dict[str, Any]] = {
    "adalora": {"rank": RANK // 2, "initial_rank": RANK},
    "full": {},
    "ia3": {"targets": "all-linear"},
    "lofit": {"share": 0.1},
    "lora_sb": {"rank": RANK, "step": 1e-4},
    "s2ft": {"heads": 1, "channels": 32},
}
"""What adapters by our names are given besides `rank`."""
PEFTS: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 32},
    "MISS": {"r": RANK},
    "OFT": {"oft_block_size": 32, "r": 0},
    "TRAINABLE_TOKENS": {"token_indices": list(range(32))},
    "VBLORA": {"vector_length": 32, "r": RANK},
}
"""What PEFT's types are given besides `r`, where they have it."""
LOSS = build_loss(LogRatio(beta=0.1), [Logistic()])


def sections() -> dict[str, dict[str, Any]]:
    """Every adapter that trains here, as a recipe has it; LoRA first."""
    ours = [name for name, own in ADAPTER.classes.items() if not own.needs_quantization and name != "peft"]
    found: dict[str, dict[str, Any]] = {name: {"name": name, **OWN.get(name, {"rank": RANK})} for name in ours}
    configs: dict[Any, Any] = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    for kind, known in KINDS.items():
        if known.why_not or known.instead or (kind == "ADAMSS" and not importlib.util.find_spec("sklearn")):
            continue
        has_rank = "r" in [field.name for field in fields(configs[kind])]
        options = PEFTS.get(kind, {"r": RANK} if has_rank else {})
        found[kind] = {"name": "peft", "type": kind, "options": options}
    return found


def run() -> dict[str, Any]:
    """Measure all; a table while it runs."""
    logging.getLogger("align").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        _write_model(folder)
        plain = _load(folder, {"name": "lora", "rank": RANK})
        print(f"{'adapter':18} {'trains':>9} {'time':>6} {'MiB':>6} {'update':>12} {'float32':>9} {'bfloat16':>9}")
        adapters = {}
        for name, section in sections().items():
            adapters[name] = own = _measured(folder, name, section, plain)
            differ = own["differs"]
            print(
                f"{name:18} {own['trained']:9} {own['time']:6.2f} {own['bytes'] / 2**20:6.1f} {own['update']:>12} "
                f"{differ.get('float32', float('nan')):9.1e} {differ.get('bfloat16', float('nan')):9.1e}",
                flush=True,
            )
    return {
        "machine": machine(torch.device("cpu")),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__},
        "model": f"a random Llama of 2 layers, width {WIDTH}, {VOCABULARY} tokens; rank {RANK} where there is one",
        "adapters": adapters,
    }


def _measured(folder: Path, name: str, section: dict[str, Any], plain: Policy) -> dict[str, Any]:
    policy = _load(folder, section)
    step = _step(policy)
    times = alternate({"lora": _step(plain), name: step}, ROUNDS, torch.device("cpu"))
    ours, lora = (list(times.values())[-1]["cpu_median_ms"], times["lora"]["cpu_median_ms"])
    needed = allocated_bytes(step, torch.device("cpu"))
    batch = policy.collate(_lists())
    with torch.no_grad():
        own = TokenScorer(policy).eval()(batch).logprobs
    return {
        "section": section,
        "trained": sum(p.numel() for p in policy.model.parameters() if p.requires_grad),
        "cpu_ms": ours,
        "lora_cpu_ms": lora,
        "time": ours / lora,
        "bytes": needed,
        "packed": policy.packing,
        **_exported(folder, policy, own),
    }


def _step(policy: Policy) -> Any:
    """One step of DPO on one packed batch, with AdamW."""
    batch = policy.collate(_lists())
    with policy.reference():
        reference = TokenScorer(policy)(batch).logprobs
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=1e-3)
    scorer = TokenScorer(policy).train()

    def step() -> None:
        loss = LOSS(scorer(batch), reference, batch).mean() + policy.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def _exported(folder: Path, policy: Policy, own: Tensor) -> dict[str, Any]:
    """The largest rank of a merged update, and nats by which merged models differ, by the dtype they are stored in."""
    batch = policy.collate(_lists())
    base = AutoModelForCausalLM.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as place:
        policy.save_adapter(Path(place))
        if not isinstance(policy.model, peft.PeftModel):
            merged: Any = AutoModelForCausalLM.from_pretrained(place)
        else:
            wrapped: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), place)
            try:
                merged = wrapped.merge_and_unload()
            except ValueError as error:
                return {"update": "no merge", "why": str(error), "differs": {}}
    if policy.packing:
        enable_packing(merged, name=str(folder))
    before, ranks = base.state_dict(), []
    for name, value in merged.state_dict().items():
        if name in before and not torch.equal(value, before[name]):
            ranks.append(_rank(value - before[name]) if value.dim() == 2 else 0)
    differs, whole = {}, {name: value.clone() for name, value in merged.state_dict().items()}
    for dtype in ("float32", "float16", "bfloat16"):
        merged.load_state_dict({name: value.to(getattr(torch, dtype)).float() for name, value in whole.items()})
        found = score_tokens(merged.eval(), batch).logprobs
        differs[dtype] = (found - own)[batch.completion_mask].abs().max().item()
    largest = max(ranks)
    update = "no matrix" if 0 in ranks else "full rank" if largest > WIDTH // 2 else f"rank {largest}"
    return {"update": update, "differs": differs}


def _rank(delta: Tensor) -> int:
    values = torch.linalg.svdvals(delta.double())
    return int((values > 1e-4 * values[0]).sum())


def _load(folder: Path, section: dict[str, Any]) -> Policy:
    made = PolicySection.model_validate({"model": str(folder), "adapter": section})
    batches = [collate(_lists(), pad_id=0)]
    options = LoadOptions(
        total_steps=1000, init_batches=batches, init_loss=lambda s, b: LOSS(s, s.logprobs.detach(), b)
    )
    return load_policy(made, options)


def _lists() -> list[Example]:
    draw = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()

    return [{"prompt_ids": ids(40), "completion_ids": [ids(60), ids(50)], "grades": [1.0, 0.0]} for _ in range(2)]


def _write_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
