"""One vLLM server: its HTTP endpoints, and its errors."""

import asyncio
import functools
import json
import os
import secrets
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2

from scsdpo.errors import ConfigurationError
from scsdpo.rollout.servers.require_key import KEY_VARIABLE
from scsdpo.rollout.vllm.rollout import EngineAnswer, Request, not_quantised
from scsdpo.rollout.weights.hashing import Receipt, refusal

SHORT = 10.0
"""Seconds in which a server that works answers a request for its state."""
_PAUSE = 0.2
"""Seconds between two tries to empty its prefix cache."""

_PLAIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Endpoints whose answers are not JSON."""

START = (
    "VLLM_API_KEY=... VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server "
    "--model MODEL --host 127.0.0.1 --middleware scsdpo.rollout.RequireKey --worker-extension-cls "
    "scsdpo.rollout.WeightReceiver --logprobs-mode processed_logprobs --enable-scale-out"
)
"""The command that starts a server. (`vllm serve` does not start in the CPU build.)"""

TRANSFER = '{"backend": "nccl"}'
"""A server's `--weight-transfer-config` for the delivery `Nccl`."""


ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora --max-lora-rank"
"""Settings of a server for `Servers(adapter="alone")`; a rank follows."""


class Unreachable(Exception):
    """The server did not answer, or answered with an error that may pass: try again."""


class Silent(Unreachable):
    """The server did not answer in time: it hangs or is busy, for example with loading weights."""


class NotNow(Unreachable):
    """The server answers, but can get its weights only when they are published again."""


@dataclass(frozen=True, slots=True)
class Server:
    """A vLLM server's endpoints; it holds no connection.

    Args:
        url: e.g. `http://host:8000`.
        key: environment variable with the server's key; no key is sent if it is unset.
        freezes: True: `pause` freezes running responses, and after `resume` they go on with the
            weights of that time. False: `pause` waits until they are complete.
    """

    url: str
    key: str = KEY_VARIABLE
    freezes: bool = False

    async def version(self) -> str:
        """Label of the server's weights."""
        return str((await self._call("/weight_info", timeout=SHORT))["weight_version"])

    async def describe(self) -> dict[str, Any]:
        """`WeightReceiver.scsdpo_describe` of its first worker, checked.

        Raises:
            ConfigurationError: if the server needs another flag; it names the flag.
        """
        seen = (await self._rpc("scsdpo_describe", {}, timeout=SHORT))[0]
        if seen["logprobs_mode"] != "processed_logprobs":
            raise ConfigurationError(
                f"model.rollout.engine: the vLLM server {self.url} returns log-probs before "
                f"temperature and cuts (logprobs_mode {seen['logprobs_mode']}): start it with "
                "--logprobs-mode processed_logprobs"
            )
        not_quantised(seen["quantization"], f"the vLLM server {self.url}")
        return seen

    async def load(self, locations: Sequence[str], sent: str, version: str, timeout: float) -> None:
        """Let the server load weights from files, and empty its prefix cache.

        While it loads, and after a failure, its label is one that no policy has.

        Args:
            locations: paths or URLs of the files.
            sent: `StreamHash` of the weights in the files.
            version: label of the weights.
            timeout: seconds for loading them.

        Raises:
            Unreachable: if other weights arrived, or modules of the model did not get theirs.
        """
        await self.label(f"loading {version}")
        fetched = await self._rpc("scsdpo_fetch", {"locations": list(locations)}, timeout=timeout)
        for worker in fetched:
            if why := refusal(worker, sent):
                raise Unreachable(why)
        await self.forget()
        await self.label(version)

    async def load_adapter(
        self, locations: Sequence[str], sent: str, version: str, timeout: float
    ) -> None:
        """Let the server load an adapter with the name `version` beside its weights.

        Args:
            locations: paths or URLs of the adapter's files.
            sent: `adapter_hash` of the files.
            version: label of weights and adapter together.
            timeout: seconds for loading it.

        Raises:
            Unreachable: if another adapter is active than was sent.
        """
        await self.label(f"loading {version}")
        arguments = {"locations": list(locations), "place": secrets.token_hex(8)}
        folder = (await self._rpc("scsdpo_fetch_adapter", arguments, timeout=timeout))[0]
        models = (await self._call("/v1/models", timeout=SHORT))["data"]
        for old in (model["id"] for model in models if model["parent"]):
            await self._call("/v1/unload_lora_adapter", {"lora_name": old}, timeout=SHORT)
        adapter = {"lora_name": version, "lora_path": folder}
        await self._call("/v1/load_lora_adapter", adapter, timeout=timeout)
        for worker in await self._rpc("scsdpo_held", {"name": version}, timeout=timeout):
            if why := refusal(worker, sent, adapter=True):
                raise Unreachable(why)
        await self.forget()
        await self.label(version)

    async def label(self, version: str) -> None:
        """Set the label of its weights, which its answers carry."""
        await self._call("/update_weight_version", {"new_version": version}, timeout=SHORT)

    async def forget(self) -> None:
        """Empty its prefix cache.

        Requests whose client is gone may hold a part of the cache for a while. Frozen requests drop
        their keys and values, which are computed again with the new weights.
        """
        frozen = "?reset_running_requests=true" if self.freezes else ""
        path = f"/reset_prefix_cache{frozen}"
        try:
            async with asyncio.timeout(SHORT):
                while not (await self._call(path, {}, timeout=SHORT))["success"]:
                    await asyncio.sleep(_PAUSE)
        except TimeoutError as error:
            said = "did not reset its prefix cache; perhaps another program samples from it"
            raise Unreachable(said) from error

    async def pause(self, timeout: float) -> None:
        """Let it complete running responses, or freeze them, and hold back new requests.

        Args:
            timeout: seconds for completing them.
        """
        mode = "keep" if self.freezes else "wait"
        await self._call(f"/pause?mode={mode}", {}, timeout=timeout)

    async def resume(self) -> None:
        """Let it go on after a pause; this does nothing if it was not paused."""
        await self._call("/resume", {}, timeout=SHORT)

    async def world_size(self) -> int:
        """Number of its workers."""
        return int((await self._call("/get_world_size", timeout=SHORT))["world_size"])

    async def join(self, init_info: dict[str, Any], timeout: float) -> None:
        """Let its workers join a group of vLLM's weight transfer engine, and leave any old one."""
        await self._call("/shutdown_weight_transfer_engine", {}, timeout=SHORT)
        body = {"init_info": init_info}
        await self._call("/init_weight_transfer_engine", body, timeout=timeout)

    async def receive(self, update_info: dict[str, Any], timeout: float) -> list[Receipt]:
        """Call `WeightReceiver.scsdpo_receive` of each worker; return their receipts."""
        arguments = {"update_info": update_info, "timeout": timeout}
        return await self._rpc("scsdpo_receive", arguments, timeout=timeout + SHORT)

    async def generate(
        self, request: Request, timeout: float, adapter: str = ""
    ) -> list[EngineAnswer]:
        """Answers to a request.

        Args:
            request: a prompt with its sampling parameters.
            timeout: seconds until the last byte of the answers.
            adapter: name of the adapter to sample with; '': none.

        Raises:
            Unreachable: if the server fails, or returns another number of responses.
        """
        body = {"token_ids": list(request.ids), "sampling_params": request.parameters}
        if adapter:
            body["model"] = adapter
        answer = await self._call("/inference/v1/generate", body, timeout=timeout)
        choices = answer["choices"]
        if len(choices) != request.parameters["n"]:
            raise Unreachable(f"returned {len(choices)} of {request.parameters['n']} responses")
        return [_answer(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]

    async def _rpc(self, method: str, arguments: dict[str, Any], *, timeout: float) -> list[Any]:
        """Call a method of every worker."""
        body = {"method": method, "kwargs": arguments, "timeout": timeout}
        return (await self._call("/collective_rpc", body, timeout=timeout))["results"]

    async def _call(self, path: str, body: Any = None, *, timeout: float) -> Any:
        """Send a GET, or with `body` a POST of JSON, without a proxy.

        Each call has its own connection, which is closed as soon as the caller is cancelled.
        """
        key = os.environ.get(self.key, "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx2.AsyncClient(trust_env=False, timeout=None, verify=_certificates())
        try:
            # The client's own timeouts limit single reads only, not a slow answer as a whole.
            async with asyncio.timeout(timeout), client:
                verb, url = "GET" if body is None else "POST", self.url.rstrip("/") + path
                answer = await client.request(verb, url, json=body, headers=headers)
            if answer.status_code == 200:
                return answer.text if path in _PLAIN else answer.json()
        except TimeoutError as error:
            raise Silent(f"{path}: no answer within {timeout:g} s") from error
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise Unreachable(f"{path}: {str(error) or type(error).__name__}") from error
        raise self._explain(answer.status_code, _message(answer.text), path)

    def _explain(self, status: int, said: str, path: str) -> Exception:
        """The error for an HTTP status: most of 4xx are configuration errors, 5xx may pass."""
        if "scsdpo_" in said and "no attribute" in said:
            return self._misses("--worker-extension-cls scsdpo.rollout.WeightReceiver")
        if "Weight transfer not configured" in said:
            return self._misses(f"--weight-transfer-config '{TRANSFER}'")
        if status >= 500:
            return Unreachable(f"{path}: status {status}: {said}")
        if status == 401:
            wrong = "holds another key" if os.environ.get(self.key) else "is not set"
            return ConfigurationError(
                f"model.rollout.engine.key: the vLLM server {self.url} needs a key, and the "
                f"environment variable {self.key} {wrong}: set it to the server's {KEY_VARIABLE}"
            )
        if status == 404 and "does not exist" in said:
            return Unreachable(said)  # rank 0 has loaded another adapter, or none yet
        if status == 404:
            return self._misses("VLLM_SERVER_DEV_MODE=1")
        if "--enable-scale-out" in said:
            return self._misses("--enable-scale-out")
        return ConfigurationError(
            f"model.rollout.engine: the vLLM server {self.url} refuses {path} (status {status}): "
            f"{said}"
        )

    def _misses(self, flag: str) -> ConfigurationError:
        return ConfigurationError(
            f"model.rollout.engine: the vLLM server {self.url} was started without {flag}: start "
            f"it with `{START}`"
        )


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The system's certificates, read once."""
    return ssl.create_default_context()


def _message(text: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]


def _answer(choice: dict[str, Any]) -> EngineAnswer:
    content = choice["logprobs"]["content"] if choice["token_ids"] else ()
    spans = choice["weight_versions"] or ()
    return EngineAnswer(
        ids=choice["token_ids"],
        logprobs=[token["logprob"] for token in content],
        finish_reason=choice["finish_reason"],
        versions=frozenset(span["version"] for span in spans),
        by_token=tuple(
            span["version"] for span in spans for _ in range(span["start"], span["end"])
        ),
    )
