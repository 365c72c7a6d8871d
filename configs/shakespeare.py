"""A GPT on 38 plays by Shakespeare, which the first run downloads: 5 MB of text, about ten minutes on a laptop."""

from jaxgpt.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        name="shakespeare",
        model=ModelConfig(n_layers=6, d_model=384, n_heads=6, context_length=256, dropout=0.1),
        tokenizer=TokenizerConfig(vocab_size=2048),
        data=DataConfig(paths=("@shakespeare",), val_fraction=0.05),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=50),
        training=TrainingConfig(steps=1000, batch_size=16, eval_batches=0, sample_prompt="**HAMLET.**"),
    )
