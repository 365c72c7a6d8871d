"""What a user would take instead: PyTorch for training, transformers for generation. Needs the extra `parity`.

Letters: B batch, T length, D width, H heads, V vocabulary."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.bench.programs import random_batch, workloads
from jaxgpt.bench.report import Contender
from jaxgpt.config import ModelConfig, TrainConfig
from jaxgpt.errors import ConfigError
from jaxgpt.interop.convert import convert

try:
    import torch
    import transformers
    from torch import nn
    from torch.nn import functional
except ImportError:
    raise ConfigError("--against needs PyTorch and transformers; run: pip install 'jaxgpt[parity]'") from None


class _Block(nn.Module):
    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = H, nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.output = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x_BTD: Any) -> Any:
        B, T, D = x_BTD.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x_BTD)).split(D, 2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x_BTD = x_BTD + self.output(y)
        return x_BTD + self.down(functional.gelu(self.up(self.norm2(x_BTD)), approximate="tanh"))


class _Gpt(nn.Module):
    """nanoGPT's mathematics."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        V, D = config.vocab_size or 0, config.d_model
        self.tokens, self.places = nn.Embedding(V, D), nn.Embedding(config.context_length, D)
        self.blocks = nn.ModuleList(_Block(D, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(D)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, tokens_BT: Any, labels_BT: Any) -> Any:
        x_BTD = self.tokens(tokens_BT) + self.places(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.norm(x_BTD) @ self.tokens.weight.T
        return functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def torch_training(config: TrainConfig) -> Iterator[Contender]:
    """The step of `config`, eager and compiled, in PyTorch with fused AdamW. Raises ConfigError for another model."""
    model = config.model
    plain = ModelConfig(
        n_layers=model.n_layers, d_model=model.d_model, n_heads=model.n_heads, vocab_size=model.vocab_size,
        context_length=model.context_length, scan_layers=model.scan_layers, remat=model.remat,
    )  # fmt: skip
    if model != plain or config.training.accumulation_steps > 1:
        raise ConfigError(f"--against torch: {config.name} is not nanoGPT's model; give S, M or configs/gpt2_124m.py")
    batch, o = random_batch(config), config.optimizer
    tokens_BT, labels_BT = (torch.from_numpy(np.array(rows, np.int64)) for rows in (batch.tokens, batch.labels))
    for name in ("torch eager", "torch compiled"):
        torch.manual_seed(0)
        network = _Gpt(model)
        rule = torch.optim.AdamW(
            network.parameters(), lr=o.peak_lr, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True
        )
        run = torch.compile(network) if name == "torch compiled" else network

        def step(network: Any = network, rule: Any = rule, run: Any = run) -> None:
            rule.zero_grad(set_to_none=True)
            loss = run(tokens_BT, labels_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), o.clip_norm)
            rule.step()
            loss.item()

        yield Contender(f"train {config.name}", name, step, {"tokens": batch.tokens.size})


def transformers_generation(source: Path, scratch: Path, config: ModelConfig) -> Iterator[Contender]:
    """The workloads in static batches, by `generate` in float32."""
    convert(source, scratch / "model", "hf", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(scratch / "model", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def batch(prompts: list[list[int]], news: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids, mask = torch.zeros((2, len(prompts), longest), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = torch.tensor(prompt), 1
        options: Any = dict(max_new_tokens=max(news), min_new_tokens=max(news), do_sample=False, pad_token_id=0)
        with torch.no_grad():
            rows = model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
        return [row[:new] for row, new in zip(rows, news, strict=True)]

    def batches(prompts: list[list[int]], news: list[int], size: int) -> list[list[int]]:
        starts = range(0, len(prompts), size)
        return [text for i in starts for text in batch(prompts[i : i + size], news[i : i + size])]

    for name, (prompts, news) in workloads(config).items():
        tokens = len(prompts[0]) if name.startswith("prefill") else sum(news)
        for size in sorted({min(8, len(prompts)), len(prompts)}):
            call = functools.partial(batches, prompts, news, size)
            yield Contender(name, f"transformers, by {size}", call, {"tokens": tokens})
