"""Time several ways to compute the same thing, and show it: a table, a page with the roofline, one JSON document.

Where other work goes on, times are worth little and ratios much. So what is compared takes turns, round after round,
with a yardstick between (a matrix product and a read of the memory). A baseline keeps times as multiples of the
yardstick's, and a row is slower only if three rounds in four are."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import SlowerError, note, require
from jaxgpt.files import read_json, reading, write_atomically

Row = dict[str, Any]
SHORTEST = 0.005  # seconds that one sample takes at least: shorter calls are repeated
COLUMNS = {  # heading, and how a value is shown
    "error": ("error", "{:.0e}"), "ms": ("ms", "{:,.2f}"), "spread": ("+-", "{:.0%}"),
    "gflops": ("GFLOP/s", "{:,.1f}"), "gbytes": ("GB/s", "{:,.1f}"), "roofline": ("roof", "{:.0%}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"), "mfu": ("MFU", "{:.1%}"), "mbu": ("MBU", "{:.0%}"),
    "memory_mib": ("MiB", "{:,.1f}"), "compile_s": ("compile", "{:.1f} s"), "ratio": ("speed", "{:.2f}"),
}  # fmt: skip
RATES = {"tokens": ("tokens_per_second", 1.0), "flops": ("gflops", 1e9), "bytes": ("gbytes", 1e9)}
SHARES = ("roofline", "mfu", "mbu")  # of the shortest time, which a contender has in seconds, as roofline_s


class Contender(NamedTuple):
    """One way to compute something. `call` runs it once; where it cannot run here, `figures` has the reason."""

    name: str
    implementation: str
    call: Callable[[], Any] | None
    figures: Row
    expected: list[np.ndarray] | None = None  # leaves of what it should return


@dataclass(frozen=True, kw_only=True)
class Output:
    """How often a benchmark measures, and what it makes of it."""

    rounds: int = 7  # Times that each program is measured, in turn with the others; the median counts.
    html: Path | None = None  # Page to write, with a picture of the roofline.
    profile: Path | None = None  # Directory for traces of our programs, whose longest operations are listed.
    save_baseline: Path | None = None  # File to keep the figures in, for a later comparison.
    baseline: Path | None = None  # Such a file: what is slower now ends in exit status 1.
    tolerance: float = 0.1  # Share by which a program may be slower than in the baseline.

    def __post_init__(self) -> None:
        legal = self.rounds >= 1 and 0 <= self.tolerance < 100
        require(legal, f"rounds {self.rounds}, tolerance {self.tolerance}: at least 1, and from 0 to 100")
        for path in filter(None, (self.html, self.profile, self.save_baseline)):  # now, not after minutes
            require(path.parent.is_dir(), f"{path}: there is no directory {path.parent}; make it")
        require(not (self.profile and self.profile.is_file()), f"profile {self.profile}: a file; name a directory")
        require(not self.baseline or self.baseline.is_file(), f"baseline {self.baseline}: there is no such file")

    def show(self, benchmark: str, rows: list[Row], limits: Row) -> None:
        """Print, write, compare. Raises SlowerError with names, and ConfigError for the baseline of another device."""
        device = jax.devices()[0].device_kind
        document = {"benchmark": benchmark, "device": device, "jax": jax.__version__, "limits": limits, "rows": rows}
        columns = {key: how for key, how in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
        print(" " * 24 + "".join(f"{heading:>9}" for heading, _ in columns.values()))
        for name, group in groupby(rows, lambda row: row["name"]):
            print(name)
            for row in group:
                cells = ("" if row.get(key) is None else how.format(row[key]) for key, (_, how) in columns.items())
                line = "".join(f"{cell:>9}" for cell in cells).rstrip()
                print(f"  {row['implementation']:<22}{line}  {row.get('reason', '')}".rstrip())
                for operation, ms in row.get("operations", {}).items():
                    print(f"{ms:30,.2f} ms  {operation}")
        here = "".join(f", {value:,.1f} {name} here" for name, value in limits.items())
        print(f"{device}, jax {jax.__version__}{here}")
        encoded = json.dumps(document, allow_nan=False)
        if self.html:
            page = Path(__file__).with_name("report.html").read_text("utf-8")
            write_atomically(self.html, page.replace("DOCUMENT", encoded.replace("<", "\\u003c")).encode())
        if self.save_baseline:
            write_atomically(self.save_baseline, encoded.encode() + b"\n")
        print(encoded, flush=True)
        if self.baseline:
            self._compare(document, read_json(self.baseline, limit=2**24))

    def _compare(self, now: Row, then: Row) -> None:
        for what in ("benchmark", "device"):
            both = f"{self.baseline} is of {what} {then.get(what)}, this one is {now[what]}"
            require(now[what] == then.get(what), f"{both}; make another with --save-baseline")

        def times(document: Row) -> Row:
            return {f"{r['name']} {r['implementation']}": r["relative"] for r in document["rows"] if "relative" in r}

        with reading(f"baseline {self.baseline}"):
            known = times(then)
        pairs = {name: (own, known[name]) for name, own in times(now).items() if name in known}
        longer = {name: new[1] / old[1] for name, (new, old) in pairs.items() if new[0] > old[1] * (1 + self.tolerance)}
        if longer:
            slower = "; ".join(f"{name} takes {ratio:.2f} times as long" for name, ratio in longer.items())
            raise SlowerError(f"slower than {self.baseline}: {slower}")
        note(f"{len(pairs)} of the {len(known)} times in {self.baseline} compared: none is slower")


def measure(contenders: Iterable[Contender], rounds: int, profile: Path | None = None, warm: bool = False) -> list[Row]:
    """The figures of each contender, its largest error over the largest expected entry, and its time: `ms` the median,
    `spread` half the distance of its quartiles over it, `relative` its quartiles over the yardstick, `ratio` the median
    speed over that of the first of its name. Texts, as lists of tokens, are compared with those of the first. To keep
    them `warm`, each turn begins with a call that is not timed: a system may have taken memory back meanwhile."""
    rows = []
    for name, group in groupby(contenders, lambda contender: contender.name):
        timed, texts = [], None
        for _, implementation, call, figures, expected in group:
            rows.append(row := {"name": name, "implementation": implementation, **figures})
            if call is None:
                continue
            began = time.perf_counter()
            try:
                result = jax.block_until_ready(call())
            except RuntimeError as error:  # such as a peer's compiler that is not there
                row["reason"] = first_line(error)
                continue
            timed.append((row, call, time.perf_counter() - began > 1))
            if profile:
                row["operations"] = _longest_operations(call, profile / f"{name} {implementation}")
            if expected is not None:
                pairs = zip(jax.tree.leaves(result), expected, strict=True)
                errors = [np.abs(np.asarray(a, float) - b).max() / (np.abs(b).max() or 1) for a, b in pairs]
                row["error"] = float(np.nan_to_num(errors, nan=np.inf).max().clip(max=1e99))  # JSON has no infinity
            if isinstance(result, list):
                texts = texts or result
                equal = sum(a == b for a, b in zip(texts, result, strict=True))
                row["reason"] = f"{equal} of {len(result)} texts equal"
        if timed:
            samples = _samples([(_yardstick(), False), *((call, is_long) for _, call, is_long in timed)], rounds, warm)
            for (row, *_), seconds in zip(timed, samples[1:], strict=True):
                row |= _times(row, seconds, yardstick=samples[0], first=samples[1])
    return rows


def _longest_operations(call: Callable[[], Any], directory: Path) -> dict[str, float]:
    """Ms of ten operations of the compiled programs; those of a CPU may have run side by side."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # or a trace of an engine's run is mostly of Python's calls
    with jax.profiler.trace(directory, profiler_options=options):
        jax.block_until_ready(call())
    newest, spent = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime), Counter[str]()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for event in (event for line in plane.lines for event in line.events):
            if "hlo_op" in dict(event.stats) and not event.name.startswith(("while", "conditional", "call")):  # wholes
                spent[event.name] += event.duration_ns / 1e6
    return dict(spent.most_common(10))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def _yardstick() -> Callable[[], Any]:
    """A matrix product, and a read of 64 MiB."""
    a, b = jnp.ones((512, 512)), jnp.ones(2**24)
    compiled = jax.jit(lambda a, b: (a @ a, b.sum())).lower(a, b).compile()
    return lambda: compiled(a, b)


def _samples(calls: list[tuple[Callable[[], Any], bool]], rounds: int, warm: bool) -> np.ndarray:
    """Seconds of one call [calls, rounds]; one that is not known to be long is repeated."""

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        jax.block_until_ready(call() if warm else None)
        began = time.perf_counter()
        for _ in range(repeats):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / repeats

    repeats = [1 if is_long else max(1, round(SHORTEST / max(seconds(call, 1), 1e-9))) for call, is_long in calls]
    return np.array([[seconds(call, n) for (call, _), n in zip(calls, repeats, strict=True)] for _ in range(rounds)]).T


def _times(row: Row, seconds: np.ndarray, yardstick: np.ndarray, first: np.ndarray) -> Row:
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    relative = np.quantile(seconds / yardstick, [0.25, 0.5, 0.75]).tolist()
    times = {"ms": 1e3 * median, "spread": (high - low) / 2 / median, "ratio": float(np.median(first / seconds))}
    rates = {rate: row[amount] / unit / median for amount, (rate, unit) in RATES.items() if amount in row}
    shares = {share: row[f"{share}_s"] / median for share in SHARES if f"{share}_s" in row}
    return times | rates | shares | {"relative": relative}
