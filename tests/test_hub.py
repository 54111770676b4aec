"""Loading by name, from a server on this machine that answers as the Hugging Face hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import families
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from llmlib import CheckpointError, UnsupportedArchitectureError, load
from llmlib.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

COMMIT, OLDER = "a" * 40, "b" * 40


class Hub(ThreadingHTTPServer):
    """Serves folders as models; `asked` holds what was read of them, as (method, path)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.models, self.gated, self.cut, self.asked = {}, set(), None, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fetched(self, name):
        """The files of a model whose bytes were asked for."""
        start = f"/{name}/resolve/"
        return {
            path.removeprefix(start).partition("/")[2]
            for verb, path in self.asked
            if verb == "GET" and path.startswith(start)
        }


class Answer(BaseHTTPRequestHandler):
    """The part of the hub's protocol that its client needs to fetch a model."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name, place = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
        if name not in self.server.models:
            return self.refuse(401, "RepoNotFound")
        (what, revision, *rest), commits = place, self.server.models[name]
        commit = {"main": COMMIT, "v1": OLDER}.get(revision, revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound")
        if not api:
            return self.send_file(name, commit, commits[commit] / "/".join(rest))
        files = [f for f in sorted(commits[commit].rglob("*")) if f.is_file()]
        names = [str(f.relative_to(commits[commit])) for f in files]
        if what == "tree":
            sizes = zip(names, files, strict=True)
            return self.send_json([{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in sizes])
        return self.send_json({"id": name, "sha": commit, "siblings": [{"rfilename": n} for n in names]})

    do_HEAD = do_GET

    def refuse(self, status, code):
        self.send_body(b"", {"X-Error-Code": code}, status)

    def send_json(self, data):
        self.send_body(json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send_file(self, name, commit, file):
        if name in self.server.gated:
            return self.refuse(403, "GatedRepo")
        if not file.exists():
            return self.refuse(404, "EntryNotFound")
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.send_body(body[start:], headers, 206 if start else 200, cut=file.suffix == self.server.cut)

    def send_body(self, body, headers, status=200, cut=False):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def made(folder, seed=0):
    """A tiny Llama as the hub publishes one, beside what nobody needs."""
    families.reference("llama", seed).save_pretrained(folder)
    families.small_tokenizer([]).save(str(folder / "tokenizer.json"))
    for other in ("pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "README.md"):
        (folder / other).write_bytes(b"never read")
    for place in ("original", "onnx"):
        (folder / place).mkdir()
        (folder / place / "model.safetensors").write_bytes(b"never read")
        (folder / place / "config.json").write_bytes(b"never read")
    return folder


def cut_in_two(folder):
    """Put the tensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({n: tensors[n] for n, s in places.items() if s == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture(scope="module")
def models(hub, tmp_path_factory):
    """What the server has, by name."""
    home = tmp_path_factory.mktemp("hub")
    single, older = made(home / "single"), made(home / "older", seed=1)
    hub.models = {
        "tiny/single": {COMMIT: single, OLDER: older},
        "tiny/shards": {COMMIT: cut_in_two(made(home / "shards"))},
        "tiny/named": {COMMIT: made(home / "named")},
        "tiny/pickled": {COMMIT: made(home / "pickled")},
        "tiny/other": {COMMIT: made(home / "other")},
        "tiny/gated": {COMMIT: single},
    }
    (home / "named" / "model.safetensors").rename(home / "named" / "weights.safetensors")
    (home / "pickled" / "model.safetensors").unlink()
    families.edit_config(home / "other", model_type="t5")
    hub.gated = {"tiny/gated"}
    return hub.models


@pytest.fixture
def cache(hub, models, tmp_path, monkeypatch):
    """An empty cache, and `hub` for the hub: what HF_HOME and HF_ENDPOINT do in a fresh process."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    places = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", places)
    monkeypatch.setattr(hub, "asked", [])
    return tmp_path / "cache"


def logits(name):
    return load(name)(torch.tensor([[1, 2, 3]])).tolist()


def refusal(name, error=CheckpointError):
    with pytest.raises(error) as caught:
        load(name)
    return str(caught.value)


DESCRIPTION = {"config.json", "generation_config.json", "tokenizer.json"}
WHOLE = {
    "tiny/single": {"model.safetensors"},
    "tiny/shards": {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {"model.safetensors.index.json"},
    "tiny/named": {"weights.safetensors"},
}


def test_a_name_gives_the_model_of_its_folder_and_again_without_a_network(hub, models, cache, monkeypatch):
    names = [*WHOLE, "tiny/single@v1", f"tiny/single@{OLDER}"]
    first = [logits(name) for name in names]
    one, other = (logits(models["tiny/single"][commit]) for commit in (COMMIT, OLDER))
    assert first == [one, one, one, other, other]
    assert one != other
    for name, weights in WHOLE.items():
        assert hub.fetched(name) == DESCRIPTION | weights
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [logits(name) for name in names] == first
    assert hub.asked == []


REFUSED = {
    "tiny/absent": "there is no folder tiny/absent, and 'tiny/absent' .* no public model of this name: check the spell",
    "absent": "there is no folder absent, .* no public model of this name",
    "tiny/gated": "accept the terms at https://huggingface.co/tiny/gated, then run `hf auth login`",
    "tiny/single@v7": "revision 'v7' of 'tiny/single'.*https://huggingface.co/tiny/single/tree/main",
    "tiny/pickled": "'tiny/pickled' has no safetensors on the hub, and pickled weights",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_fetched_is_explained(name, hub, cache):
    assert re.search(REFUSED[name], refusal(name))
    assert hub.fetched(name) == (DESCRIPTION if name == "tiny/pickled" else set())


def test_no_weights_are_fetched_of_a_model_that_can_not_be_read(hub, cache):
    assert "model_type is 't5'" in refusal("tiny/other", UnsupportedArchitectureError)
    assert hub.fetched("tiny/other") == DESCRIPTION


@pytest.mark.parametrize("way", [{"ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": True}])
def test_without_a_network_the_error_says_so(way, cache, monkeypatch):
    for name, value in way.items():
        monkeypatch.setattr(constants, name, value)
    assert "the hub can't be reached and no whole copy is in the cache: connect" in refusal("tiny/single")


def test_an_interrupted_download_goes_on(hub, models, cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits longer before each new attempt
    monkeypatch.setattr(hub, "cut", ".safetensors")
    assert "couldn't be fetched from the hub: try again, it goes on where it stopped" in refusal("tiny/single")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "no whole copy is in the cache" in refusal("tiny/single")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "cut", None)
    assert logits("tiny/single") == logits(models["tiny/single"][COMMIT])


def test_info_fetches_no_weights(hub, models, cache, capsys):
    shown = []
    for name in ("tiny/shards", models["tiny/shards"][COMMIT]):
        assert main(["info", str(name), "--json", "--context", "32"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert hub.fetched("tiny/shards") == DESCRIPTION | {"model.safetensors.index.json"}


@pytest.mark.parametrize("command", [["info", "tiny/absent"], ["generate", "tiny/absent", "x"],
                                     ["compare", "gpt2", "tiny/gated"]])  # fmt: skip
def test_a_name_that_can_not_be_fetched_is_a_line_on_stderr(command, cache, capsys):
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]  # before it, the client's progress
    assert last.startswith(f"llmlib {command[0]}: ")
    assert "couldn't be fetched from the hub" in last


@pytest.mark.slow
def test_a_fresh_process_takes_the_hub_and_the_cache_from_its_environment(hub, models, cache, capsys):
    options = ["generate", "--max-new-tokens", "5", "--json"]
    assert main([*options, str(models["tiny/single"][COMMIT]), "(a)"]) == 0
    names = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache)}
    result = subprocess.run(
        [sys.executable, "-m", "llmlib", *options, "tiny/single", "(a)"],
        capture_output=True, text=True, check=True, env=os.environ | names,
    )  # fmt: skip
    assert json.loads(result.stdout) == json.loads(capsys.readouterr().out)
    assert hub.fetched("tiny/single") == DESCRIPTION | {"model.safetensors"}
