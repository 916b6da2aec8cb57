"""One vLLM server: its HTTP endpoints, and the two ways in which it can fail."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from scsdpo.errors import ConfigurationError
from scsdpo.rollout.vllm_rollout import Answer, Request, not_quantised, refusal

SHORT = 10.0
"""Seconds in which a server that is alive answers a question about itself."""
_CONNECTIONS = 64
"""Requests under way at one server."""

START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL "
    "--worker-extension-cls scsdpo.rollout.WeightReceiver --logprobs-mode processed_logprobs "
    "--enable-scale-out"
)
"""How a server is started; in the CPU build `vllm serve` does not start."""


class Unreachable(Exception):
    """No answer, or one that says that the server is not well: worth another try."""


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM server's endpoints; holds no connection.

    Args:
        url: e.g. `http://host:8000`.
    """

    url: str

    def version(self) -> str:
        """Label of the weights that it says it has."""
        return str(self._call("/weight_info", timeout=SHORT)["weight_version"])

    def describe(self) -> dict[str, Any]:
        """`WeightReceiver.scsdpo_describe`, checked.

        Raises:
            ConfigurationError: naming the flag with which it must be started.
        """
        seen = self._rpc("scsdpo_describe", {}, timeout=SHORT)[0]
        if seen["logprobs_mode"] != "processed_logprobs":
            raise ConfigurationError(
                f"model.rollout.engine: the vLLM server {self.url} reports log-probs of logits "
                f"without temperature (logprobs_mode {seen['logprobs_mode']}): start it with "
                "--logprobs-mode processed_logprobs"
            )
        not_quantised(seen["quantization"], f"the vLLM server {self.url}")
        return seen

    def load(self, locations: Sequence[str], sent: str, version: str, timeout: float) -> None:
        """Let it fetch weights and forget what it remembers of the old ones.

        While it loads, and if that fails midway, its label is one that no policy has.

        Args:
            locations: of the files.
            sent: the `StreamHash` of what they hold.
            version: its label afterwards.
            timeout: seconds until it has loaded them.

        Raises:
            Unreachable: if other weights arrived, or not all that its model has.
        """
        self._call("/update_weight_version", {"new_version": f"loading {version}"}, timeout=SHORT)
        fetched = self._rpc("scsdpo_fetch", {"locations": list(locations)}, timeout=timeout)
        for worker in fetched:
            if why := refusal(worker, sent):
                raise Unreachable(why)
        if not self._call("/reset_prefix_cache", {}, timeout=SHORT)["success"]:
            raise Unreachable("did not reset its prefix cache; is someone else sampling from it?")
        self._call("/update_weight_version", {"new_version": version}, timeout=SHORT)

    def generate(self, requests: Sequence[Request], timeout: float) -> list[list[Answer]]:
        """Responses to each request.

        Args:
            requests: all under way at the same time.
            timeout: seconds for one of them.
        """
        with ThreadPoolExecutor(min(_CONNECTIONS, len(requests))) as pool:
            answers = [pool.submit(self._answers, request, timeout) for request in requests]
            try:
                return [answer.result() for answer in answers]
            except Unreachable:
                pool.shutdown(cancel_futures=True)
                raise

    def _answers(self, request: Request, timeout: float) -> list[Answer]:
        body = {"token_ids": list(request.ids), "sampling_params": request.parameters}
        choices = self._call("/inference/v1/generate", body, timeout=timeout)["choices"]
        if len(choices) != request.parameters["n"]:
            raise Unreachable(f"gave {len(choices)} of {request.parameters['n']} responses")
        return [_answer(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _rpc(self, method: str, arguments: dict[str, Any], *, timeout: float) -> list[Any]:
        """Call a method of every worker."""
        body = {"method": method, "kwargs": arguments, "timeout": timeout}
        return self._call("/collective_rpc", body, timeout=timeout)["results"]

    def _call(self, path: str, body: Any = None, *, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url.rstrip("/") + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise self._explain(error, path) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"{path}: {reason or type(error).__name__}") from error

    def _explain(self, error: urllib.error.HTTPError, path: str) -> Exception:
        """A status of 4xx will not change by itself, one of 5xx may."""
        said = _message(error)
        if "scsdpo_" in said and "no attribute" in said:
            return self._misses("--worker-extension-cls scsdpo.rollout.WeightReceiver")
        if error.code >= 500:
            return Unreachable(f"{path}: status {error.code}: {said}")
        if error.code == 404:
            return self._misses("VLLM_SERVER_DEV_MODE=1")
        if "--enable-scale-out" in said:
            return self._misses("--enable-scale-out")
        return ConfigurationError(
            f"model.rollout.engine: the vLLM server {self.url} refuses {path} (status "
            f"{error.code}): {said}"
        )

    def _misses(self, flag: str) -> ConfigurationError:
        return ConfigurationError(
            f"model.rollout.engine: the vLLM server {self.url} was started without {flag}; start "
            f"it with `{START}`"
        )


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _answer(choice: dict[str, Any]) -> Answer:
    content = choice["logprobs"]["content"] if choice["token_ids"] else ()
    return Answer(
        ids=choice["token_ids"],
        logprobs=[token["logprob"] for token in content],
        finish_reason=choice["finish_reason"],
        versions=frozenset(span["version"] for span in choice["weight_versions"] or ()),
    )
