"""Probabilistic text grammars: draw a text, read a text back, and know the entropy exactly.

A text is drawn in three steps: a plot, a value for each variable that the plot mentions, and then
every choice in the plot from left to right. All choices are independent of one another and of the
values, except that some variables differ by rule, so the entropy is a finite sum.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Gives a number from 0 to n - 1, each equally likely.
Draw = Callable[[int], int]
# For each variable a bit mask of the values that the text read so far leaves possible.
Masks = tuple[int, ...]
# One way to have read a piece of text: where it ends, what is still possible, the probability of
# the choices made, and how many derivations that are alike up to here it stands for.
Reading = tuple[int, Masks, float, int]
Alternatives = str | Sequence[str] | Mapping[str, int]

TOKEN = re.compile(r"[\[\]|]|\{[^{}]+\}|<[^<>]+>|[^\[\]|{}<>]+")


@dataclass
class Reader:
    """A text being read, with what is already known about it."""

    text: str
    memo: dict[tuple[int, int, Masks], list[Reading]] = field(default_factory=dict)
    furthest: int = 0


# Each kind of node can do five things: `emit` draws its text, `read` finds every way in which a
# text can go on with it, `bits` is the entropy of its choices, `expected_bytes` its mean length and
# `variables` the story variables that it may mention. All kinds are called alike, so that some of
# them get arguments they have no use for.


@dataclass(frozen=True, eq=False, slots=True)
class Literal:
    """Fixed text."""

    text: str

    def emit(self, draw: Draw, values: Sequence[int], pieces: list[str]) -> None:  # noqa: ARG002
        pieces.append(self.text)

    def read(self, reader: Reader, start: int, masks: Masks) -> list[Reading]:
        if not reader.text.startswith(self.text, start):
            return []
        end = start + len(self.text)
        reader.furthest = max(reader.furthest, end)
        return [(end, masks, 1.0, 1)]

    def bits(self) -> float:
        return 0.0

    def expected_bytes(self) -> float:
        return len(self.text)

    def variables(self) -> set[int]:
        return set()


@dataclass(frozen=True, eq=False, slots=True)
class Mention:
    """One form of a story variable: `{hero}`, `{hero.she}`."""

    variable: int
    texts: tuple[str, ...]  # of each value
    values_of: Mapping[str, int]  # text -> mask of the values that have it

    def emit(self, draw: Draw, values: Sequence[int], pieces: list[str]) -> None:  # noqa: ARG002
        pieces.append(self.texts[values[self.variable]])

    def read(self, reader: Reader, start: int, masks: Masks) -> list[Reading]:
        readings: list[Reading] = []
        possible = masks[self.variable]
        before, after = masks[: self.variable], masks[self.variable + 1 :]
        for form, values in self.values_of.items():
            if possible & values and reader.text.startswith(form, start):
                end = start + len(form)
                reader.furthest = max(reader.furthest, end)
                readings.append((end, (*before, possible & values, *after), 1.0, 1))
        return readings

    def bits(self) -> float:
        return 0.0

    def expected_bytes(self) -> float:
        # Every variable is uniform on its own, also one that must differ from another.
        return sum(map(len, self.texts)) / len(self.texts)

    def variables(self) -> set[int]:
        return {self.variable}


@dataclass(frozen=True, eq=False, slots=True)
class Together:
    """Pieces one after another."""

    parts: tuple["Node", ...]

    def emit(self, draw: Draw, values: Sequence[int], pieces: list[str]) -> None:
        for part in self.parts:
            part.emit(draw, values, pieces)

    def read(self, reader: Reader, start: int, masks: Masks) -> list[Reading]:
        readings: list[Reading] = [(start, masks, 1.0, 1)]
        for part in self.parts:
            readings = merged(
                (end, left, share * further_share, count * further_count)
                for middle, possible, share, count in readings
                for end, left, further_share, further_count in part.read(reader, middle, possible)
            )
            if not readings:
                break
        return readings

    def bits(self) -> float:
        return sum(part.bits() for part in self.parts)

    def expected_bytes(self) -> float:
        return sum(part.expected_bytes() for part in self.parts)

    def variables(self) -> set[int]:
        return set().union(*(part.variables() for part in self.parts))


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """One of several alternatives, each with a whole number as its weight."""

    alternatives: tuple["Node", ...]
    weights: tuple[int, ...]
    tickets: tuple["Node", ...]  # each alternative as often as its weight says

    def emit(self, draw: Draw, values: Sequence[int], pieces: list[str]) -> None:
        self.tickets[draw(len(self.tickets))].emit(draw, values, pieces)

    def read(self, reader: Reader, start: int, masks: Masks) -> list[Reading]:
        # Plots share sentences, and a sentence reads the same in each of them.
        key = (id(self), start, masks)
        known = reader.memo.get(key)
        if known is None:
            known = reader.memo[key] = merged(
                (end, left, share * weight / len(self.tickets), count)
                for alternative, weight in zip(self.alternatives, self.weights, strict=True)
                for end, left, share, count in alternative.read(reader, start, masks)
            )
        return known

    def shares(self) -> list[float]:
        """Give the probability of each alternative."""
        return [weight / len(self.tickets) for weight in self.weights]

    def bits(self) -> float:
        return sum(
            share * (alternative.bits() - math.log2(share))
            for share, alternative in zip(self.shares(), self.alternatives, strict=True)
        )

    def expected_bytes(self) -> float:
        return sum(
            share * alternative.expected_bytes()
            for share, alternative in zip(self.shares(), self.alternatives, strict=True)
        )

    def variables(self) -> set[int]:
        return set().union(*(alternative.variables() for alternative in self.alternatives))


Node = Literal | Mention | Together | Choice


def merged(readings: Iterable[Reading]) -> list[Reading]:
    """Join readings that end alike, so that their number never grows beyond places x values."""
    by_end: dict[tuple[int, Masks], Reading] = {}
    for reading in readings:
        end, masks, share, count = reading
        other = by_end.get((end, masks))
        if other is not None:
            reading = (end, masks, share + other[2], count + other[3])
        by_end[end, masks] = reading
    return list(by_end.values())


class Grammar:
    """A story grammar, compiled from templates.

    In a template `[a|b]` is a choice, `<name>` a symbol of `phrases` or `sentences`, `{hero}` a
    variable and `{hero.she}` another form of it. A symbol is one template, several of equal weight,
    or a mapping from template to weight.
    """

    def __init__(
        self,
        *,
        variables: Mapping[str, Mapping[str, Sequence[str]]],
        distinct: Mapping[str, str],
        phrases: Mapping[str, Alternatives],
        sentences: Mapping[str, Alternatives],
        plots: Mapping[str, str],
    ):
        """Compile a grammar.

        Args:
            variables: Variable -> form -> the text of each value; `{x}` stands for form "name".
            distinct: Variable -> the other variable that it never equals.
            phrases: Symbols that are part of a sentence.
            sentences: Symbols that are one whole sentence.
            plots: Templates of whole stories, equally likely.
        """
        assert not set(phrases) & set(sentences)
        assert len({*distinct, *distinct.values()}) == 2 * len(distinct)  # pairs, no chains
        assert all(variables[a]["name"] == variables[b]["name"] for a, b in distinct.items())
        self._variables = variables
        self._names = list(variables)
        self._sizes = [len(forms["name"]) for forms in variables.values()]
        self._distinct = {self._names.index(a): self._names.index(b) for a, b in distinct.items()}
        self._mentions: dict[tuple[int, str], Mention] = {}
        self._definitions = {**phrases, **sentences}
        self._symbols: dict[str, Node] = {}
        self.plots = {name: self._compile(template) for name, template in plots.items()}
        assert not self._definitions, f"no plot uses {list(self._definitions)}"
        self.sentences = {name: self._symbols[name] for name in sentences}
        # A variable is drawn before those that must differ from it.
        order = sorted(range(len(self._names)), key=lambda i: i in self._distinct)
        self._drawn = [
            (plot, [(i, self._distinct.get(i)) for i in order if i in plot.variables()])
            for plot in self.plots.values()
        ]
        for _, drawn in self._drawn:
            mentioned = {i for i, _ in drawn}
            assert all(other is None or other in mentioned for _, other in drawn)
        self._any = tuple((1 << size) - 1 for size in self._sizes)

    def _symbol(self, name: str) -> Node:
        if name not in self._symbols:
            definition = self._definitions.pop(name)  # a symbol that needs itself is a KeyError
            if isinstance(definition, str):
                definition = [definition]
            if not isinstance(definition, Mapping):
                definition = dict.fromkeys(definition, 1)
            nodes = [self._compile(template) for template in definition]
            self._symbols[name] = choice(nodes, list(definition.values()))
        return self._symbols[name]

    def _compile(self, template: str) -> Node:
        tokens = TOKEN.findall(template)
        assert "".join(tokens) == template, template
        assert template.isascii(), template
        node = self._alternation(tokens)
        assert not tokens, template
        return node

    def _alternation(self, tokens: list[str]) -> Node:
        """Compile tokens up to the closing bracket, which stays."""
        alternatives: list[list[Node]] = [[]]
        while tokens and tokens[0] != "]":
            token = tokens.pop(0)
            if token == "|":
                alternatives.append([])
            elif token == "[":
                alternatives[-1].append(self._alternation(tokens))
                tokens.pop(0)
            elif token[0] == "<":
                alternatives[-1].append(self._symbol(token[1:-1]))
            elif token[0] == "{":
                alternatives[-1].append(self._mention(token[1:-1]))
            else:
                alternatives[-1].append(Literal(token))
        nodes = [parts[0] if len(parts) == 1 else Together(tuple(parts)) for parts in alternatives]
        return choice(nodes, [1] * len(nodes))

    def _mention(self, reference: str) -> Mention:
        name, _, form = reference.partition(".")
        variable = self._names.index(name)
        key = (variable, form or "name")
        if key not in self._mentions:
            texts = tuple(self._variables[name][key[1]])
            assert len(texts) == self._sizes[variable], reference
            assert "".join(texts).isascii(), reference
            values_of: dict[str, int] = {}
            for value, text in enumerate(texts):
                values_of[text] = values_of.get(text, 0) | 1 << value
            self._mentions[key] = Mention(variable, texts, values_of)
        return self._mentions[key]

    def generate(self, draw: Draw) -> str:
        """Make one story out of uniform draws."""
        plot, drawn = self._drawn[draw(len(self._drawn))]
        values = [0] * len(self._sizes)
        for variable, other in drawn:
            if other is None:
                values[variable] = draw(self._sizes[variable])
            else:
                value = draw(self._sizes[variable] - 1)
                values[variable] = value + (value >= values[other])
        pieces: list[str] = []
        plot.emit(draw, values, pieces)
        return "".join(pieces)

    def read_story(self, story: str) -> tuple[float, int, int]:
        """Read a text in every possible way.

        Returns:
            The probability of the text, the number of its derivations, and how many of its
            characters the grammar can follow.
        """
        reader = Reader(story)
        probability, derivations = 0.0, 0
        for plot, drawn in self._drawn:
            for end, masks, share, count in plot.read(reader, 0, self._any):
                if end == len(story):
                    assignments = self._assignments(drawn, masks)
                    of_all = math.prod(self._options(v, other) for v, other in drawn)
                    probability += share * assignments / of_all / len(self._drawn)
                    derivations += count * assignments
        return probability, derivations, reader.furthest

    def is_sentence(self, sentence: str) -> bool:
        """Say whether one sentence symbol gives this text for some values of the variables."""
        reader = Reader(sentence)
        return any(
            end == len(sentence) and self._can_differ(masks)
            for node in self.sentences.values()
            for end, masks, _, _ in node.read(reader, 0, self._any)
        )

    def _can_differ(self, masks: Masks) -> bool:
        """Say whether variables that must differ still can."""
        return all(
            masks[variable] != masks[other] or masks[variable].bit_count() > 1
            for variable, other in self._distinct.items()
        )

    def _options(self, variable: int, other: int | None) -> int:
        return self._sizes[variable] - (other is not None)

    def _assignments(self, drawn: list[tuple[int, int | None]], masks: Masks) -> int:
        """Count the values of a plot's variables that agree with what was read."""
        paired = {other for _, other in drawn}
        ways = 1
        for variable, other in drawn:
            if other is not None:
                both = masks[variable].bit_count() * masks[other].bit_count()
                ways *= both - (masks[variable] & masks[other]).bit_count()
            elif variable not in paired:
                ways *= masks[variable].bit_count()
        return ways

    def entropy_bits(self) -> float:
        """Sum the entropy of every draw, weighted by the probability that it is made."""
        of_plots = [
            plot.bits() + sum(math.log2(self._options(v, other)) for v, other in drawn)
            for plot, drawn in self._drawn
        ]
        return math.log2(len(of_plots)) + sum(of_plots) / len(of_plots)

    def expected_bytes(self) -> float:
        """Give the mean length of a story."""
        return sum(plot.expected_bytes() for plot in self.plots.values()) / len(self.plots)


def choice(nodes: list[Node], weights: list[int]) -> Node:
    """Give a choice, or the only alternative itself."""
    assert min(weights) > 0
    if len(nodes) == 1:
        return nodes[0]
    tickets = [node for node, weight in zip(nodes, weights, strict=True) for _ in range(weight)]
    return Choice(tuple(nodes), tuple(weights), tuple(tickets))
