"""The training loop: it dispatches steps, reports the one before, evaluates, saves, and stops when it is asked to.

What is computed is a pure function of the configuration and the data; the loop owns what is around it: files, signals,
the terminal. Records are durable before the save of their step, so a killed and resumed run has the same ones."""

import functools
import math
import os
import shutil
import signal
import statistics
import time
from contextlib import ExitStack
from typing import Any

import jax

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import TrainConfig
from jaxgpt.data.loader import Batch, evaluation_batches, read_ahead, training_batches
from jaxgpt.data.prepare import prepare_corpora
from jaxgpt.data.shards import Corpus
from jaxgpt.errors import BadFileError, ConfigError, Stopped, StorageError, TrainingError
from jaxgpt.generation.engine import Engine
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.kernels.attention import chosen_form
from jaxgpt.model import parameter_count
from jaxgpt.progress import Bar
from jaxgpt.roofline import forward_flops_per_token, peak_flops
from jaxgpt.run import read_config, refuse_other_config, with_vocabulary, write_run
from jaxgpt.sharding import check_divides, make_mesh, place
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.training.metrics import MetricsLog, evaluate, evaluation_figures, step_figures
from jaxgpt.training.step import Metrics, TrainState, eval_step, init_state, loss_options, make_train_step


def train(config: TrainConfig) -> None:
    """Train, or go on with, the run of `config.run_path`, until its last step. Raises ConfigError, BadFileError,
    StorageError, TrainingError when the loss is not finite, Stopped after Ctrl-C or SIGTERM."""
    if jax.process_count() > 1:  # every process would read every row
        raise ConfigError(f"training in {jax.process_count()} processes is not supported; use the devices of one")
    mesh = make_mesh(config.mesh)
    check_divides(mesh, config.model, config.training.batch_size // config.training.accumulation_steps)
    with jax.set_mesh(mesh), Checkpoints(config.run_path, config.checkpoint) as checkpoints:
        if any(checkpoints.steps()):  # not the one of `jaxgpt convert`, which holds a model at step 0 and no history
            refuse_other_config(read_config(config.run_path), config)
        tokenizer, corpora = prepare_corpora(config.data, config.tokenizer)
        Trainer(with_vocabulary(config, tokenizer), checkpoints, tokenizer, corpora).run()


class Trainer:
    """One run in progress."""

    def __init__(self, config: TrainConfig, saved: Checkpoints, tokenizer: Tokenizer, corpora: list[Corpus]) -> None:
        self.config, self.checkpoints, self.tokenizer, self.corpora = config, saved, tokenizer, corpora
        training, length = config.training, config.model.context_length
        size, parts, weights = training.batch_size, training.accumulation_steps, config.data.weights
        self.batches = training_batches(corpora, weights, batch_size=size, length=length, seed=training.seed)
        rows, count = size // parts, training.eval_batches * parts  # a whole batch may not fit
        self.held_out = evaluation_batches(corpora, batch_size=rows, length=length, batches=count)
        self.provenance = {"tokenizer_sha256": tokenizer.sha256, "data": [corpus.fingerprint for corpus in corpora]}
        self.tokens, self.last = size * length, training.steps  # tokens in one step
        self.eval_step, self.stopping = functools.partial(eval_step, options=loss_options(config)), False
        self.seconds: list[float] = []  # that each step since the last record took, without what stands between

    def run(self) -> None:
        """Train from the newest checkpoint, or from the seed, to the last step, and print a sample."""
        state, start = self.first_state()
        with Bar("step", self.last, start) as self.bar, MetricsLog(self.config, start) as self.log, ExitStack() as undo:
            self.say = self.bar.console.print
            write_run(self.config, self.tokenizer, self.config.run_path)  # not before: a refused run keeps its own
            for number in (signal.SIGINT, signal.SIGTERM):
                undo.callback(signal.signal, number, signal.signal(number, self.handle_signal))
            self.announce(state, start)
            state = self.steps(state, start)
        self.checkpoints.wait()
        if (saved := self.checkpoints.saved_step or 0) < self.last:
            why = f"the last step could not be saved, the newest is {saved}; make room and run the same command again"
            raise StorageError(f"{self.config.run_path}: {why}")
        if (training := self.config.training).sample_tokens:
            params = SamplingParams(training.sample_tokens, temperature=0.8, top_k=50, top_p=0.95, seed=training.seed)
            (completion,) = Engine(state.model, self.tokenizer, slots=1).generate([training.sample_prompt], params)
            print(f"a sample:\n{training.sample_prompt}{completion.text}", flush=True)

    def handle_signal(self, *_: object) -> None:
        """The first Ctrl-C or SIGTERM asks for a stop, the second one leaves the process at once."""
        if self.stopping:
            os.write(2, f"jaxgpt: left at once; {self._saved()}, the same command resumes\n".encode())
            os._exit(Stopped.exit_status)
        self.stopping = True
        os.write(2, b"\njaxgpt: saving, then leaving (once more: leave at once)\n")

    def first_state(self) -> tuple[TrainState, int]:
        """The newest intact checkpoint, or the initial state, and its step."""
        abstract = jax.eval_shape(lambda: init_state(self.config))
        bytes_needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        bytes_free = shutil.disk_usage(self.config.run_path).free
        if bytes_free < 2 * bytes_needed:
            why = f"{bytes_free / 1e9:.2f} GB are free, and two checkpoints need {2 * bytes_needed / 1e9:.2f} GB"
            raise StorageError(f"{self.config.run_path}: {why}; make room or choose another --run-dir")
        converted = self.checkpoints.steps() == [0]
        new: Any = 0, None, {}, self.provenance
        rest = {"step": abstract.step} if converted else abstract.rest
        step, model, rest, provenance = self.checkpoints.restore(abstract.model, rest) or new
        state = TrainState(model=model, **rest) if step else jax.jit(init_state, static_argnums=0)(self.config, model)
        for name in ("tokenizer_sha256",) if converted else ("tokenizer_sha256", "data"):
            if provenance[name] != self.provenance[name]:
                why = f"its {name} has changed since step {step} was saved; restore what it was trained on"
                raise BadFileError(f"run {self.config.run_path}: {why}, or choose another --run-dir")
        return state, step

    def announce(self, state: TrainState, start: int) -> None:
        mesh = jax.sharding.get_mesh()
        _, attention = chosen_form(model := self.config.model, model.context_length)
        what = f"{parameter_count(state.model) / 1e6:.1f} M parameters, {model.dtype}, attention by {attention}"
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        self.say(f"{self.config.name}: {what}, on {mesh.devices.flat[0].device_kind} ({axes})")
        windows = sum((len(corpus.train) - 1) // model.context_length for corpus in self.corpora)
        epochs = f"{self.last * self.config.training.batch_size / windows:.2f} epochs"
        resumed = f", going on after step {start}" if start else ""
        self.say(f"{self.last} steps of {self.tokens:,} tokens ({epochs}) into {self.config.run_path}{resumed}")
        if not len(self.held_out):
            self.say("nothing is held out: there will be no evaluation")

    def steps(self, state: TrainState, start: int) -> TrainState:
        """All steps after `start`; a step number counts the updates that are done."""
        if start and self.evaluation_due(start) and not self.log.evaluated and not self.evaluate(start, state):
            raise Stopped(f"stopped after step {start}, {self._saved()}; run the same command to go on")
        if start >= self.last:
            self.say(f"step {start} is the last: raise training.steps (and --allow-change it) to go on")
            return state
        step_function = self.compiled(state, place(self.batches[start], "BT"))
        batches = read_ahead(self.batches, start)
        unreported: tuple[int, Metrics] | None = None
        self.resumed = time.perf_counter()
        for step in range(start + 1, self.last + 1):
            state, metrics = step_function(state, place(next(batches), "BT"))
            if unreported:
                self.report(*unreported)
            self.checkpoints.wait(block=False)
            unreported = step, metrics
            if self.stopping or self.save_due(step) or self.evaluation_due(step):
                self.report(*unreported)
                unreported = None
                self.pause(step, state)
        return state

    def pause(self, step: int, state: TrainState) -> None:
        """Evaluate and save as is due; save and leave when a stop was asked for."""
        complete = not self.evaluation_due(step) or self.evaluate(step, state)
        stopping = self.stopping  # asked once, since a signal may come between two lines
        if stopping or self.save_due(step):
            os.fsync(self.log.file.fileno())  # the records of a step are durable before it is
            self.checkpoints.save(step, state.model, state.rest, self.provenance)
        if stopping and not (complete and step == self.last):
            self.checkpoints.wait()
            raise Stopped(f"stopped after step {step}, {self._saved()}; run the same command to go on")
        self.resumed = time.perf_counter()

    def _saved(self) -> str:
        return f"the newest saved step is {self.checkpoints.saved_step}"

    def save_due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.last

    def compiled(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """The training step for exactly these shapes: it can never compile again."""
        began = time.perf_counter()
        step_function = make_train_step(self.config).lower(state, batch).compile()
        memory = step_function.memory_analysis()
        need = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
        seconds = time.perf_counter() - began
        self.say(f"compiled the step in {seconds:.1f} s; it needs {need / 2**30:.2f} GiB on each device")
        return step_function

    def report(self, step: int, metrics: Metrics) -> None:
        """Wait for the metrics of a step, show them, and record them when they are due."""
        values, now = jax.device_get(metrics), time.perf_counter()
        self.seconds.append(now - self.resumed)
        self.resumed, seconds_per_step = now, statistics.fmean(self.seconds)
        if not values["finite"]:
            what = f"loss {values['loss']} or gradient norm {values['grad_norm']} is not finite"
            remedy = f"{self._saved()}: look at the data of that step's batch, or lower optimizer.peak_lr"
            raise TrainingError(f"training step {step}: {what}; {remedy}")
        speed = self.tokens / seconds_per_step
        record = {"step": step, "loss": float(values["loss"]), "tokens_per_second": speed}
        record |= {name: float(x) for name, x in values.items() if name != "finite"} | {"tokens": step * self.tokens}
        if peak := peak_flops(jax.sharding.get_mesh()):
            record["mfu"] = speed * 3 * forward_flops_per_token(self.config.model) / peak
        due = step % self.config.training.log_every == 0 or step == self.last
        self.bar.show(step, step_figures(record, (self.last - step) * seconds_per_step), due=due)
        if due:
            self.log.write(record)
            self.seconds.clear()

    def evaluation_due(self, step: int) -> bool:
        every = self.config.training.eval_every
        due = step == self.last or (every > 0 and step % every == 0)
        return due and len(self.held_out) > 0

    def evaluate(self, step: int, state: TrainState) -> bool:
        """Measure the averaged parameters on held-out text; False when a stop comes first, and the next run does it."""
        figures = evaluate(self.eval_step, state.model, self.held_out, self.tokenizer, lambda: self.stopping)
        if figures is None:
            return False
        if not math.isfinite(loss := figures["val_loss"]):
            raise TrainingError(f"step {step}: the held-out loss is {loss}; {self._saved()}: lower optimizer.peak_lr")
        self.say(f"step {step}/{self.last}  {evaluation_figures(figures, self.corpora)}")
        self.log.write({"step": step, **figures})
        return True
