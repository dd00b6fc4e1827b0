"""A tokenizer as `transformers.AutoTokenizer` reads it: `tokenizer.json` and `tokenizer_config.json`.

A tokenizer.json is copied. Sentencepiece's byte-pair encodings and tiktoken's rank files are written as one, if it
gives the same tokens as the file on texts that differ in what such conversions get wrong; other files are copied alone.
"""

import base64
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from calm_core.io import replacing, write_text
from calm_core.tokenizer import Tokenizer, load_tokenizer
from calm_core.tokenizer.huggingface import NAMES
from calm_core.tokenizer.tiktoken import FAMILIES, LINE

CONVERTED, ORIGINAL = "tokenizer.json", "tokenizer.model"

SPACE = "\u2581"  # in which sentencepiece writes spaces

TRIALS = (
    "The state of the Union is strong, isn't it? 1790 to 2020: 3.14 %.",
    "  two spaces\n\n\tand a tab \r\n at  the end  ",
    "naïve Ångström, ﬁne ①, 中文字符 и кириллица, عربى, 😀👍🏽 \u200b\ufffd\x00",
    "aaaaaaaaaaa -------- ======= ....... 0000000000",
    "def f(x):\n    return [x[1:-1] for _ in range(10)]  # code",
    "",
    " ",
)


def export_tokenizer(path: Path, target: Path) -> dict[str, int]:
    """Write the tokenizer at `path` to the folder `target` for `AutoTokenizer`; the ids of its tokens.

    The file itself is always there, so that nothing is lost where it cannot be converted; then there is no
    tokenizer_config.json. An encoded text begins with bos, as the documents of training do, unless a tokenizer.json
    says otherwise.
    """
    tokenizer, content = load_tokenizer(path), path.read_bytes()
    target.mkdir(parents=True, exist_ok=True)
    is_json = content.lstrip()[:1] == b"{"
    with replacing(target / (CONVERTED if is_json else ORIGINAL)) as temporary:
        shutil.copyfile(path, temporary)
    if is_json:
        _copy_names(path.with_name(NAMES), target, tokenizer, tokenizers.Tokenizer.from_str(content.decode()))
    elif (converted := _converted(content, tokenizer)) is not None:
        write_text(target / CONVERTED, converted.to_str())
        _write_names(target, tokenizer, converted)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def _copy_names(source: Path, target: Path, tokenizer: Tokenizer, own: tokenizers.Tokenizer) -> None:
    """The names of the control tokens: those in the file next to tokenizer.json, or else those found in it."""
    if source.is_file():
        shutil.copyfile(source, target / NAMES)
        return
    if own.id_to_token(tokenizer.pad) is None:
        own.add_special_tokens([AddedToken("<|pad|>", special=True)])
        write_text(target / CONVERTED, own.to_str())
    _write_names(target, tokenizer, own)


def _write_names(target: Path, tokenizer: Tokenizer, converted: tokenizers.Tokenizer) -> None:
    names = {f"{name}_token": converted.id_to_token(getattr(tokenizer, name)) for name in ("bos", "eos", "pad")}
    # Without splitting, the text "<s>" would be the token of that name.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, **names}
    settings["clean_up_tokenization_spaces"] = False
    write_text(target / NAMES, json.dumps(settings, indent=1) + "\n")


def _converted(content: bytes, tokenizer: Tokenizer) -> tokenizers.Tokenizer | None:
    """The first conversion that encodes and decodes all trials as the tokenizer does; None if none does."""
    attempts = _of_ranks(content) if LINE.match(content) else _of_sentencepiece(content)
    for attempt in attempts:
        attempt.encode_special_tokens = True
        if all(_agree(attempt, tokenizer, text) for text in TRIALS):
            _add_control(attempt, tokenizer)
            return attempt
    return None


def _agree(converted: tokenizers.Tokenizer, tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text)
    return converted.encode(text, add_special_tokens=False).ids == ids and converted.decode(ids) == tokenizer.decode(
        ids
    )


def _add_control(converted: tokenizers.Tokenizer, tokenizer: Tokenizer) -> None:
    """Name bos, eos and pad, whatever lies between them in the vocabulary, and begin each text with bos."""
    while (size := converted.get_vocab_size()) < tokenizer.vocab_size:
        names = {tokenizer.bos: "<|begin_of_text|>", tokenizer.eos: "<|end_of_text|>", tokenizer.pad: "<|pad|>"}
        converted.add_special_tokens([AddedToken(names.get(size, f"<|reserved_{size}|>"), special=True)])
    named = {converted.id_to_token(token) for token in (tokenizer.bos, tokenizer.eos, tokenizer.pad)}
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sorted(named)])
    bos = converted.id_to_token(tokenizer.bos)
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos)]
    )


def _of_sentencepiece(content: bytes) -> Iterator[tokenizers.Tokenizer]:
    """A byte-pair encoding, without and with the space that some models put before each text.

    Sentencepiece merges the pair whose result has the highest score, and so the lowest id.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    text = {p: n for p, n in vocabulary.items() if not (model.is_control(n) or model.is_byte(n) or model.is_unknown(n))}
    merges = [pair for piece in sorted(text, key=text.get) for pair in _halves(piece, text)]
    for prefix in (False, True):
        bpe = BPE(vocabulary, merges, byte_fallback=True, unk_token=pieces[model.unk_id()], fuse_unk=True)
        converted = tokenizers.Tokenizer(bpe)
        written = [normalizers.Prepend(SPACE)] if prefix else []
        converted.normalizer = normalizers.Sequence([*written, normalizers.Replace(" ", SPACE)])
        stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
        converted.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
        )
        yield converted


def _halves(piece: str, vocabulary: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    return [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]


def _of_ranks(content: bytes) -> Iterator[tokenizers.Tokenizer]:
    """A byte-level encoding: each token is merged from the two that the merges of lower rank leave of it."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    letters = {bytes([byte]): letter for byte, letter in _letters().items()}
    written = {token: "".join(letters[bytes([byte])] for byte in token) for token in ranks}
    parts = [_last_parts(token, ranks) for token in ranks]
    merges = [(written[halves[0]], written[halves[1]]) for halves in parts if len(halves) == 2]
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    converted = tokenizers.Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(FAMILIES[len(ranks)].split), "isolated")
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    converted.decoder = decoders.ByteLevel()
    yield converted


def _last_parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What merges leave of a token before the last one: two parts, or more of a token that no merges lead to."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        if min(joined) == len(ranks):
            break
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _letters() -> dict[int, str]:
    """The character by which byte-level encodings write each byte: itself, or one above 255 if it is not printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + number) for number, byte in enumerate(others)}
