"""Two real models from their GGUF files: what they compute, what they answer, what loading them takes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real

from jaxgpt.generation.engine import Engine
from jaxgpt.generation.sampling import SamplingParams
from jaxgpt.interop.convert import compare, convert
from jaxgpt.interop.load import load_model

PROMPT = "The three largest cities of France are Paris, Marseille and"

LOADING = """
import sys, threading, time
from pathlib import Path
import jax
from jaxgpt.config import MeshConfig
from jaxgpt.interop.load import load_model
from jaxgpt.sharding import make_mesh

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    peak, before, done = 0, resident(), False
    def watch():
        global peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model = load_model(Path(sys.argv[1])).model
    jax.block_until_ready(jax.tree.leaves(model))
    seconds, done = time.perf_counter() - began, True
    thread.join()
print(seconds, (peak - before) / sum(4 * leaf.size for leaf in jax.tree.leaves(model)))
"""


@pytest.mark.slow
def test_loading_smollm2_takes_three_seconds_and_no_second_copy() -> None:
    runs: list[list[float]] = []
    while len(runs) < 24 and min((seconds for seconds, _ in runs), default=9) >= 3:  # others may be at work here
        out = subprocess.run(
            [sys.executable, "-c", LOADING, str(real.smollm2())], capture_output=True, text=True, check=True
        ).stdout
        runs.append([float(word) for word in out.split()])
    seconds, copies = np.array(runs).T
    print(f"loading: {seconds} s, {copies} times the weights")
    assert copies.max() < 1.3 and seconds.min() < 3


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_logits_and_greedy_text_are_those_of_transformers(name: str, mesh_of: Callable) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path: Path = getattr(real, name)()
    with mesh_of():
        loaded = load_model(path)
        ids = loaded.tokenizer.encode(PROMPT, bos=True)
        logits = np.asarray(jax.jit(lambda m, t: m.logits(m(t)[0]))(loaded.model, jnp.array([ids])))
        engine = Engine(loaded.model, loaded.tokenizer)
        (ours,) = engine.generate([ids], SamplingParams(max_new_tokens=64, temperature=0))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        difference = np.abs(theirs(torch.tensor([ids])).logits.numpy() - logits).max()
        text = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0)[0]
    print(f"{name}: logits differ by {difference:.1e}")
    assert difference <= 5e-4
    assert ours.token_ids == text[len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "jaxgpt"])
def test_smollm2_survives_each_format(to: Any, mesh_of: Callable, tmp_path: Path) -> None:
    target = tmp_path / "model"
    with mesh_of():
        convert(real.smollm2(), target, to, "float32")
        difference, kl, top1 = compare(real.smollm2(), target)
        assert (difference, top1) == (0, 1) and kl < 1e-6
        before, after = (jax.tree.leaves(load_model(path).model) for path in (real.smollm2(), target))
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
