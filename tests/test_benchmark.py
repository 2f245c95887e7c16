"""experiments.benchmark: ratios by hand, a tiny whole run, and the README's table."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from experiments import benchmark

REPOSITORY = Path(__file__).parent.parent


def test_a_ratio_is_taken_repetition_by_repetition_over_the_sum_of_the_parts():
    record = benchmark.row("x", 1.5, {"a": [1, 2, 1], "b": [1, 2, 3], "whole": [4, 4, 12]})
    assert record["median"] == 2 and record["quartiles"] == [1.5, 2.5]       # of 1, 2 and 3
    assert record["floor"] == "a + b" and record["medians"] == {"whole": 4, "a": 1, "b": 2}


def test_calls_take_turns_and_the_first_round_only_warms_up(monkeypatch):
    clock, order = itertools.count(), []
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(clock))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = benchmark.measure(calls, 2, torch.device("cpu"))
    assert seconds == {"a": [1, 1], "b": [1, 1]} and order == list("ababab")


def test_a_quick_run_records_every_ratio_with_its_floor_and_target(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    benchmark.main(["--quick", "--repeats", "2", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "benchmark_cpu.json").read_text())
    assert record["repeats"] == 2 and record["environment"]["torch"] == torch.__version__
    starts = [row["what"].split()[0] for row in record["rows"]]
    assert starts == ["peak", "choose", "scan", "train", "answer", "score", "score"]
    for row in record["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high and row["target"] > 0 and row["floor"]
    assert benchmark.table(record) in capsys.readouterr().out


def test_fewer_than_two_repetitions_are_refused():
    with pytest.raises(ValueError, match="--repeats takes a number of at least 2; got 1"):
        benchmark.main(["--repeats", "1"])


def test_the_table_in_the_readme_is_the_recorded_one():
    text = (REPOSITORY / "README.md").read_text()
    marked = re.search(r"<!-- benchmark: (\S+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    path, table = marked.groups()
    assert table == benchmark.table(json.loads((REPOSITORY / path).read_text()))
