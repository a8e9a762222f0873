"""What an operator stores in Prefect: where pods run, and credentials for registries and git servers.

Blocks turn themselves into plain `podbuild` settings and do nothing else. Register them all with
``prefect block register --module blocks``.
"""

from blocks.build_cluster import BuildCluster
from blocks.credentials import GitCredentials, RegistryCredentials
from blocks.host import load_host
from blocks.local_engine import LocalEngine

__all__ = ["BuildCluster", "GitCredentials", "LocalEngine", "RegistryCredentials", "load_host"]
