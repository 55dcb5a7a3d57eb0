"""Settings of the commands that use a trained model: generate, serve, chat and evaluate."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tinyllm_jax.config.data import ChatConfig, DataConfig
from tinyllm_jax.config.serving import EngineConfig, SamplingConfig, ServerConfig
from tinyllm_jax.settings import setting


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `generate`: those of sampling, by themselves."""

    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken: there are none."""
        return []


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `serve`."""

    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken."""
        found = [
            f"sampling.{name} says nothing to a server: {why}. Leave it out."
            for name, why in (
                ("prompt", "each request brings its own"),
                ("slide", "an answer ends where the context is full"),
            )
            if getattr(self.sampling, name) != getattr(SamplingConfig, name)
        ]
        if self.sampling.num_samples > self.server.max_choices:
            found.append(
                f"sampling.num_samples={self.sampling.num_samples} is more than server.max_choices="
                f"{self.server.max_choices}. Use {self.server.max_choices} or less, or raise the other."
            )
        slots, replicas = self.engine.slots, self.engine.replicas
        if replicas and slots % replicas:
            more = slots + replicas - slots % replicas
            found.append(
                f"engine.slots={slots} is no multiple of engine.replicas={replicas}. Use --engine.slots "
                f"{more} or another."
            )
        return found


def same_setting(section: type, name: str, **changed: Any) -> Any:
    """Declare a setting of another section once more, with another default or help."""
    field = section.__dataclass_fields__[name]
    default = changed.pop("default", field.default)
    return dataclasses.field(default=default, metadata={**field.metadata, **changed})


@dataclass(frozen=True)
class TerminalConfig:
    """A talk in a terminal."""

    system: str = setting("", "system prompt of the conversation; empty is none", flag="--system")
    history: str = setting(
        "",
        "file that keeps what was typed, for the next time; empty keeps it until the end alone",
        flag="--history",
    )
    weights: str = same_setting(EngineConfig, "weights")


@dataclass(frozen=True)
class TalkSamplingConfig:
    """What of `SamplingConfig` can be set in a talk."""

    max_new_tokens: int = same_setting(SamplingConfig, "max_new_tokens", help="longest answer")
    temperature: float = same_setting(SamplingConfig, "temperature")
    top_k: int = same_setting(SamplingConfig, "top_k")
    top_p: float = same_setting(SamplingConfig, "top_p")
    repetition_penalty: float = same_setting(SamplingConfig, "repetition_penalty")
    greedy: bool = same_setting(SamplingConfig, "greedy")
    seed: int = same_setting(SamplingConfig, "seed", flag="--seed")


@dataclass(frozen=True)
class TalkConfig:
    """Settings of `chat`."""

    terminal: TerminalConfig = dataclasses.field(default_factory=TerminalConfig)
    sampling: TalkSamplingConfig = dataclasses.field(default_factory=TalkSamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken: there are none."""
        return []

    @property
    def for_service(self) -> SamplingConfig:
        """Give the settings of sampling in the form that a model takes."""
        return SamplingConfig(**vars(self.sampling))


@dataclass(frozen=True)
class EvaluationDataConfig:
    """Which text is looked at; a part of `DataConfig`, since nothing is split or stored."""

    paths: tuple[str, ...] = setting(
        (),
        "what to score: toy (built-in stories), tinystories (downloaded), or files, folders and globs "
        "of parquet, JSONL or text, each also .gz or .zst",
        flag="--data",
    )
    text_field: str = same_setting(DataConfig, "text_field")
    document_separator: str = same_setting(DataConfig, "document_separator")
    min_document_characters: int = same_setting(DataConfig, "min_document_characters", default=1)
    on_bad_record: str = same_setting(DataConfig, "on_bad_record")
    toy_documents: int = same_setting(DataConfig, "toy_documents", default=300, minimum=1)
    toy_seed: int = same_setting(
        DataConfig,
        "toy_seed",
        default=1,
        help="toy: seed of the stories; that of training is 0, unless it was set",
    )
    download_source: str = same_setting(DataConfig, "download_source")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and how texts become windows."""

    kind: str = setting(
        "auto",
        "what the files hold: documents (corpus), conversations, questions with answers to choose "
        "from (choices), good and bad sentences (pairs), or what the first record shows (auto)",
        choices=("auto", "corpus", "conversations", "choices", "pairs"),
    )
    prompt: str = setting(
        "",
        "choices: what stands before each answer, with {question} for the question and \\n for a new "
        "line; empty is what is usual for the fields of the record",
    )
    chat: bool = setting(
        False,
        "choices and stories: ask as a user, and score or write what the assistant says; for models "
        "of --mode sft and on",
        flag="--chat",
    )
    max_documents: int = setting(
        0,
        "documents, questions or pairs taken of each corpus or file, from its beginning; 0 is all",
        minimum=0,
        flag="--max-documents",
    )
    stories: int = setting(
        0, "stories to let the model write and measure", minimum=0, flag="--stories"
    )
    context: int = setting(
        0, "tokens that are read at once; 0 is the model's whole context", unit="tokens", minimum=0
    )
    overlap: int = setting(
        -1,
        "tokens that a later window of a long document reads again; -1 is half the context",
        unit="tokens",
        minimum=-1,
    )
    compute_dtype: str = setting(
        "float32",
        "arithmetic: float32, whatever the model was trained in, or what its settings say (model)",
        choices=("float32", "model"),
    )
    batch_size: int = setting(8, "rows of a context that are read together", minimum=1)
    out: str = setting("", "file for every number, as JSON", flag="--out")


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `evaluate`."""

    evaluate: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    data: EvaluationDataConfig = dataclasses.field(default_factory=EvaluationDataConfig)
    chat: ChatConfig = dataclasses.field(default_factory=ChatConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def problems(self) -> list[str]:
        """List every rule between settings that is broken."""
        found, evaluate = [], self.evaluate
        if not self.data.paths and not evaluate.stories:
            found.append(
                "--data is missing. Name files or folders to score (--data toy is the built-in "
                "stories), or let the model write with --stories 20."
            )
        if evaluate.prompt and "{question}" not in evaluate.prompt:
            found.append(
                f"evaluate.prompt={evaluate.prompt!r} has no {{question}}. Use, for example, "
                "--evaluate.prompt 'Question: {question}\\nAnswer:'."
            )
        if evaluate.prompt and evaluate.chat:
            found.append(
                "evaluate.prompt does nothing with --chat, where the question is the user's turn. "
                "Leave one of them out."
            )
        if self.sampling.num_samples != 1:
            found.append(
                f"sampling.num_samples={self.sampling.num_samples} does nothing here. Use --stories "
                f"{self.sampling.num_samples}."
            )
        if 0 < evaluate.context <= evaluate.overlap:
            found.append(
                f"evaluate.overlap={evaluate.overlap} leaves nothing to predict with "
                f"evaluate.context={evaluate.context}. Use {evaluate.context - 1} or less."
            )
        return found

    @property
    def documents(self) -> DataConfig:
        """Give the settings of reading text, in the form that `data` reads them in."""
        return DataConfig(**vars(self.data))
