"""Tokenizers out of GGUF and into it, and for the directories that transformers reads."""

import json
import sys
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from jaxgpt.errors import BadFileError, ConfigError
from jaxgpt.files import write_atomically
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.tokenizer import SPACE, JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from jaxgpt.tokenizer.bpe import added_token, byte_level_json

Json = dict[str, Any]
spm: Any = sentencepiece_model_pb2  # its classes are made when it is imported
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # the types of SentencePiece and GGUF


def _pattern(digits: str) -> list[Json]:
    """The words of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    return [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}]


# tokenizer.ggml.pre -> how a text is cut before its bytes are merged, and what else is particular
_PRE: dict[str, Json] = {
    "gpt-2": dict(splits=[], words=True),
    "smollm": dict(splits=[{"type": "Digits", "individual_digits": True}], words=True),
    "llama-bpe": dict(splits=_pattern(r"\p{N}{1,3}"), words=False, ignore_merges=True),
    "qwen2": dict(splits=_pattern(r"\p{N}"), words=False, normalizer={"type": "NFC"}),
}


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of any model: what `load_tokenizer` takes, or a .gguf file. Raises BadFileError."""
    if path.suffix != ".gguf":
        return load_tokenizer(path)
    return from_gguf(read_gguf(path).metadata, f"tokenizer {path}")


def from_gguf(metadata: Json, where: str) -> Tokenizer:
    """The tokenizer that the settings of a GGUF file describe."""
    own = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens: Any = own.get("tokens")
    types: Any = own.get("token_type", [_NORMAL] * len(tokens or []))
    if not _texts(tokens) or not isinstance(types, list) or len(types) != len(tokens) or not set(types) <= {*range(7)}:
        raise BadFileError(f"{where}: tokens or token_type are missing or damaged; fetch the file again")
    ids = {kind: own.get(f"{kind}_token_id") for kind in ("bos", "eos", "padding", "eot", "eom", "unknown")}
    if any(i is not None and (type(i) is not int or i >= len(tokens)) for i in ids.values()):
        raise BadFileError(f"{where}: a special token is beyond the {len(tokens)} of the vocabulary")
    settings: Json = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"]}
    settings["chat_template"] = metadata.get("tokenizer.chat_template")
    settings["end_tokens"] = [i for i in (ids["eot"], ids["eom"]) if i is not None]
    settings["add_bos_token"] = own.get("add_bos_token", own.get("model") == "llama")
    if own.get("model") == "gpt2":
        return JsonTokenizer(_bpe(own, tokens, types, settings, where), where, settings)
    if own.get("model") == "llama":
        return SentencePieceTokenizer(_sentencepiece(own, tokens, types, ids, where), where, settings)
    raise BadFileError(f"{where}: tokenizer.ggml.model {own.get('model')!r} is not implemented; gpt2 and llama are")


def _texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _bpe(own: Json, tokens: list[str], types: list[int], settings: Json, where: str) -> bytes:
    if own.get("pre") not in _PRE:
        known = ", ".join(_PRE)
        raise BadFileError(f"{where}: tokenizer.ggml.pre {own.get('pre')!r} is not implemented; {known} are")
    pre = dict(_PRE[own["pre"]])
    if not _texts(own.get("merges")):
        raise BadFileError(f"{where}: its merges are missing or damaged; fetch the file again")
    ignore_merges = pre.pop("ignore_merges", False)
    built = byte_level_json({token: i for i, token in enumerate(tokens)}, own["merges"], **pre)
    built["model"]["ignore_merges"] = ignore_merges
    special = {_CONTROL: True, _UNKNOWN: True, _USER: False}
    kinds = enumerate(zip(tokens, types, strict=True))
    built["added_tokens"] = [added_token(i, t, special=special[kind]) for i, (t, kind) in kinds if kind in special]
    if settings["add_bos_token"] and settings["bos_token"] is not None:
        built["post_processor"] = _bos_template(tokens[settings["bos_token"]], settings["bos_token"])
    return json.dumps(built, ensure_ascii=False).encode()


def _bos_template(bos: str, token: int) -> Json:
    """The post-processor of tokenizer.json that begins each text with `bos`."""
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }


def _sentencepiece(own: Json, tokens: list[str], types: list[int], ids: Json, where: str) -> bytes:
    scores = own.get("scores")
    unknown = ids["unknown"] if ids["unknown"] is not None else types.index(_UNKNOWN) if _UNKNOWN in types else -1
    if not isinstance(scores, list) or len(scores) != len(tokens) or unknown < 0:
        raise BadFileError(f"{where}: its scores or its unknown token are missing or damaged; fetch the file again")
    proto = spm.ModelProto()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
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

    Raises ConfigError when GGUF has no name for how it cuts a text.
    """
    of_kind = _gguf_sentencepiece if isinstance(tokenizer, SentencePieceTokenizer) else _gguf_json
    found = of_kind(tokenizer)
    missing = vocab_size - len(found["tokens"])
    found["tokens"] += [f"[unused{i}]" for i in range(missing)]
    found["token_type"] += [_UNUSED] * missing
    if "scores" in found:
        found["scores"] += [-1e6] * missing
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    found |= {f"{name}_token_id": token for name, token in ids.items() if token >= 0}
    if len(tokenizer.end_ids) > 1:
        found["eot_token_id"] = tokenizer.end_ids[1]
        if len(tokenizer.end_ids) > 2:
            print(f"jaxgpt: GGUF keeps 2 of {len(tokenizer.end_ids)} tokens that end a text", file=sys.stderr)
    found["add_bos_token"] = bool(tokenizer.bos_ids)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _gguf_sentencepiece(tokenizer: Tokenizer) -> Json:
    proto = spm.ModelProto.FromString(tokenizer.model_bytes)
    if proto.trainer_spec.model_type != spm.TrainerSpec.BPE:
        raise ConfigError("GGUF holds SentencePiece models of BPE, not of unigrams; use --to hf")
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [int(piece.type) for piece in proto.pieces],
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "unknown_token_id": next((i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), 0),
    }


def _gguf_json(tokenizer: Tokenizer) -> Json:
    parsed = json.loads(tokenizer.model_bytes)
    stored = parsed["pre_tokenizer"] or {}
    parts = stored.get("pretokenizers", [stored])
    name = None
    for known, pre in _PRE.items():
        built = byte_level_json({}, [], splits=pre["splits"], words=pre["words"])["pre_tokenizer"]["pretokenizers"]
        shown = [[{k: v for k, v in part.items() if k != "trim_offsets"} for part in each] for each in (built, parts)]
        if shown[0] == shown[1] and parsed["normalizer"] == pre.get("normalizer"):
            name = known
    if name is None:
        raise ConfigError(f"{tokenizer.where}: GGUF has no name for how it cuts a text; use --to hf")
    added = {each["id"]: _CONTROL if each["special"] else _USER for each in parsed["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parsed["model"]["merges"]]
    tokens = [tokenizer.piece(i) or f"[unused{i}]" for i in range(tokenizer.vocab_size)]
    types = [added.get(i, _NORMAL if tokenizer.piece(i) else _UNUSED) for i in range(len(tokens))]
    return {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types, "merges": merges}


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files in a directory that transformers reads; a SentencePiece model also as tokenizer.json."""
    settings = tokenizer.settings() | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer.write(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_atomically(directory / "tokenizer.json", _json_of(tokenizer))
    content = json.dumps({k: v for k, v in settings.items() if v is not None}, indent=2, ensure_ascii=False)
    write_atomically(directory / "tokenizer_config.json", content.encode() + b"\n")


def _json_of(tokenizer: SentencePieceTokenizer) -> bytes:
    """The tokenizer.json that cuts every text as a SentencePiece model does (but for U+2581 written in the text)."""
    proto = spm.ModelProto.FromString(tokenizer.model_bytes)
    pieces = [piece.piece for piece in proto.pieces]
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    if proto.trainer_spec.model_type == spm.TrainerSpec.BPE:
        model: Json = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(proto)}
        model |= {"unk_token": pieces[unknown], "fuse_unk": True}
    else:
        model = {"type": "Unigram", "vocab": [[p.piece, p.score] for p in proto.pieces], "unk_id": unknown}
    prefix: list[Json] = [{"type": "Prepend", "prepend": SPACE}] if proto.normalizer_spec.add_dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    special = {_CONTROL: True, _UNKNOWN: True, _USER: False}
    built = {
        "version": "1.0",
        "added_tokens": [
            added_token(i, piece.piece.replace(SPACE, " ") if piece.type == _USER else piece.piece,
                        special=special[piece.type])
            for i, piece in enumerate(proto.pieces) if piece.type in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": _bos_template(pieces[tokenizer.bos_id], tokenizer.bos_id) if tokenizer.bos_ids else None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model | {"byte_fallback": True},
    }  # fmt: skip
    return json.dumps(built, ensure_ascii=False).encode()


def _merges(proto: Any) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best score first: SentencePiece merges the pair with the best result."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type in (_NORMAL, _USER)}
    found = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [[left, right] for _, left, right in sorted(found, key=lambda each: each[0])]
