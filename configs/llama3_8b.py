"""The shape of Llama 3 8B (arXiv:2407.21783, table 3): 8.03 B parameters over fsdp, one sequence a device on 512.

On fewer devices raise --training.accumulation-steps; give it your text with --data.paths."""

import jaxgpt.config as c


def config() -> c.TrainConfig:
    return c.TrainConfig(
        name="llama3_8b",
        model=c.ModelConfig(
            n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14336, context_length=8192, vocab_size=128_256,
            positions="rotary", rope_theta=500_000.0, norm="rmsnorm", activation="silu", gated_mlp=True, mlp_bias=False,
            attention_bias=False, tie_embeddings=False, dtype="bfloat16", remat="full",
        ),
        tokenizer=c.TokenizerConfig(vocab_size=128_256),
        optimizer=c.OptimizerConfig(peak_lr=3e-4, warmup_steps=8000, schedule="cosine"),
        training=c.TrainingConfig(steps=1_200_000, batch_size=512, eval_every=1000, loss_chunks=16),
        checkpoint=c.CheckpointConfig(every=1000, keep_every=50_000),
        mesh=c.MeshConfig(data=1, fsdp=-1),
    )  # fmt: skip
