"""The flow `build-image`: a git repository in, a container image out."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact, acreate_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.runtime import flow_run
from pydantic import Field

import podbuild
from blocks import load_host
from flows.ship_logs import run_log
from podbuild import Build, BuildOptions, Finished, Gap, Host, Line, Pending, Plan, Repository, Result

#: What the API and the form check before a run is stored: a password in a URL is refused, and not kept. All else is
#: left to the flow, whose errors say what to change.
_NO_PASSWORD = {"pattern": r"^(?!https?://[^/]*@)(?!ssh://[^/@]*:[^/@]*@)", "maxLength": 1024}
_DEFAULT_OPTIONS = BuildOptions()


def name_run() -> str:
    """Return a short name for the run: the repository's last parts, and the ref."""
    parameters = flow_run.get_parameters()
    try:
        repository = podbuild.parse_repository(str(parameters.get("repo", "")))
    except podbuild.InvalidRequest:
        return "build-image"
    return f"{repository.short_name}@{parameters.get('ref', 'HEAD')}"[:100]


@flow(name="build-image", flow_run_name=name_run)
async def build_image(
    repo: Annotated[str, Field(json_schema_extra=_NO_PASSWORD)],
    ref: str = "HEAD",
    image: str | None = None,
    host: str = "local-engine/default",
    options: BuildOptions = _DEFAULT_OPTIONS,
) -> dict[str, Any]:
    """Build a git repository at a ref and push the image. Whoever asks for the same gets the same build.

    Returns the image, digest, reference (image@digest), commit, build (the pod's name), outcome
    (built, joined or found) and the seconds per phase. The same stands in the run's artifacts
    `image` and `image-result`, and in the event `podbuild.image.ready`. Raises one of podbuild's
    errors, each with a remedy.

    Args:
        repo: The repository's address: https, http, ssh, git@host:path, or file:///path on a local engine. No password.
        ref: A branch, a tag, or a commit.
        image: Where to push: registry/name, perhaps with a :tag. Empty: derived from the repository and the commit.
        host: The block that says where the build runs, as KIND/NAME.
        options: What changes the image, and how it is built.
    """
    where = await load_host(host)
    async with where:
        asked = await where.now()
        repository = podbuild.parse_repository(repo)
        commit = await resolve_commit(where, repository, ref)
        plan = await derive_name(where, repository, commit, image, options)
        result = await find_image(where, plan)
        if result is None:
            build = await submit_pod(where, plan, asked)
            await stream_logs(build)
            result = await check_completion(build)
    await publish(result, plain_http=plan.image.registry in where.settings.plain_http_registries)
    return result.as_dict()


@task(name="resolve-commit", cache_policy=NO_CACHE)
async def resolve_commit(where: Host, repository: Repository, ref: str) -> str:
    """Ask the git server which commit the ref is."""
    credentials = where.settings.git_credentials_for(repository.host, repository.path)
    resolved = await podbuild.resolve_commit(repository, ref, credentials)
    get_run_logger().info("%s is commit %s%s", ref, resolved.commit, f" ({resolved.ref})" if resolved.ref else "")
    return resolved.commit


@task(name="derive-name", cache_policy=NO_CACHE)
async def derive_name(
    where: Host, repository: Repository, commit: str, image: str | None, options: BuildOptions
) -> Plan:
    """Work out the image's name and the pod's name from what was asked for."""
    plan = podbuild.plan_build(repository, commit, image or None, options, where.settings)
    get_run_logger().info("Image %s, pod %s", plan.image, plan.name)
    return plan


@task(name="find-image", cache_policy=NO_CACHE)
async def find_image(where: Host, plan: Plan) -> Result | None:
    """Look whether the registry holds exactly this image already."""
    logger = get_run_logger()
    found = await podbuild.find_built(plan, where.settings, note=logger.info)
    if found is not None:
        logger.info("The registry holds it already: %s", found.reference)
    else:
        logger.info("The registry does not hold it yet")
    return found


@task(name="submit-pod", cache_policy=NO_CACHE)
async def submit_pod(where: Host, plan: Plan, asked: datetime) -> Build:
    """Create the build's pod, or join the one that is there: its name is the lock."""
    logger = get_run_logger()
    build = await podbuild.submit(where, plan, asked=asked, note=logger.info)
    logger.info("%s pod %s", "Created" if build.outcome == "built" else "Joined", build.name)
    return build


@task(name="stream-logs", cache_policy=NO_CACHE)
async def stream_logs(build: Build) -> None:
    """Follow the build to its end; its log becomes this run's log, from the first line."""
    async with run_log(get_run_logger()) as log:
        async for event in build.events():
            match event:
                case Line():
                    log.add(event)
                case Pending(reason):
                    log.say(f"Waiting: {reason}")
                case Gap(text=text):
                    log.say(text)
                case Finished(error):
                    log.say("The pod has finished." if error is None else f"{type(error).__name__}: {error.problem}")


@task(name="check-completion", cache_policy=NO_CACHE)
async def check_completion(build: Build) -> Result:
    """Ask for the proof: both containers' ends, the digest, and the registry's own word."""
    logger = get_run_logger()
    result = await build.result()
    logger.info("%s is in the registry", result.reference)
    if await build.tag_moved(result):
        logger.warning("%s holds another image by now: a later push moved the tag", result.image)
    return result


async def publish(result: Result, *, plain_http: bool) -> None:
    """Leave the answer where people and other flows find it: two artifacts and an event."""
    data = result.as_dict()
    page = describe(result, plain_http=plain_http)
    await acreate_markdown_artifact(key="image", markdown=page, description=result.reference)
    row = {**data, "seconds": sum(result.seconds.values())}
    await acreate_table_artifact(key="image-result", table=[row], description="The answer, for other flows")
    emit_event(
        "podbuild.image.ready",
        resource={"prefect.resource.id": f"podbuild.image.{result.image}", "prefect.resource.name": result.image},
        payload=data,
    )


def describe(result: Result, *, plain_http: bool) -> str:
    """Return the page about an image: what it is, and how to run it."""
    insecure = " --tls-verify=false" if plain_http else ""
    phases = "".join(f"| {phase} | {seconds:.1f} |\n" for phase, seconds in result.seconds.items())
    timing = f"\n| phase | seconds |\n|---|---|\n{phases}" if phases else ""
    return (
        f"# {result.image}\n\n"
        f"| {result.outcome} | |\n|---|---|\n"
        f"| digest | `{result.digest}` |\n"
        f"| commit | `{result.commit}` |\n"
        f"| pod | `{result.build}` |\n\n"
        f"Run it:\n\n```sh\npodman run --rm{insecure} \\\n  {result.reference}\n```\n{timing}"
    )
