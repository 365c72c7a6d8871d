"""Records of a run: never torn, no step twice, the same for every reader, and a display that fits its terminal."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pty
import re
import resource
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxgpt.config import TrainConfig, TrainingConfig
from jaxgpt.errors import ConfigError
from jaxgpt.progress import Bar
from jaxgpt.training.metrics import MetricsLog, evaluation_figures, step_figures

RECORD = {"step": 5, "loss": 6.1, "tokens_per_second": 1234.4, "mfu": 0.05}
EVALUATION = {"step": 5, "val_loss": 6.2, "val_bits_per_byte": 3.7, "val_bits_per_byte_se": 0.16}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(run_dir=str(tmp_path))


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 6.0 - step / 8, **more}


def lines(config: TrainConfig) -> list[Any]:
    raw = (config.run_path / "metrics.jsonl").read_bytes()
    assert raw.endswith(b"\n") or not raw
    return [json.loads(line) for line in raw.splitlines()]


# Files


def test_what_a_killed_run_wrote_after_its_checkpoint_is_cut(config: TrainConfig) -> None:
    kept = [record(1), record(2), {"step": 2, "val_loss": 5.0}, record(4)]
    text = "".join(json.dumps(line) + "\n" for line in (*kept, record(5), {"step": 5, "val_loss": 4.0}))
    torn = ["", '"step"', "[1]", '{"loss": 3}', '{"step": null}', '{"step": 3, "lo', "\0\0\0"]
    (config.run_path / "metrics.jsonl").write_text(text + "\n".join(torn))
    log = MetricsLog(config, 4)
    assert lines(config) == kept
    assert not log.evaluated
    log.write(record(5))
    log.write({"step": 5, "val_loss": 4.5})
    log.close()
    assert lines(config) == [*kept, record(5), {"step": 5, "val_loss": 4.5}]
    for step, evaluated in ((5, True), (2, True), (1, False)):
        log = MetricsLog(config, step)
        assert log.evaluated == evaluated
        log.close()
    MetricsLog(config, 0).close()
    assert lines(config) == []


def test_every_record_is_there_as_soon_as_it_is_written(config: TrainConfig) -> None:
    """In both files: a process that is killed afterwards loses nothing."""
    log = MetricsLog(config, 0)
    for step in range(1, 4):
        log.write(record(step))
        assert lines(config)[-1] == record(step)
        assert events(config)[-1].step == step
    log.close()


@pytest.fixture
def lift_limit() -> Iterator[None]:
    yield
    limit_files(-1)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.usefixtures("lift_limit")
@pytest.mark.parametrize("which", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_leaves_whole_records_and_the_name_of_the_file(config: TrainConfig, which: str) -> None:
    """Whatever part of a record still fits. After 60 records the larger file is TensorBoard's, written second."""
    log = MetricsLog(config, 0)
    for step in range(1, 61):
        log.write(record(step))
    path = config.run_path / which
    path = next(path.iterdir()) if path.is_dir() else path
    size = path.stat().st_size
    for room in (0, 1, 20, 24):
        limit_files(size + room)
        for _ in range(5):  # in all more than the 10 that a writer with a thread would queue before it waits for ever
            with pytest.raises(OSError, match=re.escape(str(path))) as raised:
                log.write(record(61))
            assert raised.value.errno in (errno.EFBIG, errno.ENOSPC)
            assert path.stat().st_size == size
    limit_files(-1)
    log.write(record(62))
    log.close()
    assert scalars(events(config))[-2:] == [(60, "loss", -1.5), (62, "loss", -1.75)]
    assert (lines(config)[59], lines(config)[-1]) == (record(60), record(62))


def checksum(data: bytes) -> int:
    """CRC-32C bit by bit, masked as TensorFlow's record files want it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(config: TrainConfig) -> list[Event]:
    """All events in the order of their files, read as TensorBoard does."""
    found = []
    for path in sorted((config.run_path / "tensorboard").iterdir()):
        assert ".tfevents." in path.name  # how TensorBoard knows them
        file = io.BytesIO(path.read_bytes())
        while head := file.read(12):
            length, check = struct.unpack("<QI", head)
            assert check == checksum(head[:8])
            content = file.read(length)
            assert struct.unpack("<I", file.read(4)) == (checksum(content),)
            found.append(Event.FromString(content))
    return found


def scalars(found: list[Event]) -> list[tuple[int, str, float]]:
    return [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]


def test_tensorboard_gets_the_same_numbers(finished: Path) -> None:
    config = TrainConfig(run_dir=str(finished))
    found = events(config)
    assert found[0].file_version == "brain.Event:2"
    expected = [
        (line["step"], name.replace("val_", "val/"), value)
        for line in lines(config)
        for name, value in line.items()
        if name != "step"
    ]
    got = scalars(found)
    assert {name for _, name, _ in got} >= {"loss", "val/loss", "val/bits_per_byte", "learning_rate", "grad_norm"}
    assert [place[:2] for place in got] == [place[:2] for place in expected]
    assert [value for *_, value in got] == pytest.approx([value for *_, value in expected], rel=1e-6)
    assert all(abs(event.wall_time - time.time()) < 3600 for event in found)


def test_tensorboard_forgets_what_was_cut(config: TrainConfig) -> None:
    """A session that starts at step 3 replaces all that an earlier file says of that step and those after it."""
    for restored in (0, 2):
        log = MetricsLog(config, restored)
        for step in range(restored + 1, restored + 4):
            log.write(record(step))
        log.close()
    found = events(config)
    starts = [event.step for event in found if event.session_log.status == event.session_log.START]
    assert starts == [1, 3]
    assert [step for step, *_ in scalars(found)] == [1, 2, 3, 3, 4, 5]
    assert len(list((config.run_path / "tensorboard").iterdir())) == 2


def test_weights_and_biases_gets_the_same_numbers(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    @contextlib.contextmanager
    def init(**options: Any) -> Iterator[SimpleNamespace]:
        said.append(options)
        yield SimpleNamespace(log=lambda numbers, step: said.append((step, numbers)))
        said.append("end")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = dataclasses.replace(config, name="mine", training=TrainingConfig(wandb=True))
    log = MetricsLog(config, 0)
    log.write(record(3))
    log.close()
    assert said[0]["name"] == "mine" and said[0]["config"]["training"]["wandb"] is True
    assert said[1:] == [(3, {"loss": record(3)["loss"]}), "end"]


def test_weights_and_biases_is_missed_before_anything_is_cut(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(config, 0)
    log.write(record(1))
    log.close()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        MetricsLog(dataclasses.replace(config, training=TrainingConfig(wandb=True)), 0)
    assert lines(config) == [record(1)]


# The display


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {name: value for name, value in RECORD.items() if name != "mfu"}
    corpus: Any = SimpleNamespace(val_bytes=10_000, val_gzip_bytes=2581)
    with Bar("step", 20, 0) as display:
        display.console.print("[bold]hello[/bold] :smile: " + "x" * 200)
        display.show(5, step_figures(RECORD, 7.5), due=False)
        display.show(5, step_figures(RECORD, 7.5), due=True)
        display.show(6, step_figures(unknown, 14_000), due=True)
        display.console.print(evaluation_figures(EVALUATION, [corpus]))
    assert capsys.readouterr().out.splitlines() == [
        "[bold]hello[/bold] :smile: " + "x" * 200,
        "step 5/20  loss 6.1000  1,234 tokens/s  MFU 5.0 %  0:00:08 left",
        "step 6/20  loss 6.1000  1,234 tokens/s  MFU n/a  3:53:20 left",
        "held-out loss 6.2000  3.700 ± 0.160 bits per byte  (gzip -9: 2.065)",
    ]


def read_all(descriptor: int) -> str:
    """What a terminal shows until its last writer has closed it, which Linux reports as an error."""
    content = b""
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 1 << 12):
            content += part
    os.close(descriptor)
    return content.decode()


def test_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    main, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ThreadPoolExecutor() as reader:
        reading = reader.submit(read_all, main)
        with open(terminal, "w", encoding="utf-8") as screen:
            monkeypatch.setattr(sys, "stdout", screen)
            with Bar("step", 20, 4) as display:
                display.show(5, step_figures(RECORD, 7.5), due=False)
                display.console.print("held-out loss 6.2000")
                display.show(6, step_figures({**RECORD, "loss": 5.9}, 7), due=True)
        raw = reading.result()
    assert "\x1b[?25l" in raw and raw.rstrip().endswith("\x1b[?25h"), "the cursor is hidden, and comes back"
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw).replace("\r", "\n").splitlines()
    bars = [line for line in frames if line.startswith("step ") and "━" in line]
    assert bars[-1].endswith(" 6/20 loss 5.9000  1,234 tokens/s  MFU 5.0 %  0:00:07 left")
    assert any(line.startswith("held-out loss 6.2000") for line in frames)
    assert not any(line.startswith("step 6/20") for line in frames), "the bar says it"


def test_a_reader_that_has_gone_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with Bar("step", 20, 0) as display:
            for step in range(3):
                display.console.print("is anybody there?")
                display.show(step, "loss 6.1", due=True)
        print("the sample", flush=True)
