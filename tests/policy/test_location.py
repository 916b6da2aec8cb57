"""What is named as a policy and is none: one line says what it is, or what is missing in it."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from scsdpo.policy import CausalLM
from scsdpo.policy.location import located

NAME = "someone/some-model"
CLOSED = "http://127.0.0.1:9"
"""Nobody listens there."""
PATH = "/{repo_id}/resolve/{revision}/{filename}"


def wrong(name):
    with pytest.raises(ValueError) as caught:
        CausalLM(str(name))
    said = str(caught.value)
    assert said.startswith(f"`CausalLM(name_or_path={str(name)!r})`: ")
    assert "\n" not in said
    return said.partition(": ")[2]


@pytest.fixture
def folder(qwen3, tmp_path):
    """A copy of a whole model."""
    return shutil.copytree(qwen3, tmp_path / "model")


def test_a_whole_model_is_taken(folder):
    assert located(str(folder)) == str(folder)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["config.json"], "the folder lacks config.json (it holds chat_template.jinja, gen"),
        (["tokenizer.json"], "the folder lacks a tokenizer (tokenizer.json)"),
        (["model.safetensors"], "the folder lacks weights (*.safetensors)"),
        (
            ["model.safetensors", "tokenizer.json"],
            "the folder lacks a tokenizer (tokenizer.json) and weights (*.safetensors)",
        ),
    ],
)
def test_what_a_folder_lacks_is_named(gone, said, folder):
    for name in gone:
        (folder / name).unlink()
    assert wrong(folder).startswith(said)


def test_shards_that_are_not_there_are_named(folder):
    parts = {"a": "model-1-of-3.safetensors", "b": "model-2-of-3.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert wrong(folder) == "the folder lacks model-1-of-3.safetensors and 1 more files"


def test_a_pointer_is_no_weight(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    assert wrong(folder) == "model.safetensors is a Git LFS pointer: run `git lfs pull` there"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "the folder lacks config.json (it holds nothing)"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "Qwen/Qwen3-8B"}'},
            "is an adapter without the weights of Qwen/Qwen3-8B: merge both (peft's "
            "merge_and_unload) and name the result, or name that model",
        ),
        ({"model-Q4_K_M.gguf": "GGUF"}, "GGUF files cannot be trained: name the folder of"),
        ({"config.json": "{"}, "its config.json is not JSON"),
        (
            {"config.json": "{}"},
            "its config.json has no model_type: it is not the config of",
        ),
        (
            {"checkpoints/last.ckpt": "x"},
            "is a training checkpoint: write its policy with `scsdpo export --ckpt ",
        ),
        (
            {"last.ckpt": "x"},
            "is a training checkpoint: write its policy with `scsdpo export --ckpt ",
        ),
        ({"tiny/version_0/checkpoints/x": "x"}, "the folder lacks config.json (it holds tiny)"),
    ],
)
def test_a_folder_of_something_else_says_what_it_is(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / "it" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "it" / name).write_text(content)
    (tmp_path / "it").mkdir(exist_ok=True)
    assert wrong(tmp_path / "it").startswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last.ckpt", "is a training checkpoint: write its policy with `scsdpo export --ckpt "),
        ("model.gguf", "GGUF files cannot be trained"),
        ("model.safetensors", "is a file; name the folder that holds config.json, tokenizer and"),
    ],
)
def test_a_file_says_what_it_is(name, said, tmp_path):
    (tmp_path / name).write_text("x")
    assert wrong(tmp_path / name).startswith(said)


@pytest.mark.parametrize("name", ["./none", "/nowhere/at/all", "a/b/c", "~/model"])
def test_what_looks_like_a_folder_is_not_asked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert wrong(name) == "there is no such folder"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server in the place of the hub: the status with which it answers, and an empty cache."""
    answers = {"status": 200, "code": ""}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(answers["status"])
            self.send_header("X-Error-Code", answers["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + PATH)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "RepoNotFound", "has no such public model: check the name, or log in"),
        (404, "RepoNotFound", "has no such public model: check the name, or log in"),
        (403, "GatedRepo", "is gated: accept its terms on "),
        (404, "EntryNotFound", "has no config.json on the hub: adapters and GGUF files cannot be"),
        (500, "", "the hub answers with an error ("),
    ],
)
def test_what_the_hub_answers_is_said(status, code, said, hub):
    hub |= {"status": status, "code": code}
    with pytest.raises(ValueError) as caught:
        located(NAME)
    assert said in str(caught.value)


def test_a_name_that_the_hub_knows_is_left_to_transformers(hub):
    assert located(NAME) == NAME


def cached(folder, cache):
    """`folder` as the hub's client keeps what it has loaded."""
    place = cache / "models--someone--some-model"
    shutil.copytree(folder, place / "snapshots" / "0123456789012345678901234567890123456789")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    return place / "snapshots" / "0123456789012345678901234567890123456789"


def test_without_a_network_a_name_is_said_within_seconds(hub, monkeypatch):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", CLOSED + PATH)
    begun = time.monotonic()
    said = wrong(NAME)
    assert time.monotonic() - begun < 5
    assert said.startswith("there is no such folder, the hub cannot be reached (")
    assert said.endswith("name a folder, or download it once while there is a network")


def test_without_a_network_the_copy_of_this_machine_is_taken(qwen3, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", CLOSED + PATH)
    copy = cached(qwen3, tmp_path / "cache")
    assert located(NAME) == str(copy)
    (copy / "tokenizer.json").unlink()
    assert wrong(NAME) == "the folder lacks a tokenizer (tokenizer.json)"
