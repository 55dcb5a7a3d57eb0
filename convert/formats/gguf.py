"""GGUF, the file of llama.cpp, through the `gguf` library: F32, F16, BF16 and Q8_0.

llama.cpp's `llama` turns interleaved pairs, so the rows of q and k are permuted on the way. Norms
stay F32 whatever the rest is, and a matrix whose rows are no multiple of 32 stays F16 under Q8_0,
as in llama.cpp's own conversion.

Source: ggml-org/llama.cpp, conversion/llama.py (`permute`), conversion/base.py (vocabularies),
gguf-py/gguf/constants.py.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.bundle import Bundle, check_tensors, make_layout, model_config
from convert.gguf_header import check_header
from convert.gguf_tokenizer import add_tokenizer, read_tokenizer
from convert.layout import half_split, interleaved
from convert.setting_values import check_values
from tinyllm_jax.errors import InputError

NAME = "gguf"
MAGIC = b"GGUF"
Q8_BLOCK = 32
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_BACK = {theirs: ours for ours, theirs in (_IN_LAYER | _OUTSIDE).items()}


def matches(path: Path) -> bool:
    """Tell a file by its magic."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def gguf_name(name: str) -> str:
    """Give a weight's name in GGUF."""
    stem = name.removesuffix(".weight")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    _, index, rest = stem.split(".", 2)
    return f"blk.{index}.{_IN_LAYER[rest]}.weight"


def bundle_name(name: str) -> str:
    """Undo `gguf_name`; a name that is not known stays as it is."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in _BACK:
        return f"layers.{parts[1]}.{_BACK[parts[2]]}.weight"
    return f"{_BACK[parts[0]]}.weight" if len(parts) == 1 and parts[0] in _BACK else name


def write(bundle: Bundle, path: Path, *, quantized: bool) -> None:
    """Write a file that llama.cpp loads, tokenizer and all."""
    gguf = _library()
    model = bundle.model
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tinyllm")
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_string("tinyllm.layout", json.dumps(bundle.layout))
    if bundle.tokenizer:
        add_tokenizer(writer, bundle)
    types = gguf.GGMLQuantizationType
    kinds = set()
    for name, array in bundle.weights.items():
        kind = _kind(array, quantized=quantized, types=types)
        kinds.add(kind if array.ndim > 1 else None)
        array = interleaved(name, np.asarray(array), model)
        if kind == types.BF16:
            plain = np.ascontiguousarray(array).view(np.uint8)
            writer.add_tensor(gguf_name(name), plain, raw_dtype=kind)
        else:
            wide = np.ascontiguousarray(array, np.float32)
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.add_file_type(_file_type(kinds - {None}, gguf))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


def read(path: Path, *, with_tokenizer: bool) -> Bundle:
    """Read a Llama from a file, quantised tensors as the float32 they stand for.

    Args:
        with_tokenizer: Read the file's tokenizer, where it has one.

    Raises:
        InputError: it is damaged, no Llama, or scales its rotary positions.
    """
    gguf, origin = _library(), str(path)
    fields, tensors = _open(path, gguf)
    refuse_what_is_not_computed(fields, origin=origin)
    names = {bundle_name(tensor.name) for tensor in tensors}
    if "rope_freqs.weight" in names:
        raise InputError(f"{path}: rotary positions scaled by rope_freqs.weight: not supported.")
    fields_of_model = _settings(fields, tied="lm_head.weight" not in names, origin=origin)
    model = model_config(fields_of_model, origin=origin)
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.get(f"llama.{key}", model.head_dim) != model.head_dim:
            raise InputError(
                f"{path}: llama.{key}={fields[f'llama.{key}']} and heads are {model.head_dim} "
                "wide: not supported. Give a model that turns its heads whole."
            )
    stored = {bundle_name(tensor.name): _values(tensor, gguf, path) for tensor in tensors}
    check_tensors(stored, model, origin=origin)
    weights = {name: half_split(name, array, model) for name, array in stored.items()}
    layout = make_layout(
        format=NAME,
        rope="interleaved",
        tied=model.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    layout["dtype"] = ", ".join(sorted({tensor.tensor_type.name for tensor in tensors}))
    bundle = Bundle(model, weights, None, None, layout)
    if with_tokenizer:
        bundle.tokenizer = read_tokenizer(fields, bundle, origin=origin)
    return bundle


def refuse_what_is_not_computed(fields: dict[str, Any], *, origin: str) -> None:
    """Refuse another architecture, scaled rotary positions, and one part of several.

    Raises:
        InputError: what it is.
    """
    if fields.get("general.architecture") != "llama":
        raise InputError(
            f"{origin}: architecture {fields.get('general.architecture')}. Only llama is read."
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise InputError(f"{origin}: rotary positions scaled by {scaling}: not supported.")
    if fields.get("llama.rope.scale_linear", 1.0) != 1.0:
        raise InputError(f"{origin}: rotary positions scaled by linear: not supported.")
    if fields.get("split.count", 0) not in (0, 1):
        raise InputError(
            f"{origin}: one of {fields['split.count']} parts. Join them with llama-gguf-split --merge."
        )


def _open(path: Path, gguf: Any) -> tuple[dict[str, Any], list[Any]]:
    """Read what the file says, and map its tensors, which lie one behind the other."""
    try:
        check_header(path)
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        place = reader.data_offset
        for tensor in reader.tensors:
            if tensor.data_offset != place:
                raise ValueError(f"{tensor.name} is not where it should be")
            place += tensor.n_bytes + -tensor.n_bytes % int(reader.alignment)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise InputError(f"{path}: no whole GGUF file ({error}). Get the file again.") from None
    return fields, reader.tensors


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(
            "gguf: the library of that name is not installed. Type: pip install 'tinyllm[gguf]'"
        ) from None
    return gguf


def _kind(array: np.ndarray, *, quantized: bool, types: Any) -> Any:
    if array.ndim == 1:
        return types.F32
    if quantized:
        return types.Q8_0 if array.shape[-1] % Q8_BLOCK == 0 else types.F16
    if array.dtype == ml_dtypes.bfloat16:
        return types.BF16
    return types.F16 if array.dtype == np.float16 else types.F32


def _file_type(kinds: set[Any], gguf: Any) -> int:
    types, names = gguf.GGMLQuantizationType, gguf.LlamaFileType
    if types.Q8_0 in kinds:
        return int(names.MOSTLY_Q8_0)
    if types.BF16 in kinds:
        return int(names.MOSTLY_BF16)
    return int(names.MOSTLY_F16 if types.F16 in kinds else names.ALL_F32)


def _values(tensor: Any, gguf: Any, path: Path) -> np.ndarray:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    types = gguf.GGMLQuantizationType
    if tensor.tensor_type in (types.F32, types.F16, types.F64):
        return np.asarray(tensor.data).reshape(shape)
    if tensor.tensor_type == types.BF16:
        return np.ascontiguousarray(tensor.data).view(ml_dtypes.bfloat16).reshape(shape)
    try:
        return gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(shape)
    except (NotImplementedError, ValueError) as error:
        raise InputError(
            f"{path}: {tensor.name} cannot be read as {tensor.tensor_type.name} ({error}). Give "
            "the file as F16 or Q8_0."
        ) from None


def _settings(fields: dict[str, Any], *, tied: bool, origin: str) -> dict[str, Any]:
    words = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    missing = [f"llama.{word}" for word in words.values() if f"llama.{word}" not in fields]
    if missing:
        raise InputError(f"{origin}: it lacks {', '.join(missing)}. Get the file again.")
    heads = "llama.attention.head_count"
    whole = dict.fromkeys(
        (*(f"llama.{words[ours]}" for ours in words if ours != "rms_norm_eps"),
         f"{heads}_kv", "llama.attention.key_length", "llama.vocab_size"), 1
    )  # fmt: skip
    numbers = (f"llama.{words['rms_norm_eps']}", "llama.rope.freq_base")
    check_values(fields, whole=whole, numbers=numbers, switches=(), origin=origin)
    found = {ours: fields[f"llama.{theirs}"] for ours, theirs in words.items()}
    # The file holds float32, and 1e-5 is meant where it says 9.999999747e-06.
    found["rms_norm_eps"] = _shortest(found["rms_norm_eps"])
    found["rope_theta"] = _shortest(fields.get("llama.rope.freq_base", 10000.0))
    found["num_key_value_heads"] = fields.get(f"{heads}_kv", fields[heads])
    found["head_dim"] = fields.get("llama.attention.key_length", 0)
    tokens = fields.get("tokenizer.ggml.tokens")
    found["vocab_size"] = fields.get(
        "llama.vocab_size", len(tokens) if isinstance(tokens, list) else 0
    )
    found["tie_word_embeddings"] = tied
    return found


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))
