"""A metric is one file: it is computed, recorded, logged and printed without another change."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_or_full.cli import report
from lora_or_full.config import schema, values
from lora_or_full.errors import UserError
from lora_or_full.evaluation import metrics
from lora_or_full.runs.reader import check_scores, read_answers, read_record
from lora_or_full.runs.schema import RunRecord

FILE = """
from lora_or_full.evaluation.metrics import Metric

METRIC = Metric("letters", lambda prediction, answers, scoring: min(100.0, len(prediction)))
"""


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letters.py").write_text(FILE)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    monkeypatch.setattr(values, "METRICS", [*values.METRICS, tmp_path])


@pytest.mark.usefixtures("letters")
def test_a_file_adds_a_metric(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import experiment
    from lora_or_full.training import console

    names = ["exact_match", "f1", "letters"]
    folder = tmp_path / "run"
    results = experiment.run(schema.validate(settings | {"metrics": names}), folder)
    record = read_record(folder, RunRecord)
    predictions, _ = read_answers(folder)
    check_scores(folder, record, predictions)
    assert record.test.metrics == record.before.metrics == names
    lengths = [min(100.0, len(p["prediction"])) for p in predictions]
    assert [p["letters"] for p in predictions] == lengths  # type: ignore[typeddict-item]
    assert results["test"]["letters"] == pytest.approx(sum(lengths) / len(lengths))
    low, high = results["test"]["letters_interval"]
    assert low <= results["test"]["letters"] <= high
    with (folder / "metrics.csv").open(newline="") as rows:
        logged = [row["validation/letters"] for row in csv.DictReader(rows)]
    of_epochs = [epoch["letters"] for epoch in results["epochs"]]
    assert [float(value) for value in logged if value] == pytest.approx(of_epochs)
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    assert {"validation/letters", "whole_run/test_letters"} <= set(board.Tags()["scalars"])
    console.close(results, folder)
    assert capsys.readouterr().out.count("letters") == 3  # of epochs, before and after

    report.write([folder], tmp_path / "report", margin=1.0)
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "| letters | EM before | F1 before | letters before |" in text
    assert "| validation letters, % |" in text
    figures = tmp_path / "report" / "figures"
    assert "letters, %" in (figures / "scores.svg").read_text("utf-8")
    with (tmp_path / "report" / "report.csv").open(newline="") as rows:
        [row] = csv.DictReader(rows)
    assert float(row["letters"]) == results["test"]["letters"]
    assert (
        float(row["validation_letters"])
        == max(results["epochs"], key=lambda epoch: (epoch["f1"], -epoch["validation_loss"]))[
            "letters"
        ]
    )

    # A record whose answers have another value is damaged.
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    changed = [json.dumps(json.loads(line) | {"letters": 1.5}) + "\n" for line in lines]
    (folder / "predictions.jsonl").write_text("".join(changed), "utf-8")
    with pytest.raises(UserError, match="does not give the letters"):
        check_scores(folder, record, read_answers(folder)[0])


@pytest.mark.parametrize(
    "names", [["f1", "exact_match"], ["rouge_l"], ["exact_match", "f1", "no"], "f1", None]
)
def test_metrics_begin_with_exact_match_and_f1(settings: dict[str, Any], names: Any) -> None:
    with pytest.raises(UserError, match=r"metrics=.*: must be a list: exact_match, f1, then"):
        schema.validate(settings | {"metrics": names})


def test_a_metric_whose_file_is_gone_keeps_its_name() -> None:
    assert metrics.labels(["f1", "gone", "rouge_l"]) == {
        "f1": "F1", "gone": "gone", "rouge_l": "ROUGE-L",
    }  # fmt: skip
