"""TinyStories from Hugging Face or ModelScope: resumed where it stopped, checked, whole or not there.

What Hugging Face has, where, and with whose token it is asked for comes from `huggingface_hub`. The
bytes are received here, for both hosts alike: `hf_hub_download` of versions 1.33 and 2.4 names its
partial file so that no later call finds it, and a download that was killed begins again from nothing
(0.34 and 1.0 went on). ModelScope's package is 69 MB, too much for the one listing needed of it.
"""

import contextlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tinyllm_jax.config import DataConfig, data_dir
from tinyllm_jax.data.files import locked, sha256_of_file
from tinyllm_jax.errors import InputError

TIMEOUT_SECONDS = 30
# Failures in a row, without a byte received, after which the network counts as gone.
ATTEMPTS = 5
CHUNK_BYTES = 1 << 20
HUGGINGFACE_DATASET = "roneneldan/TinyStories"
MODELSCOPE_DATASET = "/api/v1/datasets/AI-ModelScope/TinyStories/repo"
PARQUET_NAME = re.compile(r"(train|validation)-(\d+)-of-(\d+).*\.parquet")


class NetworkError(Exception):
    """The other side cannot be reached, or has stopped sending."""


class RefusedError(NetworkError):
    """The other side has answered no, so that asking again is no use."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as its host lists it."""

    name: str
    url: str
    size: int
    sha256: str  # "" where the host gives none
    headers: dict[str, str] = field(repr=False)  # of the request; may hold a token


@dataclass(frozen=True)
class Host:
    """Where TinyStories can be had."""

    variable: str  # environment variable that names another endpoint, such as a mirror
    endpoint: str
    page: str  # address for a person

    def url(self, path: str) -> str:
        """Give the full address of a path on this host."""
        return (os.environ.get(self.variable) or self.endpoint).rstrip("/") + path


HOSTS = {
    "huggingface": Host(
        variable="HF_ENDPOINT",
        endpoint="https://huggingface.co",
        page=f"/datasets/{HUGGINGFACE_DATASET}/tree/main/data",
    ),
    "modelscope": Host(
        variable="MODELSCOPE_ENDPOINT",
        endpoint="https://www.modelscope.cn",
        page="/datasets/AI-ModelScope/TinyStories/files",
    ),
}


def download_tinystories(data: DataConfig) -> list[Path]:
    """Download the parquet files of TinyStories into `data_dir()/tinystories`, about 1 GB.

    Nothing is asked of the network when every `train-K-of-N` and `validation-K-of-N` file is
    there, downloaded or put there by hand. A file gets its name once its size and sha256 are
    right; until then it is hidden, and the next call goes on with it.

    Raises:
        InputError: the host cannot be reached or sends something else than it lists.
    """
    folder = data_dir() / "tinystories"
    ready = complete_set(folder)
    if ready:
        return ready
    with locked(folder / ".lock", on_wait=lambda: say_waiting(folder)):
        if not complete_set(folder):  # another process may have brought it while this one waited
            fetch_all(HOSTS[data.download_source], folder)
    return complete_set(folder)


def fetch_all(host: Host, folder: Path) -> None:
    """Download every file that is not there yet.

    Raises:
        InputError: the host cannot be reached or sends something else than it lists.
    """
    try:
        files = list_files(host)
        total = sum(file.size for file in files)
        # disable=None: no bar where stderr is no terminal.
        with tqdm(total=total, desc="TinyStories", unit="B", unit_scale=True, disable=None) as bar:
            for file in files:
                fetch(file, folder / file.name, bar=bar)
    except NetworkError as error:
        other = next(name for name in HOSTS if HOSTS[name] != host)
        raise InputError(
            f"TinyStories cannot be downloaded ({error}). Try again to go on where it stopped, use "
            f"--data.download_source {other}, put the files train-*.parquet and "
            f"validation-*.parquet of {host.url(host.page)} into {folder} by hand, or use "
            "--data toy, which needs no files."
        ) from None


def complete_set(folder: Path) -> list[Path]:
    """List the parquet files of a folder when none of the set is missing, else nothing.

    Raises:
        InputError: there are two sets.
    """
    files: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        match = PARQUET_NAME.fullmatch(path.name)
        if match and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            files.setdefault((match[1], int(match[3])), {}).setdefault(int(match[2]), path)
    complete = sorted(key for key in files if set(files[key]) == {*range(key[1])})
    if len(complete) > len({split for split, _ in complete}):
        raise InputError(
            f"{folder}: holds parquet files of two sets ({complete}). Delete the one that you do "
            "not want."
        )
    if [split for split, _ in complete] != ["train", "validation"]:
        return []
    return sorted(path for key in complete for path in files[key].values())


def list_files(host: Host) -> list[RemoteFile]:
    """Ask a host which parquet files TinyStories has.

    Raises:
        InputError: its answer is no such list.
        NetworkError: it cannot be reached.
    """
    list_all = huggingface_files if host == HOSTS["huggingface"] else modelscope_files
    try:
        files = list_all(host)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{host.url('')}: what it sends is not the list of files that was expected. Check "
            f"{host.variable}, or put the parquet files of {host.url(host.page)} into the folder "
            "by hand."
        ) from None
    files = [file for file in files if PARQUET_NAME.fullmatch(file.name)]
    if not is_complete([file.name for file in files]):
        raise InputError(
            f"{host.url('')}: lists no whole set of train-K-of-N.parquet and "
            f"validation-K-of-N.parquet. Check {host.variable}, or use the other "
            "--data.download_source."
        )
    return sorted(files, key=lambda file: file.name)


def is_complete(names: list[str]) -> bool:
    """Tell names among which are every `train-K-of-N` and every `validation-K-of-N`."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(PARQUET_NAME.fullmatch, names)):
        numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    whole = {split for (split, count), found in numbers.items() if found == {*range(count)}}
    return whole == {"train", "validation"}


def huggingface_files(host: Host) -> list[RemoteFile]:
    """Let `huggingface_hub` list the dataset, with the person's token and settings.

    Raises:
        NetworkError: the host cannot be reached or refuses, or HF_HUB_OFFLINE is set.
    """
    # Imported here because most runs download nothing.
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers

    endpoint = host.url("")
    api = HfApi(endpoint=endpoint, library_name="tinyllm")
    try:
        tree = list(api.list_repo_tree(HUGGINGFACE_DATASET, recursive=True, repo_type="dataset"))
    # The library lets through what requests, httpx or httpx2 raises, whichever this version stands
    # on, and derives its own error from theirs.
    except (OSError, *HfHubHTTPError.__bases__) as error:  # pyright: ignore[reportGeneralTypeIssues]
        reason = " ".join(str(error).split())  # the library explains in several lines
        raise NetworkError(f"{endpoint}: {reason}") from None
    headers = build_hf_headers(library_name="tinyllm")
    files = []
    for entry in tree:
        if isinstance(entry, RepoFile):
            url = hf_hub_url(
                HUGGINGFACE_DATASET, entry.path, repo_type="dataset", endpoint=endpoint
            )
            sha256 = entry.lfs.sha256 if entry.lfs else ""
            files.append(RemoteFile(Path(entry.path).name, url, entry.size, sha256, headers))
    return files


def modelscope_files(host: Host) -> list[RemoteFile]:
    """Ask ModelScope's own interface.

    Raises:
        NetworkError: it cannot be reached.
    """
    headers = {"User-Agent": "tinyllm"}
    query = "Revision=master&Recursive=True&PageNumber=1&PageSize=200"
    url = host.url(f"{MODELSCOPE_DATASET}/tree?{query}")
    entries = json.loads(b"".join(receive(url, start=0, headers=headers)[1]))["Data"]
    files = []
    for entry in entries["Files"] if isinstance(entries, dict) else entries:
        query = urllib.parse.urlencode({"Revision": "master", "FilePath": entry["Path"]})
        url = host.url(f"{MODELSCOPE_DATASET}?{query}")
        size, sha256 = int(entry.get("Size") or 0), entry.get("Sha256") or ""
        files.append(RemoteFile(Path(entry["Path"]).name, url, size, sha256, headers))
    return files


def fetch(file: RemoteFile, path: Path, *, bar: tqdm) -> None:
    """Download one file to `path`, going on with what an earlier call received.

    Raises:
        InputError: what came is not what the host lists.
        NetworkError: the host cannot be reached, or stopped sending again and again.
    """
    if path.is_file() and mismatch(file, path) is None:
        bar.update(file.size)
        return
    partial = path.with_name(f".{path.name}.partial")
    resumed = partial.is_file() and partial.stat().st_size > 0
    before = bar.n
    receive_file(file, partial, bar=bar)
    problem = mismatch(file, partial)
    if problem and resumed:  # what the earlier call left may be of an older version of the file
        partial.unlink()
        bar.update(before - bar.n)
        receive_file(file, partial, bar=bar)
        problem = mismatch(file, partial)
    if problem:
        partial.unlink()
        raise InputError(
            f"{file.url}: {problem}. The download was thrown away; try again, or use the other "
            "--data.download_source."
        )
    os.replace(partial, path)


def mismatch(file: RemoteFile, path: Path) -> str | None:
    """Say how a file differs from what its host lists, or None."""
    size = path.stat().st_size
    if size != file.size:
        return f"has {size} bytes, and its host lists {file.size}"
    if file.sha256 and (found := sha256_of_file(path)) != file.sha256:
        return f"has sha256 {found}, and its host lists {file.sha256}"
    return None


def receive_file(file: RemoteFile, partial: Path, *, bar: tqdm) -> None:
    """Append to `partial` until it is as long as the file, trying again when the network fails.

    Raises:
        NetworkError: several tries in a row brought nothing.
    """
    failures = 0
    with open(partial, "ab") as output:
        if output.tell() > file.size:
            output.seek(output.truncate(0))
        bar.update(output.tell())
        furthest = output.tell()
        while (have := output.tell()) < file.size:
            reason = "the connection was closed too early"
            try:
                start, chunks = receive(file.url, start=have, headers=file.headers)
                if start != have:  # the host sends the whole file again
                    output.seek(output.truncate(start))
                    bar.update(start - have)
                for chunk in chunks:
                    output.write(chunk)
                    output.flush()  # so that a killed process loses nothing
                    bar.update(len(chunk))
            except RefusedError:
                raise
            except NetworkError as error:
                reason = str(error)
            if output.tell() > furthest:
                failures, furthest = 0, output.tell()
            elif (failures := failures + 1) >= ATTEMPTS:
                raise NetworkError(reason)
            if output.tell() < file.size:
                time.sleep(min(10, 2**failures))
        output.flush()
        os.fsync(output.fileno())


def receive(url: str, *, start: int, headers: dict[str, str]) -> tuple[int, Iterator[bytes]]:
    """Ask for the bytes of `url` from `start` on.

    Hosts send on to a store with a signed address; the token in `headers` stays with the host.

    Returns:
        Where the answer begins (0 when the host sends everything), and its bytes.

    Raises:
        NetworkError: the host cannot be reached, refuses, or stops sending.
    """
    request = urllib.request.Request(url)
    for name, value in headers.items():
        secret = name.lower() == "authorization"
        (request.add_unredirected_header if secret else request.add_header)(name, value)
    if start:
        request.add_header("Range", f"bytes={start}-")
    with network_errors(url):
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    begins = start if response.status == 206 else 0

    def chunks() -> Iterator[bytes]:
        with response:
            while True:
                with network_errors(url):
                    chunk = response.read1(CHUNK_BYTES)  # what has come, without waiting for more
                if not chunk:
                    return
                yield chunk

    return begins, chunks()


@contextlib.contextmanager
def network_errors(url: str) -> Iterator[None]:
    """Turn what can go wrong between here and a host into `NetworkError`."""
    host = urllib.parse.urlsplit(url).netloc
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        busy = error.code in (408, 429) or error.code >= 500
        kind = NetworkError if busy else RefusedError
        raise kind(f"{url} answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise NetworkError(f"{host}: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise NetworkError(f"{host}: {str(error) or type(error).__name__}") from None


def say_waiting(folder: Path) -> None:
    """Tell the person why nothing happens."""
    print(f"Another process is downloading into {folder}; waiting for it.", file=sys.stderr)
