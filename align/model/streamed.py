"""safetensors files written tensor by tensor, so that weights cut over processes are never whole but for one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import PartialState
from safetensors.torch import _TYPES, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from align.model.sharding import whole

NAMES = {dtype: name for name, dtype in _TYPES.items()}


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors that may be cut: each is gathered, written by the main process, and dropped.

    Where one is cut every process must call this, and holds one whole tensor at a time.
    """
    if not any(isinstance(value, DTensor) for value in tensors.values()):
        if not PartialState().is_main_process:
            return
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file, metadata)
        return
    if not PartialState().is_main_process:
        for value in tensors.values():
            whole(value.detach())
        return
    with file.open("wb") as out:
        _write_header(out, tensors, metadata)
        for value in tensors.values():
            own: Any = whole(value.detach()).cpu().contiguous().flatten()
            out.write(own.view(torch.uint8).numpy())


def _write_header(out: IO[bytes], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    """Length, then JSON of names, dtypes, shapes and places, filled with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
