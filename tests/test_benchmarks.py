# SPDX-License-Identifier: Apache-2.0
"""The benchmarks as far as they go without a GPU: cells, routing, the checks, and a run with the clock taken out."""

import argparse
import itertools
import json
import re
from unittest import mock

import pytest
from kernel_variants import FakeKernel

import cupy_moe
from cupy_moe import compiler, dispatch, gemms, launches, sm90

torch = pytest.importorskip("torch")

from benchmark_cases import SHAPE, without_clock  # noqa: E402

from benchmarks import (  # noqa: E402
    cases,
    choices,
    early,
    expected,
    invariance,
    records,
    step_cases,
    steps,
    summary,
    table,
    tiles,
    timeline,
    timing,
)


@pytest.fixture
def no_clock(monkeypatch):
    without_clock(monkeypatch)


def make(M, scheme="tensor", routing="uniform"):
    weights = cases.make_weights(SHAPE, scheme, device="cpu")
    return cases.make_inputs(SHAPE, M, routing=routing, weights=weights, device="cpu")


def test_cells():
    assert sum(map(len, cases.CELLS["all"].values())) == 45
    prefill = table.parse_cells("prefill")
    assert tuple(prefill) == cases.SHAPES
    assert all(tokens == [1024, 2048, 4096, 8192, 16384] for tokens in prefill.values())
    (sweep,) = table.parse_cells("sweep").values()
    assert sweep[:9] == [2**i for i in range(9)]
    assert sweep[9:14] == [512, 640, 768, 896, 1024]
    assert (sorted(set(sweep)), sweep[-1]) == (sweep, 16384)
    assert list(table.parse_cells("models")) == list(cases.MODELS.values())
    assert table.parse_cells("3,2:64,2:7") == {cases.SHAPES[3]: list(cases.TOKENS), cases.SHAPES[2]: [64, 7]}


@pytest.mark.parametrize("text", ["everything", "5", "1:x", "-1", ""])
def test_wrong_cells(text):
    with pytest.raises(argparse.ArgumentTypeError, match="all,prefill,both,sweep"):
        table.parse_cells(text)


def test_options():
    options = table.parse_arguments(["--backends", "cublaslt,other", "--routing", "uniform,skewed"])
    assert options.backends == ["cublaslt", "other"]
    assert options.routing == ["uniform", "skewed"]
    options = table.parse_arguments([])
    assert options.backends == ["auto"]
    assert options.cells == cases.CELLS["all"]


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_routing(routing):
    inputs = make(4000, routing=routing)
    ids = inputs.topk_ids
    assert inputs.routing == routing
    assert ((ids >= 0) & (ids < SHAPE[0])).all()
    assert all(len(set(row)) == SHAPE[1] for row in ids[:200].tolist())
    first = torch.bincount(ids[:, 0].long(), minlength=SHAPE[0]).sort(descending=True).values / len(ids)
    want = torch.full((6,), 1 / 6) if routing == "uniform" else 1 / torch.arange(1.0, 7.0) / 2.45
    torch.testing.assert_close(first, want, atol=0.03, rtol=0)


@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_references_are_those_of_the_package(scheme):
    x = make(40, scheme)
    w = x.weights
    options = {"w1_scale": w.w1_scale, "w2_scale": w.w2_scale, "per_act_token": scheme == "token"}
    hidden = x.hidden_states.float()
    got = cupy_moe.fused_experts(hidden, w.w1, w.w2, x.topk_weights, x.topk_ids, **options)
    assert expected.relative_error(got, expected.references(x)[0]) < 1e-3


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_sample_is_part_of_the_whole(scheme, routing):
    x = make(700, scheme, routing)
    sample = expected.sample_of(700, "cpu")
    assert len(set(sample.tolist())) == expected.SAMPLE
    for part, whole in zip(expected.references(x, sample), expected.references(x), strict=True):
        assert expected.relative_error(part, whole[sample]) < 1e-4
    assert expected.sample_of(512, "cpu") is None


def test_largest_activation_is_exact():
    x = make(300)
    codes, scale = expected.quantize(x.hidden_states, per_token=False)
    activated = [
        expected.silu_and_mul((codes[t].float() * scale) @ (x.weights.w1[e].float() * x.weights.w1_scale[e]).T)
        for t in range(300) for e in x.topk_ids[t].tolist()
    ]
    torch.testing.assert_close(expected.largest_activation(x), torch.stack(activated).abs().max(), rtol=1e-5, atol=0)


def test_a_wrong_result_is_not_timed(no_clock, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(table.ERROR_LIMITS, "cupy_moe", 0)
    out = tmp_path / "table.json"
    assert table.main(["--impls", "cupy_moe", "--modes", "graph,eager", "--out", str(out), "--commit", "0" * 40]) == 1
    content = json.loads(out.read_text())
    assert len(content["failures"]) == 4
    assert all("is above" in failure["reason"] for failure in content["failures"])
    assert not content["records"]


def test_table(no_clock, tmp_path, capsys):
    out = tmp_path / "table.json"
    asked = "--schemes tensor,token --routing uniform,skewed --modes graph,eager --l2 warm,cold --backends auto,none"
    peers = ["--impls", "cupy_moe,vllm", "--vllm-ops", str(tmp_path / "ops")]
    assert table.main([*asked.split(), *peers, "--out", str(out), "--commit", "0" * 40]) == 1
    content = json.loads(out.read_text())
    assert {failure["reason"].split(":")[0] for failure in content["failures"]} == {"ValueError"}  # no such backend
    assert content["header"]["skipped"].keys() == {"vllm"}
    assert "--vllm-ops DIR --out FILE.json" in content["header"]["command"]
    keys = {"device", "impl", "backend", "shape", "M", "scheme", "routing", "mode", "l2", "us", "us_min", "us_max",
            "floor_us", "err"}
    assert all(keys <= record.keys() for record in content["records"])
    assert all(record["err"] < 1e-2 < record["err_unquantized"] < 1e-1 for record in content["records"])
    # 2 cells and 2 schemes: uniform in 2 modes and 2 states of the L2, skewed in one of each
    assert len(content["records"]) == 2 * 2 * (4 + 1)
    assert "auto" not in {record["backend"] for record in content["records"]}
    assert all(record["us"] == (20 if record["l2"] == "cold" else 10) for record in content["records"])
    assert "tensor skewed graph warm" in capsys.readouterr().out


def test_invariance(no_clock, monkeypatch, tmp_path, capsys):
    out = tmp_path / "invariance.json"
    monkeypatch.setattr(timing, "fitting_replays", lambda call: 1)
    assert invariance.main(["--out", str(out), "--commit", "0" * 40]) == 0
    content = json.loads(out.read_text())
    assert [(record["M"], record["batch_invariant"]) for record in content["records"]] == [
        (5, False), (5, True), (600, False), (600, True)
    ]
    assert all(record["us"] == 10 and record["err"] < 1e-2 for record in content["records"])
    assert all(0 < record["floor_us"] < 10 for record in content["records"])
    assert "1.000 times as long as without it (geometric mean of 2 cells" in capsys.readouterr().out
    monkeypatch.setitem(choices.ERROR_LIMITS, "cupy_moe", 0)
    assert invariance.main(["--out", str(out)]) == 1
    assert len(json.loads(out.read_text())["failures"]) == 2


@pytest.mark.parametrize(("columns", "timed"), [(4096, {0, 1, 2}), (4112, {1, 2})])
def test_tiles_that_suit_one_gemm(columns, timed, monkeypatch):
    """That GEMM takes them, the other one what it takes anyway; with more columns none does."""
    taken = []
    monkeypatch.setattr(cases, "make_weights", lambda shape: None)
    monkeypatch.setattr(cases, "make_inputs", lambda shape, tokens, weights: None)
    monkeypatch.setattr(tiles, "capture", lambda *args: taken.append(args[3]))
    monkeypatch.setattr(timing, "fitting_replays", lambda call: 1)
    monkeypatch.setattr(
        timing, "time_in_turns", lambda calls, replays: [timing.Timing(us, us, us) for us in range(len(calls), 0, -1)],
    )
    of_w1, of_w2 = (
        tiles.Weights(0, 4, 64, k, paired=False, short_columns=short) for k, short in ((1024, 0), (columns, 4096))
    )
    records = tiles.measure("sm90", (4, 2, 1024, columns))
    assert len(records) == len(tiles.TOKENS) == taken.count(None)
    for record in records:
        times = [tile["us"] for tile in record["tiles"]]
        assert times == list(range(1, len(times) + 1))
        assert record["default_us"] == len(times) + 1
    taken = [tile for tile in taken if tile]
    assert {tile.window for tile in taken} == timed
    for tile in taken:
        tile_for = tiles.taking(tile, lambda device, weights, rows: "the usual one")
        assert tile_for(0, of_w2, 9) == tile
        assert tile_for(0, of_w1, 9) == (tile if tile.window else "the usual one")


def test_early(no_clock, monkeypatch, tmp_path, capsys):
    out, seen, call = tmp_path / "early.json", [], cupy_moe.Experts.__call__
    monkeypatch.setattr(timing, "fitting_replays", lambda call: 1)
    monkeypatch.setattr(cupy_moe.Experts, "__call__", lambda *args: (seen.append(sm90.EARLY), call(*args))[1])
    assert early.main(["--backend", "reference", "--out", str(out), "--commit", "0" * 40]) == 0
    content = json.loads(out.read_text())
    assert [(record["M"], record["early_weights"]) for record in content["records"]] == [(5, False), (5, True)]
    assert list(dict.fromkeys(seen)) == [0, 4]
    assert sm90.EARLY == 4
    assert "geometric mean of 1 cells" in capsys.readouterr().out


def test_the_host_is_timed_again(no_clock, monkeypatch, tmp_path, capsys):
    """A disturbance that lasts for all cells of one pass is in no record."""
    out, times = tmp_path / "eager.json", iter([90.0, 90.0, 20.0, 21.0, 30.0, 19.0])
    monkeypatch.setattr(timing, "host_us", lambda call: next(times))
    assert table.main(["--impls", "cupy_moe", "--modes", "eager", "--out", str(out), "--commit", "0" * 40]) == 0
    assert [record["host_us"] for record in json.loads(out.read_text())["records"]] == [20, 19]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 20), (64.0, 28)])
def test_the_host_has_rounds_enough(seconds, rounds, monkeypatch):
    """Twenty, however long they take, or as many as fit into a window; each looks at the clock two or three times."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count(0.0).__next__)
    calls = []
    assert timing.host_us(lambda: calls.append(0), calls=10, seconds=seconds) == 1e5
    assert len(calls) == 10 * rounds


def test_rounds_take_turns(monkeypatch):
    made, slept = [], []
    monkeypatch.setattr(timing, "time_warm", lambda call, **_: timing.Timing(call(), 0, 0))
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    first, second = timing.time_in_turns([lambda: made.append(0) or len(made), lambda: made.append(1) or len(made)])
    assert made == [0, 1] * timing.ROUNDS
    assert (first.us_min, first.us, second.us_max) == (1, timing.ROUNDS, 2 * timing.ROUNDS)
    assert slept == pytest.approx([2e-6 * timing.REPLAYS * us for us in range(1, 2 * timing.ROUNDS + 1)])


def test_a_call_that_takes_long_is_repeated_less(monkeypatch):
    for us, replays in ((10.0, timing.REPLAYS), (1000.0, 7), (1e6, 1)):
        monkeypatch.setattr(timing, "time_warm", lambda call, us=us, **_: timing.Timing(us, us, us))
        assert timing.fitting_replays(None) == replays


def launch(kernel, grid, block, *, shared_bytes=0, **arguments):
    assert arguments.keys() == kernel.parameters.keys()
    return mock.Mock(kernel=kernel)


@pytest.mark.parametrize(
    ("build", "scheme"), [(build, scheme) for build, schemes in step_cases.STEPS for scheme in schemes],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_steps(build, scheme):
    case = step_cases.Case(SHAPE, 70, device="cpu")
    with mock.patch.object(compiler, "kernel", FakeKernel), mock.patch.object(launches, "Launch", launch), \
            mock.patch.object(dispatch, "Launch", launch), mock.patch.object(dispatch, "ALONE_ELEMENTS", 0), \
            mock.patch.object(compiler, "multiprocessors", return_value=132):
        step = build(case, scheme)
    behind_amax = scheme == "tensor" and build in (step_cases.quantize, step_cases.activation)
    assert len(step.launches) == len(step.moved) == (2 if behind_amax else 1)
    got, want = step.got(), step.want()
    assert got.shape == want.shape
    assert want.isfinite().all()
    assert expected.relative_error(want, want) == 0
    assert all(nbytes > 0 for i in range(len(step.launches)) for nbytes in step.nbytes(i))


@pytest.mark.parametrize("scheme", ["tensor", "token"])
def test_packed_step(scheme):
    """The step takes the packed form, whose words have the upper bytes of the values that are expected of it."""
    case = step_cases.Case(SHAPE, 70, device="cpu")
    with mock.patch.object(gemms, "PACKED_ROWS", {scheme: 0}), mock.patch.object(compiler, "kernel", FakeKernel), \
            mock.patch.object(launches, "Launch", launch):
        step = step_cases.requantize(case, scheme)
    assert [launched.kernel.name for launched in step.launches] == ["requantize"]
    assert step.want().shape == (case.rows, case.inner)
    words, x = step_cases.packed(case)
    row, column = case.rows - 1, case.inner - 1
    expert = int(case.owners[row])
    within = row - int(case.routing.expert_offsets[expert])
    group = int(case.routing.expert_offsets[expert]) // 16 + expert + within // 16
    quarter, part = within % 8 // 2, within % 16 // 8 * 2 + within % 2
    of = words[group, column // 8, :, quarter, column % 8]
    bits = sum((int(word) & 0xFF) << (24 - 8 * i) for i, word in enumerate(of)) if part == 3 else int(of[part]) & ~0xFF
    assert bits & 0xFFFFFFFF == int(x[row, column].view(torch.int32)) & 0xFFFFFFFF


def test_sets_of_arrays():
    l2 = 50 << 20
    assert steps.sets_of(1 << 30, l2) == (2, "cold")
    assert steps.sets_of(10 << 20, l2) == (20, "cold")
    assert steps.sets_of(4 << 20, l2) == (3, "warm")
    assert steps.sets_of(1000, l2) == (steps.MOST_SETS, "warm")


def test_sizes_of_copies():
    assert [steps.two_digits(n) for n in (16_777_216, 18_358_784, 2_348_810_240)] == [17e6, 18e6, 2.3e9]


def test_file_of_records(tmp_path):
    out = tmp_path / "x.json"
    records.save(str(out), {"device": "none", "skipped": {}}, [{"M": 1}, {"M": 2}], failures=[])
    want = {"header": {"device": "none", "skipped": {}}, "failures": [], "records": [{"M": 1}, {"M": 2}]}
    assert json.loads(out.read_text()) == want
    records.save(None, {}, [])


def test_parts_of_a_call():
    """The two kernels without a name of ours are the GEMMs; what encodes behind the first belongs to the activation."""
    names = ("route_quantize", "gemm", "quantize_shuffle", "gemm", "combine")
    parts = timeline.parts_of([(name, float(i + 1)) for i, name in enumerate(names)])
    assert parts == {"route": 1, "quantize": 0, "gemm1": 2, "activation": 3, "gemm2": 4, "combine": 5}
    behind = timeline.parts_of([("amax_tokens", 1.0), ("route_quantize", 2.0), ("gemm", 3.0)])
    assert (behind["quantize"], behind["route"], behind["gemm1"]) == (1, 2, 3)
    slower = {part: 2 * us for part, us in parts.items()}
    record = timeline.summed_up([parts, slower, parts])
    assert (record["us"], record["us_min"], record["us_max"]) == (15, 15, 30)
    assert record["parts"] == parts


def test_means_of_the_table(capsys):
    kind = summary.PLAIN | {"shape": SHAPE, "M": 5, "floor_us": 8.0}
    table.print_table([kind | {"impl": impl, "backend": of, "us": us}
                       for impl, of, us in (("cupy_moe", "sm90", 10.0), ("vllm", "cutlass", 15.0))])
    means = dict(re.findall(r"(\S+ / \S+) +([\d.]+)  \(geometric", capsys.readouterr().out))
    assert means == {"sm90 / floor": "1.250", "vllm / floor": "1.875", "vllm / sm90": "1.500"}


def test_a_result_of_nan_is_not_timed(no_clock, monkeypatch, capsys):
    monkeypatch.setattr(expected, "relative_error", lambda output, of: float("nan"))
    assert table.main(["--impls", "cupy_moe"]) == 1


@pytest.mark.parametrize(("shape", "M", "active", "us"), [
    ((8, 2, 4096, 28672), 1, 2, 226.58), ((8, 2, 4096, 28672), 512, 8, 908.99), ((40, 8, 1024, 1536), 512, 40, 61.36),
    ((8, 2, 4096, 28672), 16384, 8, 15306.98),
])
def test_floor(shape, M, active, us):
    """Of the published table, and where arithmetic takes longer than reading the weights."""
    assert cases.floor_us(shape, M, active, 3.11e12, 1517e12) == pytest.approx(us, abs=0.005)


@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_weights_are_those_that_were_drawn(scheme):
    """Within half a step of a code: nothing is cut off."""
    w = make(1, scheme).weights
    drawn = torch.randn(w.w1[0].shape, generator=torch.Generator().manual_seed(0)) / 10
    torch.testing.assert_close(w.w1[0].float() * w.w1_scale[0].reshape(-1, 1), drawn, rtol=1 / 16, atol=1e-3)
    assert cases.scheme_of(w.w1, w.w2, w.w1_scale, w.w2_scale) == scheme


def test_wrong_weights_of_a_peer():
    w = cases.make_weights(SHAPE, device="cpu")
    turned = w.w1.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="w1 must be contiguous"):
        cases.scheme_of(turned, w.w2, w.w1_scale, w.w2_scale)


class Clock:
    """Events of a device on which everything takes its time, in ms."""

    def __init__(self, monkeypatch):
        self.now, clock = 0.0, self

        class Event:
            def __init__(self, **_):
                pass

            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.advance(100.0))

    def advance(self, ms):
        self.now += ms


@pytest.mark.parametrize("hold", [False, True])
def test_microseconds_of_a_call(hold, monkeypatch):
    """Rounds of different length: of one call, without what keeps the device busy and without the flush."""
    clock, flushed = Clock(monkeypatch), []
    ms = itertools.chain.from_iterable(itertools.repeat(each, 5) for each in 2 * (3.0, 1.0, 8.0))
    options = {"hold": hold, "rounds": 3, "replays": 5}
    warm = timing.time_warm(lambda: clock.advance(next(ms)), **options)
    cold = timing.time_cold(
        lambda: clock.advance(next(ms)), lambda: flushed.append(clock.advance(50.0)), **options
    )
    assert warm == cold == timing.Timing(3000.0, 1000.0, 8000.0)
    assert len(flushed) == 15
    assert clock.now == 2 * 60 + 15 * 50 + hold * 6 * 100
    assert warm.per(4) == timing.Timing(750.0, 250.0, 2000.0)
