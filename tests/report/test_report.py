"""The report's command: right numbers, nothing from data as markup, and a word for every gap."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_or_full.cli import report
from lora_or_full.errors import UserError

PROJECT = Path(__file__).parents[2]


def made(tmp_path: Path, **more: Any) -> tuple[str, str, dict[str, Any]]:
    """Markdown, HTML and numbers of the report on `study/`."""
    folder = report.write([tmp_path / "study"], tmp_path / "out", **({"margin": 1.0} | more))
    numbers = json.loads((folder / "report.json").read_text())
    return (folder / "report.md").read_text(), (folder / "report.html").read_text(), numbers


def whole_study(make_run: Any) -> None:
    for seed in (1, 2, 3):
        make_run("lora", seed, share=0.6)
        make_run("full", seed, share=0.8)


def test_a_whole_study(make_run: Any, tmp_path: Path) -> None:
    whole_study(make_run)
    text, page, numbers = made(tmp_path)
    for title in (
        "What may be concluded", "Results", "Dynamics", "Ablation: memory, time, size",
        "Significance", "Failure cases", "The recipe", "Efficiency and theory", "Provenance",
    ):  # fmt: skip
        assert f"\n## {title}\n" in text
        assert f"<h2>{title}</h2>" in page
    figures = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    named = set(re.findall(r"\(figures/(\w+\.svg)\)", text))
    assert figures == named
    assert len(figures) >= 6
    assert page.count("<svg") == len(figures)
    rows = list(csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines()))
    assert len(rows) == 6
    compared = numbers["comparison"]
    for metric in ("exact_match", "f1"):
        by_mode = {
            mode: [float(row[metric]) for row in rows if row["mode"] == mode]
            for mode in ("lora", "full")
        }
        apart = [a - b for a, b in zip(by_mode["lora"], by_mode["full"], strict=True)]
        assert compared["over_seeds"][metric]["differences"] == pytest.approx(apart)
        mean = sum(apart) / 3
        for kind in ("over_seeds", "over_paragraphs", "over_both"):
            assert compared[kind][metric]["mean"] == pytest.approx(mean)
    assert "smallest p" in text
    assert "0.250" in text  # what sign flips of three seeds can give at least


def test_no_cell_of_the_table_is_a_formula(make_run: Any, tmp_path: Path) -> None:
    for seed, start in enumerate("=+-@\t\r\n", 1):
        make_run("lora", seed, name=f"{start}1+1", change=lambda r: r["environment"].update(
            commit="@SUM(1,1)"))  # fmt: skip
    make_run("lora", 9, change=lambda r: r["epochs"][1].update(validation_loss=0.125))
    made(tmp_path)
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert not [cell for row in rows for cell in row.values() if cell[:1] in tuple("=+-@\t\r\n")]
    assert {row["run"] for row in rows} > {"'=1+1", "?1+1", "lora_9"}
    assert "0.125" in {row["validation_loss"] for row in rows}
    results = json.loads((tmp_path / "study" / "lora_9" / "results.json").read_text())
    [row] = [row for row in rows if row["run"] == "lora_9"]
    assert float(row["validation_exact_match"]) == results["epochs"][1]["exact_match"]
    assert int(row["train_questions"]) == results["data"]["train"]["questions"]
    assert int(row["epochs"]) == len(results["epochs"])


def test_a_new_report_takes_away_the_pictures_of_the_old_one_alone(
    make_run: Any, tmp_path: Path
) -> None:
    make_run("lora", 1)
    own = tmp_path / "out" / "figures" / "own.svg"
    own.parent.mkdir(parents=True)
    own.write_text("<svg/>")
    made(tmp_path)
    assert not (own.parent / "differences.svg").exists()
    make_run("full", 1)
    made(tmp_path)
    assert (own.parent / "differences.svg").exists()
    shutil.rmtree(tmp_path / "study" / "full_1")
    made(tmp_path)
    assert not (own.parent / "differences.svg").exists()
    assert own.read_text() == "<svg/>"


def test_the_plot_of_the_epochs_has_as_many_lines_as_can_be_told_apart(
    make_run: Any, tmp_path: Path
) -> None:
    def at(lr: float) -> Any:
        def change(record: dict[str, Any]) -> None:
            record["config"]["lr"] = lr
            for epoch in record["epochs"]:
                epoch["f1"] = 1000 * lr

        return change

    make_run("full", 1)
    for number in range(1, 7):
        make_run("lora", 1, change=at(number / 1000), name=f"lora_{number}")
        if number < 6:
            assert ("At most 4 configurations of each mode" in made(tmp_path)[0]) == (number > 4)
    make_run("lora", 2, change=at(0.001), name="lora_1_2")  # two seeds go before a better F1
    text, _, _ = made(tmp_path)
    picture = (tmp_path / "out" / "figures" / "dynamics.svg").read_text()
    for number in range(1, 7):
        assert f"LoRA, lr {number / 1000:g}, epoch 1" in text
        assert (f"LoRA, lr {number / 1000:g}<" in picture) == (number in (1, 4, 5, 6))


class Tags(HTMLParser):
    """Which elements there are, and what they load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_text_from_data_is_never_markup_and_nothing_is_loaded(
    make_run: Any, tmp_path: Path
) -> None:
    whole_study(make_run)
    text, page, _ = made(tmp_path)
    parser = Tags()
    parser.feed(page)
    assert not parser.tags & {"b", "script", "img", "link", "iframe"}
    assert all(load.startswith("#") for load in parser.loads)
    assert "<b>Place" not in text + page
    assert "&lt;b&gt;Place" in page
    assert "&lt;b&gt;Place" in text
    assert r"\| \*" in text


def test_what_differs_besides_the_mode_is_said(make_run: Any, tmp_path: Path) -> None:
    def other(record: dict[str, Any]) -> None:
        record["config"]["data"]["train_size"] = 20
        record["data"]["train"]["fingerprint"] = "fewer"

    for seed in (1, 2):
        make_run("lora", seed)
        make_run("full", seed, change=other)
    text = made(tmp_path)[0]
    assert "differ in more than the mode: in data.train\\_size (40 and 20)" in text
    assert "were not trained on the same questions (seeds 1, 2)" in text


def test_modes_that_ran_elsewhere_are_told(make_run: Any, tmp_path: Path) -> None:
    def elsewhere(record: dict[str, Any]) -> None:
        record["environment"] |= {"cores": 64, "packages": {"torch": "2.0.0"}}

    for seed in (1, 2):
        make_run("lora", seed, change=elsewhere)
        make_run("full", seed)
    text, _, _ = made(tmp_path)
    assert "ran under different conditions (cores, packages;" in text


def test_a_validation_loss_that_rises_is_told_for_each_mode(make_run: Any, tmp_path: Path) -> None:
    def rise(record: dict[str, Any]) -> None:
        record["epochs"][1]["validation_loss"] = 9.0
        record["best_epoch"] = 1

    for seed in (1, 2):
        make_run("lora", seed)
        make_run("full", seed, change=rise)
    text = made(tmp_path)[0]
    says = "the validation loss rises after its lowest epoch in {} of 2 runs"
    assert f"LoRA: {says.format(0)}" in text
    assert f"full: {says.format(2)}; the training loss still falls in 2 of these" in text


def test_the_parts_of_memory_add_up_to_the_measured_peak(make_run: Any, tmp_path: Path) -> None:
    def more(record: dict[str, Any]) -> None:
        record["cost"]["step"]["activations_bytes"] = 2_000_000_000

    make_run("lora", 1, change=more)
    _, _, numbers = made(tmp_path)
    [table] = [t for t in numbers["tables"]["Ablation: memory, time, size"] if t["head"][0] == "MB"]
    assert table["rows"][0][-1] == "900.0"
    assert table["rows"][0][-2].startswith("-1,")


def test_one_mode_says_that_there_is_nothing_to_compare(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    make_run("lora", 2)
    text, _, numbers = made(tmp_path)
    assert "There is nothing to compare" in text
    assert "## Significance" not in text
    assert numbers["comparison"] is None


def test_one_seed_says_nothing_of_the_methods(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    make_run("full", 1)
    text, _, numbers = made(tmp_path)
    assert "nothing can be said about the two methods" in text
    assert numbers["comparison"]["over_both"] == {"exact_match": None, "f1": None}


def test_unequal_seeds_are_named_and_left_out_of_the_comparison(
    make_run: Any, tmp_path: Path
) -> None:
    whole_study(make_run)
    make_run("lora", 7)
    text, _, numbers = made(tmp_path)
    assert numbers["comparison"]["seeds"] == [1, 2, 3]
    assert "LoRA has seeds that the other does not have (7)" in text
    make_run("full", 9, name="failed")
    (tmp_path / "study" / "failed" / "results.json").unlink()
    assert "not finished" in made(tmp_path)[0]


@pytest.mark.parametrize("questions", [1, 4])
def test_a_single_paragraph_gives_no_interval_over_paragraphs(
    questions: int, make_run: Any, tmp_path: Path
) -> None:
    for seed in (1, 2):
        for mode in ("lora", "full"):
            folder = make_run(mode, seed)
            rows = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
            kept = [row for row in rows if row["paragraph"] == 0][:questions]
            (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in kept))
            results = json.loads((folder / "results.json").read_text())
            for metric in ("exact_match", "f1"):
                results["test"][metric] = sum(p[metric] for p in kept) / questions
            (folder / "results.json").write_text(json.dumps(results))
    text, _, numbers = made(tmp_path)
    assert "with one paragraph nothing can be said about other questions" in text
    assert numbers["comparison"]["over_paragraphs"]["f1"]["interval"] is None


def test_a_swept_value_is_written_at_its_place(make_run: Any, tmp_path: Path) -> None:
    def of(lr: float) -> Any:
        def change(record: dict[str, Any]) -> None:
            record["config"]["lr"] = lr

        return change

    for lr in (1e-3, 3e-3):
        make_run("lora", 1, change=of(lr), name=f"lora_{lr}")
    made(tmp_path)
    picture = (tmp_path / "out" / "figures" / "by_lr.svg").read_text()
    assert ">0.001</text>" in picture
    assert ">0.003</text>" in picture
    assert "mathdefault" not in picture


def test_no_common_seed(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    make_run("full", 2)
    assert "There is nothing to compare" in made(tmp_path)[0]


def test_masked_prompts_are_compared_with_open_ones_and_never_mixed(
    make_run: Any, tmp_path: Path
) -> None:
    def unmask(record: dict[str, Any]) -> None:
        record["config"]["mask_prompt"] = False

    whole_study(make_run)
    for seed in (1, 2, 3):
        make_run("lora", seed, share=1.0, change=unmask, name=f"open_{seed}")
    _, _, numbers = made(tmp_path)
    assert numbers["comparison"]["adapter"] == "LoRA, mask_prompt True"
    [table] = numbers["tables"]["The other configurations"]
    [[label, seeds, *_]] = table["rows"]
    assert (label, seeds) == ("LoRA, mask_prompt False", "3")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_best_of_a_mode_is_held_against_its_other_configurations(
    seeds: int, make_run: Any, tmp_path: Path
) -> None:
    def better(record: dict[str, Any]) -> None:
        record["config"]["rank"] = 32
        record["epochs"][1]["f1"] = 60.0
        record["cost"]["train_seconds"] *= 3

    for seed in range(1, seeds + 1):
        make_run("lora", seed, share=0.3)
        make_run("lora", seed, share=0.9, change=better, name=f"better_{seed}")
        make_run("full", seed)
    make_run("lora", 7, change=better, name="better_7")  # a seed that the other has not
    _, _, numbers = made(tmp_path)
    [table] = numbers["tables"]["The other configurations"]
    assert table["head"][0] == "LoRA, rank 32, minus"
    [[label, shared, _, f1, time, memory]] = table["rows"]
    assert (label, shared, time, memory) == ("LoRA, rank 8", str(seeds), "× 3.00", "× 1.00")
    arms = numbers["arms"]
    best, other = (arms[f"LoRA, rank {rank}"]["f1"][:seeds] for rank in (32, 8))
    mean = sum(best) / seeds - sum(other) / seeds
    found = [float(n.replace("−", "-")) for n in re.findall(r"[+−][\d.]+", f1)]
    assert found[0] == pytest.approx(mean, abs=0.005)
    assert found[1] < found[0] < found[2]


def test_a_grid_shows_its_curves_and_says_where_the_best_lies(
    make_run: Any, tmp_path: Path
) -> None:
    for place, lr in enumerate((1e-5, 1e-4, 1e-3)):

        def change(record: dict[str, Any], lr: float = lr, place: int = place) -> None:
            record["config"]["lr"] = lr
            for epoch in record["epochs"]:
                epoch["f1"] = 50.0 + (
                    place if record["config"]["mode"] == "lora" else -abs(place - 1)
                )

        for mode in ("lora", "full"):
            make_run(mode, 1, change=change, name=f"{mode}{place}")

    def unlike(record: dict[str, Any]) -> None:  # not of the grid, since its batches differ too
        record["config"] |= {"lr": 1e-2, "batch_size": 64}

    make_run("lora", 1, change=unlike, name="unlike")
    text, _, _ = made(tmp_path)
    assert (
        "mode=lora: the best learning rate on validation is 0.001 of 1e-05, 0.0001, 0.001;" in text
    )
    assert text.count("it lies at the edge of the grid") == 1
    assert (tmp_path / "out" / "figures" / "by_lr.svg").is_file()


@pytest.mark.parametrize(
    ("prepare", "margin", "message"),
    [
        (lambda place: None, 1.0, "There is no folder"),
        (lambda place: place.mkdir(), 1.0, "they hold no run at all"),
        (lambda place: place.mkdir(), 0.0, "--margin=0"),
        (lambda place: place.mkdir(), float("nan"), "--margin=nan"),
    ],
)
def test_nothing_to_report_on_is_told(
    prepare: Any, margin: float, message: str, tmp_path: Path
) -> None:
    prepare(tmp_path / "study")
    with pytest.raises(UserError, match=message):
        report.write([tmp_path / "study"], tmp_path / "out", margin)
    assert not (tmp_path / "out").exists()


def test_the_command_needs_no_torch_and_says_where_the_report_is(
    make_run: Any, tmp_path: Path
) -> None:
    whole_study(make_run)
    code = (
        "import sys; from lora_or_full.cli import main; main.main();"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(tmp_path / "study")],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "study" / "report" / "report.html") in done.stdout
    assert (tmp_path / "study" / "report" / "report.html").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "lora_or_full.cli.main", "report", str(tmp_path / "nowhere")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Error: There is no folder")
