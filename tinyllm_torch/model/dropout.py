"""Dropout that draws from the generator it is given."""

import torch
from jaxtyping import Float
from torch import Tensor


def dropout(
    x: Float[Tensor, "*shape"], *, rate: float, generator: torch.Generator | None
) -> Float[Tensor, "*shape"]:
    """Set a share `rate` of `x` to zero and scale the rest by 1 / (1 - rate); no generator, no change.

    The bits are not those of `tinyllm_jax`, whose generator torch has not.

    Source: Srivastava et al. 2014, JMLR 15, "inverted" form.
    """
    if generator is None or rate == 0.0:
        return x
    kept = torch.rand(x.shape, generator=generator, device=x.device) < 1.0 - rate
    return torch.where(kept, x / (1.0 - rate), 0.0)
