"""From text to a token folder: which text, which split, the same bytes each time, and never half a folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shardlane.config import Config, build
from shardlane.data import TokenFolder, open_token_folder
from shardlane.errors import DataError
from shardlane.prepare import (
    END_OF_TEXT,
    Document,
    ensure_prepared,
    prepare,
    prepared_place,
    read_source,
    split_documents,
    train_tokenizer,
)

TEXTS = {
    "a.txt": "The quick brown fox jumps over the lazy dog.\n" * 20,
    "b/c.txt": f"A text that mentions {END_OF_TEXT} does not end there.\n",
    "b/d.txt": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 🥊\n" * 5,
    "z.txt": "  spaces,\ttabs\r\nand no newline at the end",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def tiny(**data: Any) -> Config:
    data = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
    return build({"model": {"preset": "tiny"}, "data": {"held_out_fraction": 0.2, **data}})


def quiet(line: str) -> None:
    assert line and "\n" not in line


def refusal(config: Config, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(config, folder, quiet)
    assert "\n" not in str(caught.value), "a person reads one line"
    assert not folder.exists() and not list(folder.parent.glob(".*")), "a refusal leaves nothing behind"
    return str(caught.value)


def texts_of(folder: TokenFolder) -> set[str]:
    tokenizer = Tokenizer.from_file(str(folder.tokenizer_path))
    texts = set()
    for file in (folder.train, folder.held_out):
        for index in range(file.num_documents):
            *ids, last = file.document(index).tolist()
            assert last == folder.index.end_of_text_id and last not in ids
            texts.add(tokenizer.decode(ids, skip_special_tokens=False))
    return texts


def test_every_document_comes_back_as_it_was(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = prepare(tiny(source=source), tmp_path / "data", lines.append)
    assert texts_of(folder) == set(TEXTS.values())
    assert folder.train.num_documents + folder.held_out.num_documents == len(TEXTS)
    assert folder.train.num_documents and folder.held_out.num_documents
    assert folder.unigram_entropy is not None and 0 < folder.unigram_entropy < 10
    assert lines[0].startswith("read 4 documents") and "held out" in lines[-1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_standard_library_prepares_to_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """Hash seeds and thread counts differ between processes; neither may reach the tokens."""
    script = (
        "import sys; from pathlib import Path; from shardlane.config import build; from shardlane.prepare import prepare\n"
        "config = build({'model': {'preset': 'tiny'}, 'data': {'source_bytes_max': 200_000}})\n"
        "print(prepare(config, Path(sys.argv[1]), lambda line: None).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / threads)],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(digests) == 1
    folder = open_token_folder(tmp_path / "1", model_vocab_size=512)
    assert folder.vocab_size == 512
    assert folder.train.num_tokens > 50_000 and folder.held_out.num_tokens > 1_000


def test_the_standard_library_is_read_without_what_people_installed() -> None:
    documents, description = read_source(tiny().data)
    names = [document.name for document in documents]
    assert names == sorted(names) and "argparse.py" in names and "asyncio/events.py" in names
    assert not [name for name in names if {"site-packages", "test"} & set(name.split("/"))]
    assert sum(len(document.text) for document in documents) > 8_000_000
    assert "standard library" in description


def test_hidden_binary_and_empty_files_are_passed_over(source: Path) -> None:
    (source / ".hidden").write_text("secret")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("secret")
    (source / "image.png").write_bytes(b"\x89PNG\xff\xff")
    (source / "empty.txt").touch()
    os.mkfifo(source / "pipe")
    (source / "dangling").symlink_to("nowhere")
    documents, _ = read_source(tiny(source=source).data)
    assert {document.name: document.text for document in documents} == TEXTS
    assert [document.name for document in documents] == sorted(TEXTS)


@settings(deadline=None)  # files
@given(bytes_max=st.integers(1, 2000))
def test_reading_stops_at_the_byte_asked_for(tmp_path_factory: pytest.TempPathFactory, bytes_max: int) -> None:
    folder = tmp_path_factory.mktemp("text")
    text = "aé🥊" * 50  # characters of 1, 2 and 4 bytes
    for name in ("a", "b"):
        (folder / name).write_bytes(text.encode())
    documents, _ = read_source(tiny(source=folder, source_bytes_max=bytes_max).data)
    read = "".join(document.text for document in documents)
    assert (text + text).startswith(read)
    wanted = min(bytes_max, 2 * len(text.encode()))
    assert wanted - 3 <= len(read.encode()) <= wanted, "less than one character is lost"


sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=30)


@given(sizes=sizes, fraction=st.floats(0.001, 0.9))
def test_the_split_parts_all_of_the_text_and_leaves_neither_side_empty(sizes: list[int], fraction: float) -> None:
    documents = [Document(f"{index:03}", "x" * size) for index, size in enumerate(sizes)]
    train, held_out = split_documents(documents, fraction)
    assert "".join(d.text for d in sorted(train + held_out, key=lambda d: d.name)) == "x" * sum(sizes)
    if sum(sizes) > 1:
        assert train and held_out
    if len(documents) > 1:
        assert sorted(train + held_out, key=lambda d: d.name) == documents
        assert len(train) == 1 or sum(len(d.text) for d in held_out) >= fraction * sum(sizes)


def test_the_split_goes_by_name_and_not_by_order_or_content() -> None:
    documents = [Document(f"{index:03}", "x" * 100) for index in range(100)]
    _, held_out = split_documents(documents, 0.1)
    _, again = split_documents([Document(d.name, "y" * 100) for d in reversed(documents)], 0.1)
    assert {d.name for d in held_out} == {d.name for d in again} and len(held_out) == 10
    assert [d.name for d in held_out] != [f"{index:03}" for index in range(10)]


def test_one_huge_document_is_not_what_validation_is_about() -> None:
    documents = [Document("huge", "x" * 10_000), *(Document(f"{index}", "y" * 100) for index in range(100))]
    _, held_out = split_documents(documents, 0.02)
    assert "huge" not in {d.name for d in held_out}


def test_a_lone_document_is_cut_at_a_line() -> None:
    lines = "".join(f"line {index}\n" for index in range(100))
    (train,), (held_out,) = split_documents([Document("input.txt", lines)], 0.1)
    assert train.text + held_out.text == lines and train.text.endswith("\n")
    assert 0.1 <= len(held_out.text) / len(lines) < 0.12


def test_a_fraction_of_nothing_holds_nothing_out(source: Path, tmp_path: Path) -> None:
    folder = prepare(tiny(source=source / "a.txt", held_out_fraction=0), tmp_path / "data", quiet)
    assert folder.held_out.num_tokens == 0 and folder.unigram_entropy is None


def test_a_single_file_is_a_source(source: Path, tmp_path: Path) -> None:
    folder = prepare(tiny(source=source / "a.txt"), tmp_path / "data", quiet)
    assert folder.train.num_documents == folder.held_out.num_documents == 1


def test_a_given_tokenizer_is_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    tokenizer, _ = train_tokenizer([Document("", "another text entirely")], 300)
    tokenizer.enable_truncation(2)  # as some published files do; documents are encoded whole all the same
    given_file = tmp_path / "given.json"
    tokenizer.save(str(given_file))
    folder = prepare(tiny(source=source, tokenizer=given_file), tmp_path / "data", quiet)
    assert folder.tokenizer_path.read_bytes() == given_file.read_bytes()
    assert folder.vocab_size < 300
    assert texts_of(folder) == set(TEXTS.values())


def test_a_given_tokenizer_may_be_too_large_for_the_model(source: Path, tmp_path: Path) -> None:
    tokenizer, content = train_tokenizer(read_source(tiny().data)[0][:10], 600)
    assert tokenizer.get_vocab_size() == 600
    (tmp_path / "given.json").write_bytes(content)
    message = refusal(tiny(source=source, tokenizer=tmp_path / "given.json"), tmp_path / "data")
    assert "the tokenizer has 600 tokens, but model.vocab_size is 512" in message


def test_a_given_tokenizer_must_be_able_to_end_a_text(source: Path, tmp_path: Path) -> None:
    _, content = train_tokenizer([], 300)
    (tmp_path / "given.json").write_bytes(content.replace(END_OF_TEXT.encode(), b"<nothing>"))
    assert "no end-of-text token" in refusal(tiny(source=source, tokenizer=tmp_path / "given.json"), tmp_path / "data")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"source": "nowhere"}, "data.source 'nowhere' is no file or folder"),
        ({"source": os.devnull}, "is no file or folder"),
        ({"source": "EMPTY"}, "found no UTF-8 text"),
        ({"source": "TEXT", "tokenizer": "nowhere.json"}, "cannot read data.tokenizer nowhere.json: No such file"),
        ({"source": "TEXT", "tokenizer": "TEXT/a.txt"}, "is not a tokenizer.json"),
    ],
)
def test_sources_that_cannot_be_read(source: Path, tmp_path: Path, data: dict[str, str], found: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"TEXT": str(source), "EMPTY": str(tmp_path / "empty"), "TEXT/a.txt": str(source / "a.txt")}
    config = tiny(**{key: places.get(value, value) for key, value in data.items()})
    assert found in refusal(config, tmp_path / "data")


def test_a_vocabulary_too_small_for_bytes(source: Path, tmp_path: Path) -> None:
    config = tiny(source=source).with_changes({"model.vocab_size": 256})
    assert "model.vocab_size is 256, but a byte-level tokenizer needs 257" in refusal(config, tmp_path / "data")


def test_a_run_prepares_once_and_opens_ever_after(source: Path, tmp_path: Path) -> None:
    config = tiny(source=source)
    assert prepared_place(config, tmp_path / "run") == tmp_path / "run" / "data"
    lines: list[str] = []
    first = ensure_prepared(config, tmp_path / "run", lines.append)
    assert lines
    lines.clear()
    (source / "a.txt").write_text("the source has changed; the run's data has not")
    assert ensure_prepared(config, tmp_path / "run", lines.append).digest == first.digest
    assert not lines, "nothing was prepared"


def test_data_path_names_the_folder(source: Path, tmp_path: Path) -> None:
    config = tiny(source=source, path=tmp_path / "shared" / "tokens")
    (tmp_path / "shared" / "tokens").mkdir(parents=True)  # an empty one is as good as none
    assert ensure_prepared(config, tmp_path / "run", quiet).path == tmp_path / "shared" / "tokens"
    assert not (tmp_path / "run").exists()


def test_what_exists_but_is_broken_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    config = tiny(source=source)
    folder = ensure_prepared(config, tmp_path, quiet)
    (folder.path / "train.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match="truncated"):
        ensure_prepared(config, tmp_path, quiet)
    with pytest.raises(DataError, match="exists already; delete it"):
        prepare(config, folder.path, quiet)
    assert (folder.path / "train.bin").read_bytes() == b"precious"


def test_a_file_where_the_folder_should_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("precious")
    with pytest.raises(DataError, match="Not a directory"):
        ensure_prepared(tiny(source=source), tmp_path, quiet)
    assert (tmp_path / "data").read_text() == "precious"


def test_of_two_that_prepare_at_once_one_wins_and_both_open_it(source: Path, tmp_path: Path) -> None:
    both_encode = threading.Barrier(2)
    lines: list[str] = []
    opened: list[TokenFolder] = []

    def progress(line: str) -> None:
        lines.append(line)
        if line.startswith("encoding"):
            both_encode.wait(timeout=60)  # neither has written yet; both found the place vacant

    threads = [
        threading.Thread(target=lambda: opened.append(ensure_prepared(tiny(source=source), tmp_path, progress))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder.digest for folder in opened}) == 1 and len(opened) == 2
    assert sum("prepared by another process" in line for line in lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text"], "the loser cleaned up"


def test_a_failure_while_writing_leaves_no_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shardlane.prepare.write_token_folder", full)
    assert "cannot write the token folder" in refusal(tiny(source=source), tmp_path / "data")
