"""The trainers' constructor, data sets and cards: what is the same for all, and what each says of its own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from transformers import Trainer, set_seed

from align.errors import UserError
from align.trl import start
from align.trl.answers import answer_arguments
from align.trl.card import write_card
from align.trl.checkpoints import sealed, tidy, verified
from align.trl.extra import check_extra
from align.trl.overrides import class_name, refuse_overrides


class BuiltTrainer(Trainer):
    """A transformers.Trainer made from what a trainer of TRL is made from."""

    loss_is_scaled_for_ga = False
    model: Any
    args: Any
    eval_dataset: Any
    optimizer: Any
    train_dataset: Any
    _tag_names: Sequence[str] = ("align",)
    _name = ""
    _config: Any
    _loading: Mapping[str, Any] = MappingProxyType({})
    """What loads a model that is given by its name, besides that."""
    _tokenizer: Any
    _paper = ""
    _columns: Sequence[str] = ()
    """Of a prepared data set, those that the collator reads."""
    _signature_columns: Any = None

    def __init__(
        self,
        model: Any,
        args: Any,
        older: dict[str, Any],
        *,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        **given: Any,
    ) -> None:
        """Args: as DPOTrainer's.

        older: arguments of older releases, answered by name.
        given: what transformers' Trainer takes besides.
        """
        refuse_overrides(type(self))
        named = class_name(type(self))
        args = args or start.default_args(self._config, model, self._name)
        given |= start.take_older(older, args, trainer=named)
        answer_arguments(args, self._name)
        start.check_train_dataset(train_dataset, args)
        check_extra(args, self._name)
        self._check(args)
        set_seed(args.seed)
        model = start.given_model(model, args, quantization_config, **self._loading)
        start.refuse_encoder_decoder(model, trainer=named)
        self._check_model(model, args)
        tokenizer = start.given_tokenizer(processing_class or tokenizer, model, args, trainer=named)
        self._ready_texts(tokenizer, model, args)
        model = self._adapted(model, peft_config, args)
        if args.disable_dropout:
            start.without_dropout(model)
        self.args, self._tokenizer = args, tokenizer
        self._take(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self._collator(tokenizer, args),
            train_dataset=start.refuse_empty(self._prepare_dataset(train_dataset, tokenizer, args, "train"), args),
            eval_dataset=self._prepared(eval_dataset, "eval"),
            processing_class=processing_class or tokenizer,
            **given,
        )
        self._ready()

    def _ready(self) -> None:
        """What comes once transformers' trainer stands."""
        name = class_name(type(self))
        self.model_accepts_loss_kwargs = False  # what a release before 5.19 reads
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} does not support `nn.DataParallel`: start the script with `accelerate launch` "
                "or `torchrun`, or make a single GPU visible with `CUDA_VISIBLE_DEVICES`"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                f"{name} is not tried under FSDP or DeepSpeed yet; launch without them, use "
                f"`align train`, or trl.{name}"
            )
        self.model.add_model_tags(list(self._tag_names))

    # What a trainer says of its own.

    def _check(self, args: Any) -> None:
        """Refuse settings that have no meaning together."""

    def _check_model(self, model: Any, args: Any) -> None:
        """Refuse a model that cannot be trained so."""

    def _ready_texts(self, tokenizer: Any, model: Any, args: Any) -> None:
        """What a configuration says of the tokenizer."""

    def _adapted(self, model: Any, peft_config: Any, args: Any) -> Any:
        """The model with what trains on it."""
        return start.with_adapter(model, peft_config, args, keeps_start=self._keeps_start())

    def _keeps_start(self) -> bool:
        """Whether a copy of the adapter that a model comes with is kept, to measure from."""
        return False

    def _take(self, model: Any, args: Any) -> None:
        """Attributes that callers read of TRL's trainer, and what is needed of the model as it was given."""

    def _collator(self, tokenizer: Any, args: Any) -> Any:
        """The trainer's own."""
        raise NotImplementedError

    # Data.

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows of text as token ids."""
        raise NotImplementedError

    def _each(self, datasets: Any, function: Callable[..., Any], *args: Any) -> Any:
        """A function of one data set, or of each of several by name."""
        if isinstance(datasets, dict):
            return {name: function(dataset, *args) for name, dataset in datasets.items()}
        return None if datasets is None else function(datasets, *args)

    def _prepared(self, datasets: Any, name: str) -> Any:
        if isinstance(datasets, dict):
            return {key: self._prepare_dataset(d, self._tokenizer, self.args, key) for key, d in datasets.items()}
        return None if datasets is None else self._prepare_dataset(datasets, self._tokenizer, self.args, name)

    def _prepared_later(self, datasets: Any) -> Any:
        """Of a data set that evaluate is given."""
        return self._prepared(datasets, "eval")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self._columns)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As transformers' evaluate; a data set given here is prepared as one given to the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared_later(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # Files.

    def create_model_card(  # type: ignore[override]  # TRL's arguments
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **_: Any
    ) -> None:
        """README.md of the output folder.

        Args:
            model_name: by default the output folder's.
            dataset_name: of the hub.
            tags: one or several, beside the trainer's own.
        """
        if self.is_world_process_zero():
            write_card(self, model_name, dataset_name, tags)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """With the adapter that trains, which transformers passes over where a checkpoint has others beside it."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder, model = Path(resume_from_checkpoint), model or self.model
        others = [file for file in folder.glob("*/adapter_model.*")]
        if isinstance(model, PeftModel) and others and any(folder.glob("adapter_model.*")):
            model.load_adapter(str(folder), model.active_adapters[0], is_trainable=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        named = self.args.hub_model_id
        self.create_model_card(model_name=named.split("/")[-1] if named else None)
        with sealed(self, trial):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        tidy(Path(output_dir or self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, from a checkpoint that is as it was written."""
        return super().train(verified(resume_from_checkpoint, self.args.output_dir), *args, **kwargs)
