"""Run small GPT-2 and Llama models in transformers and PyTorch, and record what jaxgpt must reproduce.

    pip install -e '.[parity]'
    python tests/parity/make_reference.py

writes `tests/parity/reference/*.npz`, which `test_reference.py` reads (it needs neither PyTorch nor transformers).
`comparison.py` says which models, and what a file holds. Weights and tokens are drawn by fixed seeds; run this again
after a change of the cases there.
"""

import math

import numpy as np
import torch
from comparison import RECORDED, REFERENCE, ROWS, STEPS, Case, whole_batch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from jaxgpt.data.loader import Batch, make_batch
from jaxgpt.data.shards import TokenStream

torch.set_num_threads(1)  # models this small would only wait for other threads
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}


def transformers_model(case: Case) -> PreTrainedModel:
    """The case's model in transformers, with random weights far from the initial ones (no bias is 0, no norm is 1)."""
    c = case.model
    shared = dict(tie_word_embeddings=c.tie_embeddings, bos_token_id=None, eos_token_id=None, vocab_size=c.vocab_size)
    if c.positions == "learned":
        config = GPT2Config(
            n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, n_inner=c.ff_dim, n_positions=c.context_length,
            activation_function=ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_epsilon,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
        )  # fmt: skip
        model: PreTrainedModel = GPT2LMHeadModel(config)
    else:
        llama_config = LlamaConfig(
            num_hidden_layers=c.n_layers, hidden_size=c.d_model, num_attention_heads=c.n_heads,
            num_key_value_heads=c.kv_heads, head_dim=c.key_dim, intermediate_size=c.ff_dim,
            max_position_embeddings=c.context_length,
            rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
            hidden_act=ACTIVATIONS[c.activation], rms_norm_eps=c.norm_epsilon,
            attention_bias=c.attention_bias, mlp_bias=c.mlp_bias, **shared,
        )  # fmt: skip
        model = LlamaForCausalLM(llama_config)
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        values = rng.normal(size=parameter.shape)
        if is_norm(name) or name.endswith("bias"):
            values = 0.2 * values + (not name.endswith("bias"))
        else:
            values *= c.d_model**-0.5
        parameter.data = torch.tensor(values, dtype=torch.float32)
    return model


def is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


def make_batches(case: Case) -> dict[str, Batch]:
    """One batch of a document a row, and one of rows that the data loader packs from documents of 1 to 12 tokens."""
    rng, length = np.random.default_rng(1), case.model.context_length
    tokens = rng.integers(0, case.model.vocab_size, (ROWS, length + 1), dtype=np.int32)
    lengths = rng.integers(1, 13, ROWS * length)
    starts = np.cumsum(lengths) - lengths
    stream = TokenStream([tokens.ravel().astype("<u4")], starts[starts < tokens.size])
    packed = make_batch([(stream, row * length) for row in range(ROWS)], length)
    assert packed.segment_ids.max() > 2 and (packed.labels < 0).any()
    return {"whole": whole_batch(tokens[:, :-1], tokens[:, 1:]), "packed": packed}


def run(model: PreTrainedModel, batch: Batch) -> dict[str, np.ndarray]:
    """Logits, mean loss and gradients; each document of a row is a call of its own."""
    rows = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        documents = np.split(tokens, np.flatnonzero(np.diff(segments)) + 1)
        rows.append(torch.cat([model(torch.tensor(document[None])).logits[0] for document in documents]))
    logits = torch.stack(rows)
    loss = mean_loss(logits, batch.labels)
    model.zero_grad()
    loss.backward()
    gradients = {f"gradients/{name}": parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy(), **gradients}


def mean_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), torch.tensor(labels).long().flatten(), ignore_index=-1)


def training_batches(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that count up by 1 or 2, which can be learned, and labels of which one in ten is left out [N, B, T]."""
    rng, length = np.random.default_rng(2), case.model.context_length
    first, stride = rng.integers(0, case.model.vocab_size, (STEPS, ROWS, 1)), rng.integers(1, 3, (STEPS, ROWS, 1))
    rows = ((first + stride * np.arange(length + 1)) % case.model.vocab_size).astype(np.int32)
    labels = np.where(rng.random((STEPS, ROWS, length)) < 0.1, np.int32(-1), rows[..., 1:])
    return rows[..., :-1], labels


def train(model: PreTrainedModel, case: Case) -> dict[str, np.ndarray]:
    """Loss, gradient norm and learning rate of 20 steps of torch.optim.AdamW."""
    settings = case.optimizer
    names = dict(model.named_parameters())
    still = [p for name, p in names.items() if is_norm(name) or name.endswith("bias")]
    decaying = [p for name, p in names.items() if not (is_norm(name) or name.endswith("bias"))]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": still, "weight_decay": 0.0}],
        lr=settings.peak_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )

    def rate(step: int) -> float:  # over the peak
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        done = (step - settings.warmup_steps) / (STEPS - settings.warmup_steps)
        return settings.final_lr_ratio + (1 - settings.final_lr_ratio) * (1 + math.cos(math.pi * done)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    tokens, labels = training_batches(case)
    records = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(model(torch.tensor(tokens[step])).logits, labels[step])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
        records.append([loss.item(), norm.item(), scheduler.get_last_lr()[0]])
        optimizer.step()
        scheduler.step()
    losses, norms, rates = np.array(records).T
    clips_some = norms.min() < settings.clip_norm < norms.max()
    assert clips_some or not settings.clip_norm, f"clip some of the steps, not all or none: {norms}"
    assert losses[-1] < losses[0] - 0.5, f"nothing is learned: {losses}"
    return {
        "tokens": tokens.astype(np.int16), "labels": labels.astype(np.int16),
        "losses": losses, "grad_norms": norms, "learning_rates": rates,
    }  # fmt: skip


def make_reference(case: Case) -> dict[str, np.ndarray]:
    """All that `comparison.py` asks for."""
    model = transformers_model(case)
    reference = {f"weights/{name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    for kind, batch in make_batches(case).items():
        reference |= {f"{kind}/{field}": array.astype(np.int16) for field, array in batch._asdict().items()}
        reference |= {f"{kind}/{name}": array for name, array in run(model, batch).items()}
    return reference | {f"train/{name}": array for name, array in train(model, case).items()}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for case in RECORDED:
        np.savez_compressed(case.file, **make_reference(case))
        print(f"{case.file}: {case.file.stat().st_size / 1000:.0f} kB")
