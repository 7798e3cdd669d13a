"""Registers an operator with torch without loading torch's compiler.

`torch.library.custom_op` imports torch._dynamo at an operator's first call, 1 to 2 seconds that eager code has no use
for; the parts it is made of do not.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def register(
    name: str,
    function: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """An operator that reads its arguments and returns new tensors.

    Args:
        name: "align::...".
        function: what it does on any device; its type hints give the schema.
        fake: its results' shapes and dtypes, without values.
        backward: as that of torch.autograd.Function; without one, gradients through the operator are refused.
        setup_context: what the backward pass needs.

    Returns:
        The torch operator.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", _untraced(function))
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, backward or _no_gradient(name), setup_context=setup_context)
    namespace, _, short = name.partition("::")
    return getattr(getattr(torch.ops, namespace), short).default


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, out of the compiler's sight where there is a compiler."""

    @functools.cache
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(function)

    def run(*arguments: Any) -> Any:
        return (disabled() if "torch._dynamo" in sys.modules else function)(*arguments)

    return run


def _no_gradient(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{name} has no gradient")

    return refuse
