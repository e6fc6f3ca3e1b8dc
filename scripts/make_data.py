"""Write the built-in data set: made-up paragraphs with five questions each, as SQuAD v1.1 JSON.

With `--without-questions` every question is only "?". The score on that data is what a model can
reach without reading the question.

    python scripts/make_data.py
    python scripts/make_data.py --without-questions --output=without_questions
"""

import argparse
import json
from pathlib import Path

from builtin_text import KINDS, Paragraph, Writer

SIZES = ((3, 4), (4, 3), (4, 4))  # facts of a paragraph's first and second subject
SHARED = 1  # relations of both subjects: to answer, the subject of a question must be read
QUESTIONS = 5  # a paragraph
PARAGRAPHS = 4  # an article


def article(writer: Writer, number: int, region: str) -> dict:
    """Write an article: paragraphs about one kind of subject in one made-up region."""
    kind = list(KINDS)[number % len(KINDS)]
    title = KINDS[kind].title.draw(writer.rng, writer.split).format(r=region)
    paragraphs = []
    for part in range(PARAGRAPHS):
        paragraph = writer.paragraph(kind, region, writer.rng.choice(SIZES), SHARED)
        marks = f"{writer.split}-{number:03}-{part}"
        paragraphs.append({"context": paragraph.text, "qas": questions(writer, paragraph, marks)})
    return {"title": title, "paragraphs": paragraphs}


def questions(writer: Writer, paragraph: Paragraph, marks: str) -> list[dict]:
    """Write questions about facts of a paragraph, drawn at random and in random order."""
    asked = []
    for number, fact in enumerate(writer.rng.sample(paragraph.facts, QUESTIONS)):
        question = fact.relation.asks.draw(writer.rng, writer.split).replace("{s}", fact.subject)
        start = paragraph.text.index(fact.answers[0])
        # As in SQuAD, training questions have one answer; dev questions have all that are right.
        references = fact.answers if writer.split == "dev" else fact.answers[:1]
        answers = [{"text": text, "answer_start": start} for text in references]
        asked.append({"id": f"{marks}-{number}", "question": question, "answers": answers})
    return asked


def dataset(split: str, articles: int, seed: int) -> dict:
    """Write a split; the same seed gives the same text."""
    writer = Writer(split, seed)
    regions: dict[str, None] = {}  # ordered, and no two articles share a title
    while len(regions) < articles:
        regions[writer.word()] = None
    data = [article(writer, number, region) for number, region in enumerate(regions)]
    return {"version": "1.1", "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("assets/data"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train-articles", type=int, default=140)
    parser.add_argument("--dev-articles", type=int, default=25)
    parser.add_argument(
        "--without-questions", action="store_true", help='leave only "?" of every question'
    )
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    for split, articles in (("train", args.train_articles), ("dev", args.dev_articles)):
        squad = dataset(split, articles, args.seed)
        qas = [qa for art in squad["data"] for par in art["paragraphs"] for qa in par["qas"]]
        if args.without_questions:
            for qa in qas:
                qa["question"] = "?"
        path = args.output / f"{split}.json"
        path.write_text(json.dumps(squad, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {len(squad['data'])} articles, {len(qas)} questions")


if __name__ == "__main__":
    main()
