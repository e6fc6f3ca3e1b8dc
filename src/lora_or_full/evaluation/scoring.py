"""What is left of an answer when it is scored, by the rules that the key `scoring` names.

`squad`: Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", and
its evaluation script for v1.1.

`mlqa-<language>`: Lewis et al., 2020, "MLQA: Evaluating Cross-lingual Extractive Question
Answering", and its evaluation script, for en, es, de, vi, ar, hi and zh. Other languages follow its
rules without articles; where a language is written without spaces, each character is a word.
"""

import re
import string
import sys
import unicodedata
from collections.abc import Iterable

SQUAD, MLQA = "squad", "mlqa-"
PUNCTUATION = str.maketrans("", "", string.punctuation)
ENGLISH = re.compile(r"\b(a|an|the)\b")
ARTICLES = {
    "en": ENGLISH,
    "es": re.compile(r"\b(un|una|unos|unas|el|la|los|las)\b"),
    "de": re.compile(r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "vi": re.compile(r"\b(của|là|cái|chiếc|những)\b"),
    "ar": re.compile("ال"),  # the script removes it inside words too
}
# Characters that are words by themselves; those of zh are the script's.
KANA = "\u3040-\u30ff\uff66-\uff9f"
UNSPACED = {
    "ja": f"{KANA}\u3005\u3400-\u4dbf\u4e00-\u9fff",
    "zh": "\u4e00-\u9fa5",
    "th": "\u0e00-\u0e7f",
    "lo": "\u0e80-\u0eff",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17ff",
}
CHARACTERS = {language: re.compile(f"([{own}])") for language, own in UNSPACED.items()}
JOINED = re.compile(f"[{''.join(UNSPACED.values())}]{{2}}")
OTHER_RULES = re.compile("[\u0600-\u06ff\u0900-\u097f]")  # Arabic and Devanagari
# The language to suggest: the first that a gold answer has characters of.
SCRIPTS = UNSPACED | {
    "ja": KANA, "zh": UNSPACED["ja"], "ar": "\u0600-\u06ff", "hi": "\u0900-\u097f",
}  # fmt: skip
FEW = 0.1  # share of gold answers in a script that needs no warning


def normalize(text: str, scoring: str) -> str:
    """Lowercase a text, and remove punctuation, articles and extra white space."""
    text = text.lower()
    if scoring == SQUAD:
        text = ENGLISH.sub(" ", text.translate(PUNCTUATION))
    else:
        language = scoring.removeprefix(MLQA)
        text = "".join(c for c in text if not _is_punctuation(c))
        if language in ARTICLES:
            text = ARTICLES[language].sub(" ", text)
        if language in CHARACTERS:
            text = CHARACTERS[language].sub(r" \1 ", text)
    return " ".join(text.split())


def rules(scoring: str) -> str:
    """Name the rules in words."""
    language = scoring.removeprefix(MLQA)
    return "SQuAD v1.1's rules" if scoring == SQUAD else f"MLQA's rules for the language {language}"


def warn_of_script(answers: Iterable[str], scoring: str) -> None:
    """Print a warning if gold answers are in a script that the rules do not suit."""
    golds = list(answers)
    joined = [gold for gold in golds if JOINED.search(normalize(gold, scoring))]
    other = [gold for gold in golds if scoring == SQUAD and OTHER_RULES.search(gold)]
    if len(joined) + len(other) <= FEW * len(golds):
        return
    example = (joined or other)[0]
    language = next(name for name, own in SCRIPTS.items() if re.search(f"[{own}]", example))
    why, remedy = (
        ("has no spaces between words, so that F1 is hardly more than EM", "counts characters")
        if joined
        else ("has punctuation that these rules keep", "removes it")
    )
    print(
        f"Warning: scoring={scoring} does not suit {len(joined) + len(other):,} of {len(golds):,} "
        f"gold answers, such as {example!r}: their script {why}. "
        f"scoring={MLQA}{language} {remedy} (another language: {MLQA} and its code).",
        file=sys.stderr,
    )


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
