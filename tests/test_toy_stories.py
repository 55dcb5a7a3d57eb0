"""The built-in stories: one derivation per text, an exact entropy, and English throughout."""

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction

import pytest

from tinyllm_jax.data import toy_stories, toy_stories_words
from tinyllm_jax.data.toy_stories import (
    HashedDraws,
    corpus_hash,
    count_derivations,
    entropy_bits,
    entropy_bits_per_byte,
    expected_bytes,
    floor_bits,
    generate_stories,
    generate_story,
    grammar,
    log2_probability,
    sentence_is_grammatical,
    split_sentences,
)
from tinyllm_jax.data.toy_stories_grammar import Choice, Grammar, Literal, Mention, Node, Together
from tinyllm_jax.errors import InputError

FIRST_STORY = (
    "There once was a brave otter named Rosie. Her best friend was a happy girl named Molly, who "
    "always wore a black hat. One cool afternoon, they found a new ribbon near the castle, and "
    'they both wanted it. "I saw it first!" shouted Rosie. "But I need it more!" said Molly. They '
    'pulled so hard that the ribbon flew into a bush. Rosie felt sad and said, "You are my '
    'friend." They washed it with soap, and each had it for four weeks. Rosie learned that a '
    "friend is better than a toy."
)

PEOPLE = {"name": ("Ann", "Bob", "Cy"), "she": ("she", "he", "he")}


def small_grammar(*, weights: tuple[int, int], plots: dict[str, str]) -> Grammar:
    return Grammar(
        variables={"hero": PEOPLE, "friend": PEOPLE, "pet": {"name": ("a cat", "a big dog")}},
        distinct={"friend": "hero"},
        phrases={"mood": dict(zip(("sad", "glad"), weights, strict=True)), "way": "ran|walked off"},
        sentences={
            "start": ("{hero} was <mood>.", "There was {hero}."),
            "saw": "{hero.she} [saw|met] {friend} and {pet}.",
            "left": dict(
                zip(("{friend} <way>.", "They [ran|went [home|on]]."), weights, strict=True)
            ),
        },
        plots=plots,
    )


PLOTS = {"short": "<start> <saw>", "long": "<start> <saw> <left>"}


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return list(generate_stories(seed=11, start=0, stop=3000))


def derivations(small: Grammar) -> Iterator[tuple[str, Fraction]]:
    """Draw every result in every way, with the exact probability of each."""
    script: list[int] = []
    while True:
        options: list[int] = []

        def draw(n: int, options=options) -> int:
            options.append(n)
            if len(options) > len(script):
                script.append(0)
            return script[len(options) - 1]

        yield small.generate(draw), Fraction(1, math.prod(options))
        while script and script[-1] == options[len(script) - 1] - 1:
            script.pop()
        if not script:
            return
        script[-1] += 1


def text_probabilities(small: Grammar) -> dict[str, Fraction]:
    probability_of: dict[str, Fraction] = defaultdict(Fraction)
    for text, probability in derivations(small):
        probability_of[text] += probability
    return probability_of


def test_the_first_story_stays_the_same():
    assert generate_story(0, 0) == FIRST_STORY, (
        "Changed words or draws give every run another corpus. If that is meant, paste the new "
        "story here."
    )


def test_a_story_is_a_function_of_seed_and_index_alone():
    expected = [generate_story(5, index) for index in (12, 10, 11)]
    assert [expected[1], expected[2], expected[0]] == list(
        generate_stories(seed=5, start=10, stop=13)
    )
    distinct = {generate_story(seed, index) for seed in (0, 1, 12, 10**30) for index in range(50)}
    assert len(distinct) == 200


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_a_negative_seed_or_index_is_refused(seed, index):
    with pytest.raises(InputError, match="is negative"):
        generate_story(seed, index)


def test_draws_leave_out_the_words_that_would_favour_some_results():
    draws = HashedDraws(0, 0)
    draws._words = [4, 65535]  # 65,536 words cannot be shared evenly among 3 results
    assert draws(3) == 1
    assert draws._words == []


def test_draws_are_uniform():
    draws, rolls = HashedDraws(3, 4), 30_000
    counts = Counter(draws(12) for _ in range(rolls))
    spread = math.sqrt(rolls * (1 / 12) * (11 / 12))
    assert sorted(counts) == list(range(12))
    assert all(abs(count - rolls / 12) < 4.5 * spread for count in counts.values())


def test_probabilities_of_all_texts_of_a_small_grammar_sum_to_one():
    small = small_grammar(weights=(1, 3), plots=PLOTS)
    probability_of = text_probabilities(small)
    assert sum(probability_of.values()) == 1
    for text, expected in probability_of.items():
        probability, count, _ = small.read_story(text)
        assert count == 1
        assert probability == pytest.approx(float(expected), rel=1e-12)


def test_entropy_and_length_of_a_small_grammar_are_those_of_all_its_texts():
    small = small_grammar(weights=(1, 3), plots=PLOTS)
    probability_of = text_probabilities(small)
    entropy = -sum(p * math.log2(p) for p in probability_of.values())
    mean_bytes = sum(p * len(text) for text, p in probability_of.items())
    assert small.entropy_bits() == pytest.approx(entropy, rel=1e-12)
    assert small.expected_bytes() == pytest.approx(float(mean_bytes), rel=1e-12)


def test_the_reader_counts_every_derivation_of_an_ambiguous_grammar():
    ambiguous = small_grammar(weights=(1, 1), plots=PLOTS | {"bad": "[a|aa][a|]{pet}"})
    probability_of: dict[str, list[Fraction]] = defaultdict(list)
    for text, probability in derivations(ambiguous):
        probability_of[text].append(probability)
    assert len(probability_of["aaa cat"]) == 2
    for text, probabilities in probability_of.items():
        probability, count, _ = ambiguous.read_story(text)
        assert count == len(probabilities)
        assert probability == pytest.approx(float(sum(probabilities)), rel=1e-12)


@pytest.mark.parametrize(
    ("plot", "expected"),
    [
        ("[a|aa][a|]{pet}", True),
        ("[ab|a][c|bc].", True),
        ("[ab|ab]c", True),
        ("[a|ab]c", False),
        ("{pet}[ and| or] {hero}", False),
        ("There was [Ann|{hero}].", True),
    ],
)
def test_the_automaton_sees_ambiguity(plot, expected):
    grammar = small_grammar(weights=(1, 1), plots=PLOTS | {"other": plot + " {hero} {friend}"})
    assert (ambiguous_pair(grammar) is not None) is expected


def test_a_variable_that_the_text_leaves_open_counts_as_ambiguity():
    unnamed = small_grammar(weights=(1, 1), plots=PLOTS | {"bad": "So {hero.she} {friend}"})
    texts = Counter(text for text, _ in derivations(unnamed))
    assert texts["So he Ann"] == 2
    assert unnamed.read_story("So he Ann")[1] == 2
    assert unnamed.read_story("So he Bob")[1] == 1


def test_entropy_agrees_with_sampled_stories(stories):
    """The mean over the plots, each sampled for itself, within 4 standard errors: 0.53 bits.

    Stories of one plot spread by 4.6 bits, all together by 7.4, so that 1,200 stories say as much
    by plot as 3,000 mixed ones.
    """
    bits_of = defaultdict(list)
    for index, story in enumerate(stories[:1200]):
        plot = HashedDraws(11, index)(len(grammar().plots))  # a story's first draw
        bits_of[plot].append(-log2_probability(story))
    assert len(bits_of) == len(grammar().plots)
    mean = statistics.fmean(map(statistics.fmean, bits_of.values()))
    variances = [statistics.variance(bits) / len(bits) for bits in bits_of.values()]
    error = math.sqrt(sum(variances)) / len(bits_of)
    assert error < 0.14
    assert abs(mean - entropy_bits()) < 4 * error
    assert 90 < entropy_bits() < 130


def test_expected_bytes_agree_with_sampled_stories(stories):
    assert_mean([len(story.encode()) for story in stories], expected_bytes())
    assert entropy_bits_per_byte() == pytest.approx(entropy_bits() / expected_bytes())


def assert_mean(sample: list, expected: float) -> None:
    mean = sum(sample) / len(sample)
    variance = sum((value - mean) ** 2 for value in sample) / (len(sample) - 1)
    assert abs(mean - expected) < 4 * math.sqrt(variance / len(sample))


def test_sampled_stories_have_one_derivation(stories):
    assert {count_derivations(story) for story in stories[:500]} == {1}


def test_no_two_derivations_of_the_whole_grammar_give_one_text():
    """Together these prove it for every text, not only for sampled ones.

    The automaton lets each mention of a variable take any value, also one that contradicts another
    mention. If even then a text fixes the path, it fixes all choices and the text of each mention,
    and a mention in a form that no two values share fixes the value.
    """
    assert ambiguous_pair(grammar()) is None
    for plot in grammar().plots.values():
        assert identified(plot) == plot.variables()


def identified(node: Node) -> set[int]:
    """Find the variables whose value every text of this node gives away."""
    if isinstance(node, Mention):
        return {node.variable} if len(node.values_of) == len(node.texts) else set()
    if isinstance(node, Together):
        return set().union(*map(identified, node.parts))
    if isinstance(node, Choice):
        return set.intersection(*map(identified, node.alternatives))
    return set()


def ambiguous_pair(grammar: Grammar) -> tuple[int, int] | None:
    """Find two states of the grammar's automaton that are reached by one text and go on alike.

    A state stands for one character at one place of the grammar. Two different paths with the same
    text must part somewhere and meet again, at the latest in the end state.
    """
    characters, following = ["end"], [frozenset[int]()]

    def entries(node: Node, after: frozenset[int]) -> frozenset[int]:
        if isinstance(node, Together):
            for part in reversed(node.parts):
                after = entries(part, after)
            return after
        if isinstance(node, Choice):
            return frozenset().union(*(entries(child, after) for child in node.alternatives))
        texts = [node.text] if isinstance(node, Literal) else node.values_of
        found = []
        for text in texts:
            state = after
            for character in reversed(text):
                characters.append(character)
                following.append(state)
                state = frozenset([len(characters) - 1])
            found.append(state)
        return frozenset().union(*found)

    start = frozenset().union(*(entries(plot, frozenset([0])) for plot in grammar.plots.values()))
    seen: set[tuple[int, int]] = set()
    waiting: list[tuple[int, int]] = []

    def part(left: frozenset[int], right: frozenset[int], *, parted: bool) -> None:
        by_character = defaultdict(list)
        for state in right:
            by_character[characters[state]].append(state)
        for a in left:
            for b in by_character[characters[a]]:
                pair = (min(a, b), max(a, b))
                if (parted or a != b) and pair not in seen:
                    seen.add(pair)
                    waiting.append(pair)

    for together in {start, *following}:
        part(together, together, parted=False)
    while waiting:
        a, b = waiting.pop()
        if a == b:
            return a, b
        part(following[a], following[b], parted=True)
    return None


def test_no_option_is_rare_and_no_text_is_empty():
    waiting: list[Node] = list(grammar().plots.values())
    sizes = [len(forms["name"]) for forms in toy_stories_words.VARIABLES.values()]
    assert max(sizes) <= 60
    while waiting:
        node = waiting.pop()
        if isinstance(node, Choice):
            assert min(node.shares()) >= 1 / 60
            waiting += node.alternatives
        elif isinstance(node, Together):
            assert node.parts  # the automaton of the proof cannot tell two empty alternatives apart
            waiting += node.parts
        else:
            assert all([node.text] if isinstance(node, Literal) else node.texts)


def test_every_plot_is_a_row_of_whole_sentences():
    for template in toy_stories_words.PLOTS.values():
        assert re.fullmatch(r"<\w+>( <\w+>)* \[<\w+>(\|<\w+>)*\]", template)
        assert set(re.findall(r"<(\w+)>", template)) <= set(toy_stories_words.SENTENCES)


def test_only_the_two_names_of_a_story_appear_in_it(stories):
    names = set(toy_stories_words.GIRLS + toy_stories_words.BOYS)
    for story in stories:
        assert len(names & set(re.findall(r"[A-Z][a-z]+", story))) == 2


def test_pronouns_agree_with_the_names(stories):
    for story in stories:
        words = set(re.findall(r"\w+", story))
        if not words & set(toy_stories_words.BOYS):
            assert not words & {"he", "He", "his", "His", "him"}, story
        if not words & set(toy_stories_words.GIRLS):
            assert not words & {"she", "She", "her", "Her"}, story


def test_pronouns_and_names_cannot_be_exchanged(stories):
    names = toy_stories_words.GIRLS + toy_stories_words.BOYS
    pronouns = {"she": "he", "he": "she", "She": "He", "He": "She", "Her": "His", "His": "Her"}
    for story in stories[:100]:
        for match in re.finditer(r"\w+", story):
            if match[0] in pronouns:
                other = pronouns[match[0]]
            elif match[0] in names:
                other = next(name for name in names if name not in story)
            else:
                continue
            with pytest.raises(InputError):
                log2_probability(story[: match.start()] + other + story[match.end() :])


def test_a_changed_missing_or_added_word_is_no_story(stories):
    for story in stories[:5]:
        words = story.split(" ")
        for place in range(len(words)):
            for changed in (["zebra"], [], [words[place]] * 2):
                text = " ".join(words[:place] + changed + words[place + 1 :])
                assert count_derivations(text) == 0
    for text in ("", " ", stories[0] + " ", stories[0] * 2, stories[0][:-1], "\u00e9", "{hero}"):
        with pytest.raises(InputError, match="no story of the toy grammar"):
            log2_probability(text)


def test_the_error_says_where_a_text_leaves_the_grammar():
    with pytest.raises(InputError, match=r"after character 23 \('There once was a brave '\)"):
        log2_probability("There once was a brave zebra named Rosie.")


def test_hostile_texts_are_refused_at_once(stories):
    for text in ("a" * 10**6, '"' * 10**5, "Once upon a time, " * 10**4, stories[0] * 1000):
        assert count_derivations(text) == 0
        assert not sentence_is_grammatical(text)
        assert split_sentences(text)


def test_sentences_of_stories_are_grammatical_and_join_to_the_story(stories):
    for story in stories[:500]:
        sentences = split_sentences(story)
        assert " ".join(sentences) == story
        assert 7 <= len(sentences) <= 10
        assert all(map(sentence_is_grammatical, sentences))


def test_every_sentence_of_the_grammar_is_one_sentence_to_the_splitter():
    for name, node in grammar().sentences.items():
        for index in range(30):
            draws, pieces = HashedDraws(0, index), []
            sizes = [len(forms["name"]) for forms in toy_stories_words.VARIABLES.values()]
            node.emit(draws, [draws(size) for size in sizes], pieces)
            sentence = "".join(pieces)
            assert split_sentences(sentence + " They left.") == [sentence, "They left."], name


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ('"I found it!" shouted Tilly.', True),
        ('"I found it!" shouted Rover.', False),
        ('"I found it!" shouted Tilly', False),
        ('"I found it! shouted Tilly.', False),
        ("One cool day, Lily lost her red ball near the mill.", True),
        ("One cool day, Lily lost his red ball near the mill.", False),
        ("From that day on, Lily and Tom would sing together every day.", False),
        ("From that day on, Lily and Ben would sing together every day.", True),
        ("From that day on, Lily and Lily would sing together every day.", False),
        ("There once was a shy girl named Ben.", False),
        ("There once was a shy boy named Ben.", True),
        ("There once was a shy boy named Ben. He", False),
        ("", False),
    ],
)
def test_a_sentence_is_judged_by_the_grammar_alone(sentence, expected):
    assert sentence_is_grammatical(sentence) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ('"Oh no!" cried Ben. "Look!" said he.', ['"Oh no!" cried Ben.', '"Look!" said he.']),
        ('He said, "No. Go away." She left.', ['He said, "No. Go away."', "She left."]),
        ("A dog ran. It bar", ["A dog ran.", "It bar"]),
        ("First.\n\nSecond.", ["First.", "Second."]),
        ("It was 3.5 long. he said.", ["It was 3.5 long. he said."]),
    ],
)
def test_sentences_end_outside_quotations(text, expected):
    assert split_sentences(text) == expected


def test_the_floor_is_the_information_of_the_stories(stories):
    floor = floor_bits(stories[:50])
    assert floor.documents == 50
    assert floor.bits == pytest.approx(-sum(map(log2_probability, stories[:50])))
    assert floor.text_bytes == len("".join(stories[:50]).encode())
    assert floor.bits_per_byte == pytest.approx(floor.bits / floor.text_bytes)


@pytest.mark.parametrize("texts", [[], [FIRST_STORY, "Not a story."]])
def test_there_is_no_floor_without_stories(texts):
    with pytest.raises(InputError):
        floor_bits(texts)


def test_stories_are_short_plain_ascii(stories):
    for story in stories:
        assert story.isascii()
        assert story.isprintable()
        assert "  " not in story
        assert story == story.strip()
        assert 350 <= len(story) <= 650
        assert story[-1] in '.!"'


def test_articles_agree_with_the_word_that_follows(stories):
    for story in stories:
        for article, letter in re.findall(r"\b([Aa]n?) (\w)", story):
            assert (letter in "aeiou") == (article.lower() == "an"), story


def test_no_word_stands_twice_in_a_row(stories):
    for story in stories:
        words = re.findall(r"[\w-]+", story.lower())
        assert all(a != b for a, b in itertools.pairwise(words)), story


def test_stories_have_hundreds_of_words_and_speak(stories):
    words = {word.lower() for story in stories for word in re.findall(r"[A-Za-z]+", story)}
    assert 300 <= len(words) <= 900
    assert sum('"' in story for story in stories) > len(stories) / 2


def test_the_corpus_hash_follows_the_words(monkeypatch):
    before = corpus_hash()
    assert before == corpus_hash.__wrapped__()
    monkeypatch.setattr(toy_stories_words, "DISTINCT", {})
    assert corpus_hash.__wrapped__() != before
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert toy_stories.corpus_hash() == before
