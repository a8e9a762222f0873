"""A namespace of a Kubernetes cluster."""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from pydantic import Field

from blocks.every_host import EveryHost
from podbuild.settings import ClusterSettings


class BuildCluster(EveryHost, Block):
    """Builds run as pods in one namespace of a Kubernetes cluster.

    One such block is one trust domain: who may use it may join its builds and read their logs.

    Example:
        ```python
        from blocks import BuildCluster

        host = BuildCluster.load("BLOCK_NAME")
        ```
    """

    _block_type_name = "Build Cluster"
    _block_type_slug = "build-cluster"
    _description = "Builds images in unprivileged pods of a Kubernetes namespace."

    namespace: str = Field(default="podbuild", title="Namespace", description="The namespace that builds run in.")
    kubeconfig: str = Field(
        default="",
        title="Kubeconfig",
        description="A kubeconfig file on the worker; empty: the worker's own service account, or KUBECONFIG.",
    )
    context: str = Field(default="", title="Context", description="The kubeconfig's context; empty: its current one.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", title="Image pull policy", description="When nodes pull the builder image."
    )
    image_pull_secrets: list[str] = Field(
        default_factory=list,
        title="Image pull secrets",
        description="Secrets of the namespace that nodes pull the builder image with.",
    )
    isolation: Literal["rootless", "chroot"] = Field(
        default="rootless",
        title="Isolation",
        description="`rootless`: steps have their own mounts and processes. `chroot`: for nodes without procMount.",
    )
    seccomp_profile: str = Field(
        default="",
        title="Seccomp profile",
        description="A profile on the nodes, below the kubelet's seccomp folder; empty: the runtime's default.",
    )
    ca_config_map: str = Field(
        default="",
        title="CA ConfigMap",
        description="A ConfigMap with ca-certificates.crt, where the way out needs certificates of its own.",
    )
    service_account: str = Field(
        default="", title="Service account", description="The pods' service account; its token is never mounted."
    )
    priority_class: str = Field(default="", title="Priority class", description="The pods' priority class.")
    runtime_class: str = Field(
        default="", title="Runtime class", description="The pods' runtime class, for example gVisor's or Kata's."
    )
    dns_policy: str = Field(default="", title="DNS policy", description="The pods' DNS policy; empty: ClusterFirst.")
    node_selector: dict[str, str] = Field(
        default_factory=dict, title="Node selector", description="Labels that every build's node must have."
    )
    labels: dict[str, str] = Field(default_factory=dict, title="Labels", description="Further labels for the pods.")

    async def to_settings(self) -> ClusterSettings:
        """Return this block, with the credentials it names, as plain podbuild settings.

        Raises ValueError when a named block does not exist.
        """
        return ClusterSettings(
            **await self.shared_settings(),
            namespace=self.namespace,
            kubeconfig=self.kubeconfig,
            context=self.context,
            image_pull_policy=self.image_pull_policy,
            image_pull_secrets=tuple(self.image_pull_secrets),
            isolation=self.isolation,
            seccomp_profile=self.seccomp_profile,
            ca_config_map=self.ca_config_map,
            service_account=self.service_account,
            priority_class=self.priority_class,
            runtime_class=self.runtime_class,
            dns_policy=self.dns_policy,
            node_selector=tuple(self.node_selector.items()),
            labels=tuple(self.labels.items()),
        )
