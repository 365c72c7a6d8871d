"""Tokenizers out of GGUF, and for the directories that transformers reads."""

from pathlib import Path
from typing import Any

from jaxgpt.errors import BadFileError, note
from jaxgpt.files import reading, write_atomically
from jaxgpt.interop.gguf import read_gguf
from jaxgpt.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.tokenizer.base import SPACE, Kind, model_pb2
from jaxgpt.tokenizer.bpe import CUTTINGS, JsonTokenizer, tokenizer_json
from jaxgpt.tokenizer.spm import SentencePieceTokenizer

Json = dict[str, Any]
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
            raise BadFileError(f"{where}: tokenizer.ggml.pre {pre!r} is not implemented; {', '.join(CUTTINGS)} are")
        return JsonTokenizer(_byte_level(own, kinds, ids["bos"] if begins else None), where, settings)


def _byte_level(own: Json, kinds: list[int], bos: int | None) -> bytes:
    tokens, cutting = own["tokens"], CUTTINGS[own["pre"]]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": own["merges"]}
    model["ignore_merges"] = cutting.get("ignore_merges", False)
    parts = {"normalizer": cutting.get("normalizer"), "decoder": CUTTINGS["gpt-2"]["pre_tokenizers"][0]}
    before = {"type": "Sequence", "pretokenizers": cutting["pre_tokenizers"]}
    return tokenizer_json(tokens, kinds, bos, model, pre_tokenizer=before, **parts)


def _sentencepiece(own: Json, kinds: list[int], ids: Json) -> bytes:
    unknown = ids["unknown"] if ids["unknown"] is not None else kinds.index(Kind.UNKNOWN)
    trainer = {"model_type": "BPE", "vocab_size": len(kinds), "byte_fallback": True}
    for name, token in {"unk": unknown, "bos": ids["bos"], "eos": ids["eos"], "pad": ids["padding"]}.items():
        trainer |= {f"{name}_id": -1} if token is None else {f"{name}_id": token, f"{name}_piece": own["tokens"][token]}
    prefix = bool(own.get("add_space_prefix", True))
    normalizer = {"name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": prefix}
    proto = model_pb2.ModelProto(trainer_spec=trainer, normalizer_spec=normalizer)
    for i, (token, score, kind) in enumerate(zip(own["tokens"], own["scores"], kinds, strict=True)):
        piece = token.replace(" ", SPACE) if kind == Kind.USER_DEFINED else token
        proto.pieces.add(piece=piece, score=score, type=Kind.UNKNOWN if i == unknown else kind or Kind.NORMAL)
    return proto.SerializeToString()


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files in a directory that transformers reads; a SentencePiece model also as tokenizer.json."""
    tokenizer.write(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _json_of(tokenizer)
        written = JsonTokenizer(found, tokenizer.where, tokenizer.settings())
        # User-defined pieces are among the first.
        texts = [_PROBE, *(f"x{piece.replace(SPACE, ' ')}y" for piece in tokenizer.pieces[:1000])]
        if tokenizer.encode_batch(texts) == written.encode_batch(texts):
            write_atomically(directory / "tokenizer.json", found)
        else:
            note(f"{tokenizer.where}: no tokenizer.json cuts as it does, so there is none")


def _json_of(tokenizer: SentencePieceTokenizer) -> bytes:
    """The tokenizer.json that cuts every text as a SentencePiece model does. But U+2581 in a text is a space, and of
    two ways that a unigram model likes equally it may take the other."""
    proto = model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    # User-defined ones the library matches before spaces become U+2581.
    pieces = [p.piece.replace(SPACE, " ") if p.type == Kind.USER_DEFINED else p.piece for p in proto.pieces]
    scored = [(piece, p.score, p.type) for piece, p in zip(pieces, proto.pieces, strict=True)]
    unknown = tokenizer.kinds.index(Kind.UNKNOWN)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        # The library would find control and byte pieces in a text, were they not so unlikely
        vocab = [(p, score if kind in (Kind.NORMAL, Kind.USER_DEFINED) else -1e9) for p, score, kind in scored]
        model: Json = {"type": "Unigram", "vocab": vocab, "unk_id": unknown, "byte_fallback": True}
    else:  # SentencePiece merges the pair that makes the best piece: here every such pair, the best first
        scores = {piece: score for piece, score, kind in scored if kind == Kind.NORMAL}
        best = sorted(scores, key=lambda piece: -scores[piece])
        halves = ([piece[:cut], piece[cut:]] for piece in best for cut in range(1, len(piece)))
        merges = [[left, right] for left, right in halves if left in scores and right in scores]
        ids = {piece: i for i, piece in enumerate(pieces)}
        model = {"type": "BPE", "vocab": ids, "merges": merges, "byte_fallback": True}
        model |= {"unk_token": pieces[unknown], "fuse_unk": True}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if tokenizer.prefix else []
    normalizer = {"type": "Sequence", "normalizers": [*prefix, spaces]}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    bos = tokenizer.bos_id if tokenizer.bos_ids else None
    return tokenizer_json(pieces, tokenizer.kinds, bos, model, normalizer=normalizer, decoder=decoder)
