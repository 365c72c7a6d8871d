"""Whole runs: whatever stops them, the same command goes on as if nothing had happened, or says in one line why not."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxgpt import cli
from jaxgpt.checkpoint import restore_model
from jaxgpt.config import MeshConfig, TrainConfig
from jaxgpt.data.prepare import prepare_corpora
from jaxgpt.errors import Stopped, StorageError, TrainingError, run_command
from jaxgpt.model import Transformer
from jaxgpt.run import read_config
from jaxgpt.training import loop, metrics
from jaxgpt.training.loop import Trainer, train

pytestmark = pytest.mark.usefixtures("compiled_once")
SPEED = ("tokens_per_second", "mfu")


def with_options(config: TrainConfig, run_dir: Path, **sections: dict[str, Any]) -> TrainConfig:
    """`with_options(tiny, path, training=dict(steps=3))` is `tiny` in another directory with that change."""
    changed = {name: dataclasses.replace(getattr(config, name), **options) for name, options in sections.items()}
    return dataclasses.replace(config, run_dir=str(run_dir), **changed)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The records without the clock's part; fails for a torn line or a step that is there twice."""
    raw = (run_dir / "metrics.jsonl").read_bytes()
    assert raw.endswith(b"\n") or not raw
    found = [json.loads(line) for line in raw.splitlines()]
    places = [(record["step"], "val_loss" in record) for record in found]
    assert places == sorted(set(places))
    return [{name: value for name, value in record.items() if name not in SPEED} for record in found]


def saved_steps(run_dir: Path) -> list[int]:
    """The checkpoints, oldest first."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit())


def saved_leaves(run_dir: Path, step: int) -> dict[str, Any]:
    """Shape, dtype and fingerprint of everything that a checkpoint holds."""
    manifest = json.loads((run_dir / f"checkpoints/{step}/manifest/metadata").read_bytes())["manifest"]
    leaves: dict[str, Any] = json.loads(manifest)["leaves"]
    assert {".token_embedding.value", "['step']"} <= {*leaves["model"], *leaves["rest"]}
    return leaves


def assert_same_run(run_dir: Path, other: Path, step: int = 20) -> None:
    assert records(run_dir) == records(other)
    assert saved_leaves(run_dir, step) == saved_leaves(other, step)


def after_report(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something once, when `step` has been reported and what was saved is saved: while the next one runs."""
    original, todo = Trainer.report, [action]

    def report(self: Trainer, number: int, values: Any) -> None:
        original(self, number, values)
        if number == step and todo:
            self.checkpoints.wait()
            todo.pop()()

    monkeypatch.setattr(Trainer, "report", report)


def interrupt(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# Stopped on purpose


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("number", "reported", "step"), [(signal.SIGTERM, 6, 7), (signal.SIGINT, 2, 3), (signal.SIGTERM, 4, 4)]
)
def test_a_stop_saves_the_last_finished_step(
    tiny: TrainConfig,
    finished: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    reported: int,
    step: int,
) -> None:
    """The step that runs while another is reported is finished; step 4, which is saved anyway, runs alone."""
    config = with_options(tiny, tmp_path / "run")
    with monkeypatch.context() as patch:
        after_report(patch, reported, lambda: interrupt(number))
        stopped = command("train.py", config)
    assert stopped.status == 75
    assert stopped.error == f"stopped after step {step}, the newest saved step is {step}; run the same command to go on"
    assert "jaxgpt: saving, then leaving" in stopped.err
    assert saved_steps(tmp_path / "run")[-1] == step
    assert records(tmp_path / "run") == [r for r in records(finished) if r["step"] <= step]
    went_on = command("train.py", config)
    assert went_on.status == 0 and f"going on after step {step}" in went_on.out
    windows = sum((len(corpus.train) - 1) // 64 for corpus in prepare_corpora(tiny.data, tiny.tokenizer)[1])
    assert f"({20 * 4 / windows:.2f} epochs)" in went_on.out
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.usefixtures("one_device")
def test_a_stop_during_evaluation_leaves_it_to_the_next_run(
    tiny: TrainConfig, finished: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the middle of the first evaluation, again when that is made up for, and in the very last one."""
    held_out = loop.evaluation_batches
    interrupted = iter([True, True, False, False, False, True, False])

    def read(index: int, batch: Any) -> Any:
        if index == 1 and next(interrupted):
            interrupt()
        return batch

    monkeypatch.setattr(loop, "evaluation_batches", lambda *a, **more: held_out(*a, **more).map_with_index(read))
    config = with_options(tiny, tmp_path / "run")
    for step in (5, 5, 20):
        stopped = command("train.py", config)
        assert (stopped.status, stopped.error.partition(", ")[0]) == (75, f"stopped after step {step}")
        assert saved_steps(tmp_path / "run")[-1] == step
        assert [r["step"] for r in records(tmp_path / "run") if "val_loss" in r] == [*range(5, step, 5)]
    assert command("train.py", config).status == 0
    assert next(interrupted, None) is None
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.usefixtures("one_device")
def test_what_the_message_says_is_saved(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A signal after the loop has decided that step 5, which is only evaluated, need not be saved."""
    pause = Trainer.pause

    def pause_then_interrupt(self: Trainer, step: int, state: Any) -> None:
        pause(self, step, state)
        if step == 5:
            assert [r["step"] for r in records(tmp_path)][-1] == 5
            interrupt()

    monkeypatch.setattr(Trainer, "pause", pause_then_interrupt)
    with pytest.raises(Stopped, match=r"^stopped after step 6, the newest saved step is 6;"):
        train(with_options(tiny, tmp_path))
    assert saved_steps(tmp_path)[-1] == 6


def test_a_stop_during_data_preparation(
    tiny: TrainConfig, finished: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = with_options(tiny, tmp_path / "run", data={"cache_dir": str(tmp_path / "cache")})
    with monkeypatch.context() as patch:
        patch.setattr("jaxgpt.data.prepare.write_shard", lambda *_: interrupt())
        stopped = command("train.py", config)
    assert (stopped.status, stopped.error) == (75, "interrupted; run the same command again to go on")
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert command("train.py", config).status == 0
    assert_same_run(tmp_path / "run", finished)


# Processes that really die


def in_child(words: list[str], out: str, settings: dict[str, Any], stuck: bool) -> None:
    """A process of its own that does what train.py does; `stuck` keeps it busy for ever where it would save."""
    for path, descriptor in ((f"{out}.out", 1), (f"{out}.err", 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for name, value in settings.items():
        jax.config.update(name, value)
    if stuck:
        loop.Trainer.save = lambda *_: time.sleep(60)  # type: ignore[method-assign]
    sys.argv = ["train.py", *words]
    run_command(lambda arguments: cli.dispatch(["train", *arguments], "train.py"))


class Child:
    """A running child and what it has said."""

    def __init__(self, context: ForkServerContext, words: list[str], out: Path, **settings: Any) -> None:
        stuck = settings.pop("stuck", False)
        self.process = context.Process(target=in_child, args=(words, str(out), settings, stuck))
        self._out = out
        self.process.start()

    @property
    def err(self) -> str:
        return self._out.with_suffix(".err").read_text()

    def wait_until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Return when something has happened or the child is gone."""
        end = time.monotonic() + seconds
        while self.process.is_alive() and not happened():
            assert time.monotonic() < end, self.err
            time.sleep(0.002)

    def leave(self, number: int | None = None) -> int | None:
        """Send a signal, if any, and return the exit status."""
        if number is not None and self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)
        self.process.join(120)
        return self.process.exitcode


@pytest.fixture
def start(compile_settings: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """`start(words)` runs train.py in another process, forked from one that has imported everything: 1 s, not 6."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxgpt.cli", "jaxgpt.training.loop", "pytest"])
    children = []

    def start_child(words: list[str], **settings: Any) -> Child:
        children.append(Child(context, words, tmp_path / "child", **settings, **compile_settings))
        return children[-1]

    yield start_child
    for child in children:
        child.process.kill()
        child.process.join()


@pytest.mark.slow
def test_a_killed_run_is_the_run_that_nothing_disturbed(
    tiny: TrainConfig, start: Callable[..., Child], tmp_path: Path
) -> None:
    moments = random.Random(0)
    undisturbed, killed = (with_options(tiny, tmp_path / name) for name in ("undisturbed", "killed"))
    words = {}
    for config in (undisturbed, killed):
        path = tmp_path / f"{config.run_path.name}.json"
        path.write_text(cli.to_json(config))
        words[config.run_path] = [str(path)]
    assert start(words[undisturbed.run_path]).leave() == 0

    run_dir, counts = killed.run_path, [0]

    def progress() -> int:
        path = run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for kill in range(6):
        child = start(words[run_dir])
        if kill < 2:  # before anything is saved: at the start, then while it compiles or in the first steps
            child.wait_until(lambda k=kill: k == 0 or (run_dir / "tensorboard").exists())
            time.sleep(moments.uniform(0, 0.5))
        else:
            target = min(counts[-1] + moments.randrange(1, 4), 22)
            child.wait_until(lambda: saved_anything(run_dir) and progress() >= target)  # noqa: B023
            time.sleep(moments.uniform(0, 0.02))
        assert child.leave(signal.SIGKILL) in (-signal.SIGKILL, 0), child.err
        counts.append(len(records(run_dir)) if progress() else 0)
    assert len({count for count in counts if 0 < count < 24}) >= 3, "it was hardly ever killed between two steps"
    assert start(words[run_dir]).leave() == 0
    assert_same_run(run_dir, undisturbed.run_path)


def saved_anything(run_dir: Path) -> bool:
    return any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(
    tiny: TrainConfig, start: Callable[..., Child], command: Callable[..., Any], tmp_path: Path
) -> None:
    """And until then nobody else may train there."""
    config = with_options(tiny, tmp_path / "run", training={"steps": 6})
    assert command("train.py", config).status == 0
    longer = with_options(tiny, tmp_path / "run", training={"steps": 7})
    (tmp_path / "longer.json").write_text(cli.to_json(longer))
    child = start([str(tmp_path / "longer.json"), "--allow-change", "training.steps"], stuck=True)
    child.wait_until(lambda: records(tmp_path / "run")[-1]["step"] == 7)
    refused = command("train.py", longer)
    assert refused.status == 2
    assert refused.error.startswith(f"{tmp_path / 'run'} is in use by pid {child.process.pid} on host ")
    os.kill(child.process.pid, signal.SIGINT)
    child.wait_until(lambda: "jaxgpt: saving, then leaving (once more: leave at once)" in child.err)
    began = time.monotonic()
    assert child.leave(signal.SIGINT) == 75
    assert time.monotonic() - began < 5
    assert child.err.endswith("jaxgpt: left at once; the newest saved step is 6, the same command resumes\n")


# Meshes


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_run(tiny: TrainConfig, tmp_path: Path) -> None:
    model = {"n_heads": 8, "head_dim": 4}
    training = {"steps": 8, "batch_size": 8, "accumulation_steps": 1, "loss_chunks": 1}
    options = {"model": model, "training": training, "data": {"val_fraction": 0.0}, "mesh": {"data": 8}}
    whole = tmp_path / "8x1x1"
    train(with_options(tiny, whole, checkpoint={"keep_last": 9}, **options))
    for sizes in ((2, 2, 2), (1, 1, 8)):
        run_dir = tmp_path / "x".join(map(str, sizes))
        shutil.copytree(whole, run_dir)
        shutil.rmtree(run_dir / "checkpoints/8")
        train(with_options(tiny, run_dir, **options | {"mesh": dataclasses.asdict(MeshConfig(*sizes))}))
        losses, expected = ([record["loss"] for record in records(path)] for path in (run_dir, whole))
        assert len(losses) == 8 and losses[:4] == expected[:4]
        np.testing.assert_allclose(losses[4:], expected[4:], rtol=0, atol=1e-5)
        assert losses[4:] != expected[4:], "sums in another order that give the same bits: was it another mesh?"


# Numbers and memory


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_not_finite_ends_the_run(tiny: TrainConfig, command: Callable[..., Any], tmp_path: Path) -> None:
    good = with_options(tiny, tmp_path / "run", training={"steps": 4})
    assert command("train.py", good).status == 0
    before = saved_leaves(tmp_path / "run", 4)
    bad = with_options(tiny, tmp_path / "run", optimizer={"peak_lr": 1e30, "clip_norm": 0.0})
    changes = ("training.steps", "optimizer.peak_lr", "optimizer.clip_norm")
    ended = command("train.py", bad, "--allow-change", *changes)
    assert (ended.status, ended.error) == (
        70, "step 5: the held-out loss is nan; the newest saved step is 4: lower optimizer.peak_lr"
    )  # fmt: skip
    ended = command("train.py", bad, "--allow-change", *changes, "--training.eval-every", "0")
    assert ended.status == 70
    assert ended.error.startswith("training step 6: loss ")
    remedy = "look at the data of that step's batch, or lower optimizer.peak_lr"
    assert ended.error.endswith(f" is not finite; the newest saved step is 4: {remedy}")
    assert saved_steps(tmp_path / "run") == [4] and saved_leaves(tmp_path / "run", 4) == before
    assert [record["step"] for record in records(tmp_path / "run") if "loss" in record] == [1, 2, 3, 4, 5]
    step, _, _ = restore_step(tmp_path / "run")
    assert step == 4


@pytest.mark.usefixtures("one_device")
def test_records_that_somebody_moves_away_end_no_run(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rotated log: what is open is still written and made durable before a checkpoint."""
    after_report(monkeypatch, 2, lambda: (tmp_path / "metrics.jsonl").rename(tmp_path / "older"))
    train(with_options(tiny, tmp_path, training=dict(steps=8)))
    assert saved_steps(tmp_path)[-1] == 8
    assert len((tmp_path / "older").read_text().splitlines()) >= 4


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_state_that_is_not_finite_is_not_saved(tiny: TrainConfig, tmp_path: Path) -> None:
    """The update overflows while loss and gradient are still finite: the checkpoint is the last to notice."""
    optimizer = {"peak_lr": 1e15, "weight_decay": 1e30, "warmup_steps": 0}
    config = with_options(tiny, tmp_path, optimizer=optimizer, checkpoint={"every": 1})
    with pytest.raises(TrainingError, match=r"^step 1 was not saved: leaf \S+ is not finite"):
        train(config)
    assert saved_steps(tmp_path) == []


def restore_step(run_dir: Path) -> tuple[int, Any, Any]:
    config = read_config(run_dir).model
    with jax.set_mesh(loop.make_mesh(MeshConfig())):
        return restore_model(run_dir, jax.eval_shape(lambda: Transformer(config, jax.random.key(0))))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("when", ["compiling", "running"])
def test_too_little_memory_names_what_to_lower(
    tiny: TrainConfig, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, when: str
) -> None:
    calls = itertools.count(1)
    compiled = Trainer.compiled

    def compile_then_fail(self: Trainer, *arguments: Any) -> Callable[..., Any]:
        step_function = None if when == "compiling" else compiled(self, *arguments)

        def step(*state_and_batch: Any) -> Any:
            if step_function is None or next(calls) == 6:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore\nlines")
            return step_function(*state_and_batch)

        return step if step_function else step()

    monkeypatch.setattr(Trainer, "compiled", compile_then_fail)
    ended = command("train.py", with_options(tiny, tmp_path / "run"))
    assert ended.status == 70
    assert ended.error == (
        "the devices have too little memory: RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.; "
        "raise training.accumulation_steps, set model.remat full, or lower the batch size or num_samples"
    )
    assert saved_steps(tmp_path / "run") == ([] if when == "compiling" else [4])


@pytest.mark.usefixtures("one_device")
def test_another_error_of_the_device_is_a_bug(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(Trainer, "compiled", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(with_options(tiny, tmp_path))


# Disks


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes, as on a full disk; -1 lifts that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def lift_limit() -> Iterator[None]:
    yield
    limit_files(-1)


@pytest.mark.usefixtures("one_device", "lift_limit")
@pytest.mark.parametrize("what", ["metrics.jsonl", "tensorboard", "checkpoint"])
def test_a_full_disk_ends_the_run_in_one_line(
    tiny: TrainConfig,
    finished: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    what: str,
) -> None:
    run_dir = tmp_path / "run"
    sizes = {
        "metrics.jsonl": lambda: (run_dir / "metrics.jsonl").stat().st_size + 50,
        "tensorboard": lambda: next((run_dir / "tensorboard").iterdir()).stat().st_size + 50,
        "checkpoint": lambda: 1 << 14,
    }
    if what == "tensorboard":
        short = SimpleNamespace(loads=json.loads, dumps=lambda record, **_: "{}")  # so that its file is the larger one
        monkeypatch.setattr(metrics, "json", short)
    with monkeypatch.context() as patch:
        after_report(patch, 6, lambda: limit_files(sizes[what]()))
        ended = command("train.py", with_options(tiny, run_dir))
    limit_files(-1)
    assert ended.status == 74
    if what == "checkpoint":
        assert ended.error.startswith(f"cannot save step 8 in {run_dir / 'checkpoints'}: ")
        assert ended.error.endswith("make room or mend the disk (the newest saved step is 4)")
    else:
        assert ended.error.startswith(f"cannot write or read {run_dir / what}") and "; free space" in ended.error
    assert saved_steps(run_dir) == [4]
    if what != "tensorboard":
        last = records(run_dir)[-1]["step"]
        assert last == 6 if what == "metrics.jsonl" else last >= 8  # a save fails in the background
        assert command("train.py", with_options(tiny, run_dir)).status == 0
        assert_same_run(run_dir, finished)


@pytest.mark.usefixtures("one_device")
def test_too_little_room_is_seen_before_the_first_step(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Parameters, their average and two moments of Adam, for two checkpoints, and not much more."""
    usage, state = shutil.disk_usage(tmp_path), 4 * 4 * parameters(tiny)

    def free(size: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))

    monkeypatch.setattr(Trainer, "compiled", lambda *_: 1 / 0)
    free(2 * state)
    with pytest.raises(StorageError, match=rf"^{tmp_path}: 0\.00 GB are free, and two checkpoints need 0\.00 GB; make"):
        train(with_options(tiny, tmp_path))
    free(2.01 * state)
    with pytest.raises(ZeroDivisionError):
        train(with_options(tiny, tmp_path))


def parameters(config: TrainConfig) -> int:
    """512 tokens (500 rounded up), 64 places, two layers of GPT-2 and a last norm, counted by hand."""
    D, F = config.model.d_model, 4 * config.model.d_model
    layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
    return 512 * D + 64 * D + 2 * layer + 2 * D


# What is said and recorded


@pytest.mark.usefixtures("one_device")
def test_nothing_held_out(tiny: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train(with_options(tiny, tmp_path, data={"val_fraction": 0.0}, training={"steps": 5}))
    assert "nothing is held out: there will be no evaluation" in capsys.readouterr().out
    assert [sorted(record) for record in records(tmp_path)] == 5 * [
        ["grad_norm", "learning_rate", "loss", "step", "tokens"]
    ]


@pytest.mark.usefixtures("one_device")
def test_an_evaluation_takes_as_many_rows_at_a_time_as_a_training_step(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch that is cut into parts because it does not fit would not fit there either."""
    shapes = []

    def note(*arguments: Any) -> dict[str, float]:
        windows = arguments[2]
        shapes.append((len(windows), windows[0].tokens.shape))
        return {"val_loss": 1.0, "val_bits_per_byte": 1.0, "val_bits_per_byte_se": 0.1}

    monkeypatch.setattr("jaxgpt.training.loop.evaluate", note)
    train(with_options(tiny, tmp_path, training={"steps": 5}))
    assert shapes == [(3 * 2, (4 // 2, 64))]


@pytest.mark.usefixtures("one_device")
def test_speed_leaves_out_what_stands_between(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock that only steps and evaluations move. A record after every third step holds the mean of three."""
    now = [100.0]
    compiled, evaluate = Trainer.compiled, Trainer.evaluate

    def compiled_with_clock(self: Trainer, *arguments: Any) -> Callable[..., Any]:
        step_function, taken = compiled(self, *arguments), itertools.count(1)

        def step(*state_and_batch: Any) -> Any:
            now[0] += next(taken)
            return step_function(*state_and_batch)

        now[0] += 50
        return step

    def slow_evaluate(self: Trainer, *arguments: Any) -> bool:
        now[0] += 1000
        return evaluate(self, *arguments)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Trainer, "compiled", compiled_with_clock)
    monkeypatch.setattr(Trainer, "evaluate", slow_evaluate)
    train(with_options(tiny, tmp_path, training={"steps": 6, "log_every": 3, "eval_every": 1}))
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in found if "val_loss" in record]) == 6
    speeds = {record["step"]: record["tokens_per_second"] for record in found if "loss" in record}
    assert speeds == {3: 4 * 64 / 2, 6: 4 * 64 / 5}


def test_the_records_of_a_run(finished: Path) -> None:
    found = records(finished)
    assert [r["step"] for r in found if "loss" in r] == [*range(1, 21)]
    assert [r["step"] for r in found if "val_loss" in r] == [5, 10, 15, 20]
    assert [r["tokens"] for r in found if "loss" in r] == [*range(256, 5121, 256)]
    assert found[-2]["loss"] < found[0]["loss"] - 0.3, "it does not learn"
    assert saved_steps(finished) == [16, 20]


@pytest.mark.usefixtures("one_device")
def test_a_finished_run_says_so_and_prints_a_sample(
    tiny: TrainConfig, finished: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    training = {"sample_tokens": 10, "sample_prompt": "import "}
    outcomes = [command("train.py", with_options(tiny, tmp_path / "run", training=training)) for _ in range(2)]
    for outcome in outcomes:
        assert outcome.status == 0
        assert "step 20 is the last: raise training.steps (and --allow-change it) to go on\n" in outcome.out
        assert "a sample:\nimport " in outcome.out
    assert outcomes[0].out == outcomes[1].out
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.usefixtures("one_device")
def test_a_longer_run_goes_on(tiny: TrainConfig, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = with_options(tiny, tmp_path / "run", training={"steps": 22})
    train(dataclasses.replace(config, allow_change=("training.steps",)))
    assert records(tmp_path / "run")[:24] == records(finished)
    assert [record["step"] for record in records(tmp_path / "run")][24:] == [21, 22, 22]
    assert saved_steps(tmp_path / "run") == [20, 22]
