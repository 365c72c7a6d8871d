"""What a user would take instead: PyTorch for training, transformers for generation. Needs the extra `parity`."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.bench.programs import random_batch, workloads
from jaxgpt.bench.report import Contender
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import ConfigError
from jaxgpt.interop.configs import write_config
from jaxgpt.interop.convert import convert

try:
    import torch
    import transformers
except ImportError:
    raise ConfigError("--against needs PyTorch and transformers; run: pip install 'jaxgpt[parity]'") from None


def gpt2(config: ModelConfig) -> Any:
    """The same model with fused attention. Raises ConfigError where that is not GPT-2 in float32, without dropout."""
    with contextlib.suppress(ConfigError):  # it is no family's
        family, hf = write_config(config, "gpt2")
        if family.model_type == "gpt2" and config.dtype == "float32" and not config.dropout:
            none: Any = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
            none |= dict.fromkeys(("bos_token_id", "eos_token_id"))
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf | none))
    raise ConfigError("--against torch: this is not GPT-2 in float32, without dropout; give S or M")


def torch_training(config: TrainConfig) -> Iterator[Contender]:
    """The step of `config`, eager and compiled, in PyTorch with fused AdamW, without accumulation."""
    batch, o = random_batch(config), config.optimizer
    tokens_BT, labels_BT = (torch.from_numpy(np.array(rows, np.int64)) for rows in (batch.tokens, batch.labels))

    def step(loss: Any, network: Any, rule: Any) -> None:
        rule.zero_grad(set_to_none=True)
        found = loss(network)
        found.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), o.clip_norm)
        rule.step()
        found.item()

    def loss(network: Any) -> Any:
        return torch.nn.functional.cross_entropy(network(tokens_BT).logits.flatten(0, 1), labels_BT.flatten())

    for name, kind in {"torch eager": loss, "torch compiled": torch.compile(loss)}.items():
        network = gpt2(config.model)
        options: Any = dict(lr=o.peak_lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True)
        rule = torch.optim.AdamW(network.parameters(), **options)
        call = functools.partial(step, kind, network, rule)
        yield Contender(f"train {config.name}", name, call, {"tokens": batch.tokens.size})


def transformers_generation(source: Path, scratch: Path, config: ModelConfig) -> Iterator[Contender]:
    """The workloads in static batches, by `generate` in float32."""
    convert(source, scratch / "model", "hf", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def batches(prompts: list[list[int]], news: list[int], size: int) -> list[list[int]]:
        if size < len(prompts):
            return batches(prompts[:size], news[:size], size) + batches(prompts[size:], news[size:], size)
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        ids = pad([torch.tensor(prompt) for prompt in prompts])
        mask = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts])
        options: Any = dict(max_new_tokens=max(news), min_new_tokens=max(news), do_sample=False, pad_token_id=0)
        rows = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
        return [row[:new] for row, new in zip(rows, news, strict=True)]

    for name, (prompts, news, tokens) in workloads(config).items():
        for size in sorted({min(8, len(prompts)), len(prompts)}):
            call = functools.partial(batches, prompts, news, size)
            yield Contender(name, f"transformers, by {size}", call, {"tokens": tokens})
