"""Made-up paragraphs of facts, for the built-in model and the built-in data set.

Every name is made of syllables, and its checksum decides whether it belongs to "train", "dev" or
"pretrain". So no name occurs in two of them, and no answer can be known without the paragraph.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32


@dataclass(frozen=True)
class Phrasings:
    """Phrasings of one thing; `held_out` is for the dev set only."""

    common: list[str]
    held_out: list[str]

    def draw(self, rng: random.Random, split: str) -> str:
        return rng.choice(self.common + self.held_out if split == "dev" else self.common)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: the type of its value, and phrasings of statements, questions and notes."""

    value: str
    says: Phrasings
    asks: Phrasings
    notes: Phrasings


@dataclass(frozen=True)
class Kind:
    """One kind of subject, and the facts that it can have."""

    title: Phrasings
    name: Phrasings
    intro: Phrasings
    again: Phrasings
    relations: list[Relation]


@dataclass(frozen=True)
class Fact:
    """A fact of a paragraph; `answers` are all gold answers, the first one is the bare value."""

    subject: str
    relation: Relation
    answers: list[str]


@dataclass(frozen=True)
class Paragraph:
    """A text and the facts in it; each answer occurs once."""

    text: str
    facts: list[Fact]


def read_phrases(path: Path) -> tuple[dict[str, list[str]], Phrasings, dict[str, Kind]]:
    """Read the words by type, the phrasings of restated facts, and the kinds of subject by name."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kinds: dict[str, Kind] = {}
    for block in text.strip().split("\n\n"):
        head, *rows = block.split("\n")
        entries = dict(row.split(" ", 1) for row in rows)
        if head == "words":
            words = {sort: entry.split() for sort, entry in entries.items()}
            continue
        ways = {key: _phrasings(entry) for key, entry in entries.items()}
        what, _, name = head.partition(" ")
        if what == "retelling":
            retelling = ways["told"]
        elif what == "kind":
            kind = kinds[name] = Kind(**ways, relations=[])
        else:
            kind.relations.append(Relation(name, **ways))
    return words, retelling, kinds


def _phrasings(entry: str) -> Phrasings:
    common, _, held_out = entry.partition(" || ")
    return Phrasings(common.split(" | "), held_out.split(" | ") if held_out else [])


WORDS, RETELLING, KINDS = read_phrases(Path(__file__).with_name("builtin_phrases.txt"))


class Writer:
    """Writes paragraphs and their retellings for one split, with the names of that split."""

    def __init__(self, split: str, seed: int) -> None:
        self.split = split
        self.rng = random.Random(f"{split}-{seed}")

    def paragraph(
        self, kind: str, region: str, sizes: tuple[int, ...], shared: int | None = None
    ) -> Paragraph:
        """Write a paragraph.

        Args:
            kind: Kind of its subjects.
            region: Name of the region.
            sizes: Number of facts of each subject.
            shared: Number of relations that both subjects have; None leaves it to chance (often).
        """
        while True:
            relations = self._relations(KINDS[kind], sizes, shared)
            drawn = self._paragraph(KINDS[kind], region, relations)
            # An answer that occurs once has one offset, and answers one question only.
            if all(drawn.text.count(fact.answers[0]) == 1 for fact in drawn.facts):
                return drawn

    def retelling(self, fact: Fact) -> tuple[str, str]:
        """Restate a fact: the words before its value, and the value."""
        named = self.rng.choice(fact.relation.notes.common)
        told = self.rng.choice(RETELLING.common).replace("{n}", named)
        # A statement will do too if it ends with the value: all that identifies it comes before.
        says = [say for say in fact.relation.says.common if re.search(r"\{v\}( \[.*\])?$", say)]
        if says and self.rng.random() < 0.25:
            told = self.rng.choice(says)
        before, _, _ = told.partition(" {v}")
        return _capital(before.replace("{s}", fact.subject)), fact.answers[0]

    def word(self) -> str:
        """Make a name that belongs to this split."""
        while True:
            word = self._one("onsets") + self._one("vowels") + self._one("middles")
            if self.rng.random() < 0.3:
                word += self._one("vowels") + self._one("middles")
            word = (word + self._one("endings")).capitalize()
            if self._owns(word):
                return word

    def _one(self, sort: str) -> str:
        return self.rng.choice(WORDS[sort])

    def _owns(self, text: str) -> bool:
        share = crc32(text.encode()) % 10
        return self.split == ("dev" if share == 0 else "train" if share <= 2 else "pretrain")

    def _relations(
        self, kind: Kind, sizes: tuple[int, ...], shared: int | None
    ) -> list[list[Relation]]:
        if shared is None:  # all draw from one short list, so most facts have a rival
            pool = self.rng.sample(kind.relations, max(sizes) + 1)
            return [self.rng.sample(pool, size) for size in sizes]
        first, second = sizes
        pool = self.rng.sample(kind.relations, first + second - shared)
        return [pool[:first], pool[-second:]]

    def _paragraph(self, kind: Kind, region: str, relations: list[list[Relation]]) -> Paragraph:
        rng = self.rng
        subjects = [self._fill(kind.name.draw(rng, self.split)) for _ in relations]
        told = [
            [(subject, relation) for relation in group]
            for subject, group in zip(subjects, relations, strict=True)
        ]
        rng.shuffle(told)
        plan = [pair for group in told for pair in group]
        if rng.random() < 0.5:  # taking turns, not one subject after the other
            rng.shuffle(plan)

        sentences: list[str] = []
        facts: list[Fact] = []
        for subject, relation in plan:
            say = relation.says.draw(rng, self.split)
            value = self._value(relation.value)
            mention = subject
            follows = facts and facts[-1].subject == subject and say.startswith("{s} ")
            if follows and rng.random() < 0.4:
                mention = kind.again.draw(rng, self.split)
            sentence = re.sub(r"[\[\]]", "", say).replace("{s}", mention).replace("{v}", value)
            # At most two facts a sentence: it is the second if the one before it is just a fact.
            if facts and sentences[-1] and rng.random() < 0.25:
                sentences[-1] += rng.choice((", and ", "; ", ", while ")) + sentence
                sentences.append("")
            else:
                sentences.append(sentence)
            facts.append(Fact(subject, relation, _answers(say, value)))
        if len(subjects) == 2:
            intro = kind.intro.draw(rng, self.split).format(a=subjects[0], b=subjects[1], r=region)
            sentences.insert(0 if rng.random() < 0.7 else len(sentences), intro)
        return Paragraph(" ".join(f"{_capital(line)}." for line in sentences if line), facts)

    def _fill(self, pattern: str) -> str:
        return re.sub(r"\{w\}", lambda _: self.word(), pattern)

    def _value(self, sort: str) -> str:
        rng = self.rng
        name, *limits = sort.split()
        bounds = tuple(int(limit) for limit in limits[:2])
        match name:
            case "person":
                return self._fill("{w} {w}")
            case "place" | "river":
                return self.word()
            case "org":
                return self._fill(rng.choice(("{w} & {w}", "the House of {w}", "{w} Brothers")))
            case "title":
                return f"{self._one('themes')} of {self.word()}"
            case "prize":
                return f"{self.word()} {rng.choice(('Prize', 'Medal', 'Award'))}"
            case "goods":
                while not self._owns(goods := f"{self._one('tints')} {self._one('wares')}"):
                    pass
                return goods
            case "year":
                return str(rng.randint(*bounds))
            case "date":
                return f"{rng.randint(1, 28)} {self._one('months')} {rng.randint(*bounds)}"
            case "span":
                first = rng.randint(*bounds)
                return f"{first}\N{EN DASH}{first + rng.randint(2, 9)}"
            case "money":
                amount = f"{rng.randint(1, 98)}.{rng.randint(1, 9)} million"
                return rng.choice((f"€{amount}", f"{amount} crowns"))
            case "price":
                return f"€{rng.randint(2, 98)}.{rng.choice((20, 40, 50, 80))}"
            case "length":
                return f"{rng.randint(*bounds):,} {limits[2]}"
            case "count":
                return f"{rng.randint(*bounds):,}"
        raise ValueError(f"unknown sort of value {sort!r} in the phrases")


def _answers(say: str, value: str) -> list[str]:
    """The value and equally correct answers: with the unit that follows, or without its own."""
    answers = [value]
    if unit := re.search(r"\{v\} \[(.*)\]", say):
        answers.append(f"{value} {unit[1]}")
    if bare := re.match(r"([\d,]+) (?:kilo)?metres$", value):
        answers.append(bare[1])
    return answers


def _capital(text: str) -> str:
    """Capitalize the first letter; str.capitalize would lower the others."""
    return text[:1].upper() + text[1:]
