"""Timing in turns, and what is made of it: the table, the page, the last line, the comparison with a baseline."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.bench import report
from jaxgpt.bench.kernels import Kernels
from jaxgpt.bench.report import Contender, Output, Row, measure
from jaxgpt.errors import BadFileError, ConfigError, SlowerError

ROWS: list[Row] = [
    {"name": "loss <V>", "implementation": "a", "ms": 2.0, "ratio": 1.0, "relative": [0.9, 1.0, 1.1]},
    {"name": "loss <V>", "implementation": "b", "reason": "only on a TPU"},
]


def slept(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_times_are_of_one_call_and_ratios_of_the_first() -> None:
    slow, fast = measure(
        [Contender("x", "slow", slept(0.02), {"tokens": 7}), Contender("x", "fast", slept(0.002), {})], rounds=5
    )
    assert 20 <= slow["ms"] < 40 and 2 <= fast["ms"] < 10
    assert slow["ratio"] == 1 and 3 < fast["ratio"] <= 10.5
    assert slow["tokens"] == 7 and slow["relative"][0] <= slow["relative"][1] <= slow["relative"][2]


def test_a_warm_turn_is_timed_from_its_second_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first one of a turn pays for is what the others' turns did to the machine."""
    clock, last = [0.0], [""]

    def now() -> float:
        clock[0] += 0.005  # a look at the clock takes as long as a sample should, so that nothing is repeated
        return clock[0]

    def call(name: str) -> None:
        clock[0] += 0.001 if last == [name] else 0.1
        last[0] = name

    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=now))
    contenders = [Contender("x", name, functools.partial(call, name), {}) for name in "ab"]
    assert [row["ms"] for row in measure(contenders, rounds=3)] == pytest.approx([105, 105])
    assert [row["ms"] for row in measure(contenders, rounds=3, warm=True)] == pytest.approx([6, 6])


def test_each_name_has_its_own_first() -> None:
    contenders = [Contender(name, "only", slept(0.001), {}) for name in "xyz"]
    assert [row["ratio"] for row in measure(contenders, rounds=2)] == [1, 1, 1]


def test_one_that_fails_is_listed_and_the_others_are_timed() -> None:
    def fail() -> None:
        raise RuntimeError("no compiler\nmore")

    contenders = [Contender("x", "a", None, {"reason": "not here"}), Contender("x", "b", fail, {})]
    absent, failed, fine = measure([*contenders, Contender("x", "c", slept(0.001), {})], rounds=2)
    assert (absent["reason"], failed["reason"]) == ("not here", "no compiler")
    assert "ms" not in absent | failed and fine["ratio"] == 1


def test_texts_are_compared() -> None:
    first, second = [[1, 2], [3]], [[1, 2], [4]]
    _, other = measure([Contender("x", "a", lambda: first, {}), Contender("x", "b", lambda: second, {})], rounds=1)
    assert other["reason"] == "1 of 2 texts equal"


# A warning of Python 3.13 about the profiler's own types, while they are made, would be the end of the process.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
def test_a_profile_lists_what_took_longest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sorts(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sort(jnp.cos(x)), x)

    call, traces = functools.partial(jax.jit(sorts).lower(x := jnp.arange(2.0**18)).compile(), x), tmp_path / "traces"
    rows = measure([Contender(name, "a", call, {}) for name in "xy"], rounds=2, profile=traces)
    for row in rows:
        longest, *_ = row["operations"]
        assert "sort" in longest and not any(name.startswith("while") for name in row["operations"]), row["operations"]
        times = list(row["operations"].values())
        assert times == sorted(times, reverse=True) and 0.1 * row["ms"] < times[0] < 50 * row["ms"]
    kept = sorted(path.relative_to(traces).parts[0] for path in traces.rglob("*.xplane.pb"))
    assert kept == ["x a", "y a"], "also where both are of the same second"
    assert "operations" not in measure([Contender("x", "a", call, {})], rounds=1)[0]
    Output().show("kernels", rows, {})
    assert f"{rows[0]['operations'][longest]:,.2f} ms  {longest}\n" in capsys.readouterr().out


def test_the_last_line_is_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    Output().show("kernels", ROWS, {"GFLOP/s": 100.0})
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "benchmark": "kernels", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "limits": {"GFLOP/s": 100.0}, "rows": ROWS,
    }  # fmt: skip
    assert table[0].split() == ["ms", "speed"]
    assert table[2].split() == ["a", "2.00", "1.00"] and table[3].split() == ["b", "only", "on", "a", "TPU"]
    assert "100.0 GFLOP/s here" in table[-1]


def test_the_page_holds_the_document(tmp_path: Path) -> None:
    """A name with < in it must not end the script."""
    Output(html=tmp_path / "page.html").show("kernels", ROWS, {})
    page = (tmp_path / "page.html").read_text("utf-8")
    content = page.split('id="document">')[1].split("</script>")[0]
    assert "<" not in content and json.loads(content)["rows"] == ROWS


def changed(**figures: Any) -> list[Row]:
    return [ROWS[0] | figures, ROWS[1]]


def test_a_baseline_finds_what_is_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = tmp_path / "baseline.json"
    Output(save_baseline=baseline).show("kernels", ROWS, {})
    now = Output(baseline=baseline)
    now.show("kernels", changed(ms=9.0), {})  # the machine is slower, and so is the yardstick
    assert "1 of the 1 times" in capsys.readouterr().err
    now.show("kernels", changed(relative=[1.05, 1.5, 1.6]), {})  # a quarter of the rounds is within the tolerance
    with pytest.raises(SlowerError, match=r"loss <V> a takes 1\.30 times as long") as error:
        now.show("kernels", changed(relative=[1.2, 1.3, 1.4]), {})
    assert error.value.exit_status == 1
    Output(baseline=baseline, tolerance=0.3).show("kernels", changed(relative=[1.2, 1.3, 1.4]), {})


def test_a_baseline_of_something_else_is_refused(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    Output(save_baseline=baseline).show("kernels", ROWS, {})
    with pytest.raises(ConfigError, match="is of benchmark kernels, this one is train"):
        Output(baseline=baseline).show("train", ROWS, {})
    baseline.write_text(baseline.read_text().replace(f'"{jax.devices()[0].device_kind}"', '"TPU v9"'))
    with pytest.raises(ConfigError, match="is of device TPU v9"):
        Output(baseline=baseline).show("kernels", ROWS, {})


@pytest.mark.parametrize("options", [{"rounds": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Output(**options)


def test_mistakes_are_found_before_anything_is_measured(tmp_path: Path) -> None:
    for options in (
        {"html": tmp_path / "no" / "page.html"},
        {"save_baseline": tmp_path / "no" / "b.json"},
        {"profile": tmp_path / "no" / "traces"},
    ):
        with pytest.raises(ConfigError, match="there is no directory"):
            Output(**options)
    with pytest.raises(ConfigError, match="there is no such file"):
        Output(baseline=tmp_path / "none.json")
    with pytest.raises(ConfigError, match="a file; name a directory"):
        Output(profile=Path(__file__))
    with pytest.raises(ConfigError, match="is not run"):
        Kernels(compile_for=("v5e:2x2",), profile=tmp_path / "traces").run()


def test_a_damaged_baseline_is_one_line(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"benchmark": "kernels", "device": jax.devices()[0].device_kind}))
    with pytest.raises(BadFileError, match="rows"):
        Output(baseline=baseline).show("kernels", ROWS, {})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_the_largest_error(wrong: float) -> None:
    expected = [np.ones(2)]
    (row,) = measure([Contender("x", "a", lambda: np.array([1.0, wrong]), {}, expected)], rounds=1)
    assert row["error"] == 1e99 and json.dumps(row, allow_nan=False)


def test_nothing_is_expected_of_a_gradient_that_is_zero() -> None:
    (row,) = measure([Contender("x", "a", lambda: np.zeros(2), {}, [np.zeros(2)])], rounds=1)
    assert row["error"] == 0
