"""From text to a token folder: read the source, hold some documents out, get a tokenizer, encode, rename into place.

A file is a document. The same text, settings and `tokenizers` release give the same bytes; across releases compare runs only
on the same data hash (`TokenFolder.digest`). The whole text is held in memory: a corpus of many gigabytes wants a prepared
folder made elsewhere, in the format of `shardlane.data`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import secrets
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shardlane.config import Config
from shardlane.data import INDEX_FILE, TokenFolder, open_token_folder, write_token_folder
from shardlane.errors import DataError
from shardlane.sections import DataConfig
from shardlane.storage import Location, locate, sync_folder
from shardlane.token_cache import cache_folder, open_tokens, put_tokens

END_OF_TEXT = "<|endoftext|>"
PYTHON_STDLIB = "python-stdlib"
# What published tokenizers call it, ours first: GPT-2 and Qwen, Llama 3, Llama 2 and Mistral, Gemma.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
# Packages that people installed, tests (19 of 31 MB, much of it tables) and files that differ from build to build.
_STDLIB_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
_STDLIB_SKIPPED_PREFIX = "_sysconfigdata_"
_BATCH_CHARACTERS = 1 << 21  # enough documents to keep all cores busy, few enough that encodings stay small

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Document:
    """`name` is its path within the source with forward slashes; it decides the split."""

    name: str
    text: str


def prepared_place(config: Config, run_dir: Path) -> Location:
    """Where this run's tokens are, or will be."""
    return locate(config.data.path or str(run_dir / "data"))


def ensure_prepared(config: Config, run_dir: Path, progress: Progress) -> TokenFolder:
    """Opens this run's token folder; prepares it first if there is none.

    What exists is never overwritten: a broken folder is a `DataError` that says what is wrong with it.
    """
    place = prepared_place(config, run_dir)
    if _is_vacant(place):
        return _make(config, place, progress)
    return open_tokens(config.with_changes({"data.path": str(place)}))


def prepare(config: Config, place: Location, progress: Progress) -> TokenFolder:
    """Makes `place`, which must not exist or be empty. `progress` gets a line for each part of the work.

    A folder is built beside its place and renamed into it; in an object store the index is put there last: it is there whole or
    not at all. Of two processes that prepare the same at once the first to finish wins, and both open the winner's. Raises
    `DataError`.
    """
    if not _is_vacant(place):
        raise DataError(f"{place} exists already; delete it, or name another place")
    return _make(config, place, progress)


def _make(config: Config, place: Location, progress: Progress) -> TokenFolder:
    if isinstance(place, Path):
        return _build(config, place, progress)
    cache = cache_folder(config)
    building = cache / f".prepare.{secrets.token_hex(8)}"
    try:
        won = put_tokens(_build(config, building, progress, place), place)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if not won:
        progress(f"{place} was prepared by another process meanwhile; using that")
    return open_tokens(config.with_changes({"data.path": str(place)}))


def _build(config: Config, folder: Path, progress: Progress, destined: Location | None = None) -> TokenFolder:
    """`destined`: where it goes from here."""
    documents, source = read_source(config.data)
    num_bytes = sum(len(document.text.encode()) for document in documents)
    progress(f"read {len(documents):,} documents, {num_bytes / 1e6:.1f} MB, of {source}")
    train, held_out = split_documents(documents, config.data.held_out_fraction)
    if config.data.tokenizer:
        tokenizer, tokenizer_json = load_tokenizer(Path(config.data.tokenizer).expanduser())
    else:
        progress(f"training a byte-level BPE of {config.model.vocab_size:,} tokens")
        tokenizer, tokenizer_json = train_tokenizer(train, config.model.vocab_size)
    vocab_size, end_of_text_id = _vocabulary(tokenizer, config)
    progress(f"encoding with {vocab_size:,} tokens")
    goal = destined or folder
    building = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    try:
        building.mkdir(parents=True)
        index = write_token_folder(
            building,
            train=_encode(tokenizer, train, end_of_text_id),
            held_out=_encode(tokenizer, held_out, end_of_text_id),
            vocab_size=vocab_size,
            end_of_text_id=end_of_text_id,
            tokenizer_json=tokenizer_json,
            source=source,
        )
        won = _publish(building, folder)
    except OSError as error:
        raise DataError(f"cannot write the token folder {folder}: {error.strerror}; free the place or name another") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if won:
        progress(f"wrote {index.train.num_tokens:,} tokens to train on and {index.held_out.num_tokens:,} held out to {goal}")
    else:
        progress(f"{folder} was prepared by another process meanwhile; using that")
    return open_token_folder(folder, model_vocab_size=config.model.vocab_size, verify=not won)


def read_source(data: DataConfig) -> tuple[list[Document], str]:
    """All documents by name, up to `source_bytes_max` bytes (the last is cut there), and a description for people.

    In folders, hidden, empty and non-UTF-8 files are passed over. Raises `DataError` if there is no text.
    """
    if data.source == PYTHON_STDLIB:
        root, description = Path(sysconfig.get_path("stdlib")), f"the Python {platform.python_version()} standard library"
        files = [
            name
            for name in _files_below(root, _STDLIB_SKIPPED_FOLDERS)
            if name.endswith(".py") and not name.rpartition("/")[2].startswith(_STDLIB_SKIPPED_PREFIX)
        ]
    else:
        path = Path(data.source).expanduser()
        description = data.source
        if path.is_dir():
            root, files = path, _files_below(path, ())
        elif path.is_file():
            root, files = path.parent, [path.name]
        else:
            raise DataError(f"data.source {data.source!r} is no file or folder; name one, or use {PYTHON_STDLIB!r}")
    documents = list(_read_documents(root, files, data.source_bytes_max))
    if not documents:
        raise DataError(f"found no UTF-8 text in data.source {data.source!r}; name a text file or a folder of them")
    return documents, description


def split_documents(documents: list[Document], held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out), each in the given order; together they are all of the text.

    Documents are held out in the order of their names' hashes until that fraction of the characters is reached: no
    randomness, and at least one document on either side. One that is longer than all that is wanted waits until last, lest
    the validation loss be about a single text. A lone document is cut at a line, its end held out.
    """
    if not held_out_fraction:
        return documents, []
    if len(documents) == 1:
        (whole,) = documents
        wanted = len(whole.text) - max(1, int(len(whole.text) * held_out_fraction))
        cut = whole.text.rfind("\n", 0, wanted) + 1 or wanted
        if not cut:
            return documents, []
        return [Document(whole.name, whole.text[:cut])], [Document(whole.name, whole.text[cut:])]
    num_wanted = held_out_fraction * sum(len(document.text) for document in documents)

    def turn(document: Document) -> tuple[bool, bytes]:
        return len(document.text) > num_wanted, hashlib.sha256(document.name.encode()).digest()

    held_out: set[str] = set()
    num_held_out = 0
    for document in sorted(documents, key=turn)[:-1]:
        if num_held_out >= num_wanted:
            break
        held_out.add(document.name)
        num_held_out += len(document.text)
    return (
        [document for document in documents if document.name not in held_out],
        [document for document in documents if document.name in held_out],
    )


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> tuple[Tokenizer, bytes]:
    """A GPT-2 style byte-level BPE and its file: any text encodes and decodes to itself. Short text may yield fewer tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(
            f"model.vocab_size is {vocab_size}, but a byte-level tokenizer needs {len(alphabet) + 1} or more;"
            " raise it, or set data.tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer, tokenizer.to_str().encode()


def load_tokenizer(path: Path) -> tuple[Tokenizer, bytes]:
    """A `tokenizer.json` and its bytes, which are copied as they are. Raises `DataError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read data.tokenizer {path}: {error.strerror}; name a tokenizer.json") from error
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises the bare class
        reason = " ".join(str(error).split())
        raise DataError(f"data.tokenizer {path} is not a tokenizer.json of the tokenizers library: {reason}") from error
    tokenizer.no_truncation()  # some published files cut and pad; a document is encoded whole
    tokenizer.no_padding()
    return tokenizer, content


def _vocabulary(tokenizer: Tokenizer, config: Config) -> tuple[int, int]:
    """(vocabulary size, end-of-text id). Raises `DataError` if the model is too small or the tokenizer cannot end a text."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    vocab_size = max(vocabulary.values()) + 1  # not their number: published vocabularies have gaps
    if vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer has {vocab_size} tokens, but model.vocab_size is {config.model.vocab_size}; raise model.vocab_size"
        )
    for name in _END_OF_TEXT_NAMES:
        if name in vocabulary:
            return vocab_size, vocabulary[name]
    raise DataError(f"data.tokenizer has no end-of-text token, looked for {', '.join(_END_OF_TEXT_NAMES)}; add one to it")


def _encode(tokenizer: Tokenizer, documents: list[Document], end_of_text_id: int) -> Iterator[list[int]]:
    tokenizer.encode_special_tokens = True  # a document that mentions <|endoftext|> does not end there
    for batch in _batches(documents):
        for encoding in tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False):
            yield [*encoding.ids, end_of_text_id]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _files_below(root: Path, skipped_folders: tuple[str, ...]) -> list[str]:
    """Names relative to `root`, sorted: the order of a directory is the file system's whim."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped_folders and not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _read_documents(root: Path, files: Iterable[str], bytes_max: int) -> Iterator[Document]:
    num_bytes = 0
    for name in files:
        path = root / name
        try:
            if not path.is_file():  # a pipe would wait for ever
                continue
            content = path.read_bytes()
            content.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if bytes_max:
            content = content[: bytes_max - num_bytes]
        num_bytes += len(content)
        if text := content.decode(errors="ignore"):  # only a character cut in half can be ignored here
            yield Document(name, text)
        if bytes_max and num_bytes >= bytes_max:
            return


def _is_vacant(place: Location) -> bool:
    """Nothing there, or an empty folder, as a mounted volume begins; in an object store, no index."""
    try:
        return not (any(place.iterdir()) if isinstance(place, Path) else (place / INDEX_FILE).exists())
    except FileNotFoundError:
        return True
    except OSError as error:
        raise DataError(f"cannot read the token folder {place}: {error.strerror}; name another place") from error


def _publish(building: Path, folder: Path) -> bool:
    """Renames into place, durably. False: another process was first. Renaming over a folder that is not empty fails."""
    sync_folder(building)
    try:
        building.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync_folder(folder.parent)
    return True
