"""Collections of a MongoDB server to documents, in the order of _id."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from lm.config import ConfigError
from lm.data.documents import Document, Reading, of_record

PASSWORD = "LM_MONGODB_PASSWORD"  # environment variable
# Of an _id, in the order in which the server sorts them, and the numbers that BSON has for them.
_TYPES = {
    "minKey": (255,), "null": (10,), "number": (1, 16, 18, 19), "string": (2, 14), "object": (3,),
    "binData": (5,), "objectId": (7,), "bool": (8,), "date": (9,), "timestamp": (17,), "maxKey": (127,),
}  # fmt: skip
_URI = re.compile(r"(mongodb(?:\+srv)?)://(?:[^@/]*@)?([^@/?]+)/([^/?]+)(\?.*)?")


def locate(path: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the printable name and the URI of a collection; raise ConfigError for what names none."""
    uri = ",".join(path)  # of a set of replicas, hosts have commas between them
    if not (match := _URI.fullmatch(uri)) or not all(_collection_name(match[3])):
        raise ConfigError(
            "data.path: name a collection, as in mongodb://user@host/database.collection"
        )
    yield f"{match[1]}://{match[2]}/{match[3]}", uri


def read(uri: str, start: int, reading: Reading) -> Iterator[Document]:
    """Yield a document for every record of a collection from number `start` on, in the order of _id."""
    pymongo = _installed()
    ((name, _),) = locate([uri])
    last = reached = None  # the record that was read last, and where a cursor was lost before
    while True:
        try:
            with _connected(uri) as client:
                for record in _from(_collection(client, uri), start, last, reading):
                    where = f"{name}: the record with _id {record['_id']!r}"
                    yield of_record(record, where, reading)
                    last = record
            return
        except (pymongo.errors.AutoReconnect, pymongo.errors.CursorNotFound) as error:
            # A cursor that waited too long is gone, or a server is: go on from where it was, but
            # not for ever.
            if last is reached:
                raise _failed(name, error) from error
            reached = last
        except _errors() as error:
            raise _failed(name, error) from error


def _from(collection: Any, start: int, last: Any, reading: Reading) -> Iterator[Any]:
    """Yield the records from number `start` on, or those behind the record `last`, in order of _id."""
    options: dict[str, Any] = {"projection": list(reading.fields.names), "sort": [("_id", 1)]}
    if last is None:
        yield from collection.find(skip=start, **options)
        return
    # Not by a number: records may have come or gone before it. And $gt knows but the type it is given.
    yield from collection.find({"_id": {"$gt": last["_id"]}}, **options)
    for name in _types_behind(last["_id"], collection.codec_options):
        yield from collection.find({"_id": {"$type": name}}, **options)


def _types_behind(value: Any, options: Any) -> list[str]:
    """Return the types that the server orders behind that of `value`."""
    import bson

    code = bson.encode({"": value}, codec_options=options)[4]
    place = next((i for i, name in enumerate(_TYPES) if code in _TYPES[name]), len(_TYPES))
    return list(_TYPES)[place + 1 :]


def marks(uris: Sequence[str]) -> Iterator[bytes]:
    """Yield what changes when records come, go or change size; reading all would be a download."""
    for uri in uris:
        ((name, _),) = locate([uri])
        try:
            with _connected(uri) as client:
                collection = _collection(client, uri)
                about = collection.database.command("collStats", collection.name)
                last = collection.find_one(projection=["_id"], sort=[("_id", -1)])
        except _errors() as error:
            raise _failed(name, error) from error
        mark = [name, about["count"], about["size"], str(last)]
        yield hashlib.blake2b(repr(mark).encode()).digest()


def _collection_name(path: str) -> tuple[str, str]:
    database, _, collection = unquote(path).partition(".")
    return database, collection


def _collection(client: Any, uri: str) -> Any:
    """Return the collection, bytes that are not UTF-8 as surrogates, dates beyond Python's as numbers."""
    from bson.codec_options import DatetimeConversion

    database, collection = _collection_name(_URI.fullmatch(uri)[3])  # type: ignore[index]
    options = client.codec_options.with_options(
        unicode_decode_error_handler="surrogateescape",
        datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    )
    return client[database].get_collection(collection, options)


def _connected(uri: str) -> Any:
    """Return a client, whose password is the environment's."""
    password = {"password": os.environ[PASSWORD]} if PASSWORD in os.environ and "@" in uri else {}
    pymongo = _installed()
    try:
        return pymongo.MongoClient(uri, **password)
    except (pymongo.errors.PyMongoError, ValueError) as error:
        raise ConfigError(
            f"data.path: no client for this URI ({type(error).__name__}); check its options, and the user's "
            f"password in the environment variable {PASSWORD}"
        ) from None


def _errors() -> tuple[type[Exception], ...]:
    """Return what the driver raises: of the server, and of records that it cannot decode."""
    pymongo = _installed()
    import bson.errors

    return pymongo.errors.PyMongoError, bson.errors.BSONError


def _failed(name: str, error: Exception) -> ConfigError:
    message = " ".join(str(error).partition(", full error")[0].split())[:200]
    return ConfigError(
        f"data.path: cannot read {name}: {type(error).__name__} ({message}); check that the server runs, and "
        f"the user's password in the environment variable {PASSWORD}"
    )


def _installed() -> Any:
    try:
        import pymongo
        import pymongo.errors
    except ImportError:
        raise ConfigError("data.source=mongodb needs pymongo; pip install -e '.[mongo]'") from None
    return pymongo
