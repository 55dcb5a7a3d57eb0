"""Settings of the text: the tokenizer, the files and rows, and conversations."""

from dataclasses import dataclass

from tinyllm_jax.settings import setting


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens. The vocabulary size is `model.vocab_size`."""

    kind: str = setting(
        "sentencepiece",
        "sentencepiece: BPE with byte fallback; bytelevel: byte-level BPE with NFKC",
        choices=("sentencepiece", "bytelevel"),
    )
    path: str = setting(
        "", "a tokenizer to use as it is (tokenizer.model or tokenizer.json) instead of training"
    )
    retrain: bool = setting(
        False,
        "train the tokenizer again although one for this data exists",
        flag="--retrain-tokenizer",
    )
    character_coverage: float = setting(
        0.9995,
        "sentencepiece: share of characters that get a token of their own; the rest fall back to "
        "bytes",
        minimum=0.98,
        maximum=1.0,
    )
    max_sentences: int = setting(
        10_000_000, "sentencepiece: lines sampled for training", unit="lines", minimum=1
    )
    min_frequency: int = setting(
        2, "bytelevel: a pair is merged when seen this often", unit="times", minimum=1
    )
    max_sample_bytes: int = setting(
        200_000_000,
        "text to train on; larger corpora are sampled evenly by document; sentencepiece needs about "
        "three times as much memory",
        unit="bytes",
        minimum=1000,
    )


@dataclass(frozen=True)
class DataConfig:
    """Which text, how it is split, and how it becomes rows of tokens."""

    paths: tuple[str, ...] = setting(
        ("toy",),
        "toy (built-in stories), tinystories (downloaded), or files, folders and globs of "
        "parquet, JSONL or text, each also .gz or .zst",
        flag="--data",
    )
    validation_paths: tuple[str, ...] = setting(
        (), "validation text from files of its own; else train-*/validation-* names, else a split"
    )
    validation_fraction: float = setting(
        0.01,
        "share of documents held out, by a hash of their text, or of a conversation's first user turn, "
        "where no validation files exist",
        above=0.0,
        maximum=0.5,
    )
    text_field: str = setting("text", "parquet column or JSONL field that holds the document")
    document_separator: str = setting(
        "<|endoftext|>", "what stands between documents of a plain text file"
    )
    min_document_characters: int = setting(
        11,
        "documents whose stripped text is shorter are left out and counted",
        unit="characters",
        minimum=1,
    )
    on_bad_record: str = setting(
        "error",
        "a broken record stops with its line number (error) or is left out and counted (skip)",
        choices=("error", "skip"),
    )
    packing: str = setting(
        "auto",
        "stream: one token stream cut at random windows; padded: one document a row; packed: "
        "whole documents share a row and never attend to each other; auto: stream for pretraining, "
        "packed for conversations",
        choices=("auto", "stream", "padded", "packed"),
    )
    sequence_length: int = setting(
        256, "tokens of one row that the model reads", unit="tokens", minimum=1
    )
    long_documents: str = setting(
        "split",
        "padded and packed rows: a document longer than a row goes on in the next row (split) or "
        "is cut there and the cut tokens counted (truncate)",
        choices=("split", "truncate"),
    )
    toy_documents: int = setting(
        30_000, "toy: stories to make", unit="documents", minimum=100, maximum=100_000_000
    )
    toy_seed: int = setting(0, "toy: seed of the stories", minimum=0)
    download_source: str = setting(
        "huggingface",
        "tinystories: from roneneldan/TinyStories on Hugging Face or AI-ModelScope/TinyStories on "
        "ModelScope",
        choices=("huggingface", "modelscope"),
    )
    workers: int = setting(
        0, "processes that prepare text; 0 is one for each core", unit="processes", minimum=0
    )
    runner: str = setting(
        "local",
        "where text is prepared: on this machine's cores (local), or on the machines of a Ray "
        "cluster that share its disk (ray)",
        choices=("local", "ray"),
    )
    ray_address: str = setting(
        "auto",
        "runner ray: HOST:PORT of the cluster, the one that this machine belongs to (auto), or one of "
        "this machine's own cores for as long as it takes (local)",
    )


@dataclass(frozen=True)
class ChatConfig:
    """Which shape conversations have in their files, and what is put into them."""

    format: str = setting(
        "auto",
        "shape of conversations: messages (role, content), sharegpt (`conversations` of from, value), "
        "alpaca (instruction, input, output), or the one that the fields of each record show (auto)",
        choices=("auto", "messages", "sharegpt", "alpaca"),
    )
    system: str = setting(
        "", "system prompt of conversations that have none of their own; empty leaves them without"
    )
