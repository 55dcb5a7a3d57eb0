"""TinyStories comes down whole and checked, goes on where it stopped, and needs no network twice."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_python
from huggingface_hub import constants, hf_hub_download

from tinyllm_jax.config import DataConfig
from tinyllm_jax.data.corpus import Counts, find_parts, read_documents
from tinyllm_jax.data.download import download_tinystories
from tinyllm_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["huggingface", "modelscope"]
NAMES = [
    "data/train-00000-of-00002-2d5a1467fff1081b.parquet",
    "data/train-00001-of-00002-5852b56a2bd28fd9.parquet",
    "data/validation-00000-of-00001-869c898b519ad725.parquet",
]


def make_parquet(seed: str) -> bytes:
    """Make a file that compression does not shrink, so that it arrives in many pieces."""
    texts = [hashlib.sha512(f"{seed}{number}".encode()).hexdigest() for number in range(4000)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


class Hub(http.server.ThreadingHTTPServer):
    """Both hosts in one, as far as a download sees them.

    What `huggingface_hub` asks for it asks itself, and one test downloads with the library alone,
    so that this cannot be another Hugging Face than the library's.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files = {name: make_parquet(name) for name in NAMES}
        self.files |= {"README.md": b"about", "TinyStories-train.txt": b"another form of it"}
        self.listed = dict(self.files)  # what the list of files is made from
        self.sent = dict.fromkeys(self.files, 0)
        self.requests = 0
        self.tokens: list[tuple[str, str | None]] = []  # of each request: its path, who asks
        self.patience = -1  # bytes of each file after which connections break; -1 is never
        self.hangs = False  # connections stay open, silent, when patience ends
        self.closing = threading.Event()
        self.ignores_range = False
        self.refuses = 0  # a status that every download gets

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """Keep quiet about connections that this test breaks itself."""


class HubRequest(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests += 1
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.server.tokens.append((url.path, self.headers["Authorization"]))
        if url.path == "/api/datasets/roneneldan/TinyStories/tree/main":
            self.answer_hf_page(query)
        elif url.path == "/api/v1/datasets/AI-ModelScope/TinyStories/repo/tree":
            assert (query["Revision"], query["Recursive"]) == ("master", "True")
            entries = [{"Path": "data", "Type": "tree"}, *self.modelscope_entries()]
            self.answer(json.dumps({"Code": 200, "Data": {"Files": entries}, "Success": True}))
        elif url.path.startswith("/datasets/roneneldan/TinyStories/resolve/main/"):
            self.send_on(url.path.split("/main/")[1])
        elif url.path in ("/cdn", "/api/v1/datasets/AI-ModelScope/TinyStories/repo"):
            self.send_file(query["FilePath"])
        else:
            self.send_error(404)

    def answer_hf_page(self, query: dict[str, str]) -> None:
        """Send a list of two pages, the first of which says where the second is."""
        assert query.pop("recursive").lower() == "true"
        folder = {"type": "directory", "oid": "f" * 40, "size": 0, "path": "data"}
        entries = [folder, *self.hf_entries()]
        if "cursor" in query:
            self.answer(json.dumps(entries[2:]))
        else:
            following = f"{self.server.endpoint}{self.path}&cursor=2"
            self.answer(json.dumps(entries[:2]), link=f'<{following}>; rel="next"')

    def hf_entries(self) -> Iterator[dict]:
        for path, content in self.server.listed.items():
            size = len(content)
            entry = {"type": "file", "oid": "e" * 40, "size": size, "path": path}
            if path.endswith(".parquet"):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
            yield entry

    def send_on(self, name: str) -> None:
        """Answer as Hugging Face does, which leaves the bytes to another host."""
        content = self.server.listed[name]
        self.send_response(302)
        other_host = self.server.endpoint.replace("127.0.0.1", "localhost")
        self.send_header("Location", f"{other_host}/cdn?FilePath={name}")
        self.send_header("ETag", f'"{"e" * 40}"')
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def modelscope_entries(self) -> Iterator[dict]:
        for path, content in self.server.listed.items():
            sha256 = hashlib.sha256(content).hexdigest()
            yield {"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256}

    def answer(self, text: str, *, link: str = "") -> None:
        self.send_response(200)
        if link:
            self.send_header("Link", link)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def send_file(self, name: str) -> None:
        hub = self.server
        if hub.refuses:
            self.send_error(hub.refuses)
            return
        content, start = hub.files[name], 0
        asked = self.headers["Range"]
        if asked and not hub.ignores_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) if hub.patience < 0 else max(start, hub.patience)
        self.wfile.write(content[start:end])
        hub.sent[name] += len(content[start:end])
        if hub.hangs:
            hub.closing.wait()
        self.close_connection = True

    def log_message(self, format, *args) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    # The library reads its settings when it is imported, which may have happened long ago.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{hub.endpoint}/")
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.closing.set()
        hub.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Let the time between two tries pass at once."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "data" / "tinystories"


def config(source: str) -> DataConfig:
    return DataConfig(paths=("tinystories",), download_source=source)


def another_process(source: str, home: Path, *, offline: bool) -> subprocess.Popen:
    """Start a download in a process of its own, where the library reads its settings anew."""
    command = (
        "from tinyllm_jax.config import DataConfig\n"
        "from tinyllm_jax.data.download import download_tinystories\n"
        f"download_tinystories(DataConfig(paths=('tinystories',), download_source={source!r}))\n"
    )
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    return subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(paths: list[Path]) -> dict[str, bytes]:
    return {f"data/{path.name}": path.read_bytes() for path in paths}


@pytest.mark.parametrize("source", SOURCES)
def test_a_download_is_whole_and_the_next_call_needs_no_network(hub, folder, source):
    paths = download_tinystories(config(source))
    assert [path.parent for path in paths] == [folder] * 3
    assert contents(paths) == {name: hub.files[name] for name in NAMES}
    assert hub.sent["TinyStories-train.txt"] == hub.sent["README.md"] == 0
    assert not list(folder.glob("*.partial"))
    asked = hub.requests
    assert download_tinystories(config(source)) == paths
    assert hub.requests == asked


def test_the_corpus_called_tinystories_is_split_by_its_files(hub):
    data = config("huggingface")
    documents: dict[str, int] = {}
    for part in find_parts(data, part_bytes=1 << 20):
        count = sum(1 for _ in read_documents(part, data, Counts()))
        documents[part.split] = documents.get(part.split, 0) + count
    assert documents == {"train": 8000, "validation": 4000}


@pytest.mark.parametrize("source", SOURCES)
def test_an_interrupted_download_goes_on_where_it_stopped(hub, folder, waits, source):
    hub.patience = 100_000
    with pytest.raises(InputError, match=r"cannot be downloaded.*connection was closed too early"):
        download_tinystories(config(source))
    assert not list(folder.glob("*.parquet"))
    (partial,) = folder.glob(".*.partial")
    assert partial.stat().st_size == hub.sent[NAMES[0]] == 100_000
    assert len(waits) >= 4
    hub.patience = -1
    paths = download_tinystories(config(source))
    assert contents(paths) == {name: hub.files[name] for name in NAMES}
    # Every byte was sent once, whatever happened on the way.
    assert {name: hub.sent[name] for name in NAMES} == {n: len(hub.files[n]) for n in NAMES}


@pytest.mark.parametrize("source", SOURCES)
def test_a_killed_download_goes_on_where_it_stopped(hub, folder, tmp_path, source):
    hub.patience, hub.hangs = 3000, True  # so few bytes that a buffer would hold them back
    with another_process(source, tmp_path, offline=False) as process:
        try:
            partial = folder / f".{NAMES[0].split('/')[1]}.partial"
            deadline = time.monotonic() + 30
            while not (partial.exists() and partial.stat().st_size == hub.patience):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    hub.patience, hub.hangs = -1, False
    paths = download_tinystories(config(source))
    assert contents(paths) == {name: hub.files[name] for name in NAMES}
    assert {name: hub.sent[name] for name in NAMES} == {n: len(hub.files[n]) for n in NAMES}


def test_the_library_alone_gets_the_same_file_from_this_server(hub, tmp_path):
    path = hf_hub_download(
        "roneneldan/TinyStories",
        NAMES[0],
        repo_type="dataset",
        endpoint=hub.endpoint,
        cache_dir=tmp_path / "cache",
        local_dir=tmp_path / "local",
    )
    assert Path(path).read_bytes() == hub.files[NAMES[0]]


@pytest.mark.parametrize("token", ["hf_of_a_person", None])
def test_the_token_goes_to_hugging_face_and_to_no_other_host(hub, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    download_tinystories(config("huggingface"))
    expected = f"Bearer {token}" if token else None
    assert len(hub.tokens) == 2 + 2 * len(NAMES)
    for path, received in hub.tokens:
        assert received == (None if path == "/cdn" else expected), path


def test_a_short_break_of_the_network_is_waited_out(hub, monkeypatch):
    hub.patience = 50_000

    def recover(_: float) -> None:
        hub.patience += 100_000

    monkeypatch.setattr(time, "sleep", recover)
    paths = download_tinystories(config("huggingface"))
    assert contents(paths) == {name: hub.files[name] for name in NAMES}
    assert sum(hub.sent.values()) == sum(len(hub.files[name]) for name in NAMES)


def test_a_host_that_sends_from_the_start_again_is_understood(hub, folder, waits):
    hub.patience = 100_000
    with pytest.raises(InputError):
        download_tinystories(config("huggingface"))
    hub.ignores_range = True
    with pytest.raises(InputError):  # rather than to begin for ever
        download_tinystories(config("huggingface"))
    hub.patience, hub.sent = -1, dict.fromkeys(hub.files, 0)
    paths = download_tinystories(config("huggingface"))
    assert contents(paths) == {name: hub.files[name] for name in NAMES}
    assert hub.sent[NAMES[0]] == len(hub.files[NAMES[0]])


@pytest.mark.parametrize("source", SOURCES)
def test_damaged_bytes_are_noticed_and_thrown_away(hub, folder, source):
    whole = hub.files[NAMES[1]]
    hub.files[NAMES[1]] = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    with pytest.raises(InputError, match=r"has sha256 .*, and its host lists") as caught:
        download_tinystories(config(source))
    assert "train-00001-of-00002" in str(caught.value)
    assert [path.name for path in folder.glob("*.parquet")] == [NAMES[0].split("/")[1]]
    assert not list(folder.glob(".*.partial"))
    hub.files[NAMES[1]] = whole
    assert len(download_tinystories(config(source))) == 3
    assert hub.sent[NAMES[0]] == len(hub.files[NAMES[0]])


def test_a_partial_file_of_something_else_is_replaced(hub, folder):
    folder.mkdir(parents=True)
    name = NAMES[0].split("/")[1]
    (folder / f".{name}.partial").write_bytes(b"an older version" * 1000)
    paths = download_tinystories(config("huggingface"))
    assert contents(paths) == {name: hub.files[name] for name in NAMES}


@pytest.mark.parametrize("source", SOURCES)
def test_no_network_says_in_one_line_what_to_do(hub, folder, monkeypatch, waits, source):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot be downloaded.*Connection refused") as caught:
        download_tinystories(config(source))
    message = str(caught.value)
    assert "\n" not in message
    for hint in ("http://127.0.0.1:9/datasets/", "validation-*.parquet", str(folder), "--data toy"):
        assert hint in message


def test_offline_mode_of_the_library_is_honoured(hub, tmp_path):
    with another_process("huggingface", tmp_path, offline=True) as process:
        message = process.communicate(timeout=60)[1].splitlines()[-1]
    assert "InputError: TinyStories cannot be downloaded" in message
    assert "offline mode is enabled" in message
    assert hub.requests == 0


def test_a_dataset_that_the_host_does_not_have_is_said_in_one_line(hub, monkeypatch):
    monkeypatch.setattr(HubRequest, "answer_hf_page", lambda self, _: self.send_error(404))
    with pytest.raises(
        InputError, match=r"cannot be downloaded \(http://127.*404.*Not Found"
    ) as caught:
        download_tinystories(config("huggingface"))
    assert "\n" not in str(caught.value)


def test_preparing_data_does_not_import_the_library():
    command = "import sys, tinyllm_jax.data.prepare; sys.exit('huggingface_hub' in sys.modules)"
    run_python("-c", command, check=True)


def test_files_put_there_by_hand_are_taken_as_they_are(hub, folder):
    (folder / "data").mkdir(parents=True)
    for name in NAMES[:2]:
        (folder / name).write_bytes(hub.files[name])
    (folder / ".cache").mkdir()
    (folder / ".cache" / NAMES[2].split("/")[1]).write_bytes(b"half of it")
    assert len(download_tinystories(config("huggingface"))) == 3
    asked = hub.requests
    assert asked > 0
    (folder / NAMES[2]).write_bytes(hub.files[NAMES[2]])
    paths = download_tinystories(config("huggingface"))
    assert hub.requests == asked
    assert sorted(path.name for path in paths) == [name.split("/")[1] for name in NAMES]


def test_files_of_another_set_are_left_out_or_refused(hub, folder):
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00009.parquet").write_bytes(b"alone of its set")
    assert len(download_tinystories(config("huggingface"))) == 3
    (folder / "train-00000-of-00001.parquet").write_bytes(b"a whole other set")
    with pytest.raises(InputError, match="holds parquet files of two sets"):
        download_tinystories(config("huggingface"))


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (503, 5)])
def test_a_refusal_is_final_and_a_busy_host_is_asked_again(hub, waits, status, tries):
    hub.refuses = status
    with pytest.raises(InputError, match=f"answers {status}"):
        download_tinystories(config("modelscope"))
    assert hub.requests == 1 + tries


def test_a_host_without_the_files_is_named(hub):
    hub.listed = {"README.md": b"about"}
    with pytest.raises(InputError, match=r"lists no whole set.*Check HF_ENDPOINT"):
        download_tinystories(config("huggingface"))
    hub.listed = {}
    with pytest.raises(InputError, match="Check MODELSCOPE_ENDPOINT"):
        download_tinystories(config("modelscope"))


def test_a_host_with_half_a_set_is_named_before_anything_is_downloaded(hub, folder):
    del hub.listed[NAMES[1]]
    with pytest.raises(InputError, match=r"lists no whole set.*Check HF_ENDPOINT"):
        download_tinystories(config("huggingface"))
    assert not list(folder.glob("*.parquet"))


def test_two_processes_download_once(hub, folder, tmp_path):
    hub.patience, hub.hangs = 3000, True
    with another_process("modelscope", tmp_path, offline=False) as first:
        partial = folder / f".{NAMES[0].split('/')[1]}.partial"
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size == hub.patience):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with another_process("modelscope", tmp_path, offline=False) as second:
            assert second.stderr is not None
            assert "waiting for it" in second.stderr.readline()
            asked = hub.requests
            first.kill()
            hub.patience, hub.hangs = -1, False
            second.communicate(timeout=30)
            assert second.returncode == 0
            assert hub.requests > asked
    assert {name: hub.sent[name] for name in NAMES} == {n: len(hub.files[n]) for n in NAMES}


def test_an_answer_that_is_no_list_is_refused(hub, monkeypatch):
    monkeypatch.setattr(HubRequest, "hf_entries", lambda _: [{"no": "path"}])
    with pytest.raises(InputError, match="not the list of files that was expected"):
        download_tinystories(config("huggingface"))
