"""Which part of every array stands on which device: the only room that knows the mesh.

Axes of the mesh, all of them automatic (GSPMD), from the slowest link to the fastest:

    data     rows; weights are whole in each group
    fsdp     rows, and weights and moments by their hidden size
    expert   rows, and experts by their number
    tensor   heads, hidden layers of the MLPs, and the vocabulary

Source: Xu et al. 2021, arXiv:2105.04663 (GSPMD); Rajbhandari et al. 2019, arXiv:1910.02054 (fsdp is
its third stage); Shoeybi et al. 2019, arXiv:1909.08053 (tensor); Lepikhin et al. 2020,
arXiv:2006.16668 (experts).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from tinyllm_jax.model.placement import Placement
from tinyllm_jax.model.weights import EMBEDDING

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")  # what divides the rows of a pass
# The end of a weight's name -> how its axes are divided. The first row that fits counts.
SPECS = {
    r"mlp\.experts\.(gate|up)_proj\.kernel": PartitionSpec("expert", "fsdp", "tensor"),
    r"mlp\.experts\.down_proj\.kernel": PartitionSpec("expert", "tensor", "fsdp"),
    r"mlp\.gate\.kernel": PartitionSpec(),  # the router: as thin as the number of experts
    r"(self_attn\.[qkv]|mlp\.(shared_experts\.)?(gate|up))_proj\.kernel": PartitionSpec(
        "fsdp", "tensor"
    ),
    r"(self_attn\.o|mlp\.(shared_experts\.)?down)_proj\.kernel": PartitionSpec("tensor", "fsdp"),
    # Adapters: the side that is not thin is divided as that of the matrix beside it.
    r"(self_attn\.[qkv]|mlp\.(gate|up))_proj\.lora_A\.kernel": PartitionSpec("fsdp", None),
    r"(self_attn\.[qkv]|mlp\.(gate|up))_proj\.lora_B\.kernel": PartitionSpec(None, "tensor"),
    r"(self_attn\.o|mlp\.down)_proj\.lora_A\.kernel": PartitionSpec("tensor", None),
    r"(self_attn\.o|mlp\.down)_proj\.lora_B\.kernel": PartitionSpec(None, "fsdp"),
    r"embed_tokens\.weight": PartitionSpec("tensor", "fsdp"),
    r"lm_head\.kernel": PartitionSpec("fsdp", "tensor"),
    r"score\.kernel": PartitionSpec(),  # as thin as one number
    r"(\w+_layernorm|self_attn\.[qk]_norm|norm)\.weight": PartitionSpec(),
}
IN_BLOCK = re.compile(r"layers\.\d+\.")
EXPERTS = "mlp.experts."


def weight_spec(name: str) -> PartitionSpec:
    """Look up how a weight is divided.

    Args:
        name: As in the flat dictionary of weights, or within one block.

    Raises:
        LookupError: the table has no row for it.
    """
    inner = IN_BLOCK.sub("", name, count=1)
    for pattern, spec in SPECS.items():
        if re.fullmatch(pattern, inner):
            return spec
    raise LookupError(f"{name}: no row of tinyllm_jax.training.sharding.SPECS says where it stands")


def make_mesh(sizes: Mapping[str, int], devices: list[Any]) -> Mesh:
    """Arrange devices in a grid, neighbours along the last axis."""
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Give the sharding of every leaf of a train state: moments follow their weights.

    Args:
        state: A `TrainState` of arrays or shapes, in which whatever stands under the name of a
            weight and has its shape is divided as it is; all else is whole everywhere.
    """
    shapes = {name: weight.shape for name, weight in state.weights.items()}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", "")
        is_weight_like = name in shapes and leaf.shape == shapes[name]
        return NamedSharding(mesh, weight_spec(name) if is_weight_like else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keep all of a block for its backward pass but weights that `fsdp` divides.

    Kept until then, they would fill the memory that dividing them has saved, so they are gathered
    once more.
    """
    if primitive.name == "all_gather":
        return "fsdp" not in parameters["axis_name"]
    if primitive.name == "custom_vjp_call":  # as `_together` makes it
        inside = parameters["call_jaxpr"].eqns
        return any(equation.primitive.name != "sharding_constraint" for equation in inside)
    return primitive.name != "sharding_constraint"


def without(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """Leave an axis of the mesh undivided."""
    return PartitionSpec(*(None if part == axis else part for part in spec))


class MeshPlacement(Placement):
    """Divides rows over `ROWS`, and brings weights together along `fsdp` where they are used."""

    whole_rows = False

    def __init__(self, mesh: Mesh, *, dtype: jnp.dtype):
        """Take the mesh and the type of activations, in which matrices travel."""
        self._mesh, self._dtype = mesh, dtype
        self.row_groups = math.prod(mesh.shape[axis] for axis in ROWS)
        if mesh.shape["fsdp"] > 1:
            self.kept = all_but_gathered

    def block_weights(self, weights: Any) -> Any:
        """Bring the weights of one block together; those of experts wait for `experts`."""

        def place(path: tuple[Any, ...], weight: Any) -> Any:
            name = ".".join(map(str, path))
            if name.startswith(EXPERTS):
                return weight
            return weight.replace(self._together(name, weight[...]))

        flat = [(path, place(path, weight)) for path, weight in nnx.to_flat_state(weights)]
        return nnx.from_flat_state(flat)

    def other_weights(self, weights: dict[str, Array]) -> dict[str, Array]:
        """Bring embedding, last norm and head together for a whole pass."""
        return {
            name: weight if IN_BLOCK.match(name) else self._together(name, weight)
            for name, weight in weights.items()
        }

    def residual(self, x: Array) -> Array:
        """Divide by rows."""
        return self._constrain(x, PartitionSpec(ROWS))

    def logits(self, logits: Array) -> Array:
        """Divide by rows and by vocabulary."""
        return self._constrain(logits, PartitionSpec(ROWS, None, "tensor"))

    def passes(self, batch: dict[str, Array], *, count: int) -> dict[str, Array]:
        """Take the passes as the host has cut them, each divided alike."""
        assert all(len(rows) == count for rows in batch.values())
        return batch

    def by_row(self, function: Callable[..., Any], x: Array) -> Any:
        """Apply it to each device's own rows, where the compiler would gather all of them."""
        rows = PartitionSpec(ROWS)
        return jax.shard_map(
            function, mesh=self._mesh, in_specs=rows, out_specs=rows, check_vma=False
        )(x)

    def experts(
        self,
        mix: Callable[..., Array],
        kernels: Any,
        x: Array,
        weights: Array,
        choices: Array,
        dropout_key: PRNGKeyArray | None,
    ) -> Array:
        """Let each device sort the tokens of its group of `expert` to the experts that it holds.

        Tokens are gathered along `expert`, and their sums are added up and divided again: whatever
        the router chooses, none is dropped and no shape depends on it.
        """
        leaves, structure = jax.tree.flatten(kernels)
        paths = [path for path, _ in nnx.to_flat_state(kernels)]
        specs = [weight_spec(EXPERTS + ".".join(map(str, path))) for path in paths]
        rows, groups = PartitionSpec(ROWS), self._mesh.shape["expert"]

        def local(
            leaves: list[Array], x: Array, weights: Array, choices: Array, key: Array | None
        ) -> Array:
            whole = [
                self._gathered(leaf.astype(self._dtype), spec)
                for leaf, spec in zip(leaves, specs, strict=True)
            ]
            kernels = jax.tree.unflatten(structure, whole)
            if key is not None:  # each device has rows and inner widths of its own
                for axis in AXES:
                    key = jax.random.fold_in(key, jax.lax.axis_index(axis))
            if groups > 1:
                x, weights, choices = (
                    jax.lax.all_gather(each, "expert", tiled=True) for each in (x, weights, choices)
                )
            first = jax.lax.axis_index("expert") * len(whole[0])
            mixed = mix(kernels, x, weights, choices, key, first)
            if groups > 1:
                mixed = jax.lax.psum_scatter(mixed, "expert", tiled=True)
            return jax.lax.psum(mixed, "tensor") if self._mesh.shape["tensor"] > 1 else mixed

        spread = jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(specs, rows, rows, rows, PartitionSpec()),
            out_specs=rows,
            check_vma=False,  # the products' own backward passes say nothing of axes
        )
        return spread(leaves, x, weights, choices, dropout_key)

    def _gathered(self, array: Array, spec: PartitionSpec) -> Array:
        """Gather within a `shard_map` what `fsdp` divides; backward, sums are scattered."""
        if self._mesh.shape["fsdp"] == 1:
            return array
        axis = tuple(spec).index("fsdp")
        return jax.lax.all_gather(array, "fsdp", axis=axis, tiled=True)

    def _together(self, name: str, weight: Array) -> Array:
        """Gather what `fsdp` divides, in the type in which it is used."""
        spec = weight_spec(name)
        if name.endswith("_proj.kernel"):
            weight = weight.astype(self._dtype)
        whole = without(spec, "fsdp")

        @jax.custom_vjp
        def move(weight: Array) -> Array:
            return self._constrain(weight, whole)

        # By itself the gradient would stay whole. That of a look-up is divided only when it is
        # added up, or else the rows of all devices would travel to it.
        def divide(_: None, change: Array) -> tuple[Array]:
            change = self._constrain(change, whole) if name == EMBEDDING else change
            return (self._constrain(change, spec),)

        move.defvjp(lambda weight: (move(weight), None), divide)
        return move(weight)

    def _constrain(self, x: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, spec))
