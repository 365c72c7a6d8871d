"""Tokenizers out of GGUF and into it, and for the directories that transformers reads."""

import contextlib
from pathlib import Path
from typing import Any

from jaxgpt.errors import BadFileError, ConfigError, note
from jaxgpt.files import reading, write_atomically
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.tokenizer import SPACE, JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from jaxgpt.tokenizer.base import Kind
from jaxgpt.tokenizer.bpe import CUTTINGS, Cutting, byte_level_json, tokenizer_json
from jaxgpt.tokenizer.spm import model_pb2

Json = dict[str, Any]
_UNLIKELY = -1e6  # the score of a piece that no merge makes
_PROBE = "Don't SAY  it'll\n\n  end: 31,415 \t x=[1]\r\n   naïve e\u0301 \u4f60\u597d \U0001f642\ufeff\n"


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of any model: what `load_tokenizer` takes, or a .gguf file. Raises BadFileError."""
    if path.suffix != ".gguf":
        return load_tokenizer(path)
    return from_gguf(read_gguf(path)[0], f"tokenizer {path}")


def from_gguf(metadata: Json, where: str) -> Tokenizer:
    """The tokenizer that the settings of a GGUF file describe. Raises BadFileError."""
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    with reading(where):
        tokens, model, pre = own["tokens"], own.get("model"), own.get("pre")
        kinds = own.get("token_type", [Kind.NORMAL] * len(tokens))
        if model not in ("gpt2", "llama"):
            raise BadFileError(f"{where}: tokenizer.ggml.model {model!r} is not implemented; gpt2 and llama are")
        if len(kinds) != len(tokens) or not set(kinds) <= {*range(7)} or {type(token) for token in tokens} != {str}:
            raise BadFileError(f"{where}: tokens or token_type are damaged; fetch the file again")
        ids = {name: own.get(f"{name}_token_id") for name in ("bos", "eos", "padding", "eot", "eom", "unknown")}
        begins = own.get("add_bos_token", model == "llama" or pre == "llama-bpe")
        settings = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
        settings |= {"end_tokens": [ids["eot"], ids["eom"]], "add_bos_token": begins}
        settings |= {"chat_template": metadata.get("tokenizer.chat_template")}
        if model == "llama":
            return SentencePieceTokenizer(_sentencepiece(own, kinds, ids), where, settings)
        if pre not in CUTTINGS:
            known = ", ".join(CUTTINGS)
            raise BadFileError(f"{where}: tokenizer.ggml.pre {pre!r} is not implemented; {known} are")
        bos = tokens[ids["bos"]] if begins and ids["bos"] is not None else None
        vocab, kind_of = {token: i for i, token in enumerate(tokens)}, dict(zip(tokens, kinds, strict=True))
        return JsonTokenizer(byte_level_json(vocab, kind_of, bos, own["merges"], CUTTINGS[pre]), where, settings)


def _sentencepiece(own: Json, kinds: list[int], ids: Json) -> bytes:
    unknown = ids["unknown"] if ids["unknown"] is not None else kinds.index(Kind.UNKNOWN)
    proto = model_pb2.ModelProto()
    for i, (token, score, kind) in enumerate(zip(own["tokens"], own["scores"], kinds, strict=True)):
        piece = token.replace(" ", SPACE) if kind == Kind.USER_DEFINED else token
        proto.pieces.add(piece=piece, score=score, type=Kind.UNKNOWN if i == unknown else kind or Kind.NORMAL)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(kinds), True
    for name, token in {"unk": unknown, "bos": ids["bos"], "eos": ids["eos"], "pad": ids["padding"]}.items():
        setattr(trainer, f"{name}_id", -1 if token is None else token)
        if token is not None:
            setattr(trainer, f"{name}_piece", own["tokens"][token])
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = bool(own.get("add_space_prefix", True))
    return proto.SerializeToString()


def gguf_metadata(tokenizer: Tokenizer, vocab_size: int) -> Json:
    """The settings that describe a tokenizer in GGUF, with unused tokens up to `vocab_size`. Raises ConfigError when
    GGUF has no name for how it cuts a text."""
    missing = vocab_size - tokenizer.vocab_size
    pieces = [piece or f"[unused{i}]" for i, piece in enumerate(tokenizer.pieces + [""] * missing)]
    own = _gguf_model(tokenizer, pieces, tokenizer.kinds + [Kind.UNUSED] * missing)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    ids |= dict(zip(("eot", "eom"), tokenizer.end_ids[1:], strict=False))
    if len(tokenizer.end_ids) > 3:
        note(f"GGUF keeps 3 of {len(tokenizer.end_ids)} tokens that end a text")
    own |= {"add_bos_token": bool(tokenizer.bos_ids), **{f"{name}_token_id": token for name, token in ids.items()}}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    with contextlib.suppress(BadFileError):  # no name for it is known here
        if _alike(tokenizer, from_gguf(metadata, tokenizer.where)):
            return metadata
    raise ConfigError(f"{tokenizer.where}: GGUF has no name for how it cuts a text; use --to hf")


def _alike(tokenizer: Tokenizer, written: Tokenizer) -> bool:
    texts = [_PROBE, *(f"x{piece.replace(SPACE, ' ')}y" for piece in tokenizer.pieces[:1000])]
    return tokenizer.encode_batch(texts) == written.encode_batch(texts)  # user-defined pieces are among the first


def _gguf_model(tokenizer: Tokenizer, pieces: list[str], kinds: list[int]) -> Json:
    own: Json = {"model": "llama", "pre": "default", "add_space_prefix": bool(tokenizer.prefix)}
    if isinstance(tokenizer, SentencePieceTokenizer):
        own["model"] = "t5" if tokenizer.unigram else "llama"
        scores = dict(zip(tokenizer.pieces, tokenizer.scores, strict=True))
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        parsed = tokenizer.parsed()
        merges, unknown = parsed["model"].get("merges", []), parsed["model"].get("unk_token")
        if tokenizer.byte_level:
            pre = next((name for name, cutting in CUTTINGS.items() if cutting == _cutting(parsed)), None)
            own = {"model": "gpt2", "pre": pre, "merges": [" ".join(merge) for merge in merges]}
            return own | {"tokens": pieces, "token_type": kinds}
        kinds = [Kind.UNKNOWN if piece == unknown else kind for piece, kind in zip(pieces, kinds, strict=True)]
        # SentencePiece merges the two whose piece has the best score: the place of its merges.
        scores = {left + right: -float(place) for place, (left, right) in enumerate(merges)}
    if Kind.UNKNOWN in kinds:
        own["unknown_token_id"] = kinds.index(Kind.UNKNOWN)
    tokens = [_written(piece, kind) for piece, kind in zip(pieces, kinds, strict=True)]
    return own | {"tokens": tokens, "token_type": kinds, "scores": [scores.get(piece, _UNLIKELY) for piece in pieces]}


def _cutting(parsed: Json) -> Cutting:
    first = parsed["pre_tokenizer"] or {}
    steps = first.get("pretokenizers", [first])
    steps = [step | {"trim_offsets": True} if "trim_offsets" in step else step for step in steps]  # changes no text
    return Cutting(steps, parsed["normalizer"], parsed["model"]["ignore_merges"])


def _written(piece: str, kind: int) -> str:
    """GGUF and tokenizer.json match user-defined pieces before spaces become U+2581."""
    return piece.replace(SPACE, " ") if kind == Kind.USER_DEFINED else piece


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files in a directory that transformers reads; a SentencePiece model also as tokenizer.json."""
    tokenizer.write(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _json_of(tokenizer)
        if _alike(tokenizer, JsonTokenizer(found, tokenizer.where, tokenizer.settings())):
            write_atomically(directory / "tokenizer.json", found)
        else:
            note(f"{tokenizer.where}: no tokenizer.json cuts as it does, so there is none")


def _json_of(tokenizer: SentencePieceTokenizer) -> bytes:
    """The tokenizer.json that cuts every text as a SentencePiece model does. But U+2581 in a text is a space, and of
    two ways that a unigram model likes equally it may take the other."""
    pieces = [_written(piece, kind) for piece, kind in zip(tokenizer.pieces, tokenizer.kinds, strict=True)]
    ids, unknown = {piece: i for i, piece in enumerate(pieces)}, tokenizer.kinds.index(Kind.UNKNOWN)
    if tokenizer.unigram:  # the library would find control and byte pieces in a text, were they not so unlikely
        scored = zip(pieces, tokenizer.scores, tokenizer.kinds, strict=True)
        vocab = [(p, score if kind in (Kind.NORMAL, Kind.USER_DEFINED) else -1e9) for p, score, kind in scored]
        model: Json = {"type": "Unigram", "vocab": vocab, "unk_id": unknown}
    else:
        model = {"type": "BPE", "vocab": ids, "unk_token": pieces[unknown], "fuse_unk": True}
        model["merges"] = _merges(tokenizer)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.prefix else []
    return tokenizer_json(
        ids,
        dict(zip(pieces, tokenizer.kinds, strict=True)),
        pieces[tokenizer.bos_id] if tokenizer.bos_ids else None,
        model | {"byte_fallback": True},
        normalizer={"type": "Sequence", "normalizers": [*prefix, spaces]},
        decoder={"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    )


def _merges(tokenizer: SentencePieceTokenizer) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first: SentencePiece merges the pair with the best result."""
    kind_of = zip(tokenizer.pieces, tokenizer.scores, tokenizer.kinds, strict=True)
    scores = {piece: score for piece, score, kind in kind_of if kind == Kind.NORMAL}
    halves = ((piece, piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece)))
    found = [(-scores[piece], left, right) for piece, left, right in halves if left in scores and right in scores]
    return [[left, right] for _, left, right in sorted(found, key=lambda each: each[0])]
