"""Draw the attention mask of questions that share contexts, as the model's code makes it.

python scripts/draw_mask.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib.pyplot as plt

from lora_or_full.data.prompt import IGNORED, labels
from lora_or_full.modeling.prefix_packing import PADDING_SEGMENT, Packed, packed
from lora_or_full.report import plots

END = "<end>"
# Contexts, each with its questions and their answers; a word is a token here.
TEXTS = {
    "Context: Ada built the mill of Oslo .": {
        "Question: Who built it ? Answer:": "Ada",
        "Question: Where is it ? Answer:": "Oslo",
    },
    "Context: Riga is old .": {
        "Question: What ? Answer:": "Riga",
        "Question: How ? Answer:": "old",
    },
}
OF_BRANCH = (plots.BLUE, plots.AMBER, plots.GREEN)  # context, first and second question


def sequence() -> tuple[list[str], Packed]:
    """The word of each token of TEXTS, and the packed sequence."""
    words: dict[str, int] = {}
    contexts, branches, targets = [], [], []
    for context, questions in TEXTS.items():
        for question, answer in questions.items():
            before, said = (
                [words.setdefault(word, len(words)) for word in text.split()]
                for text in (question, f"{answer} {END}")
            )
            contexts.append([words.setdefault(word, len(words)) for word in context.split()])
            branches.append(before + said)
            targets.append(labels(before, said, mask_prompt=True))
    made = packed(contexts, branches, targets, length=100)
    names = list(words)
    return [names[number] for number in made.input_ids[0].tolist()], made


def draw() -> str:
    """The drawing as SVG: one row per query token, one column per key token."""
    names, made = sequence()
    # The padding of a block is left out: no token attends to it.
    kept = (made.segment_of != PADDING_SEGMENT).nonzero().squeeze(1).tolist()
    column_of = {token: column for column, token in enumerate(kept)}
    with plt.rc_context(plots.STYLE | {"axes.grid": False, "font.size": 7}):
        figure, axis = plt.subplots(figsize=(8, 7.4), layout="constrained")
        for block in made.blocks:
            for row in (token for token in kept if block.start <= token < block.stop):
                seen = (block.mask[row - block.start].nonzero().squeeze(1) + block.start).tolist()
                cells = [token for token in seen if token in column_of]
                axis.broken_barh(
                    [(column_of[token], 1) for token in cells], (column_of[row], 1),
                    facecolors=[OF_BRANCH[made.segment_of[token]] for token in cells],
                    edgecolor="white", linewidth=0.5,
                )  # fmt: skip
        for column, token in enumerate(kept[:-1]):
            if made.labels[0, kept[column + 1]] != IGNORED:
                axis.text(len(kept) + 0.5, column + 0.5, f"→ {names[token + 1]}", va="center")
        middles = [column + 0.5 for column in range(len(kept))]
        positions = made.position_ids[0].tolist()
        axis.set_yticks(middles, [f"{names[t]}  {positions[t]:2}" for t in kept])
        axis.set_xticks(middles, [names[t] for t in kept], rotation=90)
        axis.set(xlim=(0, len(kept) + 5), ylim=(len(kept), 0), aspect="equal")
        axis.spines[["bottom", "left"]].set_visible(False)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        return plots.svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/packing_mask.svg"))
    output = parser.parse_args().output
    output.write_text(draw() + "\n", encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
