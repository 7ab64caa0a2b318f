"""An object store on loopback that speaks the JSON API of Cloud Storage: the package gcp-storage-emulator, and of
that API what the package leaves out, preconditions, moves and contents that end in a carriage return."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

import gcsfs
import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"
_CONDITIONS = {"ifGenerationMatch": "generation", "ifMetagenerationMatch": "metageneration"}
_lock = threading.Lock()
# It calls an object that is not there an error.
logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Serve one empty bucket from memory; yields the environment by which gcsfs and TensorStore find it."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    with _Server(("127.0.0.1", 0), partial(server.RequestHandler, storage)) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{http.server_port}"
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCE_METADATA_ROOT": "127.0.0.1:9",  # nobody to ask for credentials
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind of bucket it is
        }
        http.shutdown()
        thread.join()
    gcsfs.GCSFileSystem.clear_instance_cache()  # they know the address of this server


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # as many readers at one time as TensorStore has threads

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has seen enough, or was killed, closes the connection: no error here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _conditional(handler: Callable[..., None]) -> Callable[..., None]:
    """The handler, behind the conditions of the request on the object that it names; one request at a time."""

    def handle(request: Any, response: Any, storage: Storage) -> None:
        with _lock:
            name = request.params.get("object_id") or request.query.get("name", [None])[0]
            if name is None and request.query.keys() & _CONDITIONS.keys():
                name = request.data.get("meta", request.data)["name"]
            stored = storage.objects.get(request.params.get("bucket_name"), {}).get(name, {})
            for condition, field in _CONDITIONS.items():
                if condition in request.query and request.query[condition][0] != stored.get(field, "0"):
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return
            if stored:  # by which TensorStore knows what it read before
                response["x-goog-generation"] = stored["generation"]
            handler(request, response, storage)

    return handle


def _move(request: Any, response: Any, storage: Storage) -> None:
    bucket, source, target = (request.params[key] for key in ("bucket_name", "object_id", "target"))
    try:
        response.json(objects._copy(request.base_url, storage, bucket, source, bucket, target))
        storage.delete_file(bucket, source)
    except NotFound:
        response.status = HTTPStatus.NOT_FOUND


def _parts_end_by_crlf(data: bytes | None, request: Any) -> bytes | None:
    """The body with the line ends of RFC 2046: gcsfs ends its parts by a line feed alone, and the package's parser
    takes a carriage return that is the last byte of a content for the other half."""
    data, boundary = _decoded(data, request), f"--{request.headers.get_boundary()}".encode()
    if data and data.startswith(boundary + b"\n"):
        return data.replace(b"\n" + boundary, b"\r\n" + boundary)
    return data


_MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<target>.+)$"
_served: Any = server
_decoded, _served._decode_raw_data = server._decode_raw_data, _parts_end_by_crlf
_served.HANDLERS = tuple(
    (pattern, {method: _conditional(handler) for method, handler in handlers.items()})
    for pattern, handlers in ((_MOVE, {"POST": _move}), *server.HANDLERS)
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, gs://..., served on loopback."""
    gcsfs.GCSFileSystem.clear_instance_cache()  # each remembers where its own was served
    with object_store() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield f"gs://{BUCKET}"
    gcsfs.GCSFileSystem.clear_instance_cache()
