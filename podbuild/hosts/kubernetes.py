"""Pods on a Kubernetes cluster: the manifest as it is, a Secret that goes with its pod, and every answer classified.

The client is `kubernetes.aio`, used for what it is good at: configuration, TLS, tokens. Requests and
answers are plain JSON, because its generated calls refuse `sinceTime`, end every stream after 300 s,
and its Watch repeats logs. No watch: a pod is polled by name.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import aiohttp
import anyio
from kubernetes.aio import client, config
from kubernetes.aio.config.config_exception import ConfigException

from podbuild.errors import AccessDenied, BuildError, HostUnavailable, PodRejected, QuotaExceeded
from podbuild.hosts import NameExists, Pod
from podbuild.manifest import GATE, MANAGED_BY, SECRET_VOLUME, Isolation, Manifest
from podbuild.settings import ClusterSettings

_CONNECT_SECONDS = 10
_READ_SECONDS = 30
#: A quiet build is no error: a follow that says nothing for so long is opened again.
_QUIET_SECONDS = 300
_RETRY_SECONDS = 60
_CLEANUP_SECONDS = 20
_PAGE = 200
_DELETE_TRIES = 5
_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"
_TEXT_LIMIT = 600


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the API server said: a status code, and an object, which for an error is a `Status`."""

    code: int
    body: dict[str, Any]

    @property
    def reason(self) -> str:
        return str(self.body.get("reason", ""))

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))[:_TEXT_LIMIT]


class KubernetesHost:
    """A namespace of a cluster, as a host. Use it as an async context manager.

    Entering it reads the configuration and raises `HostUnavailable` if there is none; the cluster
    is asked at the first call. Pods outlive it.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self.settings = settings
        self._api: client.ApiClient | None = None
        #: The server's time, and our own monotonic one when it was told.
        self._server_time: tuple[datetime, float] | None = None

    async def __aenter__(self) -> Self:
        self._api = await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._api is not None:
            await self._api.close()  # type: ignore[no-untyped-call]
        self._api = None

    async def _connect(self) -> client.ApiClient:
        settings, configuration = self.settings, client.Configuration()
        in_cluster = await anyio.Path(_SERVICE_ACCOUNT).exists()
        try:
            if not settings.kubeconfig and not settings.context and in_cluster:
                config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            else:
                await config.load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=settings.kubeconfig or None,
                    context=settings.context or None,
                    client_configuration=configuration,
                    persist_config=False,
                )
        except (ConfigException, OSError, ValueError) as error:
            raise HostUnavailable(
                "There is no usable configuration of a cluster here.",
                "Set `kubeconfig` (and `context`) in the build-cluster block, or run inside the cluster.",
            ) from error
        # Followers hold two connections each, and must never wait for one another.
        configuration.connection_pool_maxsize = 0
        configuration.client_session_kwargs = {"read_bufsize": 2**16}
        return client.ApiClient(configuration)

    @property
    def isolation(self) -> Isolation:
        return self.settings.isolation

    async def now(self) -> datetime:
        """Return the API server's time: pods are stamped by it. It is asked once, then counted on."""
        if self._server_time is None:
            await self._ask("GET", "")
        assert self._server_time is not None  # noqa: S101 - every answer has a Date, or `_ask` raised
        told, when = self._server_time
        return told + timedelta(seconds=asyncio.get_running_loop().time() - when)

    # --- creating ---------------------------------------------------------------------------------------

    async def create(self, manifest: Manifest, files: Mapping[str, bytes]) -> Pod:
        """Create the pod behind its gate, then its Secret, then lift the gate; return the pod.

        Raises `NameExists`, `QuotaExceeded` while there is no room, `PodRejected` when the pod or the
        namespace is refused, `AccessDenied` when a right is missing. A failure leaves nothing behind.
        """
        pod = await self._create_gated(cluster_manifest(manifest, self.settings))
        try:
            await self._create_secret(pod, files)
            return await self._lift_gate(pod)
        except BaseException:
            with anyio.move_on_after(_CLEANUP_SECONDS, shield=True), suppress(BuildError):
                await self.delete(pod)
            raise

    async def _create_gated(self, manifest: Manifest) -> Pod:
        name = manifest["metadata"]["name"]
        answer = await self._ask("POST", "pods", body=manifest)
        if answer.code == 201:
            return answer.body
        if answer.code == 409 and answer.reason == "AlreadyExists":
            # A try whose answer was lost may have made it: our Secret's name has a nonce that nobody else knows.
            there = await self.read(name)
            if there is not None and _secret_name(there) == _secret_name(manifest):
                return there
            raise NameExists(name)
        if answer.code == 403 and "exceeded quota" in answer.message:
            # Admission runs first, so a full quota hides that the name is taken.
            if await self.read(name) is not None:
                raise NameExists(name)
            raise QuotaExceeded(
                f"The namespace {self.settings.namespace} has no room: {answer.message}",
                "Wait for other builds, or have the ResourceQuota raised.",
            )
        raise self._refused(answer, "create pods")

    async def _create_secret(self, pod: Pod, files: Mapping[str, bytes]) -> None:
        metadata = pod["metadata"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": _secret_name(pod), "labels": dict(MANAGED_BY), "ownerReferences": [owner]},
            "immutable": True,
            "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
        }
        answer = await self._ask("POST", "secrets", body=secret)
        # 409 can only be our own earlier try: the name holds this pod's nonce.
        if answer.code not in (201, 409):
            raise self._refused(answer, "create secrets")

    async def _lift_gate(self, pod: Pod) -> Pod:
        """Remove our gate alone: another controller's gates stay."""
        patch = {
            "metadata": {"uid": pod["metadata"]["uid"]},
            "spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]},
        }
        answer = await self._ask("PATCH", f"pods/{pod['metadata']['name']}", body=patch)
        if answer.code == 200:
            return answer.body
        if answer.code in (404, 409, 422):
            raise NameExists(pod["metadata"]["name"])
        raise self._refused(answer, "patch pods")

    # --- reading ----------------------------------------------------------------------------------------

    async def read(self, name: str) -> Pod | None:
        """Return the pod of this name as the API server has it, or None."""
        answer = await self._ask("GET", f"pods/{name}")
        if answer.code == 200:
            return answer.body
        if answer.code == 404:
            return None
        raise self._refused(answer, "get pods")

    async def find(self, labels: Mapping[str, str]) -> list[Pod]:
        """Return our pods that carry all of these labels, read in pages."""
        selector = ",".join(f"{key}={value}" for key, value in {**MANAGED_BY, **labels}.items())
        found: list[Pod] = []
        query = {"labelSelector": selector, "limit": str(_PAGE)}
        while True:
            answer = await self._ask("GET", "pods", query=query)
            if answer.code == 410:
                # The list grew old between two pages: begin again.
                found.clear()
                query.pop("continue", None)
                continue
            if answer.code != 200:
                raise self._refused(answer, "list pods")
            found += answer.body["items"]
            following = answer.body["metadata"].get("continue")
            if not following:
                return found
            query["continue"] = following

    async def log(self, pod: Pod, container: str, *, since: str | None = None) -> AsyncIterator[bytes]:
        """Yield a container's log as the kubelet serves it. What ended the stream is for the pod's state to tell."""
        query = {"container": container, "follow": "true", "timestamps": "true"}
        if since:
            query["sinceTime"] = since
        try:
            async with await self._send("GET", f"pods/{pod['metadata']['name']}/log", query=query, quiet=True) as reply:
                if reply.status == 200:
                    async for chunk in reply.content.iter_any():
                        yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError):
            return

    # --- ending -----------------------------------------------------------------------------------------

    async def delete(self, pod: Pod) -> None:
        """Delete exactly this pod, gracefully: the name is free when its containers have ended, and not before."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        current: Pod | None = pod
        for _ in range(_DELETE_TRIES):
            if current is None or current["metadata"]["uid"] != uid:
                return
            version = current["metadata"].get("resourceVersion")
            preconditions = {"uid": uid, **({"resourceVersion": version} if version else {})}
            body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions}
            answer = await self._ask("DELETE", f"pods/{name}", body=body)
            if answer.code in (200, 202, 404):
                return
            if answer.code != 409:
                raise self._refused(answer, "delete pods")
            current = await self.read(name)
        raise HostUnavailable(f"The pod {name} changes faster than it can be deleted.", "Try again.")

    async def release(self, pod: Pod) -> None:
        """Do nothing: the kubelet removes a finished pod's volumes, and its Secret goes with the pod."""

    # --- the wire ---------------------------------------------------------------------------------------

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        quiet: bool = False,
    ) -> aiohttp.ClientResponse:
        """Send one request below our namespace and return the open answer."""
        if self._api is None:
            raise HostUnavailable("This host is closed.", "Use it inside `async with`.")
        headers = {"Accept": "*/*" if quiet else "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/strategic-merge-patch+json"
        elif body is not None:
            headers["Content-Type"] = "application/json"
        verb, url, sent, payload, _ = await self._api.param_serialize(
            method,
            f"/api/v1/namespaces/{self.settings.namespace}" + (f"/{path}" if path else ""),
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        read = _QUIET_SECONDS if quiet else _READ_SECONDS
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=read)
        reply = await self._api.call_api(verb, url, header_params=sent, body=payload, _request_timeout=timeout)
        response: aiohttp.ClientResponse = reply.response
        if date := response.headers.get("Date"):
            self._server_time = (parsedate_to_datetime(date).astimezone(UTC), asyncio.get_running_loop().time())
        return response

    async def _ask(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None
    ) -> _Answer:
        """Ask until there is an answer: 429, 5xx and broken connections are tried again for 60 s.

        Every call of ours may be repeated: names are fixed, and deletions carry preconditions.
        Raises `HostUnavailable` when the time is over, `AccessDenied` for credentials that no longer hold.
        """
        loop = asyncio.get_running_loop()
        end, pause, renewed = loop.time() + _RETRY_SECONDS, 0.25, False
        while True:
            wait = pause * random.uniform(0.5, 1)  # noqa: S311 - spreads callers, guards nothing
            try:
                async with await self._send(method, path, query=query, body=body) as reply:
                    text = await reply.text(errors="replace")
                    code, asked_wait = reply.status, reply.headers.get("Retry-After", "")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if loop.time() + wait > end:
                    raise HostUnavailable(
                        f"The cluster does not answer: {type(error).__name__}.",
                        "Check its address in the kubeconfig, and that this machine reaches it.",
                    ) from error
            else:
                if code == 401 and not renewed:
                    renewed = True
                    old, self._api = self._api, await self._connect()
                    if old is not None:
                        await old.close()  # type: ignore[no-untyped-call]
                    continue
                if code == 401:
                    raise AccessDenied(
                        "The cluster does not accept our credentials.",
                        "Renew the token or certificate that the build-cluster block's kubeconfig names.",
                    )
                if code != 429 and code < 500:
                    return _Answer(code, _object(text))
                if asked_wait.isdigit():
                    wait = max(wait, float(asked_wait))
                if loop.time() + wait > end:
                    raise HostUnavailable(
                        f"The cluster answered {code} for {_RETRY_SECONDS} s: {text[:200].strip()}",
                        "Look at the load and the health of its API server.",
                    )
            await asyncio.sleep(wait)
            pause = min(pause * 2, 5)

    def _refused(self, answer: _Answer, doing: str) -> BuildError:
        """Return the typed error for an answer that is final."""
        namespace, message = self.settings.namespace, answer.message
        if answer.code == 404:
            return PodRejected(
                f"There is no namespace {namespace} in this cluster.",
                "Create it, or set another `namespace` in the build-cluster block.",
            )
        if answer.code == 403 and "cannot " in message and "in API group" in message:
            verb, _, resource = doing.partition(" ")
            return AccessDenied(
                f"The cluster does not let us {doing} in the namespace {namespace}.",
                f"Add the verb {verb!r} on {resource!r} to the Role that deploy/ ships.",
            )
        if answer.code == 403:
            return PodRejected(f"The cluster refuses the pod: {message}", "Change the setting that the text names.")
        return PodRejected(f"The cluster answered {answer.code} when asked to {doing}: {message}", "See the text.")


def cluster_manifest(manifest: Manifest, settings: ClusterSettings) -> Manifest:
    """Return the pod with what its cluster adds: profile, pull secrets, placement, labels. Pure."""
    made = deepcopy(manifest)
    spec, metadata = made["spec"], made["metadata"]
    if settings.seccomp_profile:
        profile = {"type": "Localhost", "localhostProfile": settings.seccomp_profile}
        build = next(c for c in spec["containers"] if c["name"] == "build")
        build["securityContext"]["seccompProfile"] = profile
        spec["securityContext"] = {"seccompProfile": {"type": "RuntimeDefault"}}
    for container in spec["containers"]:
        container["imagePullPolicy"] = settings.image_pull_policy
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if settings.ca_config_map:
        spec["volumes"].append({"name": "ca", "configMap": {"name": settings.ca_config_map}})
        path = "/etc/ssl/certs/ca-certificates.crt"
        for container in spec["containers"]:
            mount = {"name": "ca", "mountPath": path, "subPath": "ca-certificates.crt", "readOnly": True}
            container["volumeMounts"].append(mount)
    for field, value in (
        ("serviceAccountName", settings.service_account),
        ("priorityClassName", settings.priority_class),
        ("runtimeClassName", settings.runtime_class),
        ("dnsPolicy", settings.dns_policy),
    ):
        if value:
            spec[field] = value
    spec["nodeSelector"] = {**dict(settings.node_selector), **spec["nodeSelector"]}
    metadata["labels"] = {**dict(settings.labels), **metadata["labels"]}
    # Build pods spread over the nodes where they can: two builds on one node compete for its disk.
    peers = {"labelSelector": {"matchLabels": dict(MANAGED_BY)}, "topologyKey": "kubernetes.io/hostname"}
    preferred = [{"weight": 100, "podAffinityTerm": peers}]
    spec["affinity"] = {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    return made


def _secret_name(pod: Mapping[str, Any]) -> str:
    volumes = pod["spec"].get("volumes") or ()
    return next((str(v["secret"]["secretName"]) for v in volumes if v["name"] == SECRET_VOLUME), "")


def _object(text: str) -> dict[str, Any]:
    """Return an answer's object; what is none (429 is plain text) becomes a message."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"message": text}
