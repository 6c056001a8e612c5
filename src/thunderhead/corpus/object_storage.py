"""Shards in object storage: objects fetched whole and checked.

Clients of others move the bytes. What they do not do is added here and in `chunk_cache`: an end to retrying, a
comparison with the manifest before a file appears, a bound on the disk, and processes that share what one of them
fetched (docs/decisions/0020). Credentials are the clients' business: they come from the environment alone.
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
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import requests
from botocore.config import Config
from botocore.exceptions import ParamValidationError
from litdata.streaming.downloader import GCPDownloader, S3Downloader
from litdata.utilities.hf_fs import parse_hf_url

from thunderhead import extras
from thunderhead.core.data.manifest import REMEDY, Manifest, MissingFileError, ShardError
from thunderhead.corpus.shard_files import verify_index

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, for other stores than Amazon's AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
    "http": "~/.netrc",
    "https": "~/.netrc",
}
_FIRST_PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
_LONGEST_PAUSE = 30.0
_LEAST_RATE = 10_000  # bytes a second over data.timeout; a server that sends less is as good as silent
_log = logging.getLogger(__name__)


class StorageError(ShardError):
    """An object could not be read from where the shards lie."""


@dataclass
class Remote:
    """A folder of shards in an object store; other processes make their own client. Refuses URLs that hold secrets."""

    url: str  # s3://bucket/prefix, gs://bucket/prefix, hf://datasets/owner/name/prefix, http(s)://host/prefix
    _: KW_ONLY
    attempts: int  # how often an object is asked for until it is given up
    timeout: float  # seconds without 10 kB each, after which an attempt has failed (gs and hf: their clients' own)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            there = "credentials come from the environment (AWS_ACCESS_KEY_ID …, HF_TOKEN …)"
            raise ValueError(f"data.path: no user name, password, '?' or '#' in the URL, which is recorded: {there}")
        if parts.scheme not in CREDENTIALS or not parts.netloc:
            known = ", ".join(f"{scheme}://" for scheme in CREDENTIALS)
            raise ValueError(f"data.path={self.url} is not supported: use {known} and a bucket or host, or a folder")
        self.url, self.scheme = self.url.rstrip("/"), parts.scheme

    def fetch(self, name: str, file: Path, check: Callable[[Path], object] = lambda _: None) -> None:
        """Download an object into a file, which appears whole and checked or not at all.

        Failures that may pass are tried again after a pause that doubles; an object that `check` refuses is fetched
        once more, as it may have been damaged on the way. Raises MissingFileError if there is no such object,
        StorageError if the store refuses or has failed `attempts` times, or what `check` raises; all name its URL.
        """
        url, part = f"{self.url}/{name}", file.with_name(f"{file.name}.part")
        refused = 0
        for attempt in range(1, self.attempts + 1):
            try:
                with open(part, "wb") as stream:
                    _download(self.scheme, url, stream, self.timeout)
                check(part)
                os.replace(part, file)
                return
            except ShardError as error:
                refused += 1
                said = _page(part, url) or str(error).replace(str(part), url)
                failure, is_final = type(error)(said), refused == 2
            except Exception as error:
                failure, is_final = self._failure(url, error, attempt)
            finally:
                part.unlink(missing_ok=True)
            if is_final or attempt == self.attempts:
                raise failure from None  # what the client raised may hold what must not be shown
            pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            _log.warning("%s; trying again in %.1f s (attempt %d of %d)", failure, pause, attempt + 1, self.attempts)
            time.sleep(pause)

    def _failure(self, url: str, error: Exception, attempt: int) -> tuple[ShardError, bool]:
        """Say what went wrong, and whether asking again cannot help."""
        status, said = _status(error), _say(error)
        if status == 404:
            return MissingFileError(f"{url} is missing ({said})"), True
        # NoCredentialsError and its like (botocore), DefaultCredentialsError (google)
        if status in (401, 403) or "Credentials" in type(error).__name__:
            names = CREDENTIALS[self.scheme]
            return StorageError(f"{url} may not be read ({said}): look at the credentials ({names})"), True
        if isinstance(error, ImportError):
            return StorageError(f"{url} cannot be read: {said}; needs: {extras.install(self.scheme)}"), True
        tried = f" after {attempt} attempts" if attempt > 1 else ""
        failure = StorageError(f"{url} could not be read{tried}: {said}")
        if status is not None:
            return failure, 400 <= status < 500 and status not in (408, 425, 429)
        disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
        return failure, disk or isinstance(error, (TypeError, ParamValidationError))


def fetch_record(remote: Remote, folder: Path) -> Manifest:
    """Fetch all but the chunks into a folder, compared with the manifest; raises as `Remote.fetch` does."""

    def fetch(name: str, check: Callable[[Path], object], if_missing: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            remote.fetch(name, folder / name, check)
        except MissingFileError as error:
            raise MissingFileError(f"{error}: {if_missing}") from None

    place = "data.path must be the folder that prepare.py made, with manifest.json in it"
    fetch("manifest.json", functools.partial(Manifest.load, folder), place)
    manifest, incomplete = Manifest.load(folder), f"the shards are incomplete: {REMEDY}"
    fetch("tokenizer.json", manifest.verify_tokenizer, incomplete)
    for split, source, shard in manifest.shards():
        fetch(f"{source}/{split}/index.json", functools.partial(verify_index, shard=shard), incomplete)
        if split == "val":
            fetch(f"{source}/val/documents.npy", functools.partial(manifest.load_documents, source), incomplete)
    return manifest


@functools.lru_cache(maxsize=8)
def client(scheme: str, timeout: float, process_id: int) -> Any:
    """Make the client of a store that has one; one a process, as they do not live through a fork."""
    if scheme == "gs":
        return GCPDownloader("", "", [])
    once = Config(connect_timeout=timeout, read_timeout=timeout, retries={"total_max_attempts": 1})
    return S3Downloader("", "", [], {"config": once})


def _download(scheme: str, url: str, file: IO[bytes], timeout: float) -> None:
    """Ask once for an object, and write it into a file."""
    if scheme == "s3":  # one plain GET: boto3's transfer manager would repeat a stalled one five times by itself
        place = urlsplit(url)
        s3 = client(scheme, timeout, os.getpid())._client.client
        answer = s3.get_object(Bucket=place.netloc, Key=place.path.lstrip("/"))
        with contextlib.closing(answer["Body"]) as body:
            _copy(body._raw_stream.read1, file, timeout)
        if file.tell() != answer["ContentLength"]:
            raise OSError(f"{file.tell():,} of {answer['ContentLength']:,} bytes came")
    elif scheme == "gs":
        client(scheme, timeout, os.getpid()).download_fileobj(url, file)
    elif scheme == "hf":
        from huggingface_hub import hf_hub_download

        dataset, revision, path = parse_hf_url(url)
        with tempfile.TemporaryDirectory(dir=Path(file.name).parent) as folder:
            found = hf_hub_download(dataset, path, cache_dir=folder, repo_type="dataset", revision=revision)
            with open(found, "rb") as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
    else:
        with requests.get(url, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            _copy(functools.partial(response.raw.read1, decode_content=True), file, timeout)


def _copy(read1: Callable[[int], bytes], file: IO[bytes], timeout: float) -> None:
    """Copy what a server sends, as it comes; a TimeoutError ends a trickle, of which each byte begins timeouts anew."""
    began, before, n_bytes = time.monotonic(), 0, 0
    while block := read1(1 << 20):
        n_bytes += file.write(block)
        if (seconds := time.monotonic() - began) > timeout:
            if n_bytes - before < _LEAST_RATE * seconds:
                raise TimeoutError(f"only {n_bytes - before:,} bytes came in {seconds:.1f} s")
            began, before = time.monotonic(), n_bytes


def _page(file: Path, url: str) -> str:
    """Say what is wrong where a server answered with a page for people; empty if it did not."""
    with open(file, "rb") as stream:
        beginning = stream.read(60).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if not re.match("<(!doctype html|html|head)", beginning, re.IGNORECASE):
        return ""
    found = f"{url} is a web page, it begins with {beginning.splitlines()[0]!r}"
    return f"{found}: data.path must be the address of the files themselves, not of a page about them"


def _status(error: Exception) -> int | None:
    """HTTP status of what a client raised: botocore, requests and huggingface_hub, google."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(response, "status_code", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _say(error: Exception) -> str:
    """What a client said, in one line and without secrets: signed URLs, values of the environment's secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text)
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1…@", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and re.search(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", name):
            text = text.replace(value, "…")
    return text[:300]
