"""A GPT that learns Python from the running interpreter's standard library, in minutes on a laptop."""

from jaxgpt.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        name="tiny",
        model=ModelConfig(n_layers=4, d_model=256, n_heads=4, context_length=256),
        tokenizer=TokenizerConfig(vocab_size=4096),
        data=DataConfig(paths=("@python",), val_fraction=0.02),
        optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=20, weight_decay=0.1),
        training=TrainingConfig(
            steps=300, batch_size=16, eval_every=100, eval_batches=0, loss_chunks=2, sample_prompt="def "
        ),
        checkpoint=CheckpointConfig(every=100),
    )
