"""Compiled programs that are kept, so that the second run of a command compiles nothing."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from jaxgpt.errors import note
from jaxgpt.files import cache_home


@contextmanager
def kept_programs() -> Iterator[None]:
    """Keep what is compiled meanwhile in `<cache>/jaxgpt/compiled`, or in JAX_COMPILATION_CACHE_DIR, and say how much.
    A program is code that runs when it is read, so the directory is its owner's alone."""
    counts: Counter[str] = Counter()

    def count(event: str, **_: Any) -> None:
        counts[event.rpartition("/")[2]] += 1

    if not (directory := jax.config.values["jax_compilation_cache_dir"]):
        directory = cache_home() / "compiled"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)  # which fails for somebody else's
            jax.config.update("jax_compilation_cache_dir", str(directory))
        except OSError as error:
            note(f"compiled programs are not kept: {directory}: {error.strerror}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(count)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_listener(count)
        if counts["cache_misses"] + counts["cache_hits"]:
            note(f"{counts['cache_misses']} programs compiled, {counts['cache_hits']} read from {directory}")
