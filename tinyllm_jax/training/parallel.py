"""One run on one device or on many: puts arrays in their places, and compiles the steps for them.

A `Parallel` takes and gives plain arrays whose shapes are those of the whole, so that evaluation,
sampling, metrics and checkpoints need not know how many devices there are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from tinyllm_jax.config import Config
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.compiled import compiled
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

HostBatch = Mapping[str, np.ndarray]
PMAP_AXIS = "devices"
# Lets GPUs talk while they compute. Source: NVIDIA JAX-Toolbox, docs/GPU_performance.md.
OVERLAP: dict[str, str | bool | int] = {"xla_gpu_enable_latency_hiding_scheduler": True}


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

    def own_rows(self, *, passes: int) -> np.ndarray | None:
        """Give the places in a step of the rows that this process reads; None is all of them."""
        ...

    def place_batch(self, batch: HostBatch) -> dict[str, Any]:
        """Hand the rows of an evaluation to the devices that read them."""
        ...

    def place_steps(self, batches: Sequence[HostBatch], *, passes: int) -> dict[str, Any]:
        """Hand the rows of some steps, stacked, to the devices that read them in each pass."""
        ...

    def place_corpus(self, corpus: HostBatch) -> dict[str, Any]:
        """Give every device all of the corpus."""
        ...

    def shapes(self, state: Any, batches: Any, *, passes: int) -> tuple[Any, Any]:
        """Tell how `scan_steps` takes a state and stacked batches, given as shapes."""
        ...

    def compile_train_steps(self, steps: Callable[..., Any]) -> Any:
        """Compile what `scan_steps` makes: (state, batches, fixed), which takes the state's memory
        over."""
        ...

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        """Compile (weights, batch) -> (sums, targets)."""
        ...

    def compile_weights(self, build: Callable[..., Weights]) -> Any:
        """Compile what makes weights of others; they are where weights of their names are."""
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

    def own_rows(self, *, passes: int) -> np.ndarray | None:
        del passes
        return None

    def place_batch(self, batch: HostBatch) -> dict[str, Any]:
        return dict(batch)

    def place_steps(self, batches: Sequence[HostBatch], *, passes: int) -> dict[str, Any]:
        del passes
        return stack_batches(batches)

    def place_corpus(self, corpus: HostBatch) -> dict[str, Any]:
        return {name: jnp.asarray(array) for name, array in corpus.items()}

    def shapes(self, state: Any, batches: Any, *, passes: int) -> tuple[Any, Any]:
        del passes
        return state, batches

    def compile_train_steps(self, steps: Callable[..., Any]) -> Any:
        return compiled(steps, donate_argnums=0)

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        return compiled(step)

    def compile_weights(self, build: Callable[..., Weights]) -> Any:
        return jax.jit(build)

    def one_copy(self, weights: Weights) -> Weights:
        return weights


class OnMesh:
    """A grid of devices, and one program for all of them."""

    def __init__(self, config: Config, mesh: Mesh, *, description: str):
        self.devices, self.description = mesh.size, description
        self._mesh, self._pass_rows = mesh, config.train.batch_size
        self._placement = MeshPlacement(mesh, dtype=compute_dtype(config.model))

    def make_state(self, build: Callable[..., TrainState], *arrays: Any) -> TrainState:
        shardings = state_shardings(self._mesh, jax.eval_shape(build, *arrays))
        return jax.jit(build, out_shardings=shardings)(*arrays)

    def place_weights(self, weights: Mapping[str, Any], dtype: Any) -> Weights:
        # Copied, since a device of the CPU may keep the host's own memory, which may not be donated.
        return {
            name: jnp.array(_cut_for(self._at(weight_spec(name)), np.asarray(array, dtype)))
            for name, array in weights.items()
        }

    def place_state(self, state: TrainState) -> TrainState:
        def place(leaf: Any, sharding: NamedSharding) -> Array:
            if jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", True):
                return _cut_for(sharding, np.asarray(leaf))  # every process has all of it
            return jax.device_put(leaf, sharding)

        return jax.tree.map(place, state, state_shardings(self._mesh, state))

    def own_rows(self, *, passes: int) -> np.ndarray | None:
        if jax.process_count() == 1:
            return None
        divided = self._at(PartitionSpec(ROWS)).addressable_devices_indices_map((self._pass_rows,))
        rows = np.arange(self._pass_rows)
        own = np.unique(np.concatenate([rows[part] for part in divided.values()]))
        return (np.arange(passes)[:, None] * self._pass_rows + own).reshape(-1)

    def place_batch(self, batch: HostBatch) -> dict[str, Any]:
        return {name: self._put(rows, PartitionSpec(ROWS)) for name, rows in batch.items()}

    def place_steps(self, batches: Sequence[HostBatch], *, passes: int) -> dict[str, Any]:
        def cut(rows: np.ndarray) -> Array:
            spec, shape = self._cut(rows.shape, passes=passes)
            return self._put(rows.reshape(shape), spec)

        return {name: cut(rows) for name, rows in stack_batches(batches).items()}

    def place_corpus(self, corpus: HostBatch) -> dict[str, Any]:
        whole = self._at(PartitionSpec())
        return {name: _cut_for(whole, array) for name, array in corpus.items()}

    def shapes(self, state: Any, batches: Any, *, passes: int) -> tuple[Any, Any]:
        def cut(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec, shape = self._cut(rows.shape, passes=passes)
            return _shape(shape, rows, self._at(spec))

        placed_state = jax.tree.map(
            lambda leaf, sharding: _shape(leaf.shape, leaf, sharding),
            state,
            state_shardings(self._mesh, state),
        )
        return placed_state, jax.tree.map(cut, batches)

    @staticmethod
    def _cut(shape: tuple[int, ...], *, passes: int) -> tuple[PartitionSpec, tuple[int, ...]]:
        """Tell how rows of stacked steps are divided, in each pass by itself."""
        if passes == 1:
            return PartitionSpec(None, ROWS), shape
        steps, rows, *rest = shape
        return PartitionSpec(None, None, ROWS), (steps, passes, rows // passes, *rest)

    def compile_train_steps(self, steps: Callable[..., Any]) -> Any:
        def train_steps(state: TrainState, *batches_and_fixed: Any) -> Any:
            with placed(self._placement):
                new, numbers = steps(state, *batches_and_fixed)
            shardings = state_shardings(self._mesh, state)
            new = jax.lax.with_sharding_constraint(new, shardings)
            return new, jax.lax.with_sharding_constraint(numbers, self._at(PartitionSpec()))

        options = OVERLAP if self._mesh.devices.flat[0].platform == "gpu" else {}
        return compiled(train_steps, donate_argnums=0, compiler_options=options)

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        def evaluation_step(weights: Weights, batch: dict[str, Array]) -> Any:
            with placed(self._placement):
                return step(weights, batch)

        return compiled(evaluation_step, out_shardings=self._at(PartitionSpec()))

    def compile_weights(self, build: Callable[..., Weights]) -> Any:
        def built(*given: Any) -> Weights:
            return {
                name: jax.lax.with_sharding_constraint(weight, self._at(weight_spec(name)))
                for name, weight in build(*given).items()
            }

        return jax.jit(built)

    def one_copy(self, weights: Weights) -> Weights:
        return whole_weights(weights)

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec)

    def _put(self, rows: np.ndarray, spec: PartitionSpec) -> Array:
        shape = rows.shape
        if jax.process_count() > 1:  # these are the process's own rows of a pass
            axis = tuple(spec).index(ROWS)
            shape = (*shape[:axis], self._pass_rows, *shape[axis + 1 :])
        return jax.make_array_from_process_local_data(self._at(spec), rows, shape)


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

    def own_rows(self, *, passes: int) -> np.ndarray | None:
        del passes
        return None

    def place_batch(self, batch: HostBatch) -> dict[str, Any]:
        def cut(rows: np.ndarray) -> Array:
            return jax.device_put(rows.reshape(self.devices, -1, *rows.shape[1:]), self._rows)

        return {name: cut(rows) for name, rows in batch.items()}

    def place_steps(self, batches: Sequence[HostBatch], *, passes: int) -> dict[str, Any]:
        def cut(rows: np.ndarray) -> Array:
            """Give each device its part of every pass of every step, one pass after another."""
            steps, _, *rest = rows.shape
            shares = rows.reshape(steps * passes, self.devices, -1, *rest).swapaxes(0, 1)
            return jax.device_put(shares.reshape(self.devices, steps, -1, *rest), self._rows)

        return {name: cut(rows) for name, rows in stack_batches(batches).items()}

    def place_corpus(self, corpus: HostBatch) -> dict[str, Any]:
        del corpus
        raise AssertionError("device_rows keeps the corpus with the host under pmap")

    def shapes(self, state: Any, batches: Any, *, passes: int) -> tuple[Any, Any]:
        del passes

        def cut(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            steps, count, *rest = rows.shape
            shape = (self.devices, steps, count // self.devices, *rest)
            return _shape(shape, rows, self._rows)

        whole = jax.tree.map(lambda leaf: _shape(leaf.shape, leaf, self._whole), state)
        return whole, jax.tree.map(cut, batches)

    def compile_train_steps(self, steps: Callable[..., Any]) -> Any:
        return self._pmap(steps, in_axes=(None, 0, None), donate_argnums=0)

    def compile_evaluation_step(self, step: Callable[..., Any]) -> Any:
        return self._pmap(step, in_axes=(None, 0), donate_argnums=())

    def compile_weights(self, build: Callable[..., Weights]) -> Any:
        return jax.jit(build, out_shardings=self._whole)

    def one_copy(self, weights: Weights) -> Weights:
        return whole_weights(weights)

    def _pmap(
        self, step: Callable[..., Any], *, in_axes: tuple[int | None, ...], donate_argnums: Any
    ) -> Any:
        def compiled_for_one(*arrays: Any) -> Any:
            with placed(PmapPlacement()):
                return step(*arrays)

        return jax.pmap(
            compiled_for_one,
            axis_name=PMAP_AXIS,
            in_axes=in_axes,
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

    def largest(self, number: Array) -> Array:
        """Take the largest of the devices."""
        return jax.lax.pmax(number, PMAP_AXIS)


def make_parallel(config: Config) -> Parallel:
    """Divide a run among the devices that there are, as the settings say.

    Raises:
        InputError: sizes that the devices or the model do not have.
    """
    devices = jax.devices()
    sizes = grid_sizes(config, devices=len(devices))
    used = math.prod(sizes.values())
    idle = f", {used} of {len(devices)} devices" if used < len(devices) else ""
    if jax.process_count() > 1:
        check_processes(config, sizes, devices=len(devices))
    if used == 1:
        return OneDevice(f"one{idle}" if idle else "")
    if config.parallel.strategy == "pmap":
        return WithPmap(devices[:used], description=f"pmap over {used} devices{idle}")
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    mesh = make_mesh(sizes, devices[:used])
    return OnMesh(config, mesh, description=f"mesh {shown}{idle}")


def check_processes(config: Config, sizes: Mapping[str, int], *, devices: int) -> None:
    """Refuse what several processes cannot do.

    Raises:
        InputError: says what they can.
    """
    if config.parallel.strategy == "pmap":
        raise InputError(
            "parallel.strategy=pmap is for the devices of one process, and there are "
            f"{jax.process_count()} processes. Use --parallel.strategy mesh."
        )
    used, rows = math.prod(sizes.values()), config.train.batch_size
    if used < devices:
        share = devices // math.prod(sizes[axis] for axis in AXES if axis not in ROWS)
        raise InputError(
            f"parallel: {used} of {devices} devices would be used, and each of "
            f"{jax.process_count()} processes must use all of its own. Use --batch-size "
            f"{-(-rows // share) * share}, or sizes with a product of {devices}."
        )


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


def stack_batches(batches: Sequence[HostBatch]) -> dict[str, np.ndarray]:
    """Put the batches of some steps into one, with an axis of steps in front."""
    if len(batches) == 1:  # without a copy
        return {name: rows[None] for name, rows in batches[0].items()}
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _cut_for(sharding: NamedSharding, array: np.ndarray) -> Array:
    """Give this process's devices their parts of an array that all processes have."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def _shape(shape: tuple[int, ...], leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def whole_weights(weights: Weights) -> Weights:
    """Give the first device's copy if it has every weight whole, else the weights as they are."""
    if all(weight.is_fully_replicated for weight in weights.values()):
        return {name: weight.addressable_data(0) for name, weight in weights.items()}
    return weights
