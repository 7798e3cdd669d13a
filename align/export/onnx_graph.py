"""The forward pass as an ONNX graph, and ONNX Runtime as its engine."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from align.errors import UserError
from align.export.engines import read_prompt
from align.export.heldout import Prompt
from align.export.made import Made
from align.export.merging import finish
from align.export.trained import Trained
from align.model.load import LOAD_ERRORS, first_line

FILE = "model.onnx"


class Forward(nn.Module):
    """Token ids to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def write(made: Made) -> None:
    """`input_ids` [batch, time] to `logits` [batch, time, vocabulary]; no padding, no cache of keys and values.

    Raises:
        UserError: torch cannot trace this model.
    """
    ids = torch.zeros(2, 8, dtype=torch.long)
    shapes = {"input_ids": {0: "batch", 1: "time"}}
    try:
        torch.onnx.export(
            Forward(made.model).eval(),
            (ids,),
            made.folder / FILE,
            dynamo=True,
            verbose=False,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            external_data=True,
        )
    except LOAD_ERRORS as error:
        raise UserError(f"--to onnx: torch cannot make a graph of this model: {first_line(error)}") from error
    made.model.config.save_pretrained(made.folder)
    finish(made)


class Graph:
    """ONNX Runtime on the CPU."""

    def __init__(self, folder: Path, trained: Trained) -> None:
        import onnxruntime

        self.said = f"onnxruntime {version('onnxruntime')}"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trained.trust_remote_code)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def prompt_ids(self, prompt: Prompt) -> list[int] | None:
        return read_prompt(self.tokenizer, prompt)

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        (logits,) = self.session.run(["logits"], {"input_ids": torch.tensor([ids]).numpy()})
        shown = torch.from_numpy(logits[0, start - 1 : -1])
        return shown.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
