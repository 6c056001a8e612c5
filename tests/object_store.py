"""An object store for tests: moto's S3 on loopback, behind a proxy that fails, stalls and damages on demand."""

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

Fault = Callable[[str, int], str | None]
"""What happens to the k-th request (from 1) of an object: None, or
"503", "404", "403", "stall", "trickle", "cut", "flip"."""
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIATHUNDERHEAD00001",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t/of+thunderhead/0123456789abcdef",
}


class Store:
    """Objects behind http://127.0.0.1:<port>/<bucket>/<key>."""

    def __init__(self, backend: str):
        self.backend = urlsplit(backend).netloc
        self.requests: Counter[str] = Counter()
        self.fault: Fault = lambda key, count: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def client(self) -> Any:
        """A client of the store itself, without its faults."""
        keys = {"aws_access_key_id": "direct", "aws_secret_access_key": "direct", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://{self.backend}", **keys)

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """What `aws s3 sync` does."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                name = f"{prefix}/{file.relative_to(folder).as_posix()}"
                client.upload_file(str(file), bucket, name, {"ACL": "public-read"})

    def _handler(store) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                key = path.split("/", 2)[2]  # without the bucket
                with store._lock:
                    store.requests[key] += 1
                    fault = store.fault(key, store.requests[key])
                if fault == "stall":
                    time.sleep(3)
                    self.close_connection = True
                    return
                if fault is not None and fault.isdigit():
                    self._answer(int(fault), b"<Error><Code>Fault</Code><Message>as asked</Message></Error>")
                    return
                connection = http.client.HTTPConnection(store.backend)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                connection.request("GET", self.path, headers=headers)
                response = connection.getresponse()
                body = bytearray(response.read())
                connection.close()
                if fault == "flip":
                    body[len(body) // 2] ^= 1
                self._answer(response.status, bytes(body), fault)

            def _answer(self, status: int, body: bytes, fault: str | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if fault == "trickle":
                    with contextlib.suppress(OSError):  # until the client has had enough
                        for byte in body:
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.05)
                    self.close_connection = True
                    return
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
                if fault == "cut":
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
