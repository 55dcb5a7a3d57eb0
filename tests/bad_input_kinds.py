"""Kinds of bad input: how one is made, and what this project does with it when it reads it.

Reading must end in an `InputError` or in what it read; all else is a finding.
"""

import contextlib
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import bad_input_damage as damage
import zstandard

from tinyllm_jax import config as settings_of
from tinyllm_jax.config import ChatConfig, DataConfig, EvaluateConfig, EvaluationDataConfig
from tinyllm_jax.data import chat, corpus, sentencepiece_bpe
from tinyllm_jax.data.files import sha256_of_file
from tinyllm_jax.data.tokenizer import load_tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser, add_flags, build, parse_flags, setting_fields


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        make: Writes one into a folder and gives its path.
        read: Reads it as a command would.
        foreign: Native libraries read it, so it is tried in a process of its own.
        libraries: Without them the kind is left out.
        memory: Bytes that reading may take besides 64 times the input.
    """

    make: Callable[[Path, random.Random], Path]
    read: Callable[[Path], None]
    foreign: bool = False
    libraries: tuple[str, ...] = ()
    memory: int = 300 << 20


class Ways:
    """Several ways to read an input: each may refuse it, and the first to do so is told at the end."""

    def __init__(self) -> None:
        self._first: InputError | None = None

    @contextlib.contextmanager
    def refused_or_read(self) -> Iterator[None]:
        """Let the next way be tried after a refusal."""
        try:
            yield
        except InputError as error:
            self._first = self._first or error

    def end(self) -> None:
        """Raise the first refusal."""
        if self._first:
            raise self._first


def in_file(name: str, content: Callable[[random.Random], bytes]) -> Callable[..., Path]:
    """Make files of one name."""

    def make(folder: Path, dice: random.Random) -> Path:
        path = folder / name
        path.write_bytes(content(dice))
        return path

    return make


# --- settings ---


@cache
def keys() -> list[str]:
    return list(setting_fields(settings_of.Config))


def read_toml(path: Path) -> None:
    """Read a settings file as `train` does before it starts."""
    from tinyllm_jax.train import read_command, wants_dry_run
    from tinyllm_jax.training.start import find_folder, find_mode

    preset, overrides, problems = read_command(["--config", str(path)])
    with contextlib.suppress(InputError):
        find_folder(preset, overrides)
        wants_dry_run(preset, overrides)
        find_mode(preset, overrides)
    config = settings_of.load_config(str(path), overrides, problems)
    json.dumps(settings_of.config_to_table(config))
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 2, "pipeline": 1, "sequence": 1}
    config.division_problems(sizes)


WORDS = (
    *("", "-", "--", "---", "-h", "--config", "--no-such", "--out", "x", "-1", "1e400", "9" * 5000, "²"),
    *("true", "nan", "inf", "\udcff", "a\nb", "--out=", "--run.out", "--model", "--model.", "--=1", "=", "@x"),
    *("1_0", "0x10", "1" * 30, "0", "2", "64", "é", "x" * 4000, "--" + "y" * 4000, "../..", "--train.max_step"),
)  # fmt: skip
CLASSES = ("Config", "GenerateConfig", "ServeConfig", "TalkConfig", "EvaluateConfig")


def flags(dice: random.Random) -> bytes:
    name = dice.choice(CLASSES)
    own = list(setting_fields(getattr(settings_of, name)))
    words = []
    for _ in range(dice.choice([1, 2, 4])):
        if dice.random() < 0.7:
            value = dice.choice([*WORDS, *damage.RAW_TOML]).replace("\x00", "")
            words += [f"--{dice.choice(own)}", value.strip("'\"")][: dice.choice([1, 2, 2, 2])]
        else:
            words.append(dice.choice(WORDS))
    return json.dumps([name, words]).encode()


def read_flags(path: Path) -> None:
    """Read a command line: the class of its settings, and the words."""
    from tinyllm_jax.training.start import find_folder

    name, words = json.loads(path.read_bytes())
    cls = getattr(settings_of, name)
    parser = Parser(prog="python -m x")
    parser.add_argument("--config")
    add_flags(parser, cls)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            arguments, settings, problems = parse_flags(parser, cls, words)
    except SystemExit as done:
        if done.code:
            raise
        return  # --help
    if cls is settings_of.Config:
        with contextlib.suppress(InputError):
            find_folder(arguments.config, settings)
        settings_of.load_config("tiny", settings, problems)
    else:
        build(cls, [("", settings)], problems)


# --- text and records ---

DOCUMENTS: list[Any] = [{"text": "Once upon a time."}, {"text": "é 😀", "n": [1, {"a": 2}]}]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RECORDS: list[Any] = [
    {"messages": TALK, "tools": [{"name": "f"}]},
    {"system": "Be kind", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "Say a", "input": "now", "output": "a", "history": [["x", "y"]]},
    {"prompt": "Say a", "chosen": "a", "rejected": "b"},
    {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No"}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "answer": 7, "words": ["a"]},
]  # fmt: skip
QUESTIONS: list[Any] = [
    {"goal": "Open it", "sol1": "Push", "sol2": "Pull", "label": 1},
    {"premise": "It rained.", "question": "cause", "choice1": "Wet", "choice2": "Dry", "label": "0"},
    {"question": {"stem": "What?", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]},
     "answerKey": "B"},
    {"question": "What?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"},
    {"question": "What?", "choices": ["a", "b"], "answer": 0, "subject": "x"},
    {"ctx_a": "A", "ctx_b": "b", "ctx": "A b", "activity_label": "C", "endings": ["c [d]", "e"], "label": "1"},
    {"question": "q", "support": "s", "distractor1": "a", "distractor2": "b", "distractor3": "c",
     "correct_answer": "d"},
    {"query": "Question: a\n", "choices": ["b", "c"], "gold": 0},
    {"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "x", "field": 3},
    {"messages": TALK}, {"text": "Once upon a time"},
]  # fmt: skip
PACKED = ("", "", "", ".gz", ".zst")


def pack(content: bytes, suffix: str, dice: random.Random) -> bytes:
    """Compress, and sometimes damage what comes out."""
    if suffix == ".gz":
        content = gzip.compress(content, 1)
    elif suffix == ".zst":
        content = zstandard.ZstdCompressor(level=1).compress(content)
    return damage.change_bytes(content, dice) if suffix and dice.random() < 0.5 else content


def records_in(
    records: list[Any], endings: tuple[str, ...]
) -> Callable[[Path, random.Random], Path]:
    """Make files of records, of any ending."""

    def make(folder: Path, dice: random.Random) -> Path:
        suffix = dice.choice(PACKED)
        path = folder / f"x{dice.choice(endings)}{suffix}"
        path.write_bytes(pack(damage.lines_of(records, dice), suffix, dice))
        return path

    return make


def read_documents(path: Path) -> None:
    """Read a corpus, first with broken records left out, then with none allowed."""
    for on_bad in ("skip", "error"):
        data = DataConfig(paths=(str(path),), on_bad_record=on_bad, document_separator="\n\n")
        parts = corpus.find_parts(data, part_bytes=100)
        for part in parts:
            for text in corpus.read_documents(part, data, corpus.Counts()):
                text.encode()


@cache
def chat_template() -> Any:
    from tinyllm_jax.data.chat_template import CONTROL_TOKENS, ChatTemplate
    from tinyllm_jax.data.tokenizer import extend_tokenizer

    return ChatTemplate(extend_tokenizer(small_tokenizers()["model"], CONTROL_TOKENS))


def read_chat(path: Path) -> None:
    """Read records as conversations, pairs and prompts, up to their tokens and hashes."""
    from tinyllm_jax.data.chat_sources import identity
    from tinyllm_jax.data.prepare import hash_of

    template, ways = chat_template(), Ways()
    for read in (chat.read_conversations, chat.read_preferences, chat.read_questions):
        for on_bad in ("skip", "error"):
            data = DataConfig(paths=(str(path),), on_bad_record=on_bad)
            counts = chat.ChatCounts()
            with ways.refused_or_read():
                for item in read(str(path), data=data, chat=ChatConfig(), counts=counts):
                    corpus.text_hash(identity(item), "split")
                    if isinstance(item, chat.Conversation):
                        template.encode(item.messages)
                    if isinstance(item, chat.Question):
                        template.encode_prompt(item.messages)
                        hash_of([item.answer, item.metadata])
    ways.end()


def read_evaluation(path: Path) -> None:
    """Read what can be scored, in every way that it can be asked for, up to its tokens."""
    from tinyllm_jax.evaluation import files, records

    ways = Ways()
    makers: dict[str, Any] = {"choices": records.question_of, "pairs": records.pair_of}
    for on_bad in ("skip", "error"):
        data = EvaluationDataConfig(paths=(str(path),), on_bad_record=on_bad)
        config = EvaluateConfig(data=data)
        for kind in ("auto", "choices", "pairs", "conversations", "corpus"):
            own = replace(config, evaluate=replace(config.evaluate, kind=kind))
            with ways.refused_or_read():
                for each in files.find_data_sets(own, say=lambda _: None):
                    maker = makers.get(each.kind) or files.conversation_reader(own)
                    if each.kind == "corpus":
                        for text in files.read_texts(each, own, corpus.Counts()):
                            text.encode()
                        continue
                    for made in files.read(each, own, corpus.Counts(), maker):
                        if isinstance(made, records.Question):
                            for choice in made.choices:
                                small_tokenizers()["model"].encode(made.prompt("") + choice)
                        if isinstance(made, records.Pair):
                            small_tokenizers()["model"].encode(made.good + made.bad)
                        str(made)
    ways.end()


# --- tokenizers ---

STORY = "Once upon a time there was a cat named {}. The cat liked to play with a red ball. "


@cache
def small_tokenizers() -> dict[str, Any]:
    """Train one of each kind, in moments."""
    from tinyllm_jax.data import bytelevel

    texts = [STORY.format(name) * 3 for name in ("Tom", "Sue", "Ben", "Zoë", "Max")]
    model = sentencepiece_bpe.train(
        texts, vocab_size=300, character_coverage=1.0, max_sentences=100
    )
    return {"model": model, "json": bytelevel.train(texts, vocab_size=290, min_frequency=1)}


def model_file(dice: random.Random) -> bytes:
    """Change a SentencePiece model: its bytes, or its parts as a protobuf."""
    content = small_tokenizers()["model"].to_bytes()
    if dice.random() < 0.5:
        return damage.change_bytes(content, dice)
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    for _ in range(dice.choice([1, 1, 3])):
        change_proto(proto, dice)
    return proto.SerializeToString()


def change_proto(proto: Any, dice: random.Random) -> None:
    """Change one part of a model so that it stays a protobuf."""
    numbers = [0, 1, -1, 2, 3, 259, 300, 2**31 - 1, -(2**31)]
    piece = proto.pieces[dice.randrange(len(proto.pieces))] if proto.pieces else None
    kind = dice.randrange(11)
    if kind == 0 and piece is not None:
        piece.piece = dice.choice(["", "\u2581", "a" * 5000, "<0x41>", "</s>", "\x00", "<unk>"])
    elif kind == 1 and piece is not None:
        piece.type = dice.choice([1, 2, 3, 4, 5, 6])
    elif kind == 2 and piece is not None:
        piece.score = dice.choice([float("nan"), float("inf"), -float("inf"), 1e38, 0.0])
    elif kind == 3:
        del proto.pieces[dice.choice([0, 0, 3, 100]) :]
    elif kind == 4:
        spec = proto.trainer_spec
        name = dice.choice(["bos_id", "eos_id", "unk_id", "pad_id", "vocab_size"])
        setattr(spec, name, dice.choice(numbers))
    elif kind == 5:
        proto.trainer_spec.model_type = dice.choice([1, 2, 3, 4])
    elif kind == 6:
        proto.trainer_spec.byte_fallback = dice.random() < 0.5
    elif kind == 7:
        size = dice.choice([1, 4, 8, 64, 5000])
        begin = dice.choice([b"", b"\x00\x00\x00\x00", b"\x04\x00\x00\x00", b"\xff\xff\xff\x7f"])
        proto.normalizer_spec.precompiled_charsmap = begin + dice.randbytes(size)
    elif kind == 8:
        spec = dice.choice([proto.normalizer_spec, proto.denormalizer_spec])
        spec.add_dummy_prefix = not spec.add_dummy_prefix
        spec.escape_whitespaces = dice.random() < 0.5
        spec.remove_extra_whitespaces = dice.random() < 0.5
    elif kind == 9:
        for name in ("bos_piece", "eos_piece", "unk_piece", "pad_piece"):
            if dice.random() < 0.5:
                setattr(proto.trainer_spec, name, dice.choice(["", "a", "<unk>", "x" * 100]))
    elif piece is not None:
        proto.pieces.add().CopyFrom(piece)


MODELS = (
    {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1, "</s>": 2}, "unk_token": "z"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["</s>", -1.0]], "byte_fallback": False},
    {"type": "WordPiece", "unk_token": "z", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0,
     "vocab": {"<s>": 0, "</s>": 1}},
    {"type": "BPE", "vocab": {"<s>": 4294967295, "</s>": 4294967294}, "merges": []},
)  # fmt: skip
STEPS = (
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
    {"type": "Precompiled", "precompiled_charsmap": "/////////w=="},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 1000},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": True},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": False},
    {"type": "Metaspace", "replacement": "ab", "add_prefix_space": True, "prepend_scheme": "x"},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
    {"type": "Prepend", "prepend": ""}, {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9},
    {"type": "Sequence", "normalizers": []}, {"type": "Sequence", "pretokenizers": []}, {"type": "Digits"},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}, {"type": "Fuse"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}, None,
)  # fmt: skip


def json_tokenizer(dice: random.Random) -> bytes:
    """Change a tokenizer.json."""
    table = json.loads(small_tokenizers()["json"].to_bytes())
    kind = dice.random()
    if kind < 0.2:
        return damage.change_bytes(json.dumps(table).encode(), dice)
    if kind < 0.35:
        table["model"] = dice.choice(MODELS)
    if kind < 0.6:
        place = dice.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor"])
        table[place] = dice.choice(STEPS)
        return json.dumps(table).encode()
    if kind < 0.7:
        table["added_tokens"] = [
            {**row, "id": dice.choice([row["id"], 2**32 - 1, 10**6, 0])}
            for row in table["added_tokens"]
        ]
        return json.dumps(table).encode()
    return damage.encode(damage.json_text(table, dice))


def read_tokenizer(path: Path) -> None:
    """Load a tokenizer, extend it, and take texts and ids there and back."""
    from tinyllm_jax.data.tokenizer import extend_tokenizer

    tokenizer = load_tokenizer(path)
    for text in ("", "Once upon a time", "é😀\x00\u2581\n  </s>", "a" * 300, "x" * 40):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert all(type(id) is int for id in ids)
        with contextlib.suppress(InputError):
            tokenizer.decode(ids)
    for id in [*range(0, tokenizer.vocab_size, max(tokenizer.vocab_size // 50, 1))]:
        tokenizer.token_text(id)
        tokenizer.decode([id])
    with contextlib.suppress(InputError):
        extend_tokenizer(tokenizer, ("<|im_start|>", "<|im_end|>", "<new>"))


# --- parquet ---


@cache
def parquet_file() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    table = pa.table({"text": [STORY.format(n) for n in range(20)], "label": list(range(20))})
    pq.write_table(table, out, row_group_size=10)
    return out.getvalue()


def read_parquet(path: Path) -> None:
    read_documents(path)
    read_evaluation(path)


# --- what runs leave behind ---

METRICS: list[Any] = [
    {"kind": "train", "step": 1, "loss": 4.5, "learning_rate": 1e-3, "grad_norm": 1.5, "targets": 64},
    {"kind": "eval", "step": 2, "loss": 4.0, "perplexity": 54.0, "bits_per_byte": 2.5, "above_floor_share": 0.5},
    {"kind": "speed", "step": 2, "tokens_per_second": 900.0, "time": 1.7e9, "mfu": 0.1},
    {"kind": "sample", "step": 2, "text": "Once", "prompt": "O"},
    {"kind": "warning", "step": 2, "text": "loss went up"},
    {"kind": "rewind", "step": 1, "number": 1, "batches": "1-2", "text": "x", "first_step": 2, "last_step": 3},
    {"kind": "monitor", "step": 2, "gradient_norm": {"layers.0": 1.0, "embed_tokens": 2.0}},
    {"kind": "rollout", "step": 2, "reward": 0.5, "kl_weight": 0.1},
]  # fmt: skip
STATS: dict[str, Any] = {
    "files": [{"path": "x", "documents_read": 3, "tokens": 9, "text_bytes": 30}],
    "splits": {"train": {"documents": 3, "tokens": 9}, "validation": {"documents": 1, "tokens": 3}},
    "settings": {}, "vocab_size": 300, "tokenizer_hash": "a", "dataset_hash": "b",
}  # fmt: skip
STARTS: dict[str, Any] = {
    "starts": [
        {"time": 1.6e9, "step": 0, "command": "x", "versions": {"jax": "1"}, "preset": "tiny"}
    ]
}


def run_folder(folder: Path, dice: random.Random) -> Path:
    """Make a run folder of which one file is broken."""
    run, which = folder / "run", dice.choice(["metrics", "metrics", "config", "stats", "starts"])
    other = folder / "other"
    run.mkdir(exist_ok=True)
    other.mkdir(exist_ok=True)
    table = settings_of.config_to_table(settings_of.Config())
    lines = "".join(json.dumps(row) + "\n" for row in METRICS).encode()
    contents = {
        "metrics.jsonl": damage.lines_of(METRICS, dice) + b"\n" if which == "metrics" else lines,
        "training_config_snapshot.json": broken_json(table, dice, which == "config"),
        "dataset_stats.json": broken_json(STATS, dice, which == "stats"),
        "environment.json": broken_json(STARTS, dice, which == "starts"),
    }
    for name, content in contents.items():
        (run / name).write_bytes(content)
    (other / "training_config_snapshot.json").write_text(json.dumps(table))
    (other / "metrics.jsonl").write_bytes(lines)
    return run


def broken_json(table: Any, dice: random.Random, is_broken: bool) -> bytes:
    if not is_broken:
        return json.dumps(table).encode()
    content = damage.encode(damage.json_text(table, dice))
    return damage.change_bytes(content, dice) if dice.random() < 0.2 else content


def read_run_folder(path: Path) -> None:
    """Write the report of a run and compare it, and open its metrics as a resumed run does."""
    from tinyllm_jax.training.metrics import MetricsFile
    from tinyllm_jax.training.report import report_of
    from tinyllm_jax.training.reports.compare import comparison_of
    from tinyllm_jax.training.reports.run import read_run

    ways = Ways()
    with ways.refused_or_read():
        found = read_run(path)
        report_of(found, goes_on=False, now=1.8e9)
        other = path.with_name("other")
        comparison_of([path, other], [found, read_run(other)], now=1.8e9)
    with ways.refused_or_read(), MetricsFile(path / "metrics.jsonl", resume_step=2) as metrics:
        metrics.write([{"kind": "train", "step": 3}])
    ways.end()


@cache
def prepared() -> tuple[DataConfig, dict[str, bytes]]:
    """Prepare a small corpus once, and keep its files."""
    import tempfile

    from tinyllm_jax.data import prepare

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.jsonl").write_text(
            "".join(json.dumps({"text": STORY.format(n)}) + "\n" for n in range(60))
        )
        before = os.environ.get("TINYLLM_DATA_DIR")
        os.environ["TINYLLM_DATA_DIR"] = folder
        try:
            data = DataConfig(
                paths=(f"{folder}/x.jsonl",), sequence_length=16, validation_fraction=0.2
            )
            config = settings_of.Config(data=data)
            tokenizer = small_tokenizers()["model"]
            made = prepare.prepare(config, progress=False, tokenizer=tokenizer)
            return data, {path.name: path.read_bytes() for path in made.folder.iterdir()}
        finally:
            os.environ.pop("TINYLLM_DATA_DIR")
            if before is not None:
                os.environ["TINYLLM_DATA_DIR"] = before


def prepared_folder(folder: Path, dice: random.Random) -> Path:
    """Make a set of shards of which one file is broken."""
    from tinyllm_jax.data.prepare import hash_of

    path = folder / "set"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    files = dict(prepared()[1])
    name = dice.choice(["manifest.json", dice.choice(sorted(files))])
    if name == "manifest.json" and dice.random() < 0.8:
        table = json.loads(files[name])
        table.pop("checksum", None)
        for _ in range(dice.choice([1, 1, 3])):
            damage.change_somewhere(table, dice)  # marks stay, as texts
        if dice.random() < 0.7:
            table["checksum"] = hash_of(table)
        files[name] = json.dumps(table).encode()
    else:
        files[name] = damage.change_bytes(files[name], dice)
    for each, content in files.items():
        (path / each).write_bytes(content)
    return path


def read_prepared(path: Path) -> None:
    """Open a set as training does, and read a row of each shard."""
    from tinyllm_jax.data.prepare import open_prepared

    opened = open_prepared(path, prepared()[0], left_out_files=[])
    json.dumps(opened.stats)
    for split in (opened.train, opened.validation):
        for shard in split.shards:
            shard.tokens[:1].sum()
    opened.verify()


# --- models ---


@cache
def model_files() -> dict[str, Any]:
    """Write one small model in every format; folders are kept as {path: bytes}."""
    import tempfile

    from convert_cases import llama2c_checkpoint, random_bundle, with_training
    from llama_oracle import SMALL, changed

    import convert

    sized = changed(
        SMALL, vocab_size=300, rope_theta=10000.0, rms_norm_eps=1e-5, max_position_embeddings=16
    )
    bundle = with_training(random_bundle(sized, tokenizer=small_tokenizers()["model"]))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        targets = {"x.pt": "torch", "x.safetensors": None, "x.bin": None, "x.gguf": None, "hf": "hf",
                   "run": "orbax", "step": "safetensors"}  # fmt: skip
        for target, to in targets.items():
            with contextlib.suppress(InputError):
                convert.write(bundle, folder / target, **({"to": to} if to else {}))
        import torch

        torch.save(llama2c_checkpoint(random_bundle()), folder / "ckpt.pt")
        for path in folder.iterdir():
            if path.is_file():
                found[path.name] = path.read_bytes()
            else:
                found[path.name] = {
                    str(each.relative_to(path)): each.read_bytes()
                    for each in path.rglob("*")
                    if each.is_file() and not each.is_symlink()
                }
    return found


class Payload:
    """A pickle of this runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pickle_was_run",)


def model_file_of(name: str) -> Callable[[Path, random.Random], Path]:
    """Make damaged files of one format."""

    def make(folder: Path, dice: random.Random) -> Path:
        path = folder / name
        content = model_files()[name]
        if name == "x.safetensors" and dice.random() < 0.5:
            length = int.from_bytes(content[:8], "little")
            header = damage.encode(damage.json_text(json.loads(content[8 : 8 + length]), dice))
            size = dice.choice([len(header), len(header), 2**63, 2**40, 0, len(content)])
            content = size.to_bytes(8, "little") + header + content[8 + length :]
        elif name.endswith(".pt") and dice.random() < 0.1:
            import pickle

            content = pickle.dumps({"model": Payload()}, protocol=dice.choice([0, 2, 4]))
        else:
            content = damage.change_bytes(content, dice)
        path.write_bytes(content)
        return path

    return make


def model_folder_of(name: str, sums: str) -> Callable[[Path, random.Random], Path]:
    """Make folders of which one file is damaged; its checksum may be right all the same."""

    def make(folder: Path, dice: random.Random) -> Path:
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        files = dict(model_files()[name])
        texts = sorted(each for each in files if each.endswith(".json"))
        each = dice.choice([*texts, *texts, dice.choice(sorted(files))])
        if each.endswith(".json") and dice.random() < 0.8:
            with contextlib.suppress(ValueError):
                files[each] = damage.encode(damage.json_text(json.loads(files[each]), dice))
        elif dice.random() < 0.2:
            files.pop(each)
        else:
            files[each] = damage.change_bytes(files[each], dice)
        for each_name, content in files.items():
            (path / each_name).parent.mkdir(parents=True, exist_ok=True)
            (path / each_name).write_bytes(content)
        if not each.endswith(sums) and dice.random() < 0.8:
            for written in path.rglob(sums):
                below = written.parent
                written.write_text(json.dumps({
                    str(file.relative_to(below)): sha256_of_file(file)
                    for file in below.rglob("*") if file.is_file() and file.name != sums
                }))  # fmt: skip
        return path

    return make


def read_model(path: Path) -> None:
    import convert

    convert.read(path, say=lambda _: None)


def read_step_folder(path: Path) -> None:
    """Read a run as `--resume` and `generate` do."""
    from tinyllm_jax.training.checkpoint import open_checkpoint

    open_checkpoint(path, on_damaged=lambda _: None)


REWARDS = (
    *("os:system", "os:nothing", "x", ":", "a:", ":b", "..x:y", "json:loads:x", "no.such.module:f", "\x00:f"),
    *("tinyllm_jax.objectives.rewards:LARGEST", "math:inf", "é:ü", "a b:c", "own_exits:f", "own_raises:f"),
    *("own:slow", "own:text", "own:nan", "own:huge", "own:none", "own:raises", "own:exits", "own:deep"),
    *("x" * 5000 + ":f", "json:" + "y" * 5000, "a/b:c", "own:__dict__", "own:__class__", "\ud800:f", "own:odd"),
)  # fmt: skip
OWN_MODULE = """
def text(*_): return "much"
def nan(*_): return float("nan")
def huge(*_): return 10 ** 400
def none(*_): return None
def raises(*_): raise KeyError("a\\nb")
def exits(*_): raise SystemExit(0)
def deep(*_): return deep()
def slow(*_): return 1
class Odd(Exception):
    def __str__(self): raise ValueError
def odd(*_): raise Odd
"""


def reward_names(folder: Path, dice: random.Random) -> Path:
    (folder / "own.py").write_text(OWN_MODULE)
    (folder / "own_exits.py").write_text("raise SystemExit(0)")
    (folder / "own_raises.py").write_text("1 / 0")
    (folder / "name").write_bytes(damage.encode(dice.choice(REWARDS)))
    return folder / "name"


def read_reward(path: Path) -> None:
    """Name a reward function as settings do, and let it judge an answer."""
    import sys

    import numpy as np

    from tinyllm_jax.data.chat import Message
    from tinyllm_jax.data.prepare_prompts import Prompt
    from tinyllm_jax.objectives.rewards import Answers, load_reward_function

    before = list(sys.path)
    sys.path.insert(0, str(path.parent))
    for name in ("own", "own_exits", "own_raises"):
        sys.modules.pop(name, None)
    try:
        judge = load_reward_function(path.read_bytes().decode("utf-8", "surrogatepass"))
        prompt = Prompt(np.zeros(2, np.int32), (Message("user", "Hi"),), "", {"words": ["a"]})
        rows = np.zeros((1, 2), np.int32)
        judge(Answers([prompt], ["Hello"], np.array([True]), rows, rows, rows.astype(bool)))
    finally:
        sys.path[:] = before


KINDS: dict[str, Kind] = {
    "settings (TOML)": Kind(in_file("x.toml", lambda dice: damage.toml_text(keys(), dice)), read_toml),
    "flags": Kind(in_file("words", flags), read_flags),
    "documents": Kind(
        records_in(DOCUMENTS, (".jsonl", ".jsonl", ".ndjson", ".json", ".txt")), read_documents
    ),
    "conversations": Kind(records_in(RECORDS, (".jsonl", ".json")), read_chat),
    "evaluation": Kind(records_in(QUESTIONS, (".jsonl", ".json")), read_evaluation),
    "run folder": Kind(run_folder, read_run_folder),
    "reward names": Kind(reward_names, read_reward),
    "prepared data": Kind(prepared_folder, read_prepared),
    "SentencePiece": Kind(in_file("tokenizer.model", model_file), read_tokenizer, foreign=True),
    "tokenizer.json": Kind(in_file("tokenizer.json", json_tokenizer), read_tokenizer, foreign=True),
    "parquet": Kind(
        in_file("x.parquet", lambda dice: damage.change_bytes(parquet_file(), dice)), read_parquet,
        foreign=True,
        # Arrow believes the size that a page says it has, which the format bounds at 2 GiB.
        memory=2400 << 20,
    ),
    "safetensors": Kind(model_file_of("x.safetensors"), read_model, foreign=True),
    "llama2.c .bin": Kind(model_file_of("x.bin"), read_model, foreign=True),
    "llama2.c .pt": Kind(model_file_of("ckpt.pt"), read_model, foreign=True, libraries=("torch",)),
    "own .pt": Kind(model_file_of("x.pt"), read_model, foreign=True, libraries=("torch",)),
    "GGUF": Kind(model_file_of("x.gguf"), read_model, foreign=True, libraries=("gguf",)),
    "Hugging Face folder": Kind(
        model_folder_of("hf", "checksums.json"), read_model, foreign=True
    ),
    "step folder": Kind(
        model_folder_of("step", "checksums.json"), read_model, foreign=True
    ),
    "checkpoint": Kind(
        model_folder_of("run", "checksums.json"), read_step_folder, foreign=True
    ),
}  # fmt: skip
