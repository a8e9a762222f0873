"""The container that holds the credentials: it fetches the commit, takes over the built image, and pushes it.

It never runs anything that comes from the repository: git runs without hooks, and what `build`
left is copied by descriptor, checked, stamped, and only then pushed. Standard library only.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from meeting import (
    WORK,
    Failure,
    PartnerLost,
    announce,
    await_death,
    await_start,
    finish,
    is_full,
    keep_deadline,
    read_pod,
    say,
    system_failure,
    take_lock,
)

SECRET = Path("/podbuild/secret")
TAKEN = Path("/take/image")
TEMPORARY = Path("/tmp")  # noqa: S108 - the container's own tmpfs
SOURCE = WORK / "source"
#: Manifests and configs are a few KB; anything near this is an attack or a mistake.
DOCUMENT_LIMIT = 4 * 1024 * 1024
PUSH_TRIES = 4
_CHUNK = 1024 * 1024
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = re.compile(r"application/vnd\.oci\.image\.layer\.v1\.tar(\+gzip|\+zstd)?")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def main() -> None:
    """Fetch, wait, take over, push, report."""
    started = time.time()
    pod = read_pod()
    keep_deadline(pod["deadline_seconds"], started)
    take_lock("courier")
    seconds = {}
    try:
        fetch(pod)
        seconds["fetch"] = time.time() - started
        announce("source.ready")
        built = await_build(await_start("build"))
        begun = time.time()
        seconds["build"] = number(built.get("seconds"))
        manifest = take_over(pod)
        digest = push(pod, manifest)
        seconds["push"] = time.time() - begun
    except Failure as failure:
        finish(failure)
    except OSError as error:
        finish(system_failure("courier", error))
    finish(
        {
            "commit": pod["commit"],
            "digest": digest,
            "seconds": {phase: round(s, 2) for phase, s in seconds.items()},
            "isolation": str(built.get("isolation", ""))[:20],
            "builder": str(built.get("builder", ""))[:20],
        }
    )


def number(value: object) -> float:
    """Return a number that `build` reported; 0 for anything that is none."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


# --- fetching ---------------------------------------------------------------------------------------------


def fetch(pod: dict[str, Any]) -> None:
    """Check out exactly the commit, with its submodules, into the shared volume."""
    url, commit = pod["url"], pod["commit"]
    say(f"Fetching {commit} from {pod['source']}")
    environment = git_environment(pod)
    SOURCE.mkdir()
    git(environment, "init", "--quiet", f"--object-format={'sha256' if len(commit) == 64 else 'sha1'}")
    # The address that relative addresses of submodules start from.
    git(environment, "remote", "add", "origin", url)
    fetch_options = ("--quiet", "--no-tags", "--no-recurse-submodules", "--force")
    try:
        git(environment, "fetch", *fetch_options, "--depth=1", "--", url, commit)
    except Failure as failure:
        if failure.report["error"] != "RefNotFound":
            raise
        # This server hands out no commit by its id (dumb HTTP, or an old server): take everything, then look.
        say("The server does not hand out single commits; fetching all of its branches and tags.")
        git(environment, "fetch", *fetch_options, "--", url, "+refs/*:refs/podbuild/*")
    git(environment, "checkout", "--quiet", "--detach", commit, "--")
    if git(environment, "rev-parse", "HEAD").strip() != commit:
        raise Failure(
            "RefNotFound", f"{pod['source']} did not give the commit {commit}.", "Check that the commit exists."
        )
    if (SOURCE / ".gitmodules").exists():
        say("Fetching submodules")
        # A submodule never gets the main repository's leave to read local paths (CVE-2022-39253).
        modules = {**environment, "GIT_ALLOW_PROTOCOL": "https:http:ssh"}
        depth = ("--depth=1",)
        try:
            git(modules, "submodule", "update", "--init", "--recursive", "--quiet", *depth, phase="submodules")
        except Failure:
            git(modules, "submodule", "update", "--init", "--recursive", "--quiet", phase="submodules")
    say(f"Fetched {commit}")


def git_environment(pod: dict[str, Any], secret: Path = SECRET, temporary: Path = TEMPORARY) -> dict[str, str]:
    """Return git's environment: no prompts, no hooks, and credentials only through our helper."""
    helper = [sys.executable, str(Path(__file__).resolve()), "credential", pod["url"], str(secret)]
    allowed = "https:http:ssh" + (":file" if pod["url"].startswith("file:") else "")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(temporary),
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": allowed,
        "GIT_LFS_SKIP_SMUDGE": "1",
    }
    settings = {
        "core.hooksPath": "/dev/null",
        "credential.useHttpPath": "true",
        "credential.helper": f"!{shlex.join(helper)}",
        "http.followRedirects": "initial",
        "http.lowSpeedLimit": "1",
        "http.lowSpeedTime": "60",
        "advice.detachedHead": "false",
        "gc.auto": "0",
        "maintenance.auto": "0",
    }
    for number, (key, value) in enumerate(settings.items()):
        environment[f"GIT_CONFIG_KEY_{number}"] = key
        environment[f"GIT_CONFIG_VALUE_{number}"] = value
    environment["GIT_CONFIG_COUNT"] = str(len(settings))
    if ssh := ssh_command(pod["url"], secret, temporary):
        environment["GIT_SSH_COMMAND"] = ssh
    return environment


def git(environment: dict[str, str], *arguments: str, phase: str = "fetch") -> str:
    """Run git in the checkout and return what it prints. Raises a typed `Failure`; git's words are not repeated raw."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=SOURCE,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    raise git_failure(done.stderr, phase)


#: What git says → which error that is. The first match wins.
GIT_SAYS = (
    (r"not our ref|couldn't find remote ref|no such remote ref|does not allow request|unadvertised object"
     r"|reference is not a tree|unable to read tree|dumb http transport does not support", "RefNotFound",
     "The git server does not hand out this commit.", "Check that the commit exists, and is on a branch or a tag."),
    (r"Authentication failed|could not read (Username|Password)|Permission denied|returned error: 40[13]"
     r"|Host key verification",
     "AccessDenied", "The git server refused the credentials, or wants some.",
     "Store credentials for this server in a git-credentials block and name it in the host block."),
    (r"not found|does not appear to be a git repository|does not exist", "SourceUnavailable",
     "The git server has no such repository, or hides it.",
     "Check the address; for a private one, name a git-credentials block in the host block."),
    (r"No space left", "OutOfDisk", "There is no disk space left for the checkout.",
     "Free some, or raise `options.storage_limit`."),
    (r"transport '\w+' not allowed", "InvalidRequest", "The repository refers to an address that podbuild refuses.",
     "Use https, http or ssh addresses for submodules."),
)  # fmt: skip


def git_failure(text: str, phase: str) -> Failure:
    """Return the typed failure for what git printed."""
    where = " (while fetching submodules)" if phase == "submodules" else ""
    for pattern, error, problem, remedy in GIT_SAYS:
        if re.search(pattern, text):
            return Failure(error, problem.removesuffix(".") + where + ".", remedy, phase="fetch")
    return Failure(
        "SourceUnavailable",
        f"git could not fetch the commit{where}: {last_line(text)}",
        "Try again; if it stays, check the repository's address from this host.",
        phase="fetch",
    )


def last_line(text: str) -> str:
    """Return the last line that git printed, without control characters and without anything like userinfo."""
    lines = [line for line in text.splitlines() if line.strip()]
    shown = re.sub(r"(?<=://)[^/@\s]*@", "***@", lines[-1] if lines else "no reason given")
    return "".join(c for c in shown if c.isprintable())[:300]


def git_credentials(secret: Path = SECRET) -> list[dict[str, str]]:
    """Return what the host gave for git servers: host, path, username, password, ssh_key, known_hosts."""
    try:
        credentials: list[dict[str, str]] = json.loads((secret / "git.json").read_text())
    except FileNotFoundError:
        return []
    return credentials


def plain(path: str) -> str:
    """Return a repository's path without what spellings differ in."""
    return path.strip("/").removesuffix(".git").rstrip("/")


def covering(credentials: list[dict[str, str]], host: str, path: str) -> dict[str, str] | None:
    """Return the credentials with the longest path that covers this repository, or None."""
    offered = plain(path)
    fitting = [
        c
        for c in credentials
        if c["host"].lower() == host.lower()
        and (not plain(c["path"]) or f"{offered}/".startswith(plain(c["path"]) + "/"))
    ]
    return max(fitting, key=lambda c: len(c["path"]), default=None)


def answer_git(question: str, url: str, credentials: list[dict[str, str]]) -> str:
    """Be git's credential helper: answer only for a host and path that credentials were stored for.

    Over plain HTTP only if the repository's own ``url`` is: a submodule's address is not to be trusted with that.
    """
    asked = dict(line.split("=", 1) for line in question.splitlines() if "=" in line)
    if asked.get("protocol") not in ("https", urlsplit(url).scheme) or asked["protocol"] not in ("https", "http"):
        return ""
    path = asked.get("path", "")
    if {".", ".."} & set(unquote(path).split("/")):  # a client resolves these: the path is not what it begins with
        return ""
    found = covering(credentials, asked.get("host", ""), path)
    if not found or not found["password"]:
        return ""
    return f"username={found['username'] or 'git'}\npassword={found['password']}\n"


def ssh_command(url: str, secret: Path = SECRET, temporary: Path = TEMPORARY) -> str:
    """Return the ssh command for git, with the key that covers this repository; "" for other schemes."""
    parts = urlsplit(url)
    if parts.scheme != "ssh":
        return ""
    host = parts.netloc.rpartition("@")[2]
    found = covering(git_credentials(secret), host, parts.path) or {"ssh_key": "", "known_hosts": ""}
    options = ["-oBatchMode=yes", "-oConnectTimeout=30"]
    if found["ssh_key"]:
        key = temporary / "ssh_key"
        key.touch(0o600)
        key.write_text(found["ssh_key"].strip() + "\n")
        options += ["-i", str(key), "-oIdentitiesOnly=yes"]
    if found["known_hosts"]:
        hosts = temporary / "known_hosts"
        hosts.write_text(found["known_hosts"].strip() + "\n")
        options += [f"-oUserKnownHostsFile={hosts}", "-oStrictHostKeyChecking=yes"]
    else:
        options += ["-oUserKnownHostsFile=/dev/null", "-oStrictHostKeyChecking=accept-new"]
    return shlex.join(["ssh", *options])


# --- taking over ------------------------------------------------------------------------------------------


def await_build(lock: int, work: Path = WORK) -> dict[str, Any]:
    """Wait for the end of `build` and return its result. Raises `PartnerLost` if it left none, or an error."""
    await_death(lock)
    folder = os.open(work, os.O_PATH | os.O_DIRECTORY)
    try:
        result = document(read_document(folder, ["result.json"]))
    except (OSError, Failure):
        raise PartnerLost("The container build ended without a result.") from None
    finally:
        os.close(folder)
    if "error" in result:
        raise PartnerLost("The build failed.")
    return result


def open_inside(folder: int, path: list[str]) -> int:
    """Open a regular file below a folder for reading, following no link anywhere on the way."""
    here = os.dup(folder)
    try:
        for part in path[:-1]:
            deeper = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = deeper
        # O_NONBLOCK: opening a pipe that was left in a file's place must not hang.
        opened = os.open(path[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise bad_image("holds something that is not a regular file")
    return opened


def read_document(folder: int, path: list[str]) -> bytes:
    """Return a small file below a folder."""
    with os.fdopen(open_inside(folder, path), "rb") as file:
        content = file.read(DOCUMENT_LIMIT + 1)
    if len(content) > DOCUMENT_LIMIT:
        raise bad_image("has a manifest or config of more than 4 MiB")
    return content


def bad_image(what: str) -> Failure:
    """Return the failure for a layout that no honest build leaves."""
    return Failure(
        "BuildFailed",
        f"The image that the build left {what}.",
        "Look at what the repository's steps do: the layout was changed by something other than the builder.",
        phase="push",
    )


def take_over(pod: dict[str, Any], work: Path = WORK, taken: Path = TAKEN) -> bytes:
    """Copy the finished image into a folder of our own, checking every byte; return its stamped manifest.

    Only what the index names is taken: one manifest, its config, its layers. Each is a regular
    file, has the digest and the size it is named by, and brings no `urls` of its own. The manifest
    is written anew: whatever else was in it stays behind.
    """
    blobs = taken / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layout = os.open(work, os.O_PATH | os.O_DIRECTORY)
    try:
        index = document(read_document(layout, ["image", "index.json"]))
        manifests = index.get("manifests")
        if not isinstance(manifests, list) or len(manifests) != 1:
            raise bad_image("is not a single image")
        manifest = document(read_blob(layout, manifests[0], {_MANIFEST}))
        config = document(read_blob(layout, manifest.get("config"), {_CONFIG}))
        layers = manifest.get("layers")
        if not isinstance(layers, list):
            raise bad_image("has no list of layers")
        room = int(pod["size_limit"])
        for layer in layers:
            room -= copy_blob(layout, layer, blobs, room)
    except OSError as error:
        if is_full(error):
            raise
        raise bad_image("lacks a file, or hides one behind a link") from error
    finally:
        os.close(layout)
    stamp(config, pod)
    stamped = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": write_blob(blobs, written(config), _CONFIG),
            "layers": [{key: layer[key] for key in ("mediaType", "digest", "size")} for layer in layers],
        }
    ).encode()
    entry = write_blob(blobs, stamped, _MANIFEST)
    (taken / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (taken / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return stamped


def document(content: bytes) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise bad_image("has a manifest or config that is not JSON")
    return parsed


def written(content: dict[str, Any]) -> bytes:
    """Return a JSON object as bytes. NaN, which Python reads, is no JSON."""
    try:
        return json.dumps(content, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise bad_image("has a config that is not JSON") from None


def checked(descriptor: Any) -> tuple[str, int]:
    """Return a descriptor's hex digest and size, if it is one that we accept."""
    if not isinstance(descriptor, dict):
        raise bad_image("has a malformed descriptor")
    if "urls" in descriptor or "data" in descriptor:
        raise bad_image("refers to content from elsewhere")
    match = _DIGEST.fullmatch(str(descriptor.get("digest")))
    size = descriptor.get("size")
    if not match or type(size) is not int or size < 0 or not isinstance(descriptor.get("mediaType"), str):
        raise bad_image("has a malformed descriptor")
    return match[1], size


def read_blob(layout: int, descriptor: Any, types: set[str]) -> bytes:
    """Return a small blob whose digest, size and type are as its descriptor says."""
    name, size = checked(descriptor)
    if descriptor["mediaType"] not in types:
        raise bad_image("has a manifest or config of a type that is not OCI's")
    content = read_document(layout, ["image", "blobs", "sha256", name])
    if len(content) != size or hashlib.sha256(content).hexdigest() != name:
        raise bad_image("has a blob that is not what its digest says")
    return content


def copy_blob(layout: int, descriptor: Any, blobs: Path, room: int) -> int:
    """Copy one layer and return its size. The copy is what was checked, whatever happens to the original."""
    name, size = checked(descriptor)
    if not _LAYER.fullmatch(descriptor["mediaType"]):
        raise bad_image("has a layer of a type that is not OCI's")
    if size > room:
        raise Failure(
            "OutOfDisk", "The image is larger than the build may write.", "Raise `options.storage_limit`.", phase="push"
        )
    if (blobs / name).exists():
        if (blobs / name).stat().st_size != size:
            raise bad_image("names a layer twice, with two sizes")
        return 0
    seen, count = hashlib.sha256(), 0
    original = open_inside(layout, ["image", "blobs", "sha256", name])
    with os.fdopen(original, "rb") as source, (blobs / name).open("xb") as target:
        while count <= size and (chunk := source.read(_CHUNK)):
            seen.update(chunk)
            count += len(chunk)
            target.write(chunk)
    if count != size or seen.hexdigest() != name:
        raise bad_image("has a layer that is not what its digest says")
    return size


def stamp(config: dict[str, Any], pod: dict[str, Any]) -> None:
    """Set the labels that say where the image comes from. The repository cannot forge them: they are set last."""
    inner = config.setdefault("config", {})
    if not isinstance(inner, dict):
        raise bad_image("has a malformed config")
    labels = inner.get("Labels")
    labels = dict(labels) if isinstance(labels, dict) else {}
    labels = {k: v for k, v in labels.items() if not k.startswith("io.podbuild.")}
    labels["org.opencontainers.image.source"] = pod["source"]
    labels["org.opencontainers.image.revision"] = pod["commit"]
    labels["org.opencontainers.image.created"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels["io.podbuild.request"] = pod["request"]
    inner["Labels"] = labels


def write_blob(blobs: Path, content: bytes, media_type: str) -> dict[str, Any]:
    """Write a blob of ours and return its descriptor."""
    name = hashlib.sha256(content).hexdigest()
    (blobs / name).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(content)}


# --- pushing ----------------------------------------------------------------------------------------------

#: What skopeo says → which error that is, and whether another try can help. The first match wins.
SKOPEO_SAYS = (
    (r"immutab", "PushUnconfirmed", "The registry refuses to move the tag {image}.",
     "Choose another tag, or allow this one to move.", False),
    (r"unauthorized|authentication required|denied|forbidden|status: 40[13]", "AccessDenied",
     "The registry {registry} refused the push to {image}.",
     "Check the registry-credentials block that the host block names: it needs the right to push.", False),
    (r"server gave HTTP response to HTTPS|first record does not look like a TLS", "RegistryUnavailable",
     "The registry {registry} speaks plain HTTP.",
     "Add it to `plain_http_registries` in the host block, if that is what you want.", False),
    (r"x509|certificate", "RegistryUnavailable", "The certificate of the registry {registry} is not trusted.",
     "Give the host block a `ca_bundle` that holds its issuer.", False),
    (r"no space left|insufficient storage|quota", "RegistryUnavailable", "The registry {registry} has no room.",
     "Free some there.", False),
)  # fmt: skip


def push(pod: dict[str, Any], manifest: bytes) -> str:
    """Push the image that was taken over and return its digest, which is also the one we computed.

    A push is idempotent, so an interrupted one is tried again, 4 times in all. skopeo's words
    are never shown: they may quote headers.
    """
    image: str = pod["image"]
    registry = image.split("/", 1)[0]
    say(f"Pushing {image}")
    wanted = "sha256:" + hashlib.sha256(manifest).hexdigest()
    command = ["skopeo", "copy", "--quiet", "--retry-times=0", "--preserve-digests"]
    command += ["--digestfile", str(TEMPORARY / "digest")]
    command += ["--dest-tls-verify=false"] if registry in pod["plain_http"] else []
    if (authfile := registry_login(registry)) is not None:
        command += ["--dest-authfile", str(authfile)]
    command += [f"oci:{TAKEN}", f"docker://{image}"]
    for wait in backoff():
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="backslashreplace", check=False
        )
        if done.returncode == 0:
            break
        failure, again = push_failure(done.stderr, image, registry)
        if not again or wait is None:
            raise failure
        say(f"The push did not go through; trying again in {wait} s.")
        time.sleep(wait)
    pushed = (TEMPORARY / "digest").read_text().strip()
    if pushed != wanted:
        raise Failure(
            "PushUnconfirmed",
            "skopeo pushed another digest than the one checked.",
            "Run the build again.",
            phase="push",
        )
    shutil.rmtree(TAKEN, ignore_errors=True)
    say(f"Pushed {image.rpartition(':')[0]}@{wanted}")
    return wanted


def backoff() -> Iterator[int | None]:
    """Yield the pause after each try; None after the last."""
    yield from (2**n for n in range(PUSH_TRIES - 1))
    yield None


def push_failure(text: str, image: str, registry: str) -> tuple[Failure, bool]:
    """Return the typed failure for what skopeo printed, and whether another try can help."""
    # The image's own name may hold any of the words that are looked for.
    repository = image.rpartition(":")[0].partition("/")[2]
    text = re.sub(rf"(?<=[/=\"']){re.escape(repository)}(?![\w-])", "", text)
    for pattern, error, problem, remedy, again in SKOPEO_SAYS:
        if re.search(pattern, text, re.IGNORECASE):
            return Failure(error, problem.format(image=image, registry=registry), remedy, phase="push"), again
    problem = f"The registry {registry} could not be reached, or broke off, while {image} was pushed."
    remedy = "Check that the registry runs and that this host reaches it, then run the build again."
    return Failure("RegistryUnavailable", problem, remedy, phase="push"), True


def registry_login(registry: str, secret: Path = SECRET, temporary: Path = TEMPORARY) -> Path | None:
    """Write the login of this registry, and of no other, where skopeo reads it; None without one."""
    try:
        logins: list[dict[str, str]] = json.loads((secret / "registry.json").read_text())
    except FileNotFoundError:
        return None
    for login in logins:
        if login["host"].lower() == registry.lower():
            token = base64.b64encode(f"{login['username']}:{login['password']}".encode()).decode()
            path = temporary / "auth.json"
            path.touch(0o600)
            path.write_text(json.dumps({"auths": {registry: {"auth": token}}}))
            return path
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["credential"]:
        # The arguments that `git_environment` gave it, then git's own.
        repository, secret, operation = sys.argv[2:]
        if operation == "get":
            print(answer_git(sys.stdin.read(), repository, git_credentials(Path(secret))), end="")
    else:
        main()
