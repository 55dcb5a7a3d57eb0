"""One run on one device or on many: puts arrays in their places, and compiles the steps for them.

A `Parallel` takes and gives plain arrays whose shapes are those of the whole, so that evaluation,
sampling, metrics and checkpoints need not know how many devices there are.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from tinyllm_jax.config import Config
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.placement import Placement, placed
from tinyllm_jax.model.weights import Weights
from tinyllm_jax.training.sharding import (
    AXES,
    ROWS,
    MeshPlacement,
    make_mesh,
    state_shardings,
    weight_spec,
)
from tinyllm_jax.training.step import TrainState

PMAP_AXIS = "devices"


@runtime_checkable
class Parallel(Protocol):
    """Where a run takes place."""

    devices: int
    description: str  # for people; "" on one device that is alone

    def make_state(self, build: Callable[..., TrainState], *arrays: Any) -> TrainState:
        """Compute a state in its place, from arrays that are in theirs."""
        ...

    def place_weights(self, weights: Mapping[str, Any], dtype: Any) -> Weights:
        """Copy weights, or moments under their names, from the host to their places."""
        ...

    def place_state(self, state: TrainState) -> TrainState:
        """Move what is not in its place."""
        ...

    def place_batch(self, batch: dict[str, np.ndarray], *, passes: int) -> dict[str, Any]:
        """Hand rows to the devices that read them; an evaluation has one pass."""
        ...

    def shapes(self, state: Any, batch: Any, *, passes: int) -> tuple[Any, Any]:
        """Tell how the train step takes a state and a batch, given as shapes."""
        ...

    def compile_train_step(self, step: Callable[..., Any]) -> Any:
        """Compile (state, batch) -> (state, numbers), which takes the state's memory over."""
        ...

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        """Compile (weights, batch) -> (sums, targets)."""
        ...

    def one_copy(self, weights: Weights) -> Weights:
        """Give the weights for work that is not divided: on one device, where one has them whole."""
        ...


class OneDevice:
    """The first device, and nothing to divide."""

    devices = 1

    def __init__(self, description: str):
        self.description = description

    def make_state(self, build: Callable[..., TrainState], *arrays: Any) -> TrainState:
        return build(*arrays)

    def place_weights(self, weights: Mapping[str, Any], dtype: Any) -> Weights:
        return {name: jnp.array(array, dtype) for name, array in weights.items()}

    def place_state(self, state: TrainState) -> TrainState:
        return state

    def place_batch(self, batch: dict[str, np.ndarray], *, passes: int) -> dict[str, Any]:
        del passes
        return batch

    def shapes(self, state: Any, batch: Any, *, passes: int) -> tuple[Any, Any]:
        del passes
        return state, batch

    def compile_train_step(self, step: Callable[..., Any]) -> Any:
        return jax.jit(step, donate_argnums=0)

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        return jax.jit(step)

    def one_copy(self, weights: Weights) -> Weights:
        return weights


class OnMesh:
    """A grid of devices, and one program for all of them."""

    def __init__(self, config: Config, mesh: Mesh, *, description: str):
        self.devices, self.description = mesh.size, description
        self._mesh = mesh
        self._placement = MeshPlacement(mesh, dtype=compute_dtype(config.model))

    def make_state(self, build: Callable[..., TrainState], *arrays: Any) -> TrainState:
        shardings = state_shardings(self._mesh, jax.eval_shape(build, *arrays))
        return jax.jit(build, out_shardings=shardings)(*arrays)

    def place_weights(self, weights: Mapping[str, Any], dtype: Any) -> Weights:
        # Copied, since a device of the CPU may keep the host's own memory, which may not be donated.
        return {
            name: jnp.array(jax.device_put(np.asarray(array, dtype), self._at(weight_spec(name))))
            for name, array in weights.items()
        }

    def place_state(self, state: TrainState) -> TrainState:
        return jax.device_put(state, state_shardings(self._mesh, state))

    def place_batch(self, batch: dict[str, np.ndarray], *, passes: int) -> dict[str, Any]:
        spec = PartitionSpec(ROWS)
        if passes > 1:
            batch = {
                name: rows.reshape(passes, -1, *rows.shape[1:]) for name, rows in batch.items()
            }
            spec = PartitionSpec(None, ROWS)
        return {name: self._put(rows, self._at(spec)) for name, rows in batch.items()}

    def shapes(self, state: Any, batch: Any, *, passes: int) -> tuple[Any, Any]:
        def cut(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if passes == 1:
                return _shape(rows.shape, rows, self._at(PartitionSpec(ROWS)))
            shape = (passes, rows.shape[0] // passes, *rows.shape[1:])
            return _shape(shape, rows, self._at(PartitionSpec(None, ROWS)))

        placed_state = jax.tree.map(
            lambda leaf, sharding: _shape(leaf.shape, leaf, sharding),
            state,
            state_shardings(self._mesh, state),
        )
        return placed_state, jax.tree.map(cut, batch)

    def compile_train_step(self, step: Callable[..., Any]) -> Any:
        def train_step(state: TrainState, batch: dict[str, Array]) -> Any:
            with placed(self._placement):
                new, numbers = step(state, batch)
            shardings = state_shardings(self._mesh, state)
            new = jax.lax.with_sharding_constraint(new, shardings)
            return new, jax.lax.with_sharding_constraint(numbers, self._at(PartitionSpec()))

        return jax.jit(train_step, donate_argnums=0)

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        def evaluation_step(weights: Weights, batch: dict[str, Array]) -> Any:
            with placed(self._placement):
                return step(weights, batch)

        return jax.jit(evaluation_step, out_shardings=self._at(PartitionSpec()))

    def one_copy(self, weights: Weights) -> Weights:
        return whole_weights(weights)

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    @staticmethod
    def _put(rows: np.ndarray, sharding: NamedSharding) -> Array:
        # Says that this process holds all rows; one that reads its own leaves the shape out.
        return jax.make_array_from_process_local_data(sharding, rows, rows.shape)


class WithPmap:
    """Whole weights on each device, which compute without knowing of each other and add up."""

    def __init__(self, devices: list[Any], *, description: str):
        self.devices, self.description = len(devices), description
        self._used = devices
        mesh = jax.make_mesh(
            (len(devices),), (PMAP_AXIS,), (jax.sharding.AxisType.Auto,), devices=devices
        )
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._rows = NamedSharding(mesh, PartitionSpec(PMAP_AXIS))

    def make_state(self, build: Callable[..., TrainState], *arrays: Any) -> TrainState:
        return jax.jit(build, out_shardings=self._whole)(*arrays)

    def place_weights(self, weights: Mapping[str, Any], dtype: Any) -> Weights:
        return {
            name: jnp.array(jax.device_put(np.asarray(array, dtype), self._whole))
            for name, array in weights.items()
        }

    def place_state(self, state: TrainState) -> TrainState:
        return jax.device_put(state, self._whole)

    def place_batch(self, batch: dict[str, np.ndarray], *, passes: int) -> dict[str, Any]:
        def cut(rows: np.ndarray) -> Array:
            """Give each device its part of every pass, one pass after another."""
            shares = rows.reshape(passes, self.devices, -1, *rows.shape[1:]).swapaxes(0, 1)
            return jax.device_put(shares.reshape(self.devices, -1, *rows.shape[1:]), self._rows)

        return {name: cut(rows) for name, rows in batch.items()}

    def shapes(self, state: Any, batch: Any, *, passes: int) -> tuple[Any, Any]:
        del passes

        def cut(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (self.devices, rows.shape[0] // self.devices, *rows.shape[1:])
            return _shape(shape, rows, self._rows)

        whole = jax.tree.map(lambda leaf: _shape(leaf.shape, leaf, self._whole), state)
        return whole, jax.tree.map(cut, batch)

    def compile_train_step(self, step: Callable[..., Any]) -> Any:
        return self._pmap(step, donate_argnums=0)

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        return self._pmap(step, donate_argnums=())

    def one_copy(self, weights: Weights) -> Weights:
        return whole_weights(weights)

    def _pmap(self, step: Callable[..., Any], *, donate_argnums: Any) -> Any:
        def compiled_for_one(arrays: Any, batch: dict[str, Array]) -> Any:
            with placed(PmapPlacement()):
                return step(arrays, batch)

        return jax.pmap(
            compiled_for_one,
            axis_name=PMAP_AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=self._used,
            donate_argnums=donate_argnums,
        )


class PmapPlacement(Placement):
    """One of the devices of `pmap`: adds up with the others."""

    def dropout_key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """Drop other places than the other devices."""
        return jax.random.fold_in(key, jax.lax.axis_index(PMAP_AXIS))

    def total(self, numbers: Any) -> Any:
        """Add up over the devices."""
        return jax.lax.psum(numbers, PMAP_AXIS)


def make_parallel(config: Config) -> Parallel:
    """Divide a run among the devices that there are, as the settings say.

    Raises:
        InputError: sizes that the devices or the model do not have.
    """
    devices = jax.devices()
    sizes = grid_sizes(config, devices=len(devices))
    used = math.prod(sizes.values())
    idle = f", {used} of {len(devices)} devices" if used < len(devices) else ""
    if used == 1:
        return OneDevice(f"one{idle}" if idle else "")
    if config.parallel.strategy == "pmap":
        return WithPmap(devices[:used], description=f"pmap over {used} devices{idle}")
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    mesh = make_mesh(sizes, devices[:used])
    return OnMesh(config, mesh, description=f"mesh {shown}{idle}")


def grid_sizes(config: Config, *, devices: int) -> dict[str, int]:
    """Settle the size of each axis of the grid.

    `data=-1` takes no more than can divide the rows of a pass, so that the settings that come with
    a preset run on any machine. What is named is taken by its word or refused.

    Raises:
        InputError: names the sizes that would do.
    """
    sizes = dict(config.parallel.sizes())
    assert list(sizes) == list(AXES)
    named = math.prod(size for size in sizes.values() if size > 0)
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 0)
    filling = [axis for axis, size in sizes.items() if size == -1]
    if named > devices or (filling and devices % named):
        raise InputError(
            f"parallel: {shown} = {named} {'do' if named > 1 else 'does'} not "
            f"{'fit' if named > devices else 'divide'} the {devices} devices that are here. Use "
            f"sizes with a product of {[d for d in range(1, devices + 1) if devices % d == 0]}."
        )
    for axis in filling:
        left, rows = devices // named, config.train.batch_size
        sizes[axis] = left
        if axis == "data":
            others = math.prod(sizes[each] for each in ROWS if each != "data")
            fitting = [size for size in range(1, left + 1) if rows % (size * others) == 0]
            sizes[axis] = max(fitting, default=1)
    problems = config.division_problems(sizes)
    if problems:
        raise InputError("\n".join(problems))
    return sizes


def _shape(shape: tuple[int, ...], leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def whole_weights(weights: Weights) -> Weights:
    """Give the first device's copy if it has every weight whole, else the weights as they are."""
    if all(weight.is_fully_replicated for weight in weights.values()):
        return {name: weight.addressable_data(0) for name, weight in weights.items()}
    return weights
