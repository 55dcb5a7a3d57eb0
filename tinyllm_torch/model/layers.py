"""The layers that blocks are made of: matrix product, embedding table, RMSNorm, SwiGLU MLP.

Letters: r row (one token of the batch), e input width, f output width.

Source: RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467; SwiGLU: Shazeer 2020, arXiv:2002.05202.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from tinyllm_jax.config import ModelConfig
from tinyllm_torch.model.dropout import dropout


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Name the type of activations; `auto` is bfloat16 on a GPU, float32 on CPU."""
    if config.compute_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, config.compute_dtype)


def parameter_dtype(config: ModelConfig) -> torch.dtype:
    """Name the type of weights: float32, or float64 where the model computes in float64."""
    return torch.promote_types(compute_dtype(config), torch.float32)


class Linear(nn.Module):
    """Matrix product without bias."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        std: float,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ):
        super().__init__()
        noise = torch.randn(out_size, in_size, dtype=dtype, generator=generator)
        self.weight = nn.Parameter(std * noise)

    def forward(self, x: Float[Tensor, "batch seq in"]) -> Float[Tensor, "batch seq out"]:
        kernel = self.weight.T.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.einsum("re,ef->rf", rows, kernel)
        return out.reshape(*x.shape[:-1], kernel.shape[-1])


class Embedding(nn.Module):
    """Table of one vector for each token."""

    def __init__(
        self,
        rows: int,
        size: int,
        *,
        std: float,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(rows, size, dtype=dtype, generator=generator))

    def forward(
        self, tokens: Int[Tensor, "batch seq"], *, dtype: torch.dtype
    ) -> Float[Tensor, "batch seq hidden"]:
        # Cast after the look-up: the gradient of a frequent token is a sum of thousands, which
        # bfloat16 cannot hold.
        return embedding(tokens, self.weight).to(dtype)


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, *, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Normalise at least in float32; the weight is applied in the type of `x`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.mean(torch.square(wide), dim=-1, keepdim=True)
        normed = wide * torch.rsqrt(mean_square + self.eps)
        # Both are rounded to the type of `x` and then widened: the product is the same, and the
        # gradient of the weight, a sum over all rows, is not summed in bfloat16.
        factors = [normed, self.weight]
        normed, weight = (factor.to(x.dtype).to(wide.dtype) for factor in factors)
        return (normed * weight).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, *, inner: int, generator: torch.Generator | None):
        super().__init__()
        hidden, dtype = config.hidden_size, parameter_dtype(config)
        std = config.initializer_range
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.gate_proj = Linear(hidden, inner, std=std, dtype=dtype, generator=generator)
        self.up_proj = Linear(hidden, inner, std=std, dtype=dtype, generator=generator)
        self.down_proj = Linear(inner, hidden, std=residual_std, dtype=dtype, generator=generator)
        self.dropout_rate = config.mlp_dropout

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], *, generator: torch.Generator | None
    ) -> Float[Tensor, "batch seq hidden"]:
        inner = silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(dropout(inner, rate=self.dropout_rate, generator=generator))
