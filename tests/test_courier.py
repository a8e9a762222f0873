"""What `courier` does with what others left: an image from hostile hands, git's words, skopeo's words, logins."""

import base64
import hashlib
import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import courier
import meeting
import pytest
from meeting import Failure, PartnerLost

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
POD = {"source": "https://git.invalid/team/app", "commit": "c" * 40, "request": "r" * 64, "size_limit": 10_000}
LAYERS = (b"the first layer", b"the second layer")


class Layout:
    """An OCI layout as `build` leaves it, before somebody changes it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.image = work / "image"
        self.blobs = self.image / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        self.config: dict[str, Any] = {"architecture": "amd64", "os": "linux", "config": {"Labels": {"mine": "1"}}}
        self.manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "config": self.blob(json.dumps(self.config).encode(), CONFIG),
            "layers": [self.blob(layer, LAYER) for layer in LAYERS],
        }
        self.seal()

    def blob(self, content: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """Write a blob and return its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        (self.blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content), **more}

    def path(self, descriptor: dict[str, Any]) -> Path:
        """Return where a blob lies."""
        return self.blobs / str(descriptor["digest"]).removeprefix("sha256:")

    def seal(self) -> None:
        """Write the manifest as it is now, and the index that names it."""
        entry = self.blob(json.dumps(self.manifest).encode(), MANIFEST)
        (self.image / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A layout that is in order."""
    return Layout(tmp_path / "work")


def take(layout: Layout, tmp_path: Path, **pod: Any) -> dict[str, Any]:
    """Take the layout over and return the manifest that would be pushed."""
    manifest: dict[str, Any] = json.loads(courier.take_over({**POD, **pod}, layout.work, tmp_path / "taken"))
    return manifest


def taken_blob(tmp_path: Path, descriptor: dict[str, Any]) -> bytes:
    """Return what was taken over for a descriptor."""
    return (tmp_path / "taken/blobs/sha256" / str(descriptor["digest"]).removeprefix("sha256:")).read_bytes()


# --- taking over ------------------------------------------------------------------------------------------


def test_an_image_in_order_is_taken_over_byte_by_byte(layout: Layout, tmp_path: Path) -> None:
    """Layers are the same, the config is the same but for its labels, and the index names the stamped manifest."""
    manifest = take(layout, tmp_path)

    assert [taken_blob(tmp_path, layer) for layer in manifest["layers"]] == list(LAYERS)
    config = json.loads(taken_blob(tmp_path, manifest["config"]))
    assert {**config, "config": None} == {**layout.config, "config": None}
    (entry,) = json.loads((tmp_path / "taken" / "index.json").read_text())["manifests"]
    assert json.loads(taken_blob(tmp_path, entry)) == manifest


def test_what_was_taken_over_is_a_valid_layout(layout: Layout, tmp_path: Path) -> None:
    """Each blob has the digest it is named by and the size it is said to have; the index names what is returned."""
    taken = tmp_path / "taken"
    returned = courier.take_over(POD, layout.work, taken)

    (entry,) = json.loads((taken / "index.json").read_text())["manifests"]
    manifest = json.loads(returned)
    named = [entry, manifest["config"], *manifest["layers"]]
    assert taken_blob(tmp_path, entry) == returned
    for descriptor in named:
        content = taken_blob(tmp_path, descriptor)
        assert descriptor["digest"] == "sha256:" + hashlib.sha256(content).hexdigest()
        assert descriptor["size"] == len(content)
    assert len(list((taken / "blobs" / "sha256").iterdir())) == len(named)
    assert json.loads((taken / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert (entry["mediaType"], manifest["config"]["mediaType"]) == (MANIFEST, CONFIG)


def test_labels_say_where_the_image_comes_from_and_cannot_be_forged(layout: Layout, tmp_path: Path) -> None:
    """Ours win over the repository's, nothing under io.podbuild. is left of it, and its own labels stay."""
    forged = ("org.opencontainers.image.source", "org.opencontainers.image.revision", "io.podbuild.request")
    layout.config["config"]["Labels"] |= {**dict.fromkeys(forged, "forged"), "io.podbuild.other": "forged"}
    layout.manifest["config"] = layout.blob(json.dumps(layout.config).encode(), CONFIG)
    layout.seal()

    labels = json.loads(taken_blob(tmp_path, take(layout, tmp_path)["config"]))["config"]["Labels"]

    assert labels.pop("org.opencontainers.image.created").endswith("Z")
    assert labels == {
        "mine": "1",
        "org.opencontainers.image.source": POD["source"],
        "org.opencontainers.image.revision": POD["commit"],
        "io.podbuild.request": POD["request"],
    }


@pytest.mark.parametrize("config", [{}, {"config": {}}, {"config": {"Labels": None}}, {"config": {"Labels": [1]}}])
def test_a_config_without_labels_gets_ours(layout: Layout, tmp_path: Path, config: dict[str, Any]) -> None:
    """However little the builder wrote, the labels are there."""
    layout.manifest["config"] = layout.blob(json.dumps(config).encode(), CONFIG)
    layout.seal()

    stamped = json.loads(taken_blob(tmp_path, take(layout, tmp_path)["config"]))

    assert stamped["config"]["Labels"]["io.podbuild.request"] == POD["request"]


def test_nothing_else_of_the_manifest_is_pushed(layout: Layout, tmp_path: Path) -> None:
    """Annotations, subjects and artifact types of the repository's choosing stay behind, and so do stray files."""
    layout.manifest |= {"annotations": {"a": "b"}, "subject": layout.manifest["layers"][0], "artifactType": "x/y"}
    layout.manifest["layers"][0]["annotations"] = {"a": "b"}
    layout.seal()
    layout.blob(b"a blob that nothing names", LAYER)

    manifest = take(layout, tmp_path)

    assert set(manifest) == {"schemaVersion", "mediaType", "config", "layers"}
    assert all(set(layer) == {"mediaType", "digest", "size"} for layer in manifest["layers"])
    assert len(list((tmp_path / "taken" / "blobs" / "sha256").iterdir())) == 4


def test_a_layer_that_occurs_twice_is_taken_once(layout: Layout, tmp_path: Path) -> None:
    """Images with equal layers are in order."""
    layout.manifest["layers"] *= 2
    layout.seal()

    assert len(take(layout, tmp_path)["layers"]) == 4


def symlinked(layout: Layout, path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def secret(layout: Layout) -> Path:
    """A file that `courier` can read, and the repository must not get."""
    path = layout.work.parent / "secret"
    path.write_bytes(LAYERS[0])
    return path


def link_a_layer(layout: Layout) -> None:
    symlinked(layout, layout.path(layout.manifest["layers"][0]), secret(layout))


def link_the_index(layout: Layout) -> None:
    moved = layout.work / "index.json"
    (layout.image / "index.json").rename(moved)
    (layout.image / "index.json").symlink_to(moved)


def link_the_blobs(layout: Layout) -> None:
    elsewhere = layout.work / "elsewhere"
    layout.blobs.rename(elsewhere)
    layout.blobs.symlink_to(elsewhere)


def link_the_folder_of_folders(layout: Layout) -> None:
    elsewhere = layout.work / "elsewhere"
    layout.blobs.parent.rename(elsewhere)
    layout.blobs.parent.symlink_to(elsewhere)


def link_the_manifest(layout: Layout) -> None:
    (entry,) = json.loads((layout.image / "index.json").read_text())["manifests"]
    moved = layout.work / "manifest"
    layout.path(entry).rename(moved)
    layout.path(entry).symlink_to(moved)


def device_for_a_layer(layout: Layout) -> None:
    symlinked(layout, layout.path(layout.manifest["layers"][0]), Path("/dev/zero"))


def index_with(**changes: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        index = json.loads((layout.image / "index.json").read_text())
        index["manifests"][0] |= changes
        (layout.image / "index.json").write_text(json.dumps(index))

    return change


def nested_index(layout: Layout) -> None:
    inner = layout.blob((layout.image / "index.json").read_bytes(), "application/vnd.oci.image.index.v1+json")
    (layout.image / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [inner]}))


def docker_config(layout: Layout) -> None:
    layout.manifest["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json"
    layout.seal()


def huge_index(layout: Layout) -> None:
    index = json.loads((layout.image / "index.json").read_text())
    (layout.image / "index.json").write_text(json.dumps({**index, "x": "y" * courier.DOCUMENT_LIMIT}))


def huge_manifest(layout: Layout) -> None:
    layout.manifest["x"] = "y" * courier.DOCUMENT_LIMIT
    layout.seal()


def link_the_layout(layout: Layout) -> None:
    elsewhere = layout.work / "elsewhere"
    layout.image.rename(elsewhere)
    layout.image.symlink_to(elsewhere)


def pipe_for_a_layer(layout: Layout) -> None:
    path = layout.path(layout.manifest["layers"][0])
    path.unlink()
    os.mkfifo(path)


def pipe_for_the_index(layout: Layout) -> None:
    (layout.image / "index.json").unlink()
    os.mkfifo(layout.image / "index.json")


def folder_for_a_layer(layout: Layout) -> None:
    path = layout.path(layout.manifest["layers"][0])
    path.unlink()
    path.mkdir()


def other_bytes(layout: Layout) -> None:
    layout.path(layout.manifest["layers"][0]).write_bytes(LAYERS[0].upper())


def more_bytes(layout: Layout) -> None:
    layout.path(layout.manifest["layers"][0]).write_bytes(LAYERS[0] + b"more")


def another_config(layout: Layout) -> None:
    layout.path(layout.manifest["config"]).write_bytes(b"{}")


def config_of_the_same_size(layout: Layout) -> None:
    path = layout.path(layout.manifest["config"])
    path.write_bytes(path.read_bytes().replace(b"amd64", b"arm64"))


def missing_layer(layout: Layout) -> None:
    layout.path(layout.manifest["layers"][0]).unlink()


def manifest_with(**changes: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.manifest |= changes
        layout.seal()

    return change


def layer_with(**changes: Any) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.manifest["layers"][1] |= changes
        layout.seal()

    return change


def config_of(content: bytes) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        layout.manifest["config"] = layout.blob(content, CONFIG)
        layout.seal()

    return change


def index_of(content: str) -> Callable[[Layout], None]:
    def change(layout: Layout) -> None:
        (layout.image / "index.json").write_text(content)

    return change


def two_sizes(layout: Layout) -> None:
    layout.manifest["layers"].append({**layout.manifest["layers"][0], "size": 1})
    layout.seal()


def no_layout(layout: Layout) -> None:
    layout.image.rename(layout.work / "gone")


def two_images(layout: Layout) -> None:
    index = json.loads((layout.image / "index.json").read_text())
    index["manifests"] *= 2
    (layout.image / "index.json").write_text(json.dumps(index))


def huge_document(layout: Layout) -> None:
    config_of(json.dumps({"x": "y" * courier.DOCUMENT_LIMIT}).encode())(layout)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(link_a_layer, id="a layer is a link to a file outside"),
        pytest.param(link_the_index, id="the index is a link"),
        pytest.param(link_the_blobs, id="the folder of blobs is a link"),
        pytest.param(link_the_layout, id="the whole layout is a link"),
        pytest.param(link_the_folder_of_folders, id="the folder of the folder of blobs is a link"),
        pytest.param(link_the_manifest, id="the manifest is a link"),
        pytest.param(device_for_a_layer, id="a layer is a link to a device without an end"),
        pytest.param(pipe_for_a_layer, id="a layer is a pipe"),
        pytest.param(pipe_for_the_index, id="the index is a pipe"),
        pytest.param(folder_for_a_layer, id="a layer is a folder"),
        pytest.param(other_bytes, id="a layer holds other bytes"),
        pytest.param(more_bytes, id="a layer holds more bytes"),
        pytest.param(another_config, id="the config is another"),
        pytest.param(config_of_the_same_size, id="the config is another of the same size"),
        pytest.param(missing_layer, id="a layer is missing"),
        pytest.param(no_layout, id="there is no layout"),
        pytest.param(two_sizes, id="a layer twice, with two sizes"),
        pytest.param(two_images, id="two images"),
        pytest.param(huge_document, id="a config of more than 4 MiB"),
        pytest.param(huge_manifest, id="a manifest of more than 4 MiB"),
        pytest.param(huge_index, id="an index of more than 4 MiB"),
        pytest.param(nested_index, id="an index of indexes"),
        pytest.param(
            index_with(mediaType="application/vnd.oci.image.index.v1+json"), id="a manifest that is called an index"
        ),
        pytest.param(
            index_with(mediaType="application/vnd.docker.distribution.manifest.v2+json"), id="a manifest of Docker's"
        ),
        pytest.param(index_with(urls=["http://127.0.0.1/"]), id="a manifest from elsewhere"),
        pytest.param(index_with(digest="sha256:../../../secret"), id="a manifest whose digest is a path"),
        pytest.param(index_with(digest="sha256:" + "A" * 64), id="a digest in upper case"),
        pytest.param(index_with(digest="sha256:" + "0" * 64 + "\n"), id="a digest and a newline"),
        pytest.param(index_with(size=5 * 2**20), id="a manifest that is said to be larger"),
        pytest.param(docker_config, id="a config of Docker's"),
        pytest.param(
            layer_with(mediaType="application/vnd.docker.image.rootfs.diff.tar.gzip"), id="a layer of Docker's"
        ),
        pytest.param(layer_with(urls=["http://127.0.0.1/"]), id="a layer from elsewhere"),
        pytest.param(layer_with(urls=[]), id="an empty list of addresses"),
        pytest.param(layer_with(data="eA=="), id="a layer inside its descriptor"),
        pytest.param(layer_with(digest="sha256:../../../../etc/passwd"), id="a digest that is a path"),
        pytest.param(layer_with(digest="sha512:" + "0" * 128), id="a digest of another kind"),
        pytest.param(layer_with(digest=["x"]), id="a digest that is a list"),
        pytest.param(layer_with(size=1), id="a size that is too small"),
        pytest.param(layer_with(size=-1), id="a negative size"),
        pytest.param(layer_with(size=True), id="a size that is a truth value"),
        pytest.param(layer_with(size="16"), id="a size that is a text"),
        pytest.param(
            layer_with(mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar"), id="a foreign layer"
        ),
        pytest.param(layer_with(mediaType=None), id="a layer without a type"),
        pytest.param(manifest_with(layers=None), id="no list of layers"),
        pytest.param(manifest_with(layers=5), id="a number for layers"),
        pytest.param(manifest_with(layers={"a": 1}), id="an object for layers"),
        pytest.param(manifest_with(layers=["x"]), id="a text for a layer"),
        pytest.param(manifest_with(config=None), id="no config"),
        pytest.param(manifest_with(config={"mediaType": []}), id="a config whose type is a list"),
        pytest.param(config_of(b"[]"), id="a config that is a list"),
        pytest.param(config_of(b'{"config": 5}'), id="a config whose inner part is a number"),
        pytest.param(config_of(b'{"config": {}, "x": NaN}'), id="a config with NaN"),
        pytest.param(config_of(b"\xff\xfe{"), id="a config that is no text"),
        pytest.param(config_of(b'{"x":' * 100_000), id="a config without an end"),
        pytest.param(config_of(b'{"x":' * 100_000 + b"1" + b"}" * 100_000), id="a config of 100,000 floors"),
        pytest.param(config_of(b'{"x":' + b"9" * 5000 + b"}"), id="a number of 5,000 digits"),
        pytest.param(index_of("{}"), id="an empty index"),
        pytest.param(index_of('{"manifests": [5]}'), id="an index of numbers"),
        pytest.param(index_of('{"manifests": {"0": 1}}'), id="an index of another shape"),
        pytest.param(index_of("no JSON"), id="an index that is no JSON"),
    ],
)
def test_an_image_that_no_honest_build_leaves_is_refused(
    layout: Layout, tmp_path: Path, damage: Callable[[Layout], None]
) -> None:
    """It is a typed failure of the build, whatever was done to it, and never a file from elsewhere."""
    damage(layout)

    with pytest.raises(Failure) as raised:
        take(layout, tmp_path)

    assert raised.value.report["error"] == "BuildFailed"
    assert raised.value.report["phase"] == "push"
    assert "The image that the build left" in raised.value.report["problem"]


def test_no_more_is_copied_than_a_layer_is_said_to_be(layout: Layout, tmp_path: Path) -> None:
    """A layer that has grown, or still grows, does not fill the disk."""
    with layout.path(layout.manifest["layers"][0]).open("r+b") as layer:
        layer.truncate(64 * 2**20)

    with pytest.raises(Failure, match="not what its digest says"):
        take(layout, tmp_path)

    assert sum(p.stat().st_size for p in (tmp_path / "taken" / "blobs" / "sha256").iterdir()) <= 2**20


def test_a_hard_link_gives_nothing_but_a_right_digest(layout: Layout, tmp_path: Path) -> None:
    """A link that cannot be told from a file is read, and refused, because its bytes are not what the digest says."""
    path = layout.path(layout.manifest["layers"][0])
    path.unlink()
    password = layout.work.parent / "password"
    password.write_text("canary")
    os.link(password, path)

    with pytest.raises(Failure) as raised:
        take(layout, tmp_path)

    assert "canary" not in json.dumps(raised.value.report)
    assert hashlib.sha256(b"canary").hexdigest() not in json.dumps(raised.value.report)


def test_an_image_larger_than_the_limit_is_refused(layout: Layout, tmp_path: Path) -> None:
    """All layers count together, and the remedy names the setting."""
    room = sum(map(len, LAYERS))
    take(layout, tmp_path / "a", size_limit=room)

    with pytest.raises(Failure) as raised:
        take(layout, tmp_path / "b", size_limit=room - 1)

    assert raised.value.report["error"] == "OutOfDisk"
    assert "storage_limit" in raised.value.report["remedy"]


def test_a_full_disk_is_no_fault_of_the_image() -> None:
    """ENOSPC while taking over is told apart from a damaged layout."""
    assert meeting.system_failure("courier", OSError(28, "No space left on device")).report["error"] == "OutOfDisk"
    assert meeting.system_failure("courier", OSError(122, "Quota")).report["error"] == "OutOfDisk"
    assert meeting.system_failure("courier", OSError(5, "Input/output error")).report["error"] == "PodLost"


# --- what build reports -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(None, id="nothing"),
        pytest.param("no JSON", id="no JSON"),
        pytest.param("[]", id="a list"),
        pytest.param('{"x":' * 100_000, id="too deep"),
        pytest.param('{"error": "BuildFailed"}', id="an error"),
        pytest.param("x" * (courier.DOCUMENT_LIMIT + 1), id="too large"),
    ],
)
def test_a_build_without_a_good_result_is_over(tmp_path: Path, result: str | None) -> None:
    """Whatever the result file is, `courier` ends with a consequence, and `build`'s own end says why."""
    (tmp_path / "build.lock").touch()
    if result is not None:
        (tmp_path / "result.json").write_text(result)
    lock = os.open(tmp_path / "build.lock", os.O_RDONLY)

    with pytest.raises(PartnerLost) as raised:
        courier.await_build(lock, tmp_path)

    os.close(lock)
    assert raised.value.report["consequence"] is True


def test_a_result_behind_a_link_is_no_result(tmp_path: Path) -> None:
    """The shared volume may point anywhere; nothing is followed."""
    (tmp_path / "build.lock").touch()
    (tmp_path / "elsewhere").write_text('{"seconds": 1}')
    (tmp_path / "result.json").symlink_to(tmp_path / "elsewhere")
    lock = os.open(tmp_path / "build.lock", os.O_RDONLY)

    with pytest.raises(PartnerLost):
        courier.await_build(lock, tmp_path)

    os.close(lock)


@pytest.mark.parametrize("reported", [None, "5", [], {}, -1, 1e400, float("nan"), 10**400])
def test_seconds_that_are_none_count_as_zero(reported: object) -> None:
    """A hostile build cannot break the report with its own time."""
    assert courier.number(reported) == 0.0


# --- git ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("fatal: remote error: upload-pack: not our ref " + "403" * 13 + "4", "RefNotFound", id="no ref"),
        pytest.param("fatal: couldn't find remote ref x", "RefNotFound", id="no remote ref"),
        pytest.param("fatal: unable to access 'u': The requested URL returned error: 403", "AccessDenied", id="403"),
        pytest.param("fatal: Authentication failed for 'https://git.invalid/x/'", "AccessDenied", id="wrong password"),
        pytest.param(
            "fatal: could not read Username for 'https://git.invalid': terminal prompts disabled",
            "AccessDenied",
            id="no password",
        ),
        pytest.param("git@h: Permission denied (publickey).\nfatal: Could not read", "AccessDenied", id="ssh key"),
        pytest.param("Host key verification failed.", "AccessDenied", id="host key"),
        pytest.param("fatal: repository 'https://git.invalid/x/' not found", "SourceUnavailable", id="no repository"),
        pytest.param(
            "fatal: '/podbuild/repository' does not appear to be a git repository", "SourceUnavailable", id="no folder"
        ),
        pytest.param(
            "fatal: unable to access 'http://127.0.0.1:40312/': Failed to connect to 127.0.0.1 port 40312",
            "SourceUnavailable",
            id="a port is no status",
        ),
        pytest.param("fatal: sha1 file '<stdout>' write error: No space left on device", "OutOfDisk", id="full disk"),
        pytest.param("fatal: transport 'file' not allowed", "InvalidRequest", id="S2 a submodule on the disk"),
        pytest.param("fatal: transport 'ext' not allowed", "InvalidRequest", id="S2 a submodule that is a command"),
        pytest.param("", "SourceUnavailable", id="no words"),
    ],
)
def test_gits_words_become_a_typed_failure(text: str, error: str) -> None:
    """Each says what to change."""
    failure = courier.git_failure(text, "fetch")

    assert failure.report["error"] == error
    assert failure.report["remedy"]
    assert failure.report["phase"] == "fetch"


def test_a_failure_of_a_submodule_says_so() -> None:
    """The repository itself was fetched: its address is not what is to be checked."""
    failure = courier.git_failure("fatal: Authentication failed for 'https://other.invalid/'", "submodules")

    assert "(while fetching submodules)" in failure.report["problem"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo\n\n", "two"),
        ("", "no reason given"),
        ("fatal: https://user:canary@git.invalid/x", "fatal: https://***@git.invalid/x"),
        ("a\x1b[31mb\x07", "a[31mb"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_the_last_line_is_short_and_harmless(text: str, shown: str) -> None:
    """No control characters, no logins."""
    assert courier.last_line(text) == shown


def credentials(host: str = "git.invalid", path: str = "", password: str = "canary") -> dict[str, str]:  # noqa: S107
    return {
        "host": host,
        "path": path,
        "username": "robot",
        "password": password,
        "ssh_key": "",
        "known_hosts": "",
    }


@pytest.mark.parametrize(
    ("question", "url", "answered"),
    [
        pytest.param("protocol=https\nhost=git.invalid\npath=team/app.git\n", "https://git.invalid/x", True, id="own"),
        pytest.param("protocol=https\nhost=GIT.invalid\npath=team/app\n", "https://git.invalid/x", True, id="case"),
        pytest.param("protocol=https\nhost=other.invalid\npath=team/app\n", "https://git.invalid/x", False, id="S26"),
        pytest.param(
            "protocol=https\nhost=git.invalid:8443\npath=team/app\n", "https://git.invalid/x", False, id="port"
        ),
        pytest.param("protocol=https\nhost=git.invalid\npath=team-b/app\n", "https://git.invalid/x", False, id="path"),
        pytest.param("protocol=https\nhost=git.invalid\npath=team.git\n", "https://git.invalid/x", True, id="exact"),
        pytest.param("protocol=https\nhost=git.invalid\n", "https://git.invalid/x", False, id="no path"),
        pytest.param(
            "protocol=http\nhost=git.invalid\npath=team/app\n", "https://git.invalid/x", False, id="plain submodule"
        ),
        pytest.param("protocol=http\nhost=git.invalid\npath=team/app\n", "http://git.invalid/x", True, id="plain own"),
        pytest.param("protocol=https\nhost=git.invalid\npath=team/../other\n", "https:", False, id="a way out"),
        pytest.param("protocol=https\nhost=git.invalid\npath=team/%2e%2e/other\n", "https:", False, id="encoded"),
        pytest.param("protocol=https\nhost=git.invalid\npath=team/..%2Fother\n", "https:", False, id="with a slash"),
        pytest.param("protocol=https\nhost=git.invalid\npath=team/./app\n", "https:", False, id="a dot"),
        pytest.param("protocol=ftp\nhost=git.invalid\npath=team/app\n", "ftp://git.invalid/x", False, id="ftp"),
        pytest.param("host=git.invalid\npath=team/app\n", "https://git.invalid/x", False, id="no protocol"),
        pytest.param("", "https://git.invalid/x", False, id="no question"),
    ],
)
def test_a_login_goes_to_its_own_server_and_path_only(question: str, url: str, answered: bool) -> None:
    """Over TLS, or plainly where the repository itself is fetched plainly; and to no one else (S26)."""
    answer = courier.answer_git(question, url, [credentials(path="/team/")])

    assert answer == ("username=robot\npassword=canary\n" if answered else "")


def test_the_longest_path_wins() -> None:
    """A login for one project is preferred to that of its team."""
    logins = [credentials(password="team"), credentials(path="a/b", password="project"), credentials(path="a")]

    assert "password=project" in courier.answer_git("protocol=https\nhost=git.invalid\npath=a/b", "https:", logins)


def test_without_stored_logins_git_gets_none(tmp_path: Path) -> None:
    """Most builds have no secret file at all."""
    assert courier.git_credentials(tmp_path) == []
    assert courier.registry_login("registry.invalid", tmp_path, tmp_path) is None


def test_git_runs_without_prompts_hooks_and_foreign_transports() -> None:
    """The environment says so, and holds nothing of the caller's own."""
    local = courier.git_environment({"url": "file:///podbuild/repository"})
    remote = courier.git_environment({"url": "https://git.invalid/x"})
    pairs = {
        remote[f"GIT_CONFIG_KEY_{n}"]: remote[f"GIT_CONFIG_VALUE_{n}"] for n in range(int(remote["GIT_CONFIG_COUNT"]))
    }

    assert local["GIT_ALLOW_PROTOCOL"] == "https:http:ssh:file"
    assert remote["GIT_ALLOW_PROTOCOL"] == "https:http:ssh"
    assert remote["GIT_TERMINAL_PROMPT"] == "0"
    assert pairs["core.hooksPath"] == "/dev/null"
    assert pairs["credential.helper"].endswith("courier.py credential https://git.invalid/x /podbuild/secret")
    assert pairs["credential.useHttpPath"] == "true"
    assert "HOSTNAME" not in remote


@pytest.mark.parametrize(
    ("host", "path", "answered"),
    [
        pytest.param("git.invalid", "team/app.git", True, id="own"),
        pytest.param("git.invalid", "team-b/app.git", False, id="another path"),
        pytest.param("other.invalid", "team/app.git", False, id="another host"),
    ],
)
def test_git_itself_gets_the_login_from_the_program(tmp_path: Path, host: str, path: str, answered: bool) -> None:
    """Real git asks the real helper, with the path, in a folder whose name a shell would take apart."""
    secret = tmp_path / "a b'$(c)"
    secret.mkdir()
    (secret / "git.json").write_text(json.dumps([credentials(path="team")]))
    environment = courier.git_environment({"url": "https://git.invalid/team/app"}, secret, tmp_path)

    done = subprocess.run(
        ["git", "credential", "fill"],
        input=f"protocol=https\nhost={host}\npath={path}\n\n",
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ("password=canary" in done.stdout.splitlines()) is answered, done.stderr
    assert (done.returncode == 0) is answered
    assert "canary" not in done.stderr


@pytest.mark.parametrize("operation", ["store", "erase"])
def test_a_login_is_neither_stored_nor_forgotten(tmp_path: Path, operation: str) -> None:
    """git tells its helper what worked and what did not; ours only answers."""
    (tmp_path / "git.json").write_text(json.dumps([credentials()]))
    before = (tmp_path / "git.json").read_bytes()

    done = subprocess.run(
        [sys.executable, courier.__file__, "credential", "https://git.invalid/x", str(tmp_path), operation],
        input="protocol=https\nhost=git.invalid\npath=x\nusername=robot\npassword=wrong\n",
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "git.json").read_bytes() == before


def ssh_options(command: str) -> list[str]:
    """Return the words that a shell makes of an ssh command."""
    return shlex.split(command)


def test_ssh_gets_the_key_and_the_known_hosts_of_its_server(tmp_path: Path) -> None:
    """In files that nobody else may read, whatever their folder is called; a host key that is not known is refused."""
    folder = tmp_path / "a b'$(c)"
    folder.mkdir()
    login = {**credentials(host="git.invalid:2222"), "ssh_key": "\ncanary\n\n", "known_hosts": "git.invalid ssh-rsa A"}
    (folder / "git.json").write_text(json.dumps([credentials(host="git.invalid"), login]))

    words = ssh_options(courier.ssh_command("ssh://git@git.invalid:2222/team/app", folder, folder))

    assert words == [
        "ssh",
        "-oBatchMode=yes",
        "-oConnectTimeout=30",
        "-i",
        str(folder / "ssh_key"),
        "-oIdentitiesOnly=yes",
        f"-oUserKnownHostsFile={folder / 'known_hosts'}",
        "-oStrictHostKeyChecking=yes",
    ]
    assert (folder / "ssh_key").read_text() == "canary\n"
    assert stat.S_IMODE((folder / "ssh_key").stat().st_mode) == 0o600
    assert (folder / "known_hosts").read_text() == "git.invalid ssh-rsa A\n"


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("ssh://git@git.invalid/team/app", id="another port"),
        pytest.param("ssh://git@other.invalid:2222/team/app", id="another host"),
        pytest.param("ssh://git@git.invalid:2222/team-b/app", id="another path"),
    ],
)
def test_a_key_stays_unwritten_for_every_other_repository(tmp_path: Path, url: str) -> None:
    """A host without stored host keys is trusted on first use, without a key of ours."""
    login = {**credentials(host="git.invalid:2222", path="team"), "ssh_key": "canary"}
    (tmp_path / "git.json").write_text(json.dumps([login]))

    words = ssh_options(courier.ssh_command(url, tmp_path, tmp_path))

    assert words[3:] == ["-oUserKnownHostsFile=/dev/null", "-oStrictHostKeyChecking=accept-new"]
    assert [p.name for p in tmp_path.iterdir()] == ["git.json"]


def test_other_schemes_need_no_ssh(tmp_path: Path) -> None:
    """Nothing is written, and git keeps its own ssh command."""
    assert courier.ssh_command("https://git.invalid/x", tmp_path, tmp_path) == ""
    assert "GIT_SSH_COMMAND" not in courier.git_environment({"url": "https://git.invalid/x"}, tmp_path, tmp_path)
    assert "GIT_SSH_COMMAND" in courier.git_environment({"url": "ssh://git.invalid/x"}, tmp_path, tmp_path)


# --- skopeo -------------------------------------------------------------------------------------------------

IMAGE = "registry.invalid:5000/team/certificates:denied"


@pytest.mark.parametrize(
    ("text", "error", "again"),
    [
        pytest.param("unauthorized: authentication required", "AccessDenied", False, id="R1 401"),
        pytest.param("requested access to the resource is denied", "AccessDenied", False, id="R2 denied"),
        pytest.param("received unexpected HTTP status: 403 Forbidden", "AccessDenied", False, id="R2 403"),
        pytest.param(
            "http: server gave HTTP response to HTTPS client", "RegistryUnavailable", False, id="plain HTTP not allowed"
        ),
        pytest.param("x509: certificate signed by unknown authority", "RegistryUnavailable", False, id="certificate"),
        pytest.param("tag is immutable", "PushUnconfirmed", False, id="immutable tag"),
        pytest.param("no space left on device", "RegistryUnavailable", False, id="no room"),
        pytest.param("dial tcp: connect: connection refused", "RegistryUnavailable", True, id="R4 refused"),
        pytest.param("received unexpected HTTP status: 503", "RegistryUnavailable", True, id="R4 503"),
        pytest.param("unexpected EOF", "RegistryUnavailable", True, id="R4 broken off"),
        pytest.param(
            'Get "http://registry.invalid:5000/v2/team/certificates/blobs/": EOF',
            "RegistryUnavailable",
            True,
            id="the image's own name means nothing",
        ),
    ],
)
def test_skopeos_words_become_a_typed_failure(text: str, error: str, again: bool) -> None:
    """Only what another try can help is tried again; the words themselves are not repeated."""
    failure, retry = courier.push_failure(f"time=now level=fatal msg={text}", IMAGE, "registry.invalid:5000")

    assert (failure.report["error"], retry) == (error, again)
    assert "registry.invalid:5000" in failure.report["problem"]
    assert text not in failure.report["problem"]
    assert failure.report["phase"] == "push"


def test_a_push_is_tried_four_times() -> None:
    """The pauses grow; after the last try there is none."""
    assert list(courier.backoff()) == [1, 2, 4, None]


def test_skopeo_gets_the_login_of_one_registry_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Nobody else may read it, and no other registry's login is in it."""
    logins = [
        {"host": "other.invalid", "username": "o", "password": "other-canary"},
        {"host": "Registry.invalid", "username": "robot", "password": "canary"},
    ]
    (tmp_path / "registry.json").write_text(json.dumps(logins))

    path = courier.registry_login("registry.invalid", tmp_path, tmp_path)

    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    auth = base64.b64encode(b"robot:canary").decode()
    assert json.loads(path.read_text()) == {"auths": {"registry.invalid": {"auth": auth}}}
