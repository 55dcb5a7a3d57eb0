"""llama2.c's `.bin` files: version 0 (float32, no magic), 1 (float32) and 2 (int8 in groups).

What run.c hard-codes (eps 1e-5, rope_theta 10000, head_dim = width / heads) is not in the file, so
a model that has it otherwise is refused. Rotary rows are interleaved there.

Source: karpathy/llama2.c, export.py (`legacy_export`, `version1_export`, `version2_export`,
`quantize_q80`) and run.c (`memory_map_weights`, `rmsnorm`, `forward`).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from convert.bundle import Arrays, Bundle, make_layout, model_config
from convert.layout import half_split, interleaved
from convert.tokenizer_files import load_any_tokenizer, note_of_normaliser, tokenizer_bin
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.data.sentencepiece_bpe import SentencePieceTokenizer
from tinyllm_jax.errors import InputError

NAME = "llama2c"
MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = 256
EPS, THETA = 1e-5, 10000.0
TOKENIZER = "tokenizer.bin"
LARGEST_GROUP = 64
# Names of a layer's tensors in the order of the files.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Header:
    """What stands before the tensors."""

    version: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tied: bool
    group: int  # weights that share one scale; version 2 only

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def matches(path: Path) -> bool:
    """Tell a file by its magic, or version 0, which has none, by a header that makes sense."""
    return path.is_file() and read_header(path) is not None


def read_header(path: Path) -> Header | None:
    """Read the header, or None where this is no such file."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) < 28:
        return None
    if struct.unpack_from("<I", start)[0] == MAGIC:
        if len(start) < 45:
            return None
        version, *numbers = struct.unpack_from("<8i", start, 4)
        tied, group = struct.unpack_from("<Bi", start, 36)
        group = group if version == 2 else 0
    else:
        version, group = 0, 0
        numbers = list(struct.unpack_from("<7i", start))
        tied, numbers[5] = numbers[5] > 0, abs(numbers[5])
    hidden, inner, layers, heads, kv_heads, vocab, context = numbers
    header = Header(
        version, hidden, inner, layers, heads, kv_heads, vocab, context, bool(tied), group
    )
    return header if _makes_sense(header) else None


def read(path: Path, *, with_tokenizer: bool) -> Bundle:
    """Read a file of version 0, 1 or 2, the last as the float32 weights that runq.c computes with.

    A `tokenizer.bin` beside the file is its tokenizer, unless another is named.

    Raises:
        InputError: the version is unknown, or the file is cut short.
    """
    header = read_header(path)
    assert header is not None
    if header.version not in (0, 1, 2):
        raise InputError(
            f"{path}: version {header.version} of llama2.c's format. Versions 0, 1 and 2 are read."
        )
    model = model_config(_settings(header), origin=str(path))
    expected, size = _file_size(header), path.stat().st_size
    if size != expected:
        raise InputError(
            f"{path}: its header stands for {expected:,} bytes of llama2.c version "
            f"{header.version}, and it has {size:,}. Get the file again."
        )
    content = np.memmap(path, mode="c")
    stored = _read_tensors(content, header)
    weights = {name: half_split(name, array, model) for name, array in stored.items()}
    layout = make_layout(
        format=NAME, rope="interleaved", tied=header.tied, transposed=False, weights=weights
    )
    bundle = Bundle(model, weights, None, None, layout)
    layout["version"] = header.version
    if header.version == 2:
        layout["dtype"] = f"int8 in groups of {header.group}"
    beside = path.with_name(TOKENIZER)
    if with_tokenizer and beside.is_file():
        bundle.tokenizer = load_any_tokenizer(beside)
    return bundle


def write(bundle: Bundle, path: Path, *, version: int) -> None:
    """Write a file, and `tokenizer.bin` beside it where the tokenizer is SentencePiece's.

    Raises:
        InputError: the model is not one that run.c computes.
    """
    model = bundle.model
    check_hard_coded(model)
    check_pieces(bundle)
    header = Header(
        version,
        model.hidden_size,
        model.intermediate_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.vocab_size,
        model.max_position_embeddings,
        model.tie_word_embeddings,
        _group_size(model) if version == 2 else 0,
    )
    with open(path, "wb") as file:
        _write_header(file, header)
        for name, _ in _order(header):
            array = _tensor(bundle, name, header)
            if version == 2 and array.ndim == 2:
                for part in quantize(array, group=header.group):
                    file.write(part.tobytes())
            else:
                file.write(np.ascontiguousarray(array, "<f4").tobytes())
    _write_tokenizer(bundle, path)


def check_hard_coded(model: ModelConfig) -> None:
    """Refuse what run.c would compute differently.

    Raises:
        InputError: every such setting, in one line.
    """
    problems = []
    if model.rms_norm_eps != EPS:
        problems.append(f"rms_norm_eps={model.rms_norm_eps} (run.c has {EPS})")
    if model.rope_theta != THETA:
        problems.append(f"rope_theta={model.rope_theta} (run.c has {THETA:g})")
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        problems.append(
            f"head_dim={model.head_dim} (run.c has hidden_size / num_attention_heads = "
            f"{model.hidden_size / model.num_attention_heads:g})"
        )
    if problems:
        raise InputError(
            f"llama2c: {', '.join(problems)} is not what run.c hard-codes. Use --to gguf or hf."
        )


def check_pieces(bundle: Bundle) -> None:
    """Refuse a `tokenizer.bin` that ends before the embedding does: run.c reads a piece for each row.

    Raises:
        InputError: there are fewer tokens than rows.
    """
    tokenizer, rows = bundle.tokenizer, bundle.model.vocab_size
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.vocab_size < rows:
        raise InputError(
            f"llama2c: the tokenizer has {tokenizer.vocab_size} tokens and the embedding {rows} "
            "rows, and run.c reads a piece for every row. Use --to gguf or hf, or --tokenizer none "
            "to leave the tokenizer out."
        )


def quantize(array: np.ndarray, *, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise symmetrically: int8 in -127 to 127, and one float32 scale for each group of a row."""
    groups = np.asarray(array, np.float32).reshape(-1, group)
    scale = np.abs(groups).max(axis=1) / np.float32(127.0)
    safe = np.where(scale == 0, np.float32(1), scale)
    return np.rint(groups / safe[:, None]).astype(np.int8), scale


def _settings(header: Header) -> dict[str, Any]:
    return {
        "vocab_size": header.vocab,
        "hidden_size": header.hidden,
        "intermediate_size": header.inner,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "max_position_embeddings": header.context,
        "rope_theta": THETA,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": header.tied,
    }


def _makes_sense(header: Header) -> bool:
    """Tell numbers that can be a model from the first bytes of any other file."""
    sizes = (header.hidden, header.inner, header.layers, header.heads, header.kv_heads)
    return (
        all(0 < size <= 1 << 20 for size in sizes)
        and 0 < header.vocab <= 1 << 24
        and 0 < header.context <= 1 << 24
        and header.layers <= 1024
        and header.hidden % header.heads == 0
        and header.heads % header.kv_heads == 0
        and (header.version != 2 or (header.group > 0 and header.hidden % header.group == 0))
    )


def _order(header: Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the tensors of a file in its order, with their shapes."""
    hidden, inner, kv = header.hidden, header.inner, header.kv_heads * header.head_dim
    shapes = {
        **dict.fromkeys(NORMS, (hidden,)),
        **dict(
            zip(
                ATTENTION,
                ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)),
                strict=True,
            )
        ),
        **dict(zip(MLP, ((inner, hidden), (hidden, inner), (inner, hidden)), strict=True)),
    }

    def of_layers(names: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in names:
            for index in range(header.layers):
                yield f"layers.{index}.{name}.weight", shapes[name]

    table, norm = ("embed_tokens.weight", (header.vocab, hidden)), ("norm.weight", (hidden,))
    if header.version == 0:
        yield table
        yield from of_layers((NORMS[0], *ATTENTION, NORMS[1], *MLP))
        yield norm
        # Tables of cosine and sine that run.c skips, computed by itself since.
        yield "freqs_cos", (header.context, header.head_dim // 2)
        yield "freqs_sin", (header.context, header.head_dim // 2)
    else:
        yield from of_layers(NORMS)
        yield norm
        yield table
        yield from of_layers((*ATTENTION, *MLP))
    if not header.tied:
        yield "lm_head.weight", (header.vocab, hidden)


def _bytes_of(shape: tuple[int, ...], header: Header) -> int:
    count = int(np.prod(shape, dtype=np.int64))
    if header.version == 2 and len(shape) == 2:
        return count + 4 * (count // header.group)
    return 4 * count


def _file_size(header: Header) -> int:
    start = HEADER_BYTES if header.version else 28
    return start + sum(_bytes_of(shape, header) for _, shape in _order(header))


def _read_tensors(content: np.ndarray, header: Header) -> Arrays:
    found: Arrays = {}
    place = HEADER_BYTES if header.version else 28
    for name, shape in _order(header):
        size = _bytes_of(shape, header)
        part = np.asarray(content[place : place + size])
        place += size
        if header.version == 2 and len(shape) == 2:
            count = int(np.prod(shape))
            codes = part[:count].view(np.int8).reshape(-1, header.group).astype(np.float32)
            found[name] = (codes * part[count:].view("<f4")[:, None]).reshape(shape)
        else:
            found[name] = part.view("<f4").reshape(shape)
    found.pop("freqs_cos", None)
    found.pop("freqs_sin", None)
    return found


def _write_header(file: IO[bytes], header: Header) -> None:
    numbers = [header.hidden, header.inner, header.layers, header.heads, header.kv_heads]
    if header.version == 0:
        # A negative size says that the head is a matrix of its own.
        vocab = header.vocab if header.tied else -header.vocab
        file.write(struct.pack("<7i", *numbers, vocab, header.context))
        return
    start = struct.pack("<I8i", MAGIC, header.version, *numbers, header.vocab, header.context)
    start += struct.pack("<B", header.tied)
    if header.version == 2:
        start += struct.pack("<i", header.group)
    file.write(start.ljust(HEADER_BYTES, b"\0"))


def _tensor(bundle: Bundle, name: str, header: Header) -> np.ndarray:
    if name in ("freqs_cos", "freqs_sin"):
        pairs = np.arange(0, header.head_dim, 2, dtype=np.float32) / header.head_dim
        angles = np.outer(np.arange(header.context), 1.0 / THETA**pairs)
        return (np.cos if name == "freqs_cos" else np.sin)(angles).astype(np.float32)
    return interleaved(name, np.asarray(bundle.weights[name]), bundle.model)


def _group_size(model: ModelConfig) -> int:
    """Halve the group until it divides the rows that runq.c multiplies."""
    group = LARGEST_GROUP
    while model.hidden_size % group or model.intermediate_size % group:
        group //= 2
    return group


def _write_tokenizer(bundle: Bundle, path: Path) -> None:
    tokenizer = bundle.tokenizer
    if tokenizer is None:
        return
    if not isinstance(tokenizer, SentencePieceTokenizer):
        bundle.note("llama2.c has no byte-level tokenizer: no tokenizer.bin was written")
        return
    path.with_name(TOKENIZER).write_bytes(tokenizer_bin(tokenizer))
    if note := note_of_normaliser(tokenizer, "run.c"):
        bundle.note(note)
    bytes_at = tokenizer.encode("\x00")[-1]
    if (tokenizer.bos_id, tokenizer.eos_id, bytes_at) != (1, 2, 3):
        bundle.note(
            "run.c hard-codes bos 1, eos 2 and bytes from 3, and this tokenizer has "
            f"{tokenizer.bos_id}, {tokenizer.eos_id} and {bytes_at}: change these numbers in run.c "
            "(encode, generate) to talk to it"
        )
