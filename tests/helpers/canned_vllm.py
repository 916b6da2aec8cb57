"""A server that answers as vLLM 0.32 does, from a table."""

import http.server
import json
import random
import threading
import time
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
    """From `server.answers`: path -> (status, JSON); `server.before`: path -> what it does first,
    or what it answers, if that is a tuple.

    `server.asked` keeps (path, headers) of what came.
    """

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, dict(self.headers)))
        said = self.server.before.get(self.path, lambda _: None)(self)
        if not isinstance(said, tuple):
            said = self.server.answers.get(self.path, (404, {"detail": "Not Found"}))
        status, body = said
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of 5 a busy machine refuses some

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Canned)
        self.answers, self.before, self.asked = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        """Who asked is gone."""


@contextmanager
def serving(port=0):
    server = Server(port)
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
        "/resume": (200, {"status": "resumed"}),
    }


class Paced:
    """Lets a canned server answer each request after a while, and pause as vLLM does.

    Args:
        server: a canned one.
        seconds: that a request takes, however many there are.
    """

    def __init__(self, server, seconds):
        follow(server)
        self.server, self.seconds = server, seconds
        self.changed, self.active, self.paused = threading.Condition(), 0, False
        self.held, self.frozen = False, threading.Event()
        self.longest = 10**9
        """Tokens after which a response ends by itself."""
        self.draw = lambda _: time.sleep(self.seconds)
        self.drew = []
        """(begin, end, label at the begin, label at the end) of each request."""
        for path, act in (
            (GENERATE, self.generate),
            ("/pause?mode=wait", self.pause),
            ("/pause?mode=keep", self.freeze),
            ("/resume", self.resume),
        ):
            server.before[path] = act
        for path in ("/pause?mode=wait", "/pause?mode=keep"):
            server.answers[path] = (200, {"status": "paused"})
        path = "/reset_prefix_cache"
        server.answers[f"{path}?reset_running_requests=true"] = server.answers[path]

    @property
    def label(self):
        return self.server.answers["/weight_info"][1]["weight_version"]

    def pause(self, handler):
        with self.changed:
            self.paused = True
            self.changed.wait_for(lambda: not self.active, 30)

    def freeze(self, handler):
        with self.changed:
            self.paused = self.held = True
        self.frozen.set()

    def resume(self, handler):
        with self.changed:
            self.paused = self.held = False
            self.changed.notify_all()

    def generate(self, handler):
        with self.changed:
            self.changed.wait_for(lambda: not self.paused, 30)
            self.active += 1
        begin, first = time.monotonic(), self.label
        self.draw(handler)
        with self.changed:
            self.changed.wait_for(lambda: not self.held, 30)
        last = self.label
        parameters = json.loads(handler.body)["sampling_params"]
        draw, most = random.Random(parameters["seed"]), parameters["max_tokens"]
        ended = most > self.longest
        most = min(most, self.longest)
        choices = []
        for index in range(parameters["n"]):
            ids = [draw.randint(3, 250) for _ in range(most)]
            content = [{"token_id": i, "logprob": -5.5, "top_logprobs": []} for i in ids]
            half = most // 2 if first != last else 0
            spans = [{"version": first, "start": 0, "end": half}] if half else []
            choices.append(
                {
                    "index": index,
                    "finish_reason": "stop" if ended else "length",
                    "token_ids": ids,
                    "logprobs": {"content": content},
                    "weight_versions": [*spans, {"version": last, "start": half, "end": most}],
                }
            )
        with self.changed:
            self.active -= 1
            self.drew.append((begin, time.monotonic(), first, last))
            self.changed.notify_all()
        return 200, {"choices": choices}
