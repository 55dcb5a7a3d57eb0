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
from convert.layout import half_split, interleaved
from convert.tokenizer_files import Kind, Piece, build_sentencepiece, pieces_of
from tinyllm_jax.data.sentencepiece_bpe import SPACE_MARK, SentencePieceTokenizer
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
        _add_tokenizer(writer, bundle)
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


def read(path: Path) -> Bundle:
    """Read a Llama from a file, quantised tensors as the float32 they stand for.

    Raises:
        InputError: it is damaged, no Llama, or scales its rotary positions.
    """
    gguf = _library()
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise InputError(f"{path}: no whole GGUF file ({error}). Get the file again.") from None
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise InputError(
            f"{path}: architecture {fields.get('general.architecture')}. Only llama is read."
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    names = {bundle_name(tensor.name) for tensor in reader.tensors}
    if scaling != "none" or "rope_freqs.weight" in names:
        raise InputError(f"{path}: rotary positions scaled by {scaling}: not supported.")
    model = model_config(
        _settings(fields, tied="lm_head.weight" not in names, origin=str(path)), origin=str(path)
    )
    stored = {bundle_name(tensor.name): _values(tensor, gguf) for tensor in reader.tensors}
    check_tensors(stored, model, origin=str(path))
    weights = {name: half_split(name, array, model) for name, array in stored.items()}
    layout = make_layout(
        format=NAME,
        rope="interleaved",
        tied=model.tie_word_embeddings,
        transposed=False,
        weights=weights,
    )
    layout["dtype"] = ", ".join(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    bundle = Bundle(model, weights, None, None, layout)
    if fields.get("tokenizer.ggml.model") == "llama":
        bundle.tokenizer = _sentencepiece(fields, origin=str(path))
    return bundle


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


def _values(tensor: Any, gguf: Any) -> np.ndarray:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    types = gguf.GGMLQuantizationType
    if tensor.tensor_type in (types.F32, types.F16, types.F64):
        return np.asarray(tensor.data).reshape(shape)
    if tensor.tensor_type == types.BF16:
        return np.ascontiguousarray(tensor.data).view(ml_dtypes.bfloat16).reshape(shape)
    return gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(shape)


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
    found = {ours: fields[f"llama.{theirs}"] for ours, theirs in words.items()}
    # The file holds float32, and 1e-5 is meant where it says 9.999999747e-06.
    found["rms_norm_eps"] = _shortest(found["rms_norm_eps"])
    found["rope_theta"] = _shortest(fields.get("llama.rope.freq_base", 10000.0))
    heads = found["num_attention_heads"]
    found["num_key_value_heads"] = fields.get("llama.attention.head_count_kv", heads)
    found["head_dim"] = fields.get("llama.attention.key_length", 0)
    tokens = fields.get("tokenizer.ggml.tokens", ())
    found["vocab_size"] = fields.get("llama.vocab_size", len(tokens))
    found["tie_word_embeddings"] = tied
    return found


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _add_tokenizer(writer: Any, bundle: Bundle) -> None:
    tokenizer = bundle.tokenizer
    assert tokenizer is not None
    rows = bundle.model.vocab_size
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = pieces_of(tokenizer)
        pieces += [Piece(f"[PAD{id}]", -1000.0, Kind.UNUSED) for id in range(len(pieces), rows)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.text for piece in pieces])
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_token_types([int(piece.kind) for piece in pieces])
        writer.add_add_space_prefix(tokenizer.encode("a") != tokenizer.encode(" a"))
    else:
        _add_byte_level(writer, bundle, rows)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.unk_id >= 0:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _add_byte_level(writer: Any, bundle: Bundle, rows: int) -> None:
    """Add a byte-level BPE vocabulary under the name of the cut it makes, GPT-2's.

    llama.cpp has no normaliser, so text that NFKC would change gets other tokens there.
    """
    assert bundle.tokenizer is not None
    table = json.loads(bundle.tokenizer.to_bytes().decode("utf-8-sig"))
    if table["model"].get("type") != "BPE":
        raise InputError(
            f"tokenizer.json: {table['model'].get('type')} has no form in GGUF. Add --tokenizer "
            "none to leave the tokenizer out."
        )
    tokens = {id: text for text, id in table["model"]["vocab"].items()}
    added = {row["id"]: row for row in table.get("added_tokens", ())}
    tokens |= {id: row["content"] for id, row in added.items()}
    kinds = [
        Kind.UNUSED
        if id not in tokens
        else Kind.NORMAL
        if id not in added
        else Kind.CONTROL
        if added[id].get("special")
        else Kind.USER_DEFINED
        for id in range(rows)
    ]
    merges = [row if isinstance(row, str) else " ".join(row) for row in table["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(id, f"[PAD{id}]") for id in range(rows)])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(merges)
    cut = table.get("pre_tokenizer") or {}
    if cut.get("type") != "ByteLevel" or not cut.get("use_regex", True):
        bundle.note("llama.cpp will cut text as GPT-2 does, which this tokenizer does not")
    if table.get("normalizer"):
        bundle.note("llama.cpp does not normalise text as this tokenizer does (NFKC)")


def _sentencepiece(fields: dict[str, Any], *, origin: str) -> SentencePieceTokenizer:
    rows = zip(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        fields["tokenizer.ggml.token_type"],
        strict=True,
    )
    pieces = [Piece(text.replace(" ", SPACE_MARK), score, Kind(kind)) for text, score, kind in rows]
    return build_sentencepiece(pieces, origin=origin)
