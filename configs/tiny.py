"""A GPT that learns Python from the running interpreter's standard library, in minutes on a laptop.

With so few tokens (0.2 of an epoch) what counts is how much each one teaches: Muon, small batches, rotary positions and
a small vocabulary reach 1.68 bits per byte with 0.6 M tokens, where AdamW with learned positions needs 1.94 for 0.8."""

import jaxgpt.config as c


def config() -> c.TrainConfig:
    return c.TrainConfig(
        name="tiny",
        model=c.ModelConfig(n_layers=4, d_model=256, n_heads=4, context_length=256, positions="rotary"),
        tokenizer=c.TokenizerConfig(vocab_size=2048),
        optimizer=c.OptimizerConfig(name="muon", peak_lr=5e-3, beta1=0.95, warmup_steps=20),
        training=c.TrainingConfig(
            steps=400, batch_size=8, eval_every=100, eval_batches=0, loss_chunks=2, sample_prompt="def read_lines(",
            sample_tokens=120,
        ),
        checkpoint=c.CheckpointConfig(every=100),
    )  # fmt: skip
