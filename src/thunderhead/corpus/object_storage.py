"""Shards in object storage: objects fetched whole and checked.

litdata's downloaders move the bytes, each with its store's own client. What they do not do is added here and in
`chunk_cache`: an end to retrying, a comparison with the manifest before a file appears, a bound on the disk, and
processes that share what one of them fetched (docs/decisions/0020). Credentials are the clients' business: they come
from the environment alone.
"""

import contextlib
import errno
import functools
import logging
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import botocore.config
import botocore.exceptions
import requests
from litdata.streaming.downloader import Downloader, GCPDownloader, HFDownloader, S3Downloader

from thunderhead.core.data.manifest import MissingFileError, ShardError

SCHEMES = ("s3", "gs", "hf", "http", "https")
_FIRST_PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
_LONGEST_PAUSE = 30.0
_LEAST_RATE = 10_000  # bytes a second over data.timeout; a server that sends less is as good as silent
_log = logging.getLogger(__name__)


class StorageError(ShardError):
    """An object could not be read from where the shards lie."""


class S3(S3Downloader):  # type: ignore[misc]  # litdata has no types
    """litdata's, with one plain GET: boto3's transfer manager would repeat a stalled one five times by itself."""

    timeout: float

    def download_fileobj(self, remote_filepath: str, fileobj: IO[bytes]) -> None:
        """Write s3://bucket/key into a file."""
        url = urlsplit(remote_filepath)
        answer = self._client.client.get_object(Bucket=url.netloc, Key=url.path.lstrip("/"))
        with contextlib.closing(answer["Body"]) as body:
            n_bytes = _copy(body._raw_stream.read1, fileobj, self.timeout)
        if n_bytes != answer["ContentLength"]:
            raise OSError(f"{n_bytes:,} of {answer['ContentLength']:,} bytes came")


class HuggingFace(HFDownloader):  # type: ignore[misc]
    """litdata's, which can only make files, and makes none without a word where the hub is offline."""

    def download_fileobj(self, remote_filepath: str, fileobj: IO[bytes]) -> None:
        """Write hf://datasets/<owner>/<name>/<path> into a file."""
        with tempfile.TemporaryDirectory(dir=Path(fileobj.name).parent) as folder:
            file = Path(folder, "object")
            self.download_file(remote_filepath, str(file))
            if not file.exists():
                raise OSError("the Hugging Face Hub cannot be reached, or HF_HUB_OFFLINE is set")
            with open(file, "rb") as stream:
                shutil.copyfileobj(stream, fileobj, 1 << 20)


class Http(Downloader):  # type: ignore[misc]
    """Any web server; litdata has none for them."""

    def download_fileobj(self, remote_filepath: str, fileobj: IO[bytes]) -> None:
        """Write the answer to a GET into a file."""
        timeout = self._storage_options["timeout"]
        with requests.get(remote_filepath, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            _copy(functools.partial(response.raw.read1, decode_content=True), fileobj, timeout)


def _copy(read1: Callable[[int], bytes], file: IO[bytes], timeout: float) -> int:
    """Copy what a server sends, block by block as it comes; return how many bytes these were.

    The clients' timeouts end a silence, not a trickle: every byte begins them anew.

    Raises:
        TimeoutError: less than _LEAST_RATE came over `timeout` seconds.
    """
    began, before, n_bytes = time.monotonic(), 0, 0
    while block := read1(1 << 20):
        n_bytes += file.write(block)
        if (seconds := time.monotonic() - began) > timeout:
            if n_bytes - before < _LEAST_RATE * seconds:
                raise TimeoutError(f"only {n_bytes - before:,} bytes came in {seconds:.1f} s")
            began, before = time.monotonic(), n_bytes
    return n_bytes


def is_remote(path: str) -> bool:
    """Whether a path names an object store rather than a folder."""
    return "://" in path


class Remote:
    """A folder of prepared shards in an object store. Can be sent to other processes; each has its own client.

    Args:
        url: s3://bucket/prefix, gs://bucket/prefix, hf://datasets/owner/name/prefix, http(s)://host/prefix.
        attempts: how often an object is asked for until it is given up.
        timeout: seconds without an answer, or without more of it (10 kB a second), after which an attempt has failed
            (for gs and hf their clients' own).

    Raises:
        ValueError: the URL is of another kind, or holds a password or a query, which would end up in records.
    """

    def __init__(self, url: str, *, attempts: int, timeout: float):
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(
                f"data.path: {parts.scheme}:// is not supported; known are {', '.join(SCHEMES)}, or a folder"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "data.path: leave user names, passwords and everything from '?' or '#' out of the URL: it is recorded;"
                " credentials come from the environment (AWS_ACCESS_KEY_ID …, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
            )
        if not parts.netloc:
            raise ValueError(f"data.path={url} names no bucket or host")
        self.url, self.scheme = url.rstrip("/"), parts.scheme
        self._attempts, self._timeout = attempts, timeout

    def fetch(self, name: str, file: Path, check: Callable[[Path], None] = lambda _: None) -> None:
        """Download an object into a file, which appears whole and checked or not at all.

        Failures that may pass are tried again after a pause that doubles; an object that `check` refuses is fetched
        once more, as it may have been damaged on the way.

        Raises:
            StorageError: the store refuses, or has failed `attempts` times; names the object.
            MissingFileError: it has no such object.
            ShardError: what `check` raises, with the object's URL.
        """
        url, part = f"{self.url}/{name}", file.with_name(f"{file.name}.part")
        refused = 0
        for attempt in range(1, self._attempts + 1):
            try:
                with open(part, "wb") as stream:
                    downloader(self.scheme, self._timeout, os.getpid()).download_fileobj(url, stream)
                check(part)
                os.replace(part, file)
                return
            except ShardError as error:
                refused += 1
                reason, give_up = str(error), refused == 2
                raised: ShardError = type(error)(str(error).replace(str(part), url))
            except Exception as error:
                reason, give_up = _say(error), _is_final(error)
                raised = self._failure(url, error, attempt)
            finally:
                part.unlink(missing_ok=True)
            if give_up or attempt == self._attempts:
                raise raised from None  # what the client raised may hold what must not be shown
            pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            _log.warning(
                "%s: %s; trying again in %.1f s (attempt %d of %d)", url, reason, pause, attempt + 1, self._attempts
            )
            time.sleep(pause)

    def _failure(self, url: str, error: Exception, attempt: int) -> ShardError:
        status = _status(error)
        if status == 404:
            return MissingFileError(f"{url} is missing ({_say(error)})")
        if status in (401, 403) or _of_credentials(error):
            names = {
                "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, for other stores than Amazon's AWS_ENDPOINT_URL",
                "gs": "GOOGLE_APPLICATION_CREDENTIALS",
                "hf": "HF_TOKEN",
            }.get(self.scheme, "~/.netrc")
            return StorageError(f"{url} may not be read ({_say(error)}): look at the credentials ({names})")
        if isinstance(error, ImportError):
            return StorageError(f"{url} cannot be read: {_say(error)}; needs: uv pip install -e '.[{self.scheme}]'")
        tried = f" after {attempt} attempts" if attempt > 1 else ""
        return StorageError(f"{url} could not be read{tried}: {_say(error)}")


@functools.lru_cache(maxsize=8)
def downloader(scheme: str, timeout: float, process_id: int) -> Downloader:
    """Make the client of a kind of store; one a process, as they do not live through a fork."""
    if scheme == "s3":
        once = botocore.config.Config(connect_timeout=timeout, read_timeout=timeout, retries={"total_max_attempts": 1})
        client = S3("", "", [], {"config": once})
        client.timeout = timeout
        return client
    if scheme == "gs":
        return GCPDownloader("", "", [])
    if scheme == "hf":
        return HuggingFace("", "", [])
    return Http("", "", [], {"timeout": timeout})


def fetch_record(remote: Remote, folder: Path) -> None:
    """Fetch manifest.json and tokenizer.json into a folder.

    Raises:
        MissingFileError: there is no manifest.
        StorageError: the store refuses or fails.
    """
    try:
        remote.fetch("manifest.json", folder / "manifest.json")
    except MissingFileError as error:
        raise MissingFileError(
            f"{error}: data.path must be the folder that prepare.py made, with manifest.json in it"
        ) from None
    with contextlib.suppress(MissingFileError):  # loading the tokenizer says what its absence means
        remote.fetch("tokenizer.json", folder / "tokenizer.json")


def _status(error: Exception) -> int | None:
    """HTTP status of what a client raised: botocore, requests and huggingface_hub, google."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _is_final(error: Exception) -> bool:
    """Whether asking again cannot help."""
    if (status := _status(error)) is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    if isinstance(error, (ImportError, TypeError, botocore.exceptions.ParamValidationError)) or _of_credentials(error):
        return True
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def _of_credentials(error: Exception) -> bool:
    """Whether a client found none, or half of them: NoCredentialsError (botocore), DefaultCredentialsError (google)."""
    return "Credentials" in type(error).__name__


def _say(error: Exception) -> str:
    """What a client said, in one line and without secrets: signed URLs, values of the environment's secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text)
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1…@", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and re.search(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", name):
            text = text.replace(value, "…")
    return text[:300]
