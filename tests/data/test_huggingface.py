"""Datasets are read from folders shard by shard; of the hub's the commit is asked for and handed on."""

import json
import os

import pytest

from lm.config import ConfigError
from lm.data import corpus, huggingface, prepare, sources
from lm.data.settings import Config

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface._load.cache_clear()


def opened(path, on_broken="refuse", fields=("text",), **dataset):
    return sources.open_source(
        "huggingface",
        path=[str(path)],
        fields=sources.Fields(*fields),
        on_invalid="replace",
        on_broken=on_broken,
        dataset=sources.Dataset(**dataset),
    )


def texts(documents):
    return [document.text for document in documents]


@pytest.fixture
def folder(tmp_path):
    """A folder of data files: two of training, one of testing."""
    path = tmp_path / "data"
    path.mkdir()
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        rows = [{"text": f"{split} {number} {i}", "deep": {"body": str(i)}} for i in range(100)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{split}-{number}.jsonl").write_text(lines)
    return path


@pytest.fixture
def saved():
    """A table of texts and classes that have names; a text and a class are missing."""
    columns = {"text": [f"text {i}" for i in range(200)], "label": [i % 2 for i in range(200)]}
    columns["text"][150], columns["label"][3] = None, -1
    classes = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(classes))


def test_a_folder_of_data_files_is_streamed_by_shards(folder):
    source = opened(folder)
    assert source.parts == (f"{folder}/train/0", f"{folder}/train/1")
    documents = [list(source.read(part)) for part in (0, 1)]
    assert [texts(part) for part in documents] == [
        [f"train {number} {i}" for i in range(100)] for number in (0, 1)
    ]
    for start in (0, 1, 63, 64, 99, 100, 101):
        assert list(source.read(1, start)) == documents[1][start:]
    assert texts(opened(folder, split="test"))[:2] == ["test 0 0", "test 0 1"]
    fields = sources.Fields(source="text", target="deep.body")
    assert next(iter(opened(folder, fields=fields)))[:3] == ("train 0 0", 0, "0")


def test_what_is_damaged_in_a_folder_is_refused_or_skipped(folder):
    with (folder / "train-0.jsonl").open("a") as file:
        file.write('{"text": bad\n')
    with pytest.raises(
        ConfigError, match=r"data\.path: .*shard 0, after row \d+: Arrow.*repair it"
    ):
        list(opened(folder))
    huggingface._load.cache_clear()
    found = list(opened(folder, "skip"))
    assert [d.broken for d in found if d.broken] == ["damaged file"]
    first = list(opened(folder, "skip").read(0))
    for start in (0, 1, len(first) - 1, len(first), len(first) + 1):
        assert list(opened(folder, "skip").read(0, start)) == first[start:]
    assert {f"train 1 {i}" for i in range(100)} <= set(texts(found))


def test_a_saved_dataset_and_the_names_of_its_classes(tmp_path, saved):
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "splits")
    for source in (
        opened(tmp_path / "one", "skip"),
        opened(tmp_path / "splits", "skip", split="test"),
    ):
        documents = list(source)
        assert (documents[0].text, len(documents)) == ("text 0", 200)
        assert [i for i, d in enumerate(documents) if d.broken == "no such text"] == [150]
        for start in (0, 1, 64, 150, 151, 200, 201):
            assert list(source.read(0, start)) == documents[start:]
    labelled = sources.Fields(source="text", label="label")
    labels = [d.second for d in opened(tmp_path / "one", "skip", fields=labelled)]
    assert labels[:4] == ["no", "yes", "no", None]
    with pytest.raises(ConfigError, match=r"shard 0: row 150 has no text"):
        list(opened(tmp_path / "one"))


def test_the_fingerprint_is_of_the_content(folder, tmp_path, saved):
    first = opened(folder).fingerprint()
    assert opened(folder).fingerprint() == first
    assert opened(folder, split="test").fingerprint() != first
    (folder / "train-0.jsonl").write_text('{"text": "other", "deep": {"body": "0"}}\n')
    huggingface._load.cache_clear()
    assert opened(folder).fingerprint() != first
    saved.save_to_disk(tmp_path / "one")
    one = opened(tmp_path / "one").fingerprint()
    saved.select(range(100)).save_to_disk(tmp_path / "two")
    assert opened(tmp_path / "two").fingerprint() != one


def test_a_corpus_is_built_of_it(folder):
    built = corpus.build(Config(source="huggingface", path=(str(folder),), tokenizer="byte"))
    assert built.report["documents"] == 200


def test_the_hub_is_asked_for_the_commit_and_the_dataset_at_it(monkeypatch, folder):
    """Offline: that name, configuration, split and revision reach the library is all that is tested."""
    asked = []
    stream = datasets.load_dataset(str(folder), split="train", streaming=True)

    def dataset_info(self, name, revision):
        asked.append((name, revision))
        return huggingface_hub.DatasetInfo(
            id=name, sha=COMMIT[::-1] if revision == "other" else COMMIT
        )

    def load_dataset(path, **options):
        asked.append((path, options))
        return stream

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = opened("some/name", config="en", split="validation")
    options = {"name": "en", "split": "validation", "revision": COMMIT, "streaming": True}
    assert asked == [("some/name", None), ("some/name", options)]
    assert source.parts[1] == "some/name@0123456789ab/en/validation/1"
    assert texts(source.read(1, 99)) == ["train 1 99"]
    assert source.fingerprint() != opened("some/name", config="en", revision="other").fingerprint()
    assert (
        source.fingerprint() != opened("other/name", config="en", split="validation").fingerprint()
    )
    asked.clear()
    opened("some/name", config="en", split="validation", revision=COMMIT)
    assert asked == []  # a commit is its own answer, and what it holds was loaded


@pytest.mark.parametrize(
    ("path", "dataset", "message"),
    [
        ("some/name", {}, r"data\.path=some/name: OfflineModeIsEnabled .*HF_TOKEN"),
        ("./nowhere", {}, r"data\.path=\./nowhere: no such folder"),
        ("{folder}", {"split": "none"}, r"data\.path=.*ValueError .*dataset_split='none'"),
        ("{folder}", {"revision": "main"}, r"data\.revision=main: .* is a folder"),
        ("a,b", {}, r"name one dataset"),
    ],
)
def test_what_is_not_there_is_an_error_of_one_line(folder, path, dataset, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sources.open_source(
            "huggingface",
            path=path.format(folder=folder).split(","),
            fields=sources.Fields(),
            on_invalid="replace",
            dataset=sources.Dataset(**dataset),
        )
    assert "\n" not in str(caught.value)


def test_a_saved_dataset_has_the_split_that_it_has(tmp_path, saved):
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ConfigError, match=r"KeyError .*train.*dataset_split='train'"):
        opened(tmp_path / "splits")


@pytest.mark.parametrize("saved_to_disk", [False, True])
def test_a_folder_that_changes_while_it_is_read_is_refused(
    folder, saved, tmp_path, monkeypatch, saved_to_disk
):
    if saved_to_disk:
        folder = tmp_path / "saved"
        saved.select(range(100)).save_to_disk(folder)
    file = next(file for file in sorted(folder.iterdir()) if file.suffix in (".jsonl", ".arrow"))
    cfg = Config(source="huggingface", path=(str(folder),), tokenizer="byte")
    corpus.prepare_in(tmp_path / "whole", cfg)
    add = prepare.Writer.add

    def changing(self, encoded):
        add(self, encoded)
        os.utime(file, (1, 1))

    monkeypatch.setattr(prepare.Writer, "add", changing)
    with pytest.raises(ConfigError, match=rf"{file.name} changed while it was read"):
        corpus.prepare_in(tmp_path / "made", cfg)
