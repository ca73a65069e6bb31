"""A collection is read in order of _id, from any record on, from a server that speaks MongoDB's protocol."""

import contextlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from lm.config import ConfigError
from lm.data import corpus, mongodb, prepare, sources
from lm.data.settings import Config

pymongo = pytest.importorskip("pymongo")
bson = pytest.importorskip("bson")
SERVERS = {  # those that are installed are started
    "nx-27017": ["--db", "memory", "-p", "{port}"],
    "mongod": ["--dbpath", "{folder}", "--port", "{port}"],
    "secantusd-py": ["--storage-path", "{folder}", "--port", "{port}", "--log-level", "ERROR"],
}
TEXTS = [f"text {i} ü" for i in range(500)]


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """The address of a server; skips where this one is not installed."""
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(request.param, path=here)
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"port": port, "folder": tmp_path_factory.mktemp("database")}
    options = [option.format(**places) for option in SERVERS[request.param]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, *options], cwd=places["folder"], **quiet)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()  # what it holds is of no use
        process.wait(30)


@pytest.fixture
def collection(server):
    """A collection of records whose _ids the driver makes, in order."""
    with pymongo.MongoClient(f"mongodb://{server}") as client:
        client.books.drop_collection("pages")
        rows = [{"text": text, "deep": {"body": f"b {text}"}, "more": "x" * 99} for text in TEXTS]
        client.books.pages.insert_many(rows)
        yield client.books.pages


def opened(server, on_broken="refuse", fields=("text",), user="", options=""):
    return sources.open_source(
        "python_docs",
        path=[f"mongodb://{user}{server}/books.pages{options}"],
        fields=sources.Fields(*fields),
        on_invalid="replace",
        on_broken=on_broken,
    )


def test_every_record_is_a_document_from_any_on(server, collection):
    source = opened(server)
    assert source.parts == (f"mongodb://{server}/books.pages",)
    documents = list(source)
    assert (documents[0].text, len(documents)) == ("text 0 ü", 500)
    assert [document.text for document in documents] == TEXTS
    for start in (0, 1, 101, 499, 500, 501):
        assert list(source.read(0, start)) == documents[start:]
    pairs = opened(server, fields=("", "text", "deep.body"))
    assert [d[:3] for d in pairs][7] == ("text 7 ü", 0, "b text 7 ü")
    assert list(pickle.loads(pickle.dumps(source)).read(0, 498)) == documents[498:]


def test_a_record_without_a_text_is_refused_or_skipped(server, collection):
    wrong = collection.insert_many([{"text": 3}, {"body": "no text"}]).inserted_ids
    documents = list(opened(server, "skip"))
    assert [d.broken for d in documents[499:]] == ["", "no such text", "no such text"]
    with pytest.raises(ConfigError, match=rf"data\.field=text: .*{wrong[0]}.* has no text"):
        list(opened(server))


@pytest.fixture
def losses(monkeypatch):
    """A server forgets a cursor that waits for minutes; here three getMores are made to fail as then."""
    meanwhile = []  # what happens at each loss
    cursor = pymongo.cursor.Cursor
    more, lost = cursor._send_message, []

    def forgetful(self, operation):
        if type(operation).__name__ == "_GetMore" and len(lost) < 3:
            lost.append(operation)
            if meanwhile:
                meanwhile.pop(0)()
            raise pymongo.errors.CursorNotFound("cursor id 7 not found")
        return more(self, operation)

    monkeypatch.setattr(cursor, "_send_message", forgetful)
    yield meanwhile
    assert len(lost) == 3 and not meanwhile


def test_a_cursor_that_is_lost_is_opened_where_it_was(server, collection, losses):
    assert [document.text for document in opened(server)] == TEXTS


def test_of_one_that_is_lost_nothing_is_read_twice_or_not_at_all(server, collection, losses):
    """Records that were read go, also the last one, and others come before them."""
    ids = [record["_id"] for record in collection.find(sort=[("_id", 1)], batch_size=999)]
    losses += [
        lambda: collection.delete_many({"_id": {"$in": [*ids[:2], ids[100]]}}),
        lambda: collection.insert_one({"_id": bson.ObjectId("0" * 24), "text": "new"}),
    ]
    assert [document.text for document in opened(server)] == TEXTS


def test_a_cursor_is_lost_among_ids_of_several_types(server, collection, losses):
    collection.delete_many({})
    kinds = (lambda i: 1000 + i, lambda i: f"id {i:03}")
    collection.insert_many([{"_id": kind(i), "text": f"{i}"} for kind in kinds for i in range(250)])
    expected = [r["text"] for r in collection.find(sort=[("_id", 1)], batch_size=999)]
    assert len(expected) == 500
    assert [document.text for document in opened(server)] == expected


def test_types_of_ids_are_in_the_order_of_the_server():
    from bson.codec_options import CodecOptions

    def behind(value):
        return mongodb._types_behind(value, CodecOptions(uuid_representation=4))

    assert behind(2**40) == behind(1.5) == behind(1)
    assert behind("a")[:3] == ["object", "binData", "objectId"]
    assert behind(None)[0] == "number"
    assert behind(bson.ObjectId())[0] == behind(uuid.uuid4())[1] == "bool"


def test_a_collection_that_changes_meanwhile_is_refused(server, collection, monkeypatch, tmp_path):
    add = prepare.Writer.add

    def changing(self, encoded):
        add(self, encoded)
        collection.insert_one({"text": "one more"})

    monkeypatch.setattr(prepare.Writer, "add", changing)
    path = (f"mongodb://{server}/books.pages",)
    with pytest.raises(ConfigError, match=r"books\.pages changed while it was read"):
        corpus.prepare_in(tmp_path / "made", Config(path=path, tokenizer="byte"))
    assert not (tmp_path / "made/manifest.json").exists()


def test_the_fingerprint_changes_with_the_records(server, collection):
    first = opened(server).fingerprint()
    assert opened(server).fingerprint() == first
    assert opened(server, fields=("more",)).fingerprint() != first
    collection.insert_one({"text": "one more"})
    second = opened(server).fingerprint()
    assert second != first
    collection.update_one({"text": TEXTS[3]}, {"$set": {"text": TEXTS[3] * 20}})
    assert opened(server).fingerprint() not in (first, second)


def test_a_corpus_is_built_of_it(server, collection, monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    # As the command line gives it, where a comma is between hosts and between paths.
    path = tuple(f"mongodb://{server},{server}/books.pages".split(","))
    built = corpus.build(Config(source="mongodb", path=path, tokenizer="byte"))
    assert built.report["documents"] == 500


@pytest.mark.parametrize(
    "user", ["me:secret@", "me:sec/re/secret@", "me:secret%40@", ":secret@", "me@you:secret@"]
)
def test_a_password_is_refused_and_never_repeated(user):
    path = f"mongodb://{user}host/books.pages"
    for fields in (
        {"path": (path,)},
        {"path": (path,), "source": "mongodb"},
        {"path": (path,), "source": "text"},
        {"path": ("mongodb://host/a.b",), "validation_path": (path,)},
        {"mixture": ((path, 1.0),)},
    ):
        with pytest.raises(ConfigError, match="LM_MONGODB_PASSWORD") as caught:
            Config(**fields)
        assert "secret" not in str(caught.value)


def test_the_password_of_the_environment_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("LM_MONGODB_PASSWORD", "secret")
    source = opened("127.0.0.1:1", user="me@", options="?serverSelectionTimeoutMS=50")
    assert source.parts == ("mongodb://127.0.0.1:1/books.pages",)
    with mongodb._connected(source.places[0]) as client:
        assert client.options.pool_options._credentials.password == "secret"
    with pytest.raises(ConfigError) as caught:
        list(source)
    assert "secret" not in repr(source) + str(caught.value)


@pytest.mark.parametrize(
    "path", ["mongodb://host", "mongodb://host/books", "mongodb://host/.pages", "mongodb:///a.b"]
)
def test_a_uri_that_names_no_collection_is_an_error(path):
    with pytest.raises(ConfigError, match=r"data\.path: name a collection"):
        sources.open_source("mongodb", path=[path], fields=sources.Fields(), on_invalid="replace")


def test_a_collection_may_have_dots_in_its_name():
    ((part, uri),) = mongodb.locate(["mongodb+srv://me@host/books.pages%20of.one?tls=true"])
    assert part == "mongodb+srv://host/books.pages%20of.one"
    with pymongo.MongoClient(connect=False) as client:
        collection = mongodb._collection(client, uri)
    assert collection.full_name == "books.pages of.one"


def test_a_server_that_is_not_there_is_an_error_of_one_line():
    source = opened("127.0.0.1:1", options="?serverSelectionTimeoutMS=50")
    for action in (lambda: list(source), source.fingerprint):
        with pytest.raises(ConfigError, match=r"cannot read mongodb://127\.0\.0\.1:1/") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.fixture
def answered(monkeypatch):
    """Puts bytes in the place of others that the server answers: not every server takes what others hold."""
    answer = pymongo.message._OpMsg
    begin = answer.__init__

    def replacing(old, new):
        def changed(self, flags, payload):
            begin(self, flags, bytes(payload).replace(old, new))

        monkeypatch.setattr(answer, "__init__", changed)

    return replacing


def test_bytes_that_are_not_utf_8_are_replaced_or_refused(server, collection, answered):
    collection.delete_many({})
    collection.insert_one({"_id": "id éé", "text": "a éé b"})
    answered("éé".encode(), b"\xff\xc3z\xfe")
    (document,) = opened(server)
    assert (document.text, document.replaced) == ("a \ufffd\ufffdz\ufffd b", 3)
    refusing = sources.open_source(
        "python_docs", path=opened(server).places, fields=sources.Fields(), on_invalid="refuse"
    )
    with pytest.raises(ConfigError, match=r"data\.on_invalid=refuse: .*_id .* not UTF-8"):
        list(refusing)
    assert refusing.fingerprint() and refusing.states()


def test_a_date_beyond_those_of_python_is_an_id(server, collection, answered):
    collection.delete_many({})
    collection.insert_one({"_id": bson.Int64(1 << 50), "text": "far"})
    answered(b"\x12_id\0", b"\x09_id\0")
    assert [document.text for document in opened(server)] == ["far"]
    assert opened(server).fingerprint()


def test_what_is_no_bson_is_an_error_of_one_line(server, collection, answered):
    answered(b"\x02text\0", b"\x7etext\0")
    with pytest.raises(ConfigError, match=r"cannot read mongodb://.*InvalidBSON"):
        list(opened(server))
