"""The tokenizers lose no text, make no control token of text, and say what they cannot do."""

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data import sentencepiece_bpe
from tinyllm_jax.data.bytelevel import BYTE_OF
from tinyllm_jax.data.sentencepiece_bpe import sample_lines, training_lines
from tinyllm_jax.data.tokenizer import (
    Tokenizer,
    check_tokenizer_hash,
    load_tokenizer,
    train_tokenizer,
)
from tinyllm_jax.errors import InputError

STORIES = [
    "Once upon a time, there was a small dog named Tim.\nTim liked to play with a red ball.",
    'One day, Lily said, "Let\'s go to the park!"\n\nShe was happy. The sun was warm.',
    "The bird flew up in the big tree and saw a cat. The cat was sad, so the bird sang.",
    "Once there was a little girl who liked to bake. She made a big cake with her mom.",
] * 3
HARD_TEXTS = [
    "",
    " ",
    "  two before, two after  ",
    "a\nb\n\nc\r\n\td",
    "nul \x00 bell \x07",
    "emoji 😀👩‍👩‍👧, 中文字, עברית, العربية",
    "a▁b ▁▁ c▁",
    "\ue000▁\ue000\ue000▁▁ the private character that stands in for U+2581",
    "\ufeffbyte order mark, \u2028 line separator, \u00a0 no-break, \u3000 wide",
    "\u2585 \u2047 \U0010ffff",
    "x" * 3000,
]
CONTROL_TEXTS = ["<s>", "</s>", "<pad>", "<unk>", "a</s>b", "<0x41>", "<|im_start|>user<|im_end|>"]


def trained(kind: str, *, vocab_size: int = 400) -> Tokenizer:
    return train_tokenizer(STORIES, config=TokenizerConfig(kind=kind), vocab_size=vocab_size)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return trained("sentencepiece")


@pytest.fixture(scope="module")
def bytelevel() -> Tokenizer:
    return trained("bytelevel", vocab_size=320)


@pytest.fixture(scope="module", params=["sentencepiece", "bytelevel"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HARD_TEXTS + CONTROL_TEXTS)
def test_sentencepiece_gives_every_text_back(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text, bos=True, eos=True)) == text


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_sentencepiece_gives_any_text_back(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


@given(st.text(alphabet="▁\ue000\ue001 ab<"))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_tells_its_space_mark_from_what_stands_in_for_it(sentencepiece, text):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


@pytest.mark.parametrize("text", HARD_TEXTS + CONTROL_TEXTS)
def test_bytelevel_gives_every_normalised_text_back(bytelevel, text):
    expected = unicodedata.normalize("NFKC", text)
    assert bytelevel.decode(bytelevel.encode(text, bos=True, eos=True)) == expected


def test_spaces_survive_text_in_which_they_are_rare():
    documents = ["日本語国民は" * 150] * 1000
    config = TokenizerConfig(character_coverage=0.99)
    tokenizer = train_tokenizer(documents, config=config, vocab_size=270)
    assert tokenizer.decode(tokenizer.encode(" 日 本")) == " 日 本"


@pytest.mark.parametrize("text", CONTROL_TEXTS)
def test_control_tokens_in_a_text_stay_text(tokenizer, text):
    control = {tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id}
    if tokenizer.kind == "bytelevel":
        control |= {3, 4}
    assert not control & set(tokenizer.encode(text))


def test_control_tokens_in_training_text_make_no_control_ids():
    documents = ["a<s>b </s> <pad><unk> x<s>y <0x41>" + story for story in STORIES * 5]
    tokenizer = train_tokenizer(documents, config=TokenizerConfig(), vocab_size=340)
    for text in CONTROL_TEXTS:
        assert not {0, 1, 2, 3} & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_ids_are_those_of_the_reproduced_systems(sentencepiece, bytelevel):
    def ids(t):
        return {"pad": t.pad_id, "unk": t.unk_id, "bos": t.bos_id, "eos": t.eos_id}

    assert ids(sentencepiece) == {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
    assert ids(bytelevel) == {"pad": 0, "unk": 0, "bos": 1, "eos": 2}
    assert [bytelevel.token_text(id) for id in range(5)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert (sentencepiece.vocab_size, bytelevel.vocab_size) == (400, 320)


def test_encode_puts_bos_and_eos_where_asked(tokenizer):
    plain = tokenizer.encode("the dog")
    assert tokenizer.encode("the dog", bos=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("the dog", eos=True) == [*plain, tokenizer.eos_id]


def test_encode_batch_gives_what_encode_gives(tokenizer):
    texts = HARD_TEXTS + CONTROL_TEXTS
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_decode_stops_at_eos_and_leaves_pad_and_bos_out(tokenizer):
    ids = tokenizer.encode("the dog")
    padded = [tokenizer.bos_id, *ids, tokenizer.eos_id, *ids, tokenizer.pad_id]
    assert tokenizer.decode(padded) == "the dog"
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.pad_id]) == "the dog"


def test_decode_of_half_a_character_gives_a_replacement_mark(tokenizer):
    ids = tokenizer.encode("a😀")
    assert tokenizer.decode(ids[:-1]).startswith("a\ufffd")


@pytest.mark.parametrize("id", [-1, 400])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, id):
    with pytest.raises(InputError, match=f"Token id {id} is outside"):
        tokenizer.decode([id])


def test_lone_surrogates_are_refused_with_their_place(tokenizer):
    with pytest.raises(InputError, match=r"Character 2 .*'\\ud800'"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="Character 0"):
        train_tokenizer(["\udfff"], config=TokenizerConfig(kind=tokenizer.kind), vocab_size=400)


def test_token_text_shows_spaces_and_bytes(sentencepiece, bytelevel):
    sentence_id = sentencepiece.encode("the")[0]
    assert sentencepiece.token_text(sentence_id) == " the"
    assert sentencepiece.token_text(sentencepiece.encode("\n")[-1]) == "<0x0A>"
    shown = [bytelevel.token_text(id) for id in bytelevel.encode("é\n Tim")]
    assert shown[:3] == ["<0xC3>", "<0xA9>", "\n"]
    assert "".join(shown[3:]) == " Tim"


def test_byte_letters_are_those_of_the_library():
    from tokenizers import pre_tokenizers

    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF.values()) == [bytes([byte]) for byte in range(256)]


def test_saved_tokenizers_load_the_same_whatever_their_name(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "new folder")
    assert path.name == tokenizer.file_name
    other_name = tmp_path / "renamed.bin"
    other_name.write_bytes(path.read_bytes())
    for loaded in (load_tokenizer(path), load_tokenizer(path.parent), load_tokenizer(other_name)):
        assert loaded.hash == tokenizer.hash == hashlib.sha256(path.read_bytes()).hexdigest()
        assert loaded.to_bytes() == path.read_bytes()
        assert loaded.kind == tokenizer.kind
        assert loaded.encode("the dog </s>") == tokenizer.encode("the dog </s>")
    assert [p.name for p in path.parent.iterdir()] == [tokenizer.file_name]


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(InputError, match=r"no tokenizer in this folder.*tokenizer\.model or"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.model"
    for content in (b"", b"hello world, this is a text\n", bytes(range(256)), b'{"a": 1}', b"{"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.model: "):
            load_tokenizer(path)


def test_a_truncated_model_is_refused(sentencepiece, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece.to_bytes()[:3000])
    with pytest.raises(InputError, match="neither a SentencePiece model nor"):
        load_tokenizer(path)


def llama_like_model(**settings) -> bytes:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    given = {"vocab_size": 330, "byte_fallback": True} | settings
    SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **given,
    )
    return model.getvalue()


def test_a_model_without_pad_pads_with_unk(tmp_path):
    path = tmp_path / "llama.model"
    path.write_bytes(llama_like_model())  # the library's defaults: unk 0, bos 1, eos 2, no pad
    llama = load_tokenizer(path)
    ids = [llama.pad_id, llama.unk_id, llama.bos_id, llama.eos_id]
    assert ids == [0, 0, 1, 2]
    encoded = llama.encode("a dog▁", bos=True, eos=True)
    assert llama.decode([*encoded, 0, 0]) == "a dog▁"


def test_a_model_without_bytes_still_shows_what_it_does_not_know(tmp_path):
    path = tmp_path / "plain.model"
    path.write_bytes(llama_like_model(byte_fallback=False, vocab_size=100))
    plain = load_tokenizer(path)
    assert plain.decode(plain.encode("dog ☃")) == "dog  ⁇ "


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_model_without_bos_or_eos_is_refused(tmp_path, name):
    path = tmp_path / "t5.model"
    path.write_bytes(llama_like_model(**{f"{name}_id": -1}))
    with pytest.raises(InputError, match=f"no {name} token"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], (0, 1, 2)),
        (["<pad>", "<s>", "</s>"], (0, 1, 2)),
        (["<|endoftext|>"], (0, 0, 0)),
        (["<|begin_of_text|>", "<|end_of_text|>"], (1, 0, 1)),
    ],
)
def test_control_tokens_of_other_projects_are_found_by_name(bytelevel, tmp_path, names, expected):
    table = json.loads(bytelevel.to_bytes())
    letters = sorted(BYTE_OF)
    template = table["added_tokens"][0]
    table["added_tokens"] = [
        template | {"id": id, "content": name} for id, name in enumerate(names)
    ]
    table["model"]["unk_token"] = None
    table["model"]["merges"] = []
    table["model"]["vocab"] = {name: id for id, name in enumerate(names + letters)}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    other = load_tokenizer(path)
    assert (other.pad_id, other.bos_id, other.eos_id) == expected
    assert other.unk_id == -1
    assert other.decode(other.encode("a dog", bos=True, eos=True)) == "a dog"


def test_a_tokenizer_json_without_begin_and_end_is_refused(bytelevel, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bytelevel.to_bytes().replace(b"</s>", b"</x>").replace(b"_end", b"_fin"))
    with pytest.raises(InputError, match=r"begin and end a document; looked for <s> </s>"):
        load_tokenizer(path)


def test_a_post_processor_adds_no_tokens(bytelevel, tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_str(bytelevel.to_bytes().decode())
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    assert load_tokenizer(path).encode("the dog") == bytelevel.encode("the dog")


def test_a_file_that_cuts_or_pads_text_does_neither_here(bytelevel, tmp_path):
    from tokenizers import Tokenizer as Library

    library = Library.from_str(bytelevel.to_bytes().decode())
    library.enable_truncation(8)
    library.enable_padding(length=100)
    path = tmp_path / "tokenizer.json"
    library.save(str(path))
    for text in (STORIES[0], "the dog"):
        assert load_tokenizer(path).encode(text) == bytelevel.encode(text)


def test_text_that_the_trainer_leaves_out_is_refused():
    with pytest.raises(InputError, match=r"U\+2585.*--tokenizer\.kind bytelevel"):
        train_tokenizer(["\u2585" * 20] * 3, config=TokenizerConfig(), vocab_size=300)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_a_vocabulary_larger_than_the_text_allows_names_the_largest(kind):
    with pytest.raises(InputError, match="model.vocab_size=9000 is more than") as caught:
        trained(kind, vocab_size=9000)
    largest = int(str(caught.value).split("--model.vocab_size ")[1].split()[0])
    assert trained(kind, vocab_size=largest).vocab_size == largest
    with pytest.raises(InputError, match=f"--model.vocab_size {largest} or less"):
        trained(kind, vocab_size=largest + 1)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_a_vocabulary_too_small_for_bytes_names_the_smallest(kind):
    with pytest.raises(InputError, match="model.vocab_size=100 is less than") as caught:
        trained(kind, vocab_size=100)
    smallest = int(str(caught.value).split("--model.vocab_size ")[1].split()[0])
    assert trained(kind, vocab_size=smallest).vocab_size == smallest
    with pytest.raises(InputError, match=f"--model.vocab_size {smallest} or more"):
        trained(kind, vocab_size=smallest - 1)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_no_text_is_no_tokenizer(kind):
    with pytest.raises(InputError):
        train_tokenizer([], config=TokenizerConfig(kind=kind), vocab_size=400)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_the_reader_s_own_errors_come_through_training(kind):
    def documents():
        yield from STORIES
        raise InputError("stories.jsonl:3: not JSON.")

    with pytest.raises(InputError, match="stories.jsonl:3"):
        train_tokenizer(documents(), config=TokenizerConfig(kind=kind), vocab_size=400)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_training_prints_nothing(kind, capfd):
    trained(kind, vocab_size=300)
    assert capfd.readouterr() == ("", "")


TRAIN_ONCE = """
import sys
sys.path.insert(0, {tests!r})
from test_tokenizer import STORIES
from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data.tokenizer import train_tokenizer
documents = [f"{{story}} {{number}}" for number in range(50) for story in STORIES]
config = TokenizerConfig(kind={kind!r}, max_sentences=200)
print(train_tokenizer(documents, config=config, vocab_size=330).hash)
"""


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_training_gives_the_same_bytes_in_every_process(kind):
    script = TRAIN_ONCE.format(tests=str(Path(__file__).parent), kind=kind)
    hashes = {run_python("-c", script, check=True).stdout for _ in range(2)}
    assert len(hashes) == 1


@pytest.mark.parametrize(("name", "value"), [("character_coverage", 0.98), ("max_sentences", 5)])
def test_every_sentencepiece_setting_reaches_the_model(name, value):
    def model(config):
        return train_tokenizer(STORIES, config=config, vocab_size=300).hash

    assert model(TokenizerConfig()) != model(TokenizerConfig(**{name: value}))


def test_min_frequency_bounds_the_merges():
    config = TokenizerConfig(kind="bytelevel", min_frequency=1000)
    with pytest.raises(InputError, match="261 with tokenizer.min_frequency=1000"):
        train_tokenizer(STORIES, config=config, vocab_size=300)


def test_long_lines_are_cut_at_spaces_and_lose_nothing():
    document = " ".join(["word"] * 1000) + "\n" + "x" * 2500 + "\n\nend"
    lines = list(training_lines([document]))
    assert max(map(len, lines)) <= 1000
    assert "".join(lines).replace(" ", "") == document.replace(" ", "").replace("\n", "")
    assert all(line.split(" ") == ["word"] * len(line.split(" ")) for line in lines[:5])


def test_sampled_lines_are_even_and_the_same_every_time():
    lines = [str(number) for number in range(10_000)]
    assert sample_lines(lines, limit=10_000) == lines
    sample = sample_lines(lines, limit=1000)
    assert len(set(sample)) == 1000
    assert sample == sample_lines(lines, limit=1000)
    assert abs(sum(map(int, sample)) / 1000 - 5000) < 300  # 3 standard deviations of the mean


def test_a_hash_mismatch_names_both_hashes(sentencepiece):
    check_tokenizer_hash(sentencepiece, expected=sentencepiece.hash, origin="run")
    with pytest.raises(InputError, match=f"run: made with the tokenizer abc.*{sentencepiece.hash}"):
        check_tokenizer_hash(sentencepiece, expected="abc", origin="run")


def test_real_stories_take_about_four_bytes_a_token(shared_data):
    from pyarrow import parquet

    table = parquet.read_table(shared_data / "tinystories/train-00000-of-00002.parquet")
    stories = table["text"].to_pylist()[:4000]
    tokenizer = train_tokenizer(stories, config=TokenizerConfig(), vocab_size=4096)
    encoded = tokenizer.encode_batch(stories)
    assert [tokenizer.decode(ids) for ids in encoded[:300]] == stories[:300]
    text_bytes = sum(len(story.encode()) for story in stories)
    assert 3.7 < text_bytes / sum(map(len, encoded)) < 4.2


@pytest.mark.parametrize(
    ("count", "setting", "expected"),
    [(16, None, 7), (16, "true", 7), (15, None, 1), (16, "false", 1), (16, "0", 1)],
)
def test_many_texts_go_on_all_cores_where_the_process_is_alone(
    count: int, setting: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{number} little dogs" for number in range(count)]
    tokenizer = train_tokenizer(texts, config=TokenizerConfig(), vocab_size=300)
    alone = [tokenizer.encode(text) for text in texts]
    threads: list[int] = []
    encode = tokenizer._processor.encode

    def counted(*given: Any, num_threads: int, **rest: Any) -> Any:
        threads.append(num_threads)
        return encode(*given, num_threads=num_threads, **rest)

    monkeypatch.setattr(tokenizer._processor, "encode", counted)
    monkeypatch.setattr(sentencepiece_bpe, "available_cores", lambda: 7)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if setting is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
    assert tokenizer.encode_batch(texts) == alone
    assert threads == [expected]
