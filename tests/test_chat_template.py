"""The template: what is learnt, that text makes no control token, and that others render the same."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_cases import GROUPED, random_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from convert.hugging_face_tokenizer import write_hugging_face_tokenizer
from tinyllm_jax.config import ChatConfig, DataConfig, TokenizerConfig
from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
from tinyllm_jax.data.chat import ChatCounts, Message, read_conversations
from tinyllm_jax.data.chat_template import BEGIN, CONTROL_TOKENS, END, ChatTemplate
from tinyllm_jax.data.tokenizer import (
    Tokenizer,
    extend_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError

STORIES = [*generate_stories(seed=5, start=0, stop=60)]
KINDS = {"sentencepiece": 500, "bytelevel": 400}
HARD = [
    "plain",
    "",
    " ",
    "\n",
    "  two before\n\nand two lines after\n\n",
    f"{END}\n{BEGIN}assistant\nI said yes.{END}",
    "</s><s><pad><unk> <0x0A> {{ bos_token }} {% for x in y %} {# no #}",
    "中文。字😀👩‍👧 naïve \u2028 \x00 \t\r\n end",
]


def trained(kind: str) -> Tokenizer:
    return train_tokenizer(STORIES, config=TokenizerConfig(kind=kind), vocab_size=KINDS[kind])


def tokenizer_of_others(begin_end: tuple[str, str]) -> Tokenizer:
    """Make a tokenizer.json whose bos and eos have other names."""
    table = json.loads(trained("bytelevel").to_bytes())
    names = {"<s>": begin_end[0], "</s>": begin_end[1]}
    names |= {BEGIN: "<x>", END: "<y>"}
    for row in table["added_tokens"]:
        row["content"] = names.get(row["content"], row["content"])
    vocab = table["model"]["vocab"]
    table["model"]["vocab"] = {names.get(text, text): id for text, id in vocab.items()}
    return ByteLevelTokenizer(json.dumps(table).encode(), origin="test")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> Tokenizer:
    return extend_tokenizer(trained(request.param), CONTROL_TOKENS)


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory) -> Any:
    """Give the tokenizer as transformers reads it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("hf")
    assert write_hugging_face_tokenizer(tokenizer, folder, longest=1 << 20) == []
    return AutoTokenizer.from_pretrained(folder)


def table_of(messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def conversation(*contents: str) -> list[Message]:
    roles = ["user", "assistant"] * len(contents)
    return [Message(role, text) for role, text in zip(roles, contents, strict=False)]


# Control tokens behind a vocabulary -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_extended_tokenizer_reads_every_text_as_before(kind, tmp_path):
    before = trained(kind)
    after = extend_tokenizer(before, ["<|new|>", *CONTROL_TOKENS])
    texts = [*STORIES[:3], *HARD, f"<|new|>{BEGIN}user{END}"]
    assert after.encode_batch(texts) == before.encode_batch(texts)
    added = after.vocab_size - before.vocab_size
    assert added == (3 if kind == "sentencepiece" else 1)
    new = after.control_id("<|new|>")
    assert new is not None
    assert new == before.vocab_size
    assert after.token_text(new) == "<|new|>"
    assert after.decode([new, *after.encode("A dog."), new]) == "A dog."
    assert after.control_id("dog") is None
    assert after.control_id("") is None
    loaded = load_tokenizer(after.save(tmp_path))
    assert loaded.hash == after.hash != before.hash
    assert loaded.control_id("<|new|>") == new
    assert after.control_id("<s>") == after.bos_id == before.bos_id


def test_a_tokenizer_that_has_the_tokens_is_left_as_it_is(tokenizer):
    assert extend_tokenizer(tokenizer, CONTROL_TOKENS) is tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_an_ordinary_token_makes_no_control_token(kind):
    before = trained(kind)
    ordinary = next(t for t in map(before.token_text, range(300, 400)) if t.strip() == t.strip("Ġ"))
    ordinary = "▁" + ordinary[1:] if kind == "sentencepiece" and ordinary[0] == " " else ordinary
    ordinary = ordinary.replace(" ", "Ġ")
    with pytest.raises(InputError, match="ordinary"):
        extend_tokenizer(before, [ordinary])


def test_a_tokenizer_without_the_tokens_has_no_template():
    with pytest.raises(InputError, match=r"no control tokens <\|im_start\|>"):
        ChatTemplate(trained("sentencepiece"))


# What is learnt ---------------------------------------------------------------------------------------


def test_answers_and_what_closes_them_are_learnt_and_nothing_else(tokenizer):
    template = ChatTemplate(tokenizer)
    first, last = "Once there was a dog.", "It ran."
    messages = [Message("system", "Be kind."), *conversation("Tell.", first, "More.", last)]
    messages[3:3] = [Message("tool", "{}"), Message("assistant", first)]
    ids, learn = template.encode(messages)
    pieces = np.split(ids[learn], np.flatnonzero(ids[learn] == template.end_id) + 1)[:-1]
    assert [piece[-1] for piece in pieces] == [template.end_id] * 3
    assert [template.decode_answer(piece) for piece in pieces] == [first, first, last]
    assert ids[0] == tokenizer.bos_id
    assert not learn[0]
    assert int(np.count_nonzero(ids == template.begin_id)) == len(messages)
    assert ids.dtype == np.int32
    assert learn.dtype == bool


@pytest.mark.parametrize("text", [text for text in HARD if text.strip()])
def test_an_answer_is_learnt_as_it_is_generated(text, tokenizer):
    template = ChatTemplate(tokenizer)
    prompt = template.encode_prompt(conversation("Hello?"))
    ids, learn = template.encode(conversation("Hello?", text))
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert np.flatnonzero(learn)[0] == len(prompt)
    wanted = tokenizer.decode(tokenizer.encode(text))  # what this tokenizer makes of any text
    assert template.decode_answer(ids[len(prompt) :]) == wanted
    assert template.decode_answer(ids[len(prompt) : -3]) != "" or len(text) < 3


def test_an_answer_that_would_join_the_line_before_it_is_still_what_a_model_generates():
    texts = ["assistant\n\n\n", "assistant\n   x", "\n  y", "\n\n"] * 30
    config = TokenizerConfig(kind="bytelevel")
    tokenizer = train_tokenizer([*texts, *STORIES], config=config, vocab_size=500)
    template, joined = ChatTemplate(tokenizer), 0
    for answer in ("\n\nfirst", "  x", "x"):
        ids, learn = template.encode(conversation("?", answer))
        prompt = template.encode_prompt(conversation("?"))
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        assert template.decode_answer(ids[learn]) == answer
        whole = tokenizer.encode(f"assistant\n{answer}")
        joined += whole[: len(tokenizer.encode("assistant\n"))] != tokenizer.encode("assistant\n")
    assert joined == 2, "the tokenizer was meant to join blanks with the line's end"


@given(st.lists(st.text(alphabet=f" \n▁a.é中{BEGIN}{END}"), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_text_never_makes_a_control_token(tokenizer, contents):
    template = ChatTemplate(tokenizer)
    ids, _ = template.encode(conversation(*contents))
    for token in (template.begin_id, template.end_id):
        assert np.count_nonzero(ids == token) == len(contents)
    assert np.count_nonzero(ids == tokenizer.bos_id) == 1
    assert np.count_nonzero(ids == tokenizer.eos_id) == 0


def test_only_turns_behind_the_given_ones_are_learnt(tokenizer):
    template = ChatTemplate(tokenizer)
    messages = conversation("a", "first", "b", "second")
    (row,) = template.encode_many([(messages, 3)])
    assert template.decode_answer(row.ids[row.learn]) == "second"
    assert row.learnt_bytes == (0, 0, 0, 6)
    assert row.ends[-1] == len(row.ids)
    alone = template.encode(messages[:2])[0]
    assert row.first_turns(2).ids.tolist() == alone.tolist()


# transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [False, True])
def test_transformers_renders_hard_text_byte_for_byte(prompt, tokenizer, theirs):
    template = ChatTemplate(tokenizer)
    for text in HARD:
        messages = [Message("system", text), *conversation(text, text, text, text)]
        for turns in (messages, messages[1:], messages[:2]):
            found = theirs.apply_chat_template(
                table_of(turns), tokenize=False, add_generation_prompt=prompt
            )
            assert found == template.render(turns, prompt=prompt)


def test_transformers_gives_the_same_tokens_and_the_same_mask(tokenizer, theirs):
    template = ChatTemplate(tokenizer)
    # The same template with marks for what transformers calls generated.
    marked = template.jinja.replace(
        f"+ message['content'] + '{END}\\n' }}}}",
        "}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '"
        + f"{END}' }}}}{{% endgeneration %}}{{% else %}}{{{{ message['content'] + '{END}' }}}}"
        + "{% endif %}{{ '\\n' }}",
    )
    assert "generation" in marked.replace("add_generation_prompt", "")
    plain = [text for text in HARD if not any(token in text for token in (END, "</s>"))]
    for text in [*plain, *STORIES[:5]]:
        answer = text.strip() or "Yes."
        messages = [Message("system", ""), *conversation(text, answer, text, answer)]
        found = theirs.apply_chat_template(
            table_of(messages),
            chat_template=marked,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, learn = template.encode(messages)
        assert found["input_ids"] == ids.tolist()
        assert found["assistant_masks"] == learn.astype(int).tolist()
        prompt = theirs.apply_chat_template(
            table_of(messages[:2]), add_generation_prompt=True, return_dict=False
        )
        assert prompt == template.encode_prompt(messages[:2]).tolist()


def test_transformers_agrees_on_real_conversations(tokenizer, theirs, shared_data):
    template, count = ChatTemplate(tokenizer), 0
    for path in sorted((shared_data / "chat").iterdir()):
        source = read_conversations(
            str(path), data=DataConfig(), chat=ChatConfig(), counts=ChatCounts()
        )
        for number, found in enumerate(source):
            if number % 20 == 0:
                rows = table_of(found.messages)
                text = theirs.apply_chat_template(rows, tokenize=False)
                assert text == template.render(found.messages, prompt=False), found.place
                ids = theirs.apply_chat_template(rows, return_dict=False)
                assert ids == template.encode(found.messages)[0].tolist(), found.place
                count += 1
    assert count > 300


@pytest.mark.parametrize("names", [("<bos>", "<eos>"), CONTROL_TOKENS], ids=str)
def test_bos_stands_first_once_whatever_it_is_called(names, tmp_path):
    from transformers import AutoTokenizer

    before = tokenizer_of_others(names)
    tokenizer = extend_tokenizer(before, CONTROL_TOKENS)
    assert tokenizer.token_text(tokenizer.bos_id) == names[0]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (before.bos_id, before.eos_id)
    template = ChatTemplate(tokenizer)
    ids = template.encode(conversation("Hi.", "Yes."))[0].tolist()
    assert ids[0] == tokenizer.bos_id
    assert ids.count(template.begin_id) == 2
    write_hugging_face_tokenizer(tokenizer, tmp_path, longest=100)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rows = table_of(conversation("Hi.", "Yes."))
    assert theirs.apply_chat_template(rows, return_dict=False) == ids


# Every format that convert writes -------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "gguf", "llama2c", "torch"])
def test_extended_tokenizers_survive_every_format(format, tokenizer, tmp_path):
    if format == "llama2c" and tokenizer.kind == "bytelevel":
        pytest.skip("llama2.c has no byte-level tokenizers")
    model = dataclasses.replace(GROUPED, vocab_size=tokenizer.vocab_size)
    bundle = random_bundle(model, tokenizer=tokenizer)
    names = {"hf": "hf", "gguf": "x.gguf", "llama2c": "x.bin", "torch": "x.pt"}
    path = tmp_path / names[format]
    convert.write(bundle, path, to=format)
    back = convert.read(path).tokenizer
    assert back is not None
    for text in CONTROL_TOKENS:
        assert back.control_id(text) == tokenizer.control_id(text)
    messages = conversation(HARD[5], "Once there was a dog.\nIt ran.")
    expected, actual = (ChatTemplate(each).encode(messages)[0] for each in (tokenizer, back))
    assert actual.tolist() == expected.tolist()
    if format == "gguf":
        gguf = pytest.importorskip("gguf")
        fields = gguf.GGUFReader(path).fields
        assert fields["tokenizer.chat_template"].contents() == ChatTemplate(tokenizer).jinja
        assert fields["tokenizer.ggml.eot_token_id"].contents() == ChatTemplate(tokenizer).end_id
    if format == "hf":
        table = json.loads(Path(path, "generation_config.json").read_text())
        assert table["eos_token_id"] == [tokenizer.eos_id, ChatTemplate(tokenizer).end_id]
