"""A server that answers as vLLM 0.32 does, from a table."""

import http.server
import json
import threading
from contextlib import contextmanager

GOOD = {
    "logprobs_mode": "processed_logprobs",
    "quantization": None,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "loaded": "",
    "adapters": None,
    "adapter": "",
}
"""What `WeightReceiver.scsdpo_describe` says of a server that will do."""
LABEL = "run.digest.0"
GENERATE = "/inference/v1/generate"


class Canned(http.server.BaseHTTPRequestHandler):
    """From `server.answers`: path -> (status, JSON); `server.before`: path -> what it does first.

    `server.asked` keeps (path, headers) of what came.
    """

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, dict(self.headers)))
        self.server.before.get(self.path, lambda _: None)(self)
        status, body = self.server.answers.get(self.path, (404, {"detail": "Not Found"}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Canned)
        self.answers, self.before, self.asked = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        """Who asked is gone."""


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def error(code, message):
    return code, {"error": {"message": message, "code": code}}


def ready(label=LABEL):
    """The answers of a server that has these weights; it cannot generate yet."""
    return {
        "/collective_rpc": (200, {"results": [GOOD]}),
        "/weight_info": (200, {"weight_version": label}),
    }


def answering(label=LABEL, *, n=2):
    """One token each."""
    choice = {
        "finish_reason": "stop",
        "token_ids": [5],
        "logprobs": {"content": [{"token_id": 5, "logprob": -1.0, "top_logprobs": []}]},
        "weight_versions": [{"version": label, "start": 0, "end": 1}],
    }
    return {GENERATE: (200, {"choices": [choice | {"index": i} for i in reversed(range(n))]})}


def follow(server):
    """Let it load whatever it is told to, and answer under the label that it gets."""

    def relabel(handler):
        label = json.loads(handler.body)["new_version"]
        server.answers |= ready(label) | answering(label)

    server.before["/update_weight_version"] = relabel
    server.answers |= ready("default") | {
        "/update_weight_version": (200, {}),
        "/reset_prefix_cache": (200, {"success": True}),
    }
