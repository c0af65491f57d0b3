# SPDX-License-Identifier: Apache-2.0
"""The benchmark's small form, beside the peers where they are installed."""

import json

import pytest


@pytest.fixture
def benchmark(imported):
    return imported("guided_sampling")


def test_all_rows_of_the_small_form(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("azula")
    pytest.importorskip("neuralop")
    monkeypatch.setattr(benchmark, "DEVICE", benchmark.torch.device("cpu"))
    out = tmp_path / "speed.md"
    benchmark.main(["--only", "8x12", "--repeats", "1", "--no-compile", "--out", str(out)])
    measured = json.loads(out.with_suffix(".json").read_text())
    eager, half, twice_each, quick, *peers = measured["rows"]
    assert eager["speedup"] == 1 and eager["mean_change"] == 0
    assert eager["evaluations"] == 3 + 2 and eager["member"] > 0  # one level is inside
    assert half["method"] == "ours, eager, bf16"
    assert 0 < half["mean_change"] < 0.02 and abs(half["spread_change"]) < 0.02
    assert twice_each["method"] == "ours, eager, bf16, 2 iterations at all levels"
    assert twice_each["evaluations"] == 3 * 5
    assert quick["method"] == "ours, eager, bf16, derivative from .4 to 10"
    assert quick["evaluations"] == 3 + 2
    assert [peer["method"].split(",")[1] for peer in peers] == [
        " U-NO of equal parameters",
        " U-NO of equal channels",
    ]
    assert all(not peer["note"] and peer["member"] > 0 for peer in peers)
    assert eager["parameters"] / 2 < peers[0]["parameters"] < 2 * eager["parameters"]
    assert "| 8x12, 2 x 4 |" in out.read_text()
    twice = tmp_path / "twice.md"
    benchmark.main(["--join", *2 * [str(out.with_suffix(".json"))], "--out", str(twice)])
    lines = out.read_text().splitlines()
    row = next(line for line in lines if "eager, fp32" in line)
    assert measured["how"] in lines and twice.read_text().count(row) == 2


def test_a_peer_that_fails_is_told(benchmark, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(benchmark, "DEVICE", benchmark.torch.device("cpu"))
    monkeypatch.setattr(benchmark, "azula", broken)
    case = benchmark.Case("8x12", 1, 5, 4, 8)
    pytest.importorskip("neuralop")
    rows = list(benchmark.ours(case, 1, compiled=False, thorough=False))
    assert rows[-1].note == "no such kernel"
