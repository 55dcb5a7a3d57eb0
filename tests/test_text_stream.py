"""Text told piece by piece is the text decoded at once, cut where it should end."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data.asking import as_question, as_text
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.data.tokenizer import Tokenizer, extend_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.inference.text_stream import NO_CHARACTER, TextStream, token_bytes

STORIES = [*generate_stories(seed=3, start=0, stop=60)]
STRANGE = "Zoë 🦊🦊 said:  «naïve»\n\n€\t漢字  end "


def make(kind: str) -> Tokenizer:
    trained = train_tokenizer(STORIES, config=TokenizerConfig(kind=kind), vocab_size=400)
    return extend_tokenizer(trained, CONTROL_TOKENS)


TOKENIZERS = {kind: make(kind) for kind in ("sentencepiece", "bytelevel")}
each_kind = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def told(stream: TextStream, ids: Sequence[int]) -> list[str]:
    pieces = []
    for id in ids:
        pieces.append(stream.push(id))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@each_kind
@pytest.mark.parametrize("prompt", ["", "Once", "Once upon a time, ", "🦊"])
def test_pieces_are_the_text_behind_a_prompt(tokenizer: Tokenizer, prompt: str) -> None:
    asked = as_text(prompt, tokenizer)
    for text in (STRANGE, STORIES[0]):
        ids = tokenizer.encode(text)
        pieces = told(TextStream(tokenizer, lead=asked.lead, stop=[]), ids)
        before = len(tokenizer.decode(asked.ids))
        assert "".join(pieces) == asked.text(ids)[before:]
        assert not any(NO_CHARACTER in piece for piece in pieces)


@each_kind
def test_pieces_are_the_text_of_an_answer(tokenizer: Tokenizer) -> None:
    asked = as_question("Hello?", tokenizer, system="")
    for text in (" two spaces", "Word", STRANGE):
        ids = tokenizer.encode(text)
        pieces = told(TextStream(tokenizer, lead=asked.lead, stop=[]), ids)
        assert "".join(pieces) == asked.text(ids)


@each_kind
@given(data=st.data())
def test_whatever_the_tokens_pieces_add_up(tokenizer: Tokenizer, data: st.DataObject) -> None:
    some = st.integers(0, tokenizer.vocab_size - 1).filter(lambda each: each != tokenizer.eos_id)
    ids = data.draw(st.lists(some, max_size=30))
    asked = as_text("Once", tokenizer)
    pieces = told(TextStream(tokenizer, lead=asked.lead, stop=[]), ids)
    assert "Once" + "".join(pieces) == asked.text(ids)


@each_kind
@given(data=st.data())
def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([STRANGE, STORIES[1]]))
    ids = tokenizer.encode(text)
    whole = "".join(told(TextStream(tokenizer, lead=[], stop=[]), ids))
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start + 1, min(start + 12, len(whole))))
    stops = [whole[start:end], "never there", whole[start:end] + "x"]
    stream = TextStream(tokenizer, lead=[], stop=stops)
    pieces = told(stream, ids)
    first = min(whole.find(stop) for stop in stops if stop in whole)
    assert stream.stopped
    assert "".join(pieces) == whole[:first]


@each_kind
def test_the_beginning_of_a_stop_string_is_told_once_it_is_none(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("One day. Then")
    whole = "".join(told(TextStream(tokenizer, lead=[], stop=[]), ids))
    stream = TextStream(tokenizer, lead=[], stop=[". The end", "Then she"])
    assert "".join(told(stream, ids)) == whole
    assert not stream.stopped


@each_kind
def test_bytes_of_tokens_make_the_text(tokenizer: Tokenizer) -> None:
    for text in (STRANGE, STORIES[0]):
        found = b"".join(token_bytes(tokenizer, id) for id in tokenizer.encode(text)).decode()
        assert found.removeprefix(" ") == tokenizer.decode(tokenizer.encode(text)).removeprefix(" ")


@each_kind
def test_an_end_token_in_the_lead_hides_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The dog sat.")
    lead = [tokenizer.bos_id, *tokenizer.encode("One day"), tokenizer.eos_id, *ids]
    for size in (1, 2, len(lead)):
        pieces = told(TextStream(tokenizer, lead=lead[:-size], stop=[]), ids)
        assert "".join(pieces).strip() == "The dog sat."


@each_kind
def test_control_tokens_in_an_answer_hide_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The dog sat.")
    mixed = [tokenizer.eos_id, *ids[:2], tokenizer.bos_id, tokenizer.eos_id, *ids[2:]]
    pieces = told(TextStream(tokenizer, lead=tokenizer.encode("So."), stop=[]), mixed)
    assert "".join(pieces).strip() == "The dog sat."


@each_kind
def test_what_is_decoded_stays_short(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread decodes for everybody, so nothing may grow with prompt or answer."""
    longest = 0
    decode = tokenizer.decode

    def watched(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    half = next(id for id in range(tokenizer.vocab_size) if token_bytes(tokenizer, id) == b"\x80")
    stream = TextStream(tokenizer, lead=tokenizer.encode("word " * 500), stop=["never"])
    told(stream, [half] * 200 + [tokenizer.eos_id, tokenizer.bos_id] * 200)
    assert longest <= 40
