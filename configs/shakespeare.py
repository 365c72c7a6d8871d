"""A GPT on 38 plays by Shakespeare, which the first run downloads: 5 MB of text, about ten minutes on a laptop."""

import jaxgpt.config as c


def config() -> c.TrainConfig:
    return c.TrainConfig(
        name="shakespeare",
        model=c.ModelConfig(n_layers=6, d_model=384, n_heads=6, context_length=256, dropout=0.1, scan_layers=False),
        tokenizer=c.TokenizerConfig(vocab_size=2048),
        data=c.DataConfig(paths=("@shakespeare",), val_fraction=0.05),
        optimizer=c.OptimizerConfig(peak_lr=1e-3, warmup_steps=50),
        training=c.TrainingConfig(steps=1000, batch_size=16, eval_batches=0, sample_prompt="**HAMLET.**"),
    )
