"""README.md of an output folder."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_card(trainer: Any, model_name: str | None, dataset_name: str | None, tags: Any) -> None:
    """Args: as PackedTrainer.create_model_card's."""
    config, folder = trainer.model.config, Path(trainer.args.output_dir)
    tags = {tags} if isinstance(tags, str) else set(tags or ())
    if hasattr(config, "unsloth_version"):
        tags.add("unsloth")
    base = config._name_or_path or None
    name = model_name or folder.name
    data = ModelCardData(
        base_model=base if base and not Path(base).is_dir() else None,
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        model_name=name,
        datasets=dataset_name,
        tags=sorted({*tags, *trainer._tag_names}),
    )
    of = f"a fine-tuned version of {base}" if base else "a fine-tuned model"
    text = f"# {name}\n\nThis is {of}, trained on preferences with {trainer._name} ({trainer._paper}) by Align.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(str(folder / "README.md"))
