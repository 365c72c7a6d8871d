"""Text to token ids and back, with SentencePiece or with a tokenizer.json of the `tokenizers` library.

A tokenizer that is trained here survives every text exactly: no normalisation (identity, no dummy prefix, all
whitespace kept), byte fallback for characters without a piece, and U+2581, which SentencePiece uses for a space, is
spelt by its three bytes. Its ids: 0 pad, 1 bos, 2 eos, 3 unknown (never used), then the configured special tokens, 256
bytes, learned pieces. Other people's keep what they do, such as a dummy prefix or Unicode's NFC."""

from pathlib import Path

from jaxgpt.files import read_bounded, read_json, reading
from jaxgpt.tokenizer.base import Settings, Tokenizer
from jaxgpt.tokenizer.bpe import MAX_BYTES, JsonTokenizer
from jaxgpt.tokenizer.spm import SentencePieceTokenizer, train_tokenizer

__all__ = ["TOKENIZER_FILES", "Tokenizer", "load_tokenizer", "train_tokenizer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # looked for in this order


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A .model file, a tokenizer.json, or a directory with one of them. Raises BadFileError where there is none."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in TOKENIZER_FILES if (path / name).exists()), path / "tokenizer.model")
    with reading(f"tokenizer {path}"):
        of_kind = JsonTokenizer if path.suffix == ".json" else SentencePieceTokenizer
        return of_kind(read_bounded(path, MAX_BYTES), f"tokenizer {path}", _read_settings(path.parent))


def _read_settings(directory: Path) -> Settings:
    def read(name: str) -> Settings:
        path = directory / name
        return read_json(path, limit=64 * 2**20) if path.exists() else {}

    found = read("tokenizer_config.json")
    if (path := directory / "chat_template.jinja").exists():
        found["chat_template"] = path.read_bytes()[:MAX_BYTES].decode(errors="replace")
    ends = (read("generation_config.json") or read("config.json")).get("eos_token_id", [])
    found["end_tokens"] = [*found.get("end_tokens", []), *(ends if isinstance(ends, list) else [ends])]
    return found
