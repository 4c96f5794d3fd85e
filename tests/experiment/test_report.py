import json
import math

import pytest

from experiment import report
from experiment.cli import Failure


def test_json_holds_no_nan():
    assert json.loads(report.json_bytes({"accuracy": 99.5})) == {"accuracy": 99.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.json_bytes({"accuracy": math.nan})


def test_mean_and_sample_standard_deviation():
    assert report.mean_and_std([1.0, 2.0, 4.0]) == {"mean": 7 / 3, "std": pytest.approx(math.sqrt(7 / 3))}
    assert report.mean_and_std([5.0]) == {"mean": 5.0, "std": None}


def test_summary_over_seeds_by_hand():
    runs = [
        {"seed": seed, "target": target, "dense": {"test_accuracy": 90.0 + seed}, "lost": lost}
        for seed, target, lost in [(0, 5, 1.0), (0, 7, 4.0), (2, 5, 2.0), (2, 7, 4.0)]
    ]
    columns = [
        report.Column("lost", "lost (points)", lambda run: run["lost"]),
        report.Column("size", "size", lambda run: 1234.4, is_count=True),
        report.Column("scratch", "from scratch (%)", lambda run: None),
    ]
    summary = report.summarize(runs, ("target",), columns[:1])
    assert summary["dense"] == {"mean": 91.0, "std": pytest.approx(math.sqrt(2))}
    assert summary["pruned"] == [
        {"target": 5, "lost": {"mean": 1.5, "std": pytest.approx(math.sqrt(0.5))}},
        {"target": 7, "lost": {"mean": 4.0, "std": 0.0}},
    ]
    everything = report.make({"arguments": {}}, runs, ("target",), columns)
    assert everything["summary"]["dense"] == summary["dense"]
    assert everything["runs"] == runs
    text = report.summary_table(everything, lambda point: f"target {point['target']}", columns)
    assert [line.split() for line in text.splitlines()] == [
        ["lost", "(points)", "size"],
        ["dense"],
        ["target", "5", "1.50", "±", "0.71", "1,234"],
        ["target", "7", "4.00", "±", "0.00", "1,234"],
    ]


@pytest.mark.parametrize(
    ("content", "mentions"),
    [("no JSON", "not a report"), ("[]", "not a report"), ('{"runs": []}', "schema 1"), ('{"schema": 2}', "schema 2")],
)
def test_a_report_of_another_version_is_refused(tmp_path, content, mentions):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(Failure, match=mentions) as caught:
        report.load(path)
    assert str(path) in str(caught.value)


def test_a_report_comes_back(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(report.json_bytes({"schema": report.SCHEMA, "runs": []}))
    assert report.load(path) == {"schema": report.SCHEMA, "runs": []}
