"""torch and the words for a tensor's shape, for modules in which a formula stands beside its section of a recipe.

Such a module is imported wherever a recipe is checked, so torch must wait until the formula is called. The module
begins with `from __future__ import annotations`: its shapes then stay text, which a type checker reads, and so does the
test that holds the functions to them.
"""

from typing import TYPE_CHECKING, Any

from align.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
else:
    torch, F = LazyModule("torch"), LazyModule("torch.nn.functional")
    Bool = Float = Int = Tensor = Any  # for annotations only

__all__ = ["Bool", "F", "Float", "Int", "Tensor", "torch"]
