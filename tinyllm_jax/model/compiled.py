"""`jax.jit` with the options of XLA by which programs that hold the model are fastest."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# What YNNPACK, a library of kernels, is left to do: sums and maxima. At products Eigen was measured to be
# faster, most of all where there are few rows.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def compiled(function: Callable[..., Any], **arguments: Any) -> Any:
    """Do what `jax.jit` does, and tell XLA how to multiply on a CPU. Not for what is called in a program.

    `jax.pmap` takes no such options.

    Args:
        arguments: Of `jax.jit`; its `compiler_options` are kept beside ours.
    """
    options = {**model_options(), **arguments.pop("compiler_options", {})}
    return jax.jit(function, compiler_options=options, **arguments)


@functools.cache
def model_options() -> dict[str, str]:
    """Give the options for this process's backend; none where its XLA does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        if not any(text in str(error) for text in ("No such compile option", "is not a valid")):
            raise
        return {}
    return CPU_OPTIONS
