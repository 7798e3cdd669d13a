"""A model that TRL's trainers and ours start from."""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory, save_llama):
    """A tiny Llama whose tokenizer has a padding token, which TRL asks for."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return save_llama(tmp_path_factory.mktemp("tiny"), seed=3, special=special)
