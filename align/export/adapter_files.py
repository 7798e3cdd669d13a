"""An adapter's folder in PEFT's format."""

import shutil

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from align.errors import UserError
from align.export.made import Made
from align.export.trained import ADAPTER_FILE
from align.files import read_json, write_json
from align.model.checkpoint import export_tokenizer
from align.model.load import first_line


def write(made: Made) -> None:
    """The adapter as it is, or rounded, with its base's name as it is found from anywhere."""
    trained, output = made.trained, made.folder
    try:
        tensors = load_file(trained.folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{trained.folder / ADAPTER_FILE} cannot be read: {first_line(error)}") from error
    if made.dtype is not None:
        dtype = getattr(torch, made.dtype)
        # Places stay whole numbers: 65535 is none of bfloat16's.
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    with safe_open(trained.folder / ADAPTER_FILE, "pt") as stored:
        save_file(tensors, output / ADAPTER_FILE, metadata=stored.metadata() or {"format": "pt"})
    config = read_json(trained.folder / "adapter_config.json")
    write_json(output / "adapter_config.json", config | {"base_model_name_or_path": trained.base})
    if trained.outputs:
        shutil.copy(trained.folder / "config.json", output)
    export_tokenizer(made.tokenizer, output)
