"""`python -m tinyllm_jax.chat`: in a terminal, and through pipes."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Command
from serving import chat_model
from typing_at import Typist

from tinyllm_jax import chat
from tinyllm_jax.config import EngineConfig, SamplingConfig, TalkConfig
from tinyllm_jax.data.chat import Message
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference import language_model
from tinyllm_jax.inference.language_model import LanguageModel
from tinyllm_jax.inference.service import Service
from tinyllm_jax.inference.talk import Talk
from tinyllm_jax.inference.talk_commands import Commands
from tinyllm_jax.inference.terminal import Terminal, WordWrap
from tinyllm_jax.settings import setting_fields

SHORT = SamplingConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def base_model(trained_run: Path) -> LanguageModel:
    return language_model.load(str(trained_run))


@pytest.fixture(scope="module")
def services(base_model: LanguageModel) -> Iterator[dict[str, Service]]:
    """Give a service that chats, with random weights, and one that has read no conversations."""
    models = {"chat": chat_model(base_model, context=160), "base": base_model}
    found = {name: Service(model, EngineConfig(slots=1, queue=0)) for name, model in models.items()}
    for service in found.values():
        service.start()
    yield found
    for service in found.values():
        service.stop()


@pytest.fixture
def talk(services: dict[str, Service]) -> Talk:
    return Talk(services["chat"], system="", sampling=SHORT)


@pytest.fixture
def text(services: dict[str, Service]) -> Talk:
    return Talk(services["base"], system="", sampling=SHORT)


def whole(answer: Any) -> str:
    return "".join(answer)


# The conversation ---------------------------------------------------------------------------------


def test_a_conversation_grows_by_question_and_answer(talk: Talk) -> None:
    first = whole(talk.ask("Hello"))
    second = whole(talk.ask("Again"))
    roles = ["user", "assistant"] * 2
    said = ["Hello", first, "Again", second]
    assert talk.turns == [Message(*each) for each in zip(roles, said, strict=True)]
    assert talk.ask("More").left_out == 0


def test_a_text_is_gone_on_with_and_each_stands_by_itself(text: Talk, base_model: Any) -> None:
    text.sampling = dataclasses.replace(SHORT, greedy=True)
    assert ["Once" + whole(text.ask("Once"))] == base_model.generate(
        ["Once"], greedy=True, max_new_tokens=8
    )
    assert text.turns[0].content == "Once"
    before = "".join(turn.content for turn in text.turns)
    more = whole(text.go_on())
    assert [turn.content for turn in text.turns] == [before, more]
    whole(text.ask("The dog"))
    assert text.turns[0].content == "The dog"


def test_a_retry_draws_anew_and_forgets_the_answer_before(talk: Talk) -> None:
    whole(talk.ask("Hello"))
    first = whole(talk.ask("Again"))
    second = whole(talk.retry())
    assert second != first
    assert len(talk.turns) == 4
    assert talk.turns[-1].content == second


def test_a_retry_that_is_refused_leaves_what_was_said(talk: Talk) -> None:
    whole(talk.ask("Hello"))
    said = [*talk.turns]
    talk.system = "word " * 300
    with pytest.raises(InputError, match="room"):
        talk.retry()
    assert talk.turns == said
    talk.system = ""
    whole(talk.retry())
    assert talk.turns[0] == said[0]
    assert len(talk.turns) == 2


def test_the_same_talk_is_the_same_again(talk: Talk, services: dict[str, Service]) -> None:
    again = Talk(services["chat"], system="", sampling=SHORT)
    for each in (talk, again):
        whole(each.ask("Hello"))
        whole(each.retry())
        whole(each.ask("Again"))
    assert talk.turns == again.turns


def test_the_oldest_turns_are_left_out_and_the_last_never(talk: Talk) -> None:
    room = talk.service.context - SHORT.max_new_tokens
    for n in range(8):
        answer = talk.ask(f"{n} is a number.")
        whole(answer)
    assert answer.left_out > 0
    assert answer.left_out % 2 == 0
    kept = talk.turns[:-2][answer.left_out :]
    tried = Talk(talk.service, system="", sampling=SHORT)
    tried.turns = kept
    last = "7 is a number."
    assert tried._fitting([*kept, Message("user", last)])[1] == 0  # these fit,
    one_more = talk.turns[:-2][answer.left_out - 2 :]
    asked, _ = talk._fitting([Message("user", last)])
    long = tried._fitting([*one_more, Message("user", last)])
    assert long[1] == 2  # and no more of them do
    assert len(asked.ids) < room
    assert len(talk.turns) == 16  # what was said is kept
    with pytest.raises(InputError, match="160"):
        talk.ask("word " * 200)
    assert len(talk.turns) == 16


def test_a_cancelled_answer_keeps_what_came(talk: Talk) -> None:
    talk.sampling = dataclasses.replace(SHORT, max_new_tokens=100)
    answer = talk.ask("Hello")
    for _ in answer:
        answer.cancel()
    assert answer.ended == "cancelled"
    assert 0 < answer.new_tokens < 100
    assert talk.turns[-1].content == answer.text


# Commands -----------------------------------------------------------------------------------------


@pytest.fixture
def commands(talk: Talk) -> Any:
    """Give the commands, and what they told, a list of texts."""
    told: list[str] = []
    return SimpleNamespace(run=Commands(talk, note=told.append).run, told=told)


def test_settings_are_set_and_shown(talk: Talk, commands: Any) -> None:
    commands.run("/set temperature 0.5")
    commands.run("/set top_k=7")
    commands.run("/set greedy true")
    sampling = talk.sampling
    assert (sampling.temperature, sampling.top_k, sampling.greedy) == (0.5, 7, True)
    assert sampling.max_new_tokens == 8
    commands.run("/system Be kind.")
    commands.run("/show")
    assert "temperature = 0.5" in commands.told[-1]
    assert "'Be kind.'" in commands.told[-1]
    commands.run("/set greedy false")
    whole(talk.ask("Hello"))
    assert talk.messages()[0] == Message("system", "Be kind.")
    used = talk.used_tokens()
    commands.run("/show")
    assert f"{len(talk.turns)} turns: {used} of the 160 tokens" in commands.told[-1]
    commands.run("/reset")
    assert talk.turns == []
    for name in ("/help", "/quit"):
        commands.run(name)
    assert "/set NAME VALUE" in commands.told[-1]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/quti", "no such command. Did you mean '/quit'?"),
        ("/set", "takes a name and a value"),
        ("/set temprature 1", "Did you mean 'temperature'?"),
        ("/set temperature -1", "is too small. Use 0.0 or more"),
        ("/set temperature hot", "does not fit. Give a number"),
        ("/set prompt A", "no such setting"),
        ("/retry", "nothing was asked yet"),
        ("/save", "needs the name of a file"),
        ("/save new.txt", "nothing was said yet"),
        ("/help me", "takes nothing after it"),
    ],
)
def test_a_wrong_command_says_what_to_type(line: str, told: str, commands: Any) -> None:
    with pytest.raises(InputError) as caught:
        commands.run(line)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_said_is_saved_and_nothing_overwritten(
    talk: Talk, commands: Any, tmp_path: Path
) -> None:
    talk.system = "Be kind."
    said = whole(talk.ask("Hello"))
    commands.run(f"/save {tmp_path / 'talk.jsonl'}")
    record = json.loads((tmp_path / "talk.jsonl").read_text())
    turns = [("system", "Be kind."), ("user", "Hello"), ("assistant", said)]
    assert [(each["role"], each["content"]) for each in record["messages"]] == turns
    commands.run(f"/save {tmp_path / 'talk.txt'}")
    whole(talk.ask("Again"))
    commands.run(f"/save {tmp_path / 'talk.txt'}")  # one's own may be written again
    assert (tmp_path / "talk.txt").read_text().startswith("system: Be kind.\n\nuser: Hello\n\n")
    (tmp_path / "other.txt").write_text("dear")
    for name, problem in (("other.txt", "already"), ("other.txt/talk.txt", "other.txt/talk.txt: ")):
        with pytest.raises(InputError, match=problem):
            commands.run(f"/save {tmp_path / name}")
    assert (tmp_path / "other.txt").read_text() == "dear"


def test_lines_are_broken_between_words_however_the_text_comes() -> None:
    text = "Once upon a time\nthere  was averyveryverylongword, and a  \n\n cat."
    found = set()
    for size in (1, 2, 3, 100):
        wrap = WordWrap(10)
        pieces = [wrap.push(text[n : n + size]) for n in range(0, len(text), size)]
        found.add("".join(pieces) + wrap.finish())
    assert found == {"Once upon\na time\nthere  was\naveryveryverylongword,\nand a  \n\n cat."}


def test_a_terminal_is_not_steered_by_what_a_model_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(commands=[], history="")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.write("red\x1b[31m \x07bell\x9b2J\tTab\n")
    assert capsys.readouterr().out == "red␛[31m ␇bell\N{REPLACEMENT CHARACTER}2J\tTab\n"


# The program --------------------------------------------------------------------------------------

PROGRAM = [sys.executable, str(ROOT / "tests" / "chat_program.py")]


@pytest.fixture
def typist(command: Command, trained_run: Path, tmp_path: Path) -> Iterator[Typist]:
    """Start the program with a model that chats and never ends by itself, on a terminal."""
    words = [*PROGRAM, "--checkpoint", str(trained_run), "--max-new-tokens", "6"]
    found = Typist(words, cwd=tmp_path, environment=command.options["env"])  # type: ignore[arg-type]
    yield found
    found.close()


@pytest.mark.slow
def test_a_talk_in_a_terminal(typist: Typist) -> None:
    said = typist.wait_for(r"/help lists the commands; Ctrl-D leaves\.")
    assert "read no conversations" not in said
    typist.wait_for(">")
    typist.type("Hello\r")
    typist.wait_for(r"\(Cut at 6 tokens\. /set max_new_tokens 12 allows more\.\)")
    typist.wait_for(">")
    typist.type("/set max_new_tokens 100000\r")
    typist.wait_for("max_new_tokens = 100000")
    typist.wait_for(">")
    # Ctrl-C ends the answer and not the program; at the prompt it ends nothing.
    typist.type("A long one\r")
    typist.wait_for("A long one\n[^\n]*\\w")
    typist.type("\x03")
    typist.wait_for(r"\(Stopped\.\)")
    typist.wait_for(">")
    typist.type("\x03")
    typist.wait_for(r"Ctrl-D leaves\.")
    typist.wait_for(">")
    # The line that was typed before comes back, and the cursor moves in it.
    typist.type("/set seed 12\r")
    typist.wait_for("seed = 12")
    typist.wait_for(">")
    typist.type("\x1b[A\x7f3\r")
    typist.wait_for("seed = 13")
    typist.wait_for(">")
    typist.type("/qui\t\r")
    assert typist.end() == 0
    assert "Traceback" not in typist.screen


@pytest.mark.slow
def test_ctrl_d_leaves_and_stdout_holds_the_talk_alone(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    words = [*PROGRAM, "--checkpoint", str(trained_run), "--max-new-tokens", "6"]
    with (tmp_path / "talk.txt").open("wb") as stdout:
        typist = Typist(words, cwd=tmp_path, environment=command.options["env"], stdout=stdout)  # type: ignore[arg-type]
        typist.wait_for("leaves.")
        typist.wait_for(">")
        typist.type("Hello\r")
        typist.wait_for("Cut at 6")
        typist.wait_for(">")
        typist.type("\x04")
        assert typist.end() == 0
        typist.close()
    told = (tmp_path / "talk.txt").read_text(errors="replace")
    assert told.startswith("> Hello\n")
    assert told.endswith("\n\n")
    assert "Cut" not in told


@pytest.mark.slow
def test_lines_come_through_a_pipe(command: Command, trained_run: Path) -> None:
    flags = ["--checkpoint", str(trained_run), "--max-new-tokens", "6", "--greedy"]
    done = command.run("chat", *flags, input="Once upon a time\n\n/set max_new_tokens 3\nThe dog")
    assert done.returncode == 0, done.stderr
    first, second, rest = done.stdout.split("\n\n")
    assert first.startswith("Once upon a time")
    assert second.startswith("The dog")
    assert rest == ""
    assert "This model has read no conversations: it goes on" in done.stderr
    assert "/help" not in done.stderr  # nobody is there to type it
    done = command.run("chat", *flags, input="/sett\nOnce\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: /sett: no such command.")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "none"], "none"),
        (["--checkpoint", "none", "--temprature", "1"], "Did you mean '--temperature'?"),
        (["--checkpoint", "none", "--temperature", "-1"], "Use 0.0 or more"),
        (["--checkpoint", "none", "--prompt", "A"], "--prompt: no such flag"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_loaded(
    flags: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        chat.main(flags)
    assert told in str(caught.value)


def test_a_system_prompt_for_a_model_without_turns_is_refused(trained_run: Path) -> None:
    with pytest.raises(InputError, match="--system: this model has read no conversations"):
        chat.main(["--checkpoint", str(trained_run), "--system", "Be kind."])


def test_every_setting_of_a_talk_changes_something(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chat_model(language_model.load(str(trained_run)), context=96)
    monkeypatch.setattr(language_model, "load", lambda _: model)
    asked: list[Any] = []

    class Seen(Service):
        def __init__(self, model: Any, config: EngineConfig):
            asked.append(config.weights)
            super().__init__(model, config)

        def start(self) -> None:
            pass

        stop = start

    class Stop(Exception):  # noqa: N818
        pass

    def ask(self: Any, asked_for: Any, *, sampling: Any, **_: Any) -> None:
        asked.extend([self.tokenizer.decode(asked_for.ids), sampling])
        raise Stop

    from tinyllm_jax.inference import service, terminal

    monkeypatch.setattr(service, "Service", Seen)
    monkeypatch.setattr(Seen, "ask", ask)

    class Lines:
        is_interactive = False

        def __init__(self, *, history: str, **_: Any):
            asked.append(history)

        def note(self, text: str) -> None:
            pass

        def read(self) -> str:
            return "Hello"

    monkeypatch.setattr(terminal, "Terminal", Lines)

    def seen(*flags: str) -> list[Any]:
        asked.clear()
        with pytest.raises(Stop):
            chat.main(["--checkpoint", "any", *flags])
        return [*asked]

    changes = {
        "terminal.system": "Be kind.",
        "terminal.history": "typed.txt",
        "terminal.weights": "int8",
        "sampling.max_new_tokens": "9",
        "sampling.temperature": "0.3",
        "sampling.top_k": "4",
        "sampling.top_p": "0.5",
        "sampling.repetition_penalty": "1.3",
        "sampling.greedy": "true",
        "sampling.seed": "5",
    }
    assert set(changes) == set(setting_fields(TalkConfig))
    plain = seen()
    assert seen() == plain
    for name, value in changes.items():
        assert seen(f"--{name}", value) != plain, name
