"""Tokenizers out of GGUF and into it, and for the directories that transformers reads."""

import json
import sys
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import write_atomically
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.tokenizer import SPACE, JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer, reading
from jaxgpt.tokenizer.bpe import added_token, byte_level_json

Json = dict[str, Any]
spm: Any = sentencepiece_model_pb2  # its classes are made when it is imported
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # the types of SentencePiece and GGUF
_SPECIAL = {_CONTROL: True, _UNKNOWN: True, _USER: False}  # what is an added token of tokenizer.json, and special there
_PROBE = "Don't SAY  it'll\n\n  end: 31,415 \t x=[1]\r\n   naïve e\u0301 \u4f60\u597d \U0001f642\ufeff\n"


def _pattern(digits: str) -> list[Json]:
    """The words of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    return [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}]


# tokenizer.ggml.pre -> how a text is cut before its bytes are merged: arguments of `byte_level_json`
_PRE: dict[str, Json] = {
    "gpt-2": {},
    "smollm": dict(splits=[{"type": "Digits", "individual_digits": True}]),
    "llama-bpe": dict(splits=_pattern(r"\p{N}{1,3}"), words=False, ignore_merges=True),
    "qwen2": dict(splits=_pattern(r"\p{N}"), words=False, normalizer={"type": "NFC"}),
}


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of any model: what `load_tokenizer` takes, or a .gguf file. Raises BadFileError."""
    if path.suffix != ".gguf":
        return load_tokenizer(path)
    return from_gguf(read_gguf(path).metadata, f"tokenizer {path}")


def from_gguf(metadata: Json, where: str) -> Tokenizer:
    """The tokenizer that the settings of a GGUF file describe. Raises BadFileError."""
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    with reading(where):
        tokens, kind = own["tokens"], own.get("model")
        types = own.get("token_type", [_NORMAL] * len(tokens))
        if kind not in ("gpt2", "llama"):
            raise BadFileError(f"{where}: tokenizer.ggml.model {kind!r} is not implemented; gpt2 and llama are")
        if len(types) != len(tokens) or not set(types) <= {*range(7)} or {type(token) for token in tokens} != {str}:
            raise BadFileError(f"{where}: tokens or token_type are damaged; fetch the file again")
        ids = {name: own.get(f"{name}_token_id") for name in ("bos", "eos", "padding", "eot", "eom", "unknown")}
        if any(i is not None and not 0 <= i < len(tokens) for i in ids.values()):
            raise BadFileError(f"{where}: a special token is beyond the {len(tokens)} of the vocabulary")
        settings: Json = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
        settings["chat_template"] = metadata.get("tokenizer.chat_template")
        settings["end_tokens"] = [ids["eot"], ids["eom"]]
        settings["add_bos_token"] = own.get("add_bos_token", kind == "llama" or own.get("pre") == "llama-bpe")
        if kind == "gpt2":
            return JsonTokenizer(_bpe(own, tokens, types, settings, where), where, settings)
        return SentencePieceTokenizer(_sentencepiece(own, tokens, types, ids), where, settings)


def _bpe(own: Json, tokens: list[str], types: list[int], settings: Json, where: str) -> bytes:
    if own.get("pre") not in _PRE:
        known = ", ".join(_PRE)
        raise BadFileError(f"{where}: tokenizer.ggml.pre {own.get('pre')!r} is not implemented; {known} are")
    built = byte_level_json({token: i for i, token in enumerate(tokens)}, own["merges"], **_PRE[own["pre"]])
    kinds = enumerate(zip(tokens, types, strict=True))
    built["added_tokens"] = [added_token(i, t, special=_SPECIAL[kind]) for i, (t, kind) in kinds if kind in _SPECIAL]
    if settings["add_bos_token"] and settings["bos_token"] is not None:
        built["post_processor"] = _bos_template(tokens[settings["bos_token"]], settings["bos_token"])
    return json.dumps(built, ensure_ascii=False).encode()


def _bos_template(bos: str, token: int) -> Json:
    """The post-processor of tokenizer.json that begins each text with `bos`."""
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {bos: {"id": bos, "ids": [token], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _sentencepiece(own: Json, tokens: list[str], types: list[int], ids: Json) -> bytes:
    unknown = ids["unknown"] if ids["unknown"] is not None else types.index(_UNKNOWN)
    proto = spm.ModelProto()
    for i, (token, score, kind) in enumerate(zip(tokens, own["scores"], types, strict=True)):
        text = token.replace(" ", SPACE) if kind == _USER else token
        proto.pieces.add(piece=text, score=score, type=_UNKNOWN if i == unknown else kind or _NORMAL)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = spm.TrainerSpec.BPE, len(tokens), True
    for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        place = unknown if name == "unk" else ids[key]
        setattr(trainer, f"{name}_id", -1 if place is None else place)
        if place is not None:
            setattr(trainer, f"{name}_piece", tokens[place])
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix = bool(own.get("add_space_prefix", True))
    return proto.SerializeToString()


# Out again


def gguf_metadata(tokenizer: Tokenizer, vocab_size: int) -> Json:
    """The settings that describe a tokenizer in GGUF, with unused tokens up to `vocab_size`.

    Raises ConfigError when GGUF has no name for how it cuts a text."""
    found = _gguf_sentencepiece(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _gguf_json(tokenizer)
    missing = vocab_size - len(found["tokens"])
    found["tokens"] += [f"[unused{i}]" for i in range(missing)]
    found["token_type"] += [_UNUSED] * missing
    if "scores" in found:
        found["scores"] += [-1e6] * missing
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    named |= dict(zip(("eot", "eom"), tokenizer.end_ids[1:], strict=False))
    if len(tokenizer.end_ids) > 3:
        print(f"jaxgpt: GGUF keeps 3 of {len(tokenizer.end_ids)} tokens that end a text", file=sys.stderr)
    found |= {f"{name}_token_id": token for name, token in named.items() if token >= 0}
    found["add_bos_token"] = bool(tokenizer.bos_ids)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    if not _alike(tokenizer, from_gguf(metadata, tokenizer.where)):
        raise _inexact(tokenizer)
    return metadata


def _alike(tokenizer: Tokenizer, written: Tokenizer) -> bool:
    pieces = [tokenizer.piece(i).replace(SPACE, " ") for i in range(min(tokenizer.vocab_size, 1000))]
    texts = [_PROBE, *(f"x{piece}y" for piece in pieces)]  # user-defined pieces are among the first
    return all(written.encode(text) == tokenizer.encode(text) for text in texts)


def _inexact(tokenizer: Tokenizer) -> ConfigError:
    return ConfigError(f"{tokenizer.where}: GGUF has no name for how it cuts a text; use --to hf")


def _gguf_sentencepiece(tokenizer: Tokenizer) -> Json:
    proto = spm.ModelProto.FromString(tokenizer.model_bytes)
    if proto.trainer_spec.model_type != spm.TrainerSpec.BPE:
        raise _inexact(tokenizer)
    pieces, types = [piece.piece for piece in proto.pieces], [int(piece.type) for piece in proto.pieces]
    return _gguf_llama(pieces, types, [piece.score for piece in proto.pieces], proto.normalizer_spec.add_dummy_prefix)


def _gguf_llama(pieces: list[str], types: list[int], scores: list[float], prefix: bool) -> Json:
    tokens = [_written(piece, kind) for piece, kind in zip(pieces, types, strict=True)]
    found: Json = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types, "scores": scores}
    return found | {"add_space_prefix": prefix, "unknown_token_id": types.index(_UNKNOWN)}


def _written(piece: str, kind: int) -> str:
    """GGUF and tokenizer.json match user-defined pieces before spaces become U+2581."""
    return piece.replace(SPACE, " ") if kind == _USER else piece


def _gguf_json(tokenizer: Tokenizer) -> Json:
    assert isinstance(tokenizer, JsonTokenizer)
    parsed = tokenizer.parsed()
    added = {each["id"]: _CONTROL if each["special"] else _USER for each in parsed["added_tokens"]}
    pieces = [tokenizer.piece(i) or f"[unused{i}]" for i in range(tokenizer.vocab_size)]
    types = [added.get(i, _NORMAL if tokenizer.piece(i) else _UNUSED) for i in range(len(pieces))]
    merges = parsed["model"].get("merges", [])
    if tokenizer.byte_level:
        name = next((name for name, pre in _PRE.items() if _way(byte_level_json({}, [], **pre)) == _way(parsed)), None)
        if name is None:
            raise _inexact(tokenizer)
        joined = [" ".join(merge) for merge in merges]
        return {"model": "gpt2", "pre": name, "tokens": pieces, "token_type": types, "merges": joined}
    # SentencePiece merges the two whose piece has the best score: the place of its merges.
    scores = {left + right: -float(place) for place, (left, right) in enumerate(merges)}
    for i in tokenizer.byte_ids:
        types[i] = _BYTE
    if parsed["model"].get("unk_token") not in pieces:
        raise _inexact(tokenizer)
    types[pieces.index(parsed["model"]["unk_token"])] = _UNKNOWN
    return _gguf_llama(pieces, types, [scores.get(piece, -1e6) for piece in pieces], bool(tokenizer.prefix))


def _way(parsed: Json) -> tuple[list[Json], Any, bool]:
    """How a tokenizer.json cuts a text before its bytes are merged."""
    first = parsed["pre_tokenizer"] or {}
    parts = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in first.get("pretokenizers", [first])]
    return parts, parsed["normalizer"], parsed["model"]["ignore_merges"]


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files in a directory that transformers reads; a SentencePiece model also as tokenizer.json."""
    settings = tokenizer.settings() | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer.write(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _json_of(tokenizer)
        if _alike(tokenizer, JsonTokenizer(found, tokenizer.where, tokenizer.settings())):
            write_atomically(directory / "tokenizer.json", found)
        else:
            print(f"jaxgpt: {tokenizer.where}: no tokenizer.json cuts as it does, so there is none", file=sys.stderr)
    content = json.dumps({k: v for k, v in settings.items() if v is not None}, indent=2, ensure_ascii=False)
    write_atomically(directory / "tokenizer_config.json", content.encode() + b"\n")


def _json_of(tokenizer: SentencePieceTokenizer) -> bytes:
    """The tokenizer.json that cuts every text as a SentencePiece model does.

    But U+2581 in a text is a space, and of two ways that a unigram model likes equally it may take the other."""
    proto = spm.ModelProto.FromString(tokenizer.model_bytes)
    types = [int(piece.type) for piece in proto.pieces]
    pieces = [_written(piece.piece, piece.type) for piece in proto.pieces]
    unknown = types.index(_UNKNOWN)
    if proto.trainer_spec.model_type == spm.TrainerSpec.BPE:
        model: Json = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(proto)}
        model |= {"unk_token": pieces[unknown], "fuse_unk": True}
    else:  # the library would find control and byte pieces in a text, were they not so unlikely
        scores = [piece.score if piece.type in (_NORMAL, _USER) else -1e9 for piece in proto.pieces]
        model = {"type": "Unigram", "vocab": list(zip(pieces, scores, strict=True)), "unk_id": unknown}
    prefix: list[Json] = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    kinds = enumerate(zip(pieces, types, strict=True))
    built = {
        "version": "1.0",
        "added_tokens": [added_token(i, t, special=_SPECIAL[kind]) for i, (t, kind) in kinds if kind in _SPECIAL],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": _bos_template(pieces[tokenizer.bos_id], tokenizer.bos_id) if tokenizer.bos_ids else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model | {"byte_fallback": True},
    }
    return json.dumps(built, ensure_ascii=False).encode()


def _merges(proto: Any) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first: SentencePiece merges the pair with the best result."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    halves = ((piece, piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece)))
    found = [(-scores[piece], left, right) for piece, left, right in halves if left in scores and right in scores]
    return [[left, right] for _, left, right in sorted(found, key=lambda each: each[0])]
