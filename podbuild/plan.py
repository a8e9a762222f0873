"""What is to be built: the caller's options, checked, and the two hashes that name the work.

Pure. The *request* hash says what the image is: it decides whether an image that exists is the
answer, and it marks the derived tag. The *build* hash adds the builder image and the target image;
it decides the pod's name, which is the lock. Limits, credentials and placement enter neither.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from podbuild.errors import InvalidRequest
from podbuild.names import (
    ImageName,
    Repository,
    check_path,
    derive_image,
    is_commit,
    parse_image,
    pod_name,
    printable,
)
from podbuild.settings import HostSettings

# Never 0, which engines take for "no limit".
_QUANTITY = r"^(0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
_BUILD_ARG = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Build arguments, appendix and identity travel as annotations, which Kubernetes limits to 256 KiB in all.
PUBLIC_LIMIT_BYTES = 200 * 1024
_COMMIT_DIGITS = 12
_REQUEST_DIGITS = 8


class BuildOptions(BaseModel):
    """What changes the image, and how it is built. The first group is part of the image's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Options")

    subdirectory: str = Field(
        default="", title="Subdirectory", max_length=500, description="The folder of the repository to build."
    )
    builder: Literal["auto", "repo2docker", "dockerfile"] = Field(
        default="auto",
        title="Builder",
        description="`auto` takes a Dockerfile where there is one (and no binder/ folder), else repo2docker.",
    )
    dockerfile: str = Field(
        default="",
        title="Dockerfile",
        max_length=500,
        description="The Dockerfile's path inside the subdirectory, where it is not `Dockerfile`.",
    )
    build_args: dict[str, str] = Field(
        default_factory=dict,
        title="Build arguments",
        description="Values for the Dockerfile's ARG lines. They are public: never put a secret here.",
    )
    target: str = Field(
        default="",
        title="Target stage",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,127})?$",
        description="The stage of a Dockerfile to stop at.",
    )
    appendix: str = Field(
        default="", title="Appendix", description="Dockerfile lines that are built on top of the finished image."
    )
    extra_args: tuple[str, ...] = Field(
        default=(),
        title="Extra arguments",
        max_length=100,
        description="Further arguments for `podman build`, or for repo2docker, one per entry.",
    )
    platform: str = Field(
        default="",
        title="Platform",
        pattern=r"^([a-z0-9]+/[a-z0-9]+(/[a-z0-9]+)?)?$",
        description="For example linux/arm64; empty: the host's own.",
    )

    cpu: str = Field(
        default="2", title="CPU limit", pattern=_QUANTITY, description="Cores, as Kubernetes writes them: 2 or 500m."
    )
    memory_request: str = Field(
        default="512Mi", title="Memory request", pattern=_QUANTITY, description="Memory set aside for the build."
    )
    memory_limit: str = Field(
        default="4Gi", title="Memory limit", pattern=_QUANTITY, description="Memory the build may use at most."
    )
    storage_limit: str = Field(
        default="20Gi",
        title="Storage limit",
        pattern=_QUANTITY,
        description="Disk the build may use at most; no image larger than this is pushed.",
    )
    timeout_minutes: float = Field(
        default=60,
        title="Timeout (minutes)",
        gt=0,
        le=24 * 60,
        description="How long fetch, build and push may take together.",
    )
    node_selector: dict[str, str] = Field(
        default_factory=dict, title="Node selector", description="Labels a node must have (clusters only)."
    )
    tolerations: tuple[dict[str, Any], ...] = Field(
        default=(),
        title="Tolerations",
        description="Taints the pod tolerates, in Kubernetes' spelling (clusters only).",
    )
    log_tail_lines: int = Field(
        default=0, title="Log tail", ge=0, description="When joining: show only this many earlier lines. 0: all."
    )
    if_unknown: Literal["fail", "build"] = Field(
        default="fail",
        title="If the registry does not answer",
        description="`fail` with an error, or `build` without knowing whether the image exists.",
    )
    rebuild: bool = Field(default=False, title="Rebuild", description="Build although the image exists.")


def parse_options(values: dict[str, Any]) -> BuildOptions:
    """Return checked options from plain data. Raises `InvalidRequest` naming the first bad field."""
    try:
        return BuildOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = printable(".".join(str(part) for part in first["loc"]))
        raise InvalidRequest(f"`options.{where}`: {first['msg']}.", "See the parameter table in the README.") from error


@dataclass(frozen=True, slots=True)
class Plan:
    """One build, fully decided. Equal plans have equal names, whoever makes them."""

    repository: Repository
    commit: str
    image: ImageName
    options: BuildOptions
    builder_image: str
    #: Hex SHA-256 of what the image is.
    request: str
    #: Hex SHA-256 of the request, the builder image and the target image.
    build: str
    #: The pod's name: the lock.
    name: str
    #: What the hashes were made of, in plain data; stored with the pod and compared on joining.
    identity: dict[str, Any] = field(compare=False, repr=False, hash=False)


def plan_build(
    repository: Repository, commit: str, image: str | None, options: BuildOptions, settings: HostSettings
) -> Plan:
    """Return the plan for building a commit on a host.

    Raises `InvalidRequest` when the options contradict each other, the host does not allow the
    repository, or the image has no usable name.
    """
    if not is_commit(commit):
        raise InvalidRequest(f"{printable(commit)!r} is not a full commit id.", "Resolve the ref first.")
    if repository.scheme == "file" and not settings.sees_folders:
        raise InvalidRequest(f"{repository} is a folder of one machine.", "Only a local engine builds those.")
    if not settings.allows(repository.host or "file", repository.path):
        raise InvalidRequest(
            f"This host does not build {repository}.", "Ask its operator to add it to `allowed_repositories`."
        )
    _check_options(options)
    request_identity = _request_identity(repository, commit, options)
    request = _hash(request_identity)
    target = derive_image(settings.registry, repository) if image is None else parse_image(image)
    if not target.tag:
        target = ImageName(target.registry, target.repository, _derived_tag(repository, commit, options, request))
    identity = {"request": request_identity, "builder_image": settings.builder_image, "image": str(target)}
    size = len(canonical(identity).encode())
    if size > PUBLIC_LIMIT_BYTES:
        raise InvalidRequest(
            f"Build arguments, appendix and extra arguments take {size // 1024} KiB together.",
            f"Stay under {PUBLIC_LIMIT_BYTES // 1024} KiB: move large content into the repository.",
        )
    build = _hash(identity)
    return Plan(
        repository=repository,
        commit=commit,
        image=target,
        options=options,
        builder_image=settings.builder_image,
        request=request,
        build=build,
        name=pod_name(repository, build),
        identity=identity,
    )


def canonical(data: object) -> str:
    """Return the one JSON text of plain data: sorted keys, no blanks."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _hash(data: object) -> str:
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def _request_identity(repository: Repository, commit: str, options: BuildOptions) -> dict[str, Any]:
    return {
        "repository": repository.key,
        "commit": commit,
        "subdirectory": check_path(options.subdirectory, "options.subdirectory"),
        "builder": options.builder,
        "dockerfile": check_path(options.dockerfile, "options.dockerfile"),
        "target": options.target,
        "build_args": options.build_args,
        "appendix": options.appendix,
        "extra_args": list(options.extra_args),
        "platform": options.platform,
    }


def _derived_tag(repository: Repository, commit: str, options: BuildOptions, request: str) -> str:
    """Return the tag for an image without one: the commit, and the request where options change the image."""
    plain = _hash(_request_identity(repository, commit, BuildOptions()))
    short = commit[:_COMMIT_DIGITS]
    return short if request == plain else f"{short}-{request[:_REQUEST_DIGITS]}"


def _check_options(options: BuildOptions) -> None:
    for name, value in options.build_args.items():
        if not _BUILD_ARG.fullmatch(name):
            raise InvalidRequest(
                f"`options.build_args` has the name {printable(name)!r}.",
                "A name has letters, digits and _, and does not start with a digit.",
            )
        _check_text(value, f"The build argument {name}")
    for text, what in ((options.appendix, "appendix"), *((a, "extra_args") for a in options.extra_args)):
        _check_text(text, f"`options.{what}`")
    if options.builder == "repo2docker" and (options.dockerfile or options.target):
        raise InvalidRequest(
            "`options.dockerfile` and `options.target` do not go with the builder repo2docker.",
            "Leave them empty, or choose the builder dockerfile.",
        )


def _check_text(text: str, what: str) -> None:
    """Refuse what JSON can carry, but no program's arguments can."""
    if "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidRequest(f"{what} holds a NUL character or half a surrogate pair.", "Remove it.")
