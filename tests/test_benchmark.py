"""experiments.benchmark: ratios by hand, a tiny whole run, and the table of docs/data.md."""

import itertools
import json
import re
from pathlib import Path

import torch

from experiments import benchmark

REPOSITORY = Path(__file__).parent.parent


def test_calls_take_turns_and_the_ratio_is_taken_repetition_by_repetition(monkeypatch):
    order, clock = [], itertools.accumulate([0, 9, 0, 9, 0, 1, 0, 1, 0, 2, 0, 4, 0, 4, 0, 12])
    monkeypatch.setattr(benchmark, "process_time", lambda: next(clock))
    result = benchmark.ratio(lambda: order.append("floor"), lambda: order.append("call"), 3,
                             torch.device("cpu"))
    assert order == ["floor", "call"] * 4                                   # the first warms up
    assert result == {"median": 2, "quartiles": [1.5, 2.5], "seconds": [2, 4]}     # of 1, 2 and 3


def test_a_run_records_every_ratio_with_its_floor_and_target(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SIZE", (2, 3, 32, 48))
    monkeypatch.setattr(benchmark, "STEPS", 5)
    benchmark.main(f"--repeats 2 --device cpu --out {tmp_path}".split())
    record = json.loads((tmp_path / "benchmark_cpu.json").read_text())
    assert record["repeats"] == 2 and record["environment"]["torch"] == torch.__version__
    assert len(record["rows"]) == 2
    for row in record["rows"]:
        low, high = row["quartiles"]
        assert 0 < low <= row["median"] <= high and row["target"] > 0 and row["floor"]
    assert capsys.readouterr().out == benchmark.table(record) + "\n"


def test_the_table_in_the_docs_is_the_recorded_one():
    marked = re.search(r"<!-- benchmark: (\S+) -->\n(.*?)\n<!-- end -->",
                       (REPOSITORY / "docs" / "data.md").read_text(), re.DOTALL)
    assert marked[2] == benchmark.table(json.loads((REPOSITORY / marked[1]).read_text()))
