"""Compare a copy with its source: bit by bit where nothing may change, and by what it computes."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.bundle import Bundle, digest, to_jax
from convert.checks import listed
from convert.setting_values import computed_settings
from convert.tokenizer_files import sample_texts
from tinyllm_jax.config import ModelConfig, RunConfig, config_to_table
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import flatten

# A copy in fewer bits may move logits by this share of their spread (root mean square); int8 and
# bfloat16 stay well below, a wrong permutation or a swapped matrix far above.
LARGEST_RELATIVE_ERROR = 0.2
ROWS, LONGEST = 2, 16


@dataclass(frozen=True)
class Fingerprint:
    """What a bundle is, small enough to outlive it."""

    model: ModelConfig
    digests: dict[str, Any]  # of weights and moments
    counters: dict[str, Any]  # and settings of the run, where there is one
    logits: np.ndarray


@dataclass(frozen=True)
class Difference:
    """How far a copy's logits are from its source's."""

    largest: float
    relative: float  # root mean square, as a share of the spread of the source's logits


class Comparer:
    """Computes logits of bundles of one model, a layer at a time.

    One layer is compiled and run with the weights of each in turn, so that a second copy of the
    model is never in memory.
    """

    def __init__(self, model: ModelConfig, *, double: bool):
        dtype = "float64" if double else "float32"
        self._model = dataclasses.replace(model, compute_dtype=dtype, attention="reference")
        self._double = double
        self._compiled: tuple[Any, Any, Any] | None = None

    def logits(self, bundle: Bundle) -> np.ndarray:
        """Score fixed random tokens, in float32, or float64 where the source is float64."""
        import jax

        wide = np.float64 if self._double else np.float32
        parts: dict[str | None, dict[str, np.ndarray]] = {}
        for name, array in to_jax(bundle.weights).items():
            index, rest = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
            parts.setdefault(index, {})[f"layers.0.{rest}" if index else rest] = array
        outside = parts.pop(None)
        with jax.enable_x64(self._double):
            self._compiled = self._compiled or self._compile()
            embed, layer, score = self._compiled
            x, weights = None, {}
            for index in range(self._model.num_hidden_layers):
                arrays = outside | parts[str(index)]
                weights = {name: np.asarray(array, wide) for name, array in arrays.items()}
                x = embed(weights, self._tokens()) if x is None else x
                x = layer(weights, x)
                x.block_until_ready()  # before the next layer's weights are copied
            return np.asarray(score(weights, x))

    def _compile(self) -> tuple[Any, Any, Any]:
        """Make the three steps of a model of one layer: embed, the layer, score."""
        import jax
        import jax.numpy as jnp

        from tinyllm_jax.model.layers import compute_dtype
        from tinyllm_jax.model.rope import rope_tables
        from tinyllm_jax.model.weights import merge_weights, model_structure

        model, tokens = self._model, self._tokens()
        dtype = compute_dtype(model)
        structure, _ = model_structure(dataclasses.replace(model, num_hidden_layers=1))
        positions = np.broadcast_to(np.arange(tokens.shape[1])[None], tokens.shape)

        def embed(weights: Any, rows: Any) -> Any:
            return merge_weights(structure, weights).embed_tokens(rows, dtype=dtype)

        def layer(weights: Any, x: Any) -> Any:
            at: Any = jnp.asarray(positions)
            rope, counted = rope_tables(at, model, dtype=dtype), jnp.ones(at.shape, bool)
            block: Any = merge_weights(structure, weights).layers[0]
            return block(
                x, rope, None, cache=None, positions=at, counted=counted, dropout_key=None
            )[0]

        def score(weights: Any, x: Any) -> Any:
            whole = merge_weights(structure, weights)
            states = whole.norm(x)
            logits = whole.logits(states)
            if not model.score_head:
                return logits
            return jnp.concatenate([logits, whole.scores(states)[..., None]], axis=-1)

        return jax.jit(embed), jax.jit(layer), jax.jit(score)

    def _tokens(self) -> np.ndarray:
        length = min(LONGEST, self._model.max_position_embeddings)
        numbers = np.random.default_rng(0)
        return numbers.integers(0, self._model.vocab_size, (ROWS, length), dtype=np.int32)


def fingerprint(bundle: Bundle, comparer: Comparer, *, with_training: bool) -> Fingerprint:
    """Take what a copy will be compared with."""
    digests = {name: digest(array) for name, array in _arrays(bundle, with_training)}
    return Fingerprint(
        bundle.model, digests, _counters(bundle, with_training), comparer.logits(bundle)
    )


def compare(
    source: Fingerprint,
    copy: Fingerprint,
    *,
    lossless: bool,
    tokenizers: tuple[Tokenizer | None, Tokenizer | None] | None,
    whole_tokenizer: bool,
    origin: str,
) -> Difference:
    """Compare a copy with its source.

    Args:
        lossless: Every bit must be the same.
        tokenizers: Of source and copy; None where the copy has none.
        whole_tokenizer: Its bytes must be the same, since training goes on with it.

    Raises:
        InputError: it is not the same model.
    """
    problems = []
    if lossless:
        names = source.digests.keys() | copy.digests.keys()
        different = sorted(n for n in names if source.digests.get(n) != copy.digests.get(n))
        problems += [f"{listed(different)} changed"] if different else []
    problems += _changes(source.counters, copy.counters)
    problems += _changes(computed_settings(source.model), computed_settings(copy.model))
    if tokenizers is not None:
        problems += _changed_tokenizer(*tokenizers, whole=whole_tokenizer)
    gap = np.abs(source.logits.astype(np.float64) - copy.logits.astype(np.float64))
    spread = float(np.std(source.logits.astype(np.float64))) or 1.0
    same = np.array_equal(source.logits, copy.logits, equal_nan=True)
    largest = 0.0 if same else float(np.max(gap))
    relative = 0.0 if same else float(np.sqrt(np.mean(gap**2))) / spread
    if not same and (lossless or not relative <= LARGEST_RELATIVE_ERROR):
        problems.append(f"logits differ by {largest:.3g} ({relative:.1%} of their spread)")
    if problems:
        raise InputError(
            f"{origin}: what was written is not the same model: {'; '.join(problems)}. Nothing was "
            "kept; use another --dtype, or --no-verify to keep it."
        )
    return Difference(largest, relative)


def _arrays(bundle: Bundle, with_training: bool) -> Iterator[tuple[str, np.ndarray]]:
    yield from bundle.weights.items()
    if bundle.training and with_training:
        for kind in ("first", "second"):
            for name, array in getattr(bundle.training, kind).items():
                yield f"{kind} moment of {name}", array


def _counters(bundle: Bundle, with_training: bool) -> dict[str, Any]:
    """List what a run goes on from beside its arrays; where it lies may differ."""
    training = bundle.training
    if training is None or not with_training:
        return {}
    names = ("step", "count", "nonfinite_streak", "seed", "rows_per_step", "dataset_hash")
    best = {f"best.{name}": value for name, value in (training.best or {}).items()}
    settings = config_to_table(dataclasses.replace(training.config, run=RunConfig()))
    return {name: getattr(training, name) for name in names} | best | flatten(settings)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    missing = object()
    names = [n for n in {**before, **after} if before.get(n, missing) != after.get(n, missing)]
    changes = [f"{name}={before.get(name)} became {after.get(name)}" for name in names]
    return [listed(changes)] if changes else []


def _changed_tokenizer(
    source: Tokenizer | None, copy: Tokenizer | None, *, whole: bool
) -> list[str]:
    """Compare two tokenizers: their bytes or, where a format cannot keep these, what they do."""
    if source is None or copy is None:
        return ["the tokenizer is gone"]
    if source.hash == copy.hash:
        return []
    if whole:
        return ["the tokenizer is another file"]
    for name in ("bos_id", "eos_id"):
        if getattr(source, name) != getattr(copy, name):
            return [f"the tokenizer's {name}={getattr(source, name)} became {getattr(copy, name)}"]
    texts = sample_texts(source)
    both = zip(source.encode_batch(texts), copy.encode_batch(texts), strict=True)
    other = [text for text, (one, two) in zip(texts, both, strict=True) if one != two]
    if not other:
        return []
    return [
        f"the tokenizer gives other ids for {len(other)} of {len(texts)} texts, such as "
        f"{other[0][:40]!r} (--tokenizer none leaves it out)"
    ]
