"""The report's command: right numbers, nothing from data as markup, and a word for every gap."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_or_full.cli import main, report
from lora_or_full.errors import UserError
from lora_or_full.report import plots, render
from lora_or_full.report.collect import collect
from lora_or_full.report.render import Figure, Points, Section, Table, Text
from lora_or_full.report.sections.conclusion import conclusion
from lora_or_full.report.sections.configurations import configurations
from lora_or_full.report.sections.costs import cost
from lora_or_full.report.sections.overview import dynamics
from lora_or_full.report.stats.comparison import ArmComparison, compare_arms

PROJECT = Path(__file__).parents[2]


def concluded(tmp_path: Path) -> tuple[str, ArmComparison | None]:
    """The sentences of the first section on `study/`, and the comparison."""
    study = collect([tmp_path / "study"])
    found = compare_arms(study, 1.0)
    return words(conclusion(study, found)), found and found.pairs[0]


def words(section: Section) -> str:
    """All sentences of a section."""
    return " ".join(
        " ".join([block.text] if isinstance(block, Text) else block.items)
        for block in section.blocks
        if isinstance(block, (Text, Points))
    )


def tables(section: Section | None) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)] if section else []


def figures(section: Section | None) -> list[Figure]:
    return [block for block in section.blocks if isinstance(block, Figure)] if section else []


def swept(lr: float, f1: float = 50.0) -> Any:
    """Changes a record to a learning rate and the validation F1 of all epochs."""

    def change(record: dict[str, Any]) -> None:
        record["config"]["lr"] = lr
        for epoch in record["epochs"]:
            epoch["f1"] = f1

    return change


def test_a_whole_study(whole_study: Path) -> None:
    out = whole_study / "out"
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    numbers = json.loads((out / "report.json").read_text())
    for title in (
        "What may be concluded", "Results", "Dynamics", "Ablation: memory, time, size",
        "Significance", "Failure cases", "The recipe", "Efficiency and theory", "Provenance",
    ):  # fmt: skip
        assert f"\n## {title}\n" in text
        assert f"<h2>{title}</h2>" in page
    drawn = {file.name for file in (out / "figures").iterdir()}
    named = set(re.findall(r"\(figures/(\w+\.svg)\)", text))
    assert drawn == named
    assert len(drawn) >= 6
    assert page.count("<svg") == len(drawn)
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert len(rows) == 6
    [compared] = numbers["comparison"]["arms"]
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
    table = report.runs_csv(collect([tmp_path / "study"]))
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    assert len(rows) == 8
    assert not [cell for row in rows for cell in row.values() if cell[:1] in tuple("=+-@\t\r\n")]
    assert {row["run"] for row in rows} > {"'=1+1", "?1+1", "lora_9"}
    assert "0.125" in {row["validation_loss"] for row in rows}
    results = json.loads((tmp_path / "study" / "lora_9" / "results.json").read_text())
    [row] = [row for row in rows if row["run"] == "lora_9"]
    assert float(row["validation_exact_match"]) == results["epochs"][1]["exact_match"]
    assert int(row["train_questions"]) == results["data"]["train"]["questions"]
    assert int(row["epochs"]) == len(results["epochs"])


def test_a_new_report_takes_away_the_pictures_of_the_old_one_alone(tmp_path: Path) -> None:
    own = tmp_path / "figures" / "own.svg"
    own.parent.mkdir()
    own.write_text("<svg/>")
    sections = [Section(name, [Figure(name, "<svg/>", "")]) for name in ("scores", "differences")]
    for shown in (sections, sections[:1], sections, sections[1:]):
        render.write(tmp_path, "Title", shown)
        drawn = {file.stem for file in own.parent.iterdir()}
        assert drawn == {"own", *(section.title for section in shown)}
    assert own.read_text() == "<svg/>"


def test_the_plot_of_the_epochs_has_as_many_lines_as_can_be_told_apart(
    make_run: Any, tmp_path: Path
) -> None:
    make_run("full", 1)
    for number in range(1, 7):
        make_run("lora", 1, change=swept(number / 1000, f1=number), name=f"lora_{number}")
        if number in (4, 5):
            [figure] = figures(dynamics(collect([tmp_path])))
            assert ("At most 4 configurations of each mode" in figure.caption) == (number > 4)
    make_run("lora", 2, change=swept(0.001, f1=1), name="lora_1_2")  # two seeds beat a better F1
    section = dynamics(collect([tmp_path]))
    [figure], [table] = figures(section), tables(section)
    for number in range(1, 7):
        assert f"LoRA, lr {number / 1000:g}, epoch 1" in [row[0] for row in table.rows]
        assert (f"LoRA, lr {number / 1000:g}<" in figure.svg) == (number in (1, 4, 5, 6))


class Tags(HTMLParser):
    """Which elements there are, and what they load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_text_from_data_is_never_markup_and_nothing_is_loaded(whole_study: Path) -> None:
    text, page = ((whole_study / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    parser = Tags()
    parser.feed(page)
    assert not parser.tags & {"b", "script", "img", "link", "iframe"}
    assert all(load.startswith("#") for load in parser.loads)
    assert "<b>Place" not in text + page
    assert "&lt;b&gt;Place" in page
    assert "&lt;b&gt;Place" in text
    assert r"\| \*" in text


def test_what_differs_besides_the_mode_is_reported(make_run: Any, tmp_path: Path) -> None:
    def other(record: dict[str, Any]) -> None:
        record["config"]["data"]["train_size"] = 20
        record["data"]["train"]["fingerprint"] = "fewer"
        record["environment"] |= {"cores": 64, "packages": {"torch": "2.0.0"}}

    for seed in (1, 2):
        make_run("lora", seed)
        make_run("full", seed, change=other)
    text, _ = concluded(tmp_path)
    assert "differ in more than the mode: in data.train_size (40 and 20)" in text
    assert "were not trained on the same questions (seeds 1, 2)" in text
    assert "ran under different conditions (cores, packages;" in text


def test_a_validation_loss_that_rises_is_reported_for_each_mode(
    make_run: Any, tmp_path: Path
) -> None:
    def rise(record: dict[str, Any]) -> None:
        record["epochs"][1]["validation_loss"] = 9.0
        record["best_epoch"] = 1

    for seed in (1, 2):
        make_run("lora", seed)
        make_run("full", seed, change=rise)
    text = words(dynamics(collect([tmp_path])))
    says = "the validation loss rises after its lowest epoch in {} of 2 runs"
    assert f"LoRA: {says.format(0)}" in text
    assert f"full: {says.format(2)}; the training loss still falls in 2 of these" in text


def test_the_components_of_memory_add_up_to_the_measured_peak(
    make_run: Any, tmp_path: Path
) -> None:
    def more(record: dict[str, Any]) -> None:
        record["cost"]["step"]["activations_bytes"] = 2_000_000_000

    make_run("lora", 1, change=more)
    [table] = [t for t in tables(cost(collect([tmp_path]))) if t.head[0] == "MB"]
    assert table.rows[0][-1] == "900.0"
    assert table.rows[0][-2].startswith("-1,")


def test_one_mode_says_that_there_is_nothing_to_compare(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    make_run("lora", 2)
    folder = report.write([tmp_path / "study"], tmp_path / "out", 1.0)
    text = (folder / "report.md").read_text()
    assert "There is nothing to compare" in text
    assert "## Significance" not in text
    assert json.loads((folder / "report.json").read_text())["comparison"] is None
    make_run("full", 3)  # no seed in common
    text, found = concluded(tmp_path)
    assert "There is nothing to compare" in text
    assert found is None


def test_other_adapters_have_names_and_colours_of_their_own(make_run: Any, tmp_path: Path) -> None:
    def dora(record: dict[str, Any]) -> None:  # with PEFT's own lora_alpha
        record["config"] |= {"mode": "dora", "label": "DoRA"}
        record["config"]["adapter"]["use_dora"] = True
        del record["config"]["adapter"]["lora_alpha"]

    def ia3(record: dict[str, Any]) -> None:
        record["config"] |= {"mode": "ia3", "label": "IA3", "rank": None, "frozen_dtype": None}
        record["config"]["adapter"] = {"_target_": "peft.IA3Config", "target_modules": ["c_attn"]}
        record["shapes"] = {"h.0.attn.c_attn.ia3_l.default": [192, 1]}

    for name, change in (("dora", dora), ("ia3", ia3)):
        make_run("lora", 1, change=change, name=name)
    make_run("lora", 1)
    make_run("full", 1)
    study = collect([tmp_path])
    colours = plots.colours(study)
    assert list(colours) == ["DoRA", "IA3", "LoRA", "full"]
    assert len(set(colours.values())) == 4
    assert (colours["DoRA"], colours["full"]) == (plots.BLUE, plots.VERMILION)
    folder = report.write([tmp_path / "study"], tmp_path / "out", 1.0)
    assert "# DoRA, IA3 and LoRA against full fine-tuning" in (folder / "report.md").read_text()


def test_every_arm_is_compared_with_full_fine_tuning_at_once(make_run: Any, tmp_path: Path) -> None:
    for seed in range(1, 6):
        make_run("full", seed, share=0.9)
        for mode, share in (("lora", 0.9), ("dora", 0.05), ("rslora", 0.85), ("ia3", 0.3)):
            make_run(mode, seed, share=share)
    study = collect([tmp_path / "study"])
    found = compare_arms(study, 1.0)
    assert found is not None
    assert [pair.arm.label for pair in found.pairs] == ["DoRA", "IA3", "LoRA", "rsLoRA"]
    assert found.reference.label == "full"
    # Holm over four arms and two metrics: the smallest p of eight counts eight times.
    unadjusted = [pair.over_both[m].p for pair in found.pairs for m in ("exact_match", "f1")]  # type: ignore[union-attr]
    adjusted = [pair.holm["over both"][m] for pair in found.pairs for m in ("exact_match", "f1")]
    smallest = unadjusted.index(min(unadjusted))
    assert adjusted[smallest] == pytest.approx(min(1.0, 8 * unadjusted[smallest]))
    section = conclusion(study, found)
    [table], [figure] = tables(section), figures(section)
    verdicts = {row[0]: row[3] for row in table.rows}
    assert verdicts["DoRA"].startswith("lower (p")
    assert verdicts["LoRA"].startswith("open (p")
    for label in ("DoRA", "IA3", "LoRA", "rsLoRA"):
        assert f">{label}</text>" in figure.svg
    text = (report.write([tmp_path / "study"], tmp_path / "out", 1.0) / "report.md").read_text()
    assert "| IA3, seed 3 |" in text
    assert "only rsLoRA answers exactly" in text


@pytest.mark.parametrize(("against", "arms"), [(None, ["LoRA"]), ("LoRA", ["DoRA"])])
def test_without_full_fine_tuning_another_arm_is_the_reference(
    against: str | None, arms: list[str], make_run: Any, tmp_path: Path
) -> None:
    make_run("lora", 1)
    make_run("dora", 1)
    study = collect([tmp_path])
    found = compare_arms(study, 1.0, against)
    assert found is not None
    assert [pair.arm.label for pair in found.pairs] == arms
    assert "The reference is not full fine-tuning" in words(conclusion(study, found))


def test_the_configurations_of_one_mode_are_compared_with_a_named_one(
    make_run: Any, tmp_path: Path
) -> None:
    for lr in (0.001, 0.002, 0.003):
        make_run("lora", 1, change=swept(lr), name=f"lora_{lr}")
    study = collect([tmp_path])
    assert compare_arms(study, 1.0) is None
    found = compare_arms(study, 1.0, "LoRA, lr 0.002")
    assert found is not None
    assert [pair.arm.label for pair in found.pairs] == ["LoRA, lr 0.001", "LoRA, lr 0.003"]
    with pytest.raises(UserError, match=r"--against=full: must be one of: LoRA, lr 0\.001; "):
        compare_arms(study, 1.0, "full")


def test_unlike_cards_make_one_arm_whose_costs_are_given_apart(
    make_run: Any, tmp_path: Path
) -> None:
    def on(card: str, precision: str) -> Any:
        def change(record: dict[str, Any]) -> None:
            record["environment"]["device"] = card
            record["config"]["trainer"]["precision"] = precision
            record["cost"]["peak_memory_bytes"]["train"] = 2_000_000_000 + len(card)

        return change

    for mode in ("lora", "full"):
        make_run(mode, 1, change=on("Tesla T4", "16-mixed"))
        make_run(mode, 2, change=on("NVIDIA L4", "bf16-mixed"))
    study = collect([tmp_path])
    assert [(arm.label, list(arm.runs)) for arm in study.arms] == [
        ("LoRA", [1, 2]), ("full", [1, 2]),
    ]  # fmt: skip
    assert [list(arm.runs) for arm in study.by_hardware] == [[1], [2], [1], [2]]
    assert [row[0] for row in tables(cost(study))[0].rows] == [
        f"{label}, {card}, resident set (seed {seed})"
        for label in ("LoRA", "full")
        for seed, card in ((1, "Tesla T4, 16-mixed"), (2, "NVIDIA L4, bf16-mixed"))
    ]
    text, found = concluded(tmp_path)
    assert "The runs are on 2 kinds of hardware (Tesla T4, 16-mixed, resident set:" in text
    assert found is not None
    assert found.seeds == [1, 2]
    assert found.alike is not None
    assert [list(arm.runs) for arm in found.alike] == [[1], [1]]


def test_precisions_of_one_seed_are_arms_to_compare(make_run: Any, tmp_path: Path) -> None:
    def low(record: dict[str, Any]) -> None:
        record["config"]["trainer"]["precision"] = "bf16-mixed"

    make_run("lora", 1)
    make_run("lora", 1, change=low, name="low")
    labels = [arm.label for arm in collect([tmp_path]).arms]
    assert labels == [
        "LoRA, trainer.precision 32-true", "LoRA, trainer.precision bf16-mixed"
    ]  # fmt: skip


def test_one_epoch_draws_no_curve(make_run: Any, tmp_path: Path) -> None:
    def one(record: dict[str, Any]) -> None:
        record["epochs"], record["best_epoch"] = record["epochs"][:1], 1

    make_run("lora", 1, change=one)
    assert figures(dynamics(collect([tmp_path]))) == []


def test_runs_that_stopped_at_other_epochs_are_shown_to_their_ends(
    make_run: Any, tmp_path: Path
) -> None:
    def one(record: dict[str, Any]) -> None:
        record["epochs"], record["best_epoch"] = record["epochs"][:1], 1

    make_run("lora", 1, change=one)
    make_run("lora", 2)
    section = dynamics(collect([tmp_path]))
    [table] = tables(section)
    assert [(row[0], row[-1]) for row in table.rows] == [
        ("LoRA, epoch 1", "1 of 2"), ("LoRA, epoch 2", "1 of 1"),
    ]  # fmt: skip
    assert len(figures(section)) == 1


def test_a_question_is_an_example_once(whole_study: Path) -> None:
    text = (whole_study / "out" / "report.html").read_text()
    asked = re.findall(r'<div class="example"><strong dir="auto">(.*?)</strong>', text)
    assert len(asked) > 4
    assert len(asked) == len(set(asked))


def test_figures_are_as_wide_as_each_other_and_no_axis_leaves_what_can_be(
    whole_study: Path,
) -> None:
    drawn = {f.stem: f.read_text() for f in (whole_study / "out" / "figures").iterdir()}
    assert {re.search(r'width="([\d.]+)pt"', svg)[1] for svg in drawn.values()} == {"648"}  # type: ignore[index]
    ticks = [float(n) for n in re.findall(r">(-?[\d.]+)</text>", drawn["scores"])]
    assert ticks
    assert all(0 <= tick <= 100 for tick in ticks)


def test_one_seed_says_nothing_of_the_methods(make_run: Any, tmp_path: Path) -> None:
    make_run("lora", 1)
    make_run("full", 1)
    text, found = concluded(tmp_path)
    assert "nothing can be said about the two methods" in text
    assert found is not None
    assert found.over_both == {"exact_match": None, "f1": None}


def test_unequal_seeds_are_named_and_left_out_of_the_comparison(
    make_run: Any, tmp_path: Path
) -> None:
    for seed in (1, 2):
        make_run("lora", seed)
        make_run("full", seed)
    make_run("lora", 7)
    (make_run("full", 9) / "results.json").unlink()
    text, found = concluded(tmp_path)
    assert found is not None
    assert found.seeds == [1, 2]
    assert "LoRA has seeds that the other does not have (7)" in text
    assert "full_9: not finished" in text


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
    text, found = concluded(tmp_path)
    assert "with one paragraph nothing can be said about other questions" in text
    assert found is not None
    assert found.over_paragraphs["f1"].interval is None


def test_masked_prompts_are_compared_with_open_ones_and_never_mixed(
    make_run: Any, tmp_path: Path
) -> None:
    def unmask(record: dict[str, Any]) -> None:
        record["config"]["mask_prompt"] = False

    for seed in (1, 2):
        make_run("full", seed)
        make_run("lora", seed)
        make_run("lora", seed, share=1.0, change=unmask, name=f"open_{seed}")
    _, found = concluded(tmp_path)
    assert found is not None
    assert found.arm.label == "LoRA, mask_prompt True"
    [table] = tables(configurations(collect([tmp_path])))
    [[label, seeds, *_]] = table.rows
    assert (label, seeds) == ("LoRA, mask_prompt False", "2")


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_best_of_a_mode_is_compared_with_its_other_configurations(
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
    study = collect([tmp_path])
    [table] = tables(configurations(study))
    assert table.head[0] == "LoRA, rank 32, minus"
    [[label, shared, _, f1, time, memory]] = table.rows
    assert (label, shared, time, memory) == ("LoRA, rank 8", str(seeds), "× 3.00", "× 1.00")
    scores = {arm.label: arm.test("f1")[:seeds] for arm in study.arms}
    best, other = (scores[f"LoRA, rank {rank}"] for rank in (32, 8))
    mean = sum(best) / seeds - sum(other) / seeds
    found = [float(n.replace("−", "-")) for n in re.findall(r"[+−][\d.]+", f1)]
    assert found[0] == pytest.approx(mean, abs=0.005)
    assert found[1] < found[0] < found[2]


def test_a_grid_shows_its_curves_and_says_where_the_best_lies(
    make_run: Any, tmp_path: Path
) -> None:
    for number, lr in enumerate((1e-5, 1e-4, 1e-3)):
        make_run("lora", 1, change=swept(lr, f1=50.0 + number), name=f"lora{number}")
        make_run("full", 1, change=swept(lr, f1=50.0 - abs(number - 1)), name=f"full{number}")

    def unlike(record: dict[str, Any]) -> None:  # not of the grid, since its batches differ too
        record["config"] |= {"lr": 1e-2, "batch_size": 64}

    make_run("lora", 1, change=unlike, name="unlike")
    section = configurations(collect([tmp_path]))
    assert section is not None
    text = words(section)
    assert (
        "mode=lora: the best learning rate on validation is 0.001 of 1e-05, 0.0001, 0.001;" in text
    )
    assert text.count("it lies at the edge of the grid") == 1
    [figure] = figures(section)
    assert figure.name == "by_lr"
    for tick in ("1e-05", "0.0001", "0.001"):
        assert f">{tick}</text>" in figure.svg
    assert "mathdefault" not in figure.svg


@pytest.mark.parametrize(
    ("prepare", "margin", "message"),
    [
        (lambda place: None, 1.0, "There is no folder"),
        (lambda place: place.mkdir(), 1.0, "they hold no run at all"),
        (lambda place: place.mkdir(), 0.0, "--margin=0"),
        (lambda place: place.mkdir(), float("nan"), "--margin=nan"),
    ],
)
def test_nothing_to_report_on_is_refused(
    prepare: Any, margin: float, message: str, tmp_path: Path
) -> None:
    prepare(tmp_path / "study")
    with pytest.raises(UserError, match=message):
        report.write([tmp_path / "study"], tmp_path / "out", margin)
    assert not (tmp_path / "out").exists()


def test_the_command_needs_no_torch_and_prints_where_the_report_is(
    whole_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = (
        "import sys; from lora_or_full.cli import main; main.main();"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    study = whole_study / "study"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(study)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(study / "report" / "report.html") in done.stdout
    assert (study / "report" / "report.html").is_file()
    # Of several folders, it writes into none.
    monkeypatch.chdir(tmp_path)
    runs = [str(file.parent) for file in sorted(study.glob("*/results.json"))]
    main.main(["report", *runs])
    assert capsys.readouterr().out.startswith(str(Path("report", "report.html")))
    assert (tmp_path / "report" / "report.html").is_file()
    assert not (Path(runs[0]) / "report").exists()
    with pytest.raises(SystemExit) as stop:
        main.main(["report", str(whole_study / "nowhere")])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("Error: There is no folder")
