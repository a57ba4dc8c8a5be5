"""A real registry of OCI artifacts, on a port of its own, and a few lines that push to it."""

import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import urllib.request

from server import eventually

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
IMAGE_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
MODEL = "application/vnd.cncf.model."
EMPTY = "application/vnd.oci.empty.v1+json"
PACKINGS = {
    "tar": lambda archive: archive,
    "tar+gzip": gzip.compress,
    "tar+zstd": lambda archive: subprocess.run(
        ["zstd", "-q", "-c"], input=archive, capture_output=True, check=True, timeout=10
    ).stdout,
}


class Registry:
    """Debian's `docker-registry`; `host` is where it listens, `folder` where its contents lie.

    `login` is what a header of basic authentication says when the settings in `more` want one.
    """

    def __init__(self, folder, more=None, login=None):
        self.login = {"Authorization": f"Basic {login}"} if login else {}
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": self.host},
        } | (more or {})
        file = folder / "registry.json"
        # JSON is YAML.
        file.write_text(json.dumps(settings))
        command = [shutil.which("docker-registry"), "serve", file]
        assert command[0], "docker-registry is missing: deploy/apt.sh docker-registry=docker-registry"
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            eventually(self.is_up, 20)
        except AssertionError as error:
            self.close()
            raise AssertionError((folder / "log").read_text()) from error

    def is_up(self):
        assert self.process.poll() is None, f"the registry ended with {self.process.returncode}"
        return self.call("GET", "/v2/").status == 200

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method, path, body=None, headers=None):
        url = path if path.startswith("http") else f"http://{self.host}{path}"
        request = urllib.request.Request(
            url, data=body, method=method, headers=(headers or {}) | self.login
        )
        return urllib.request.urlopen(request, timeout=10)

    def blob(self, repository, content, media_type, annotations=None):
        """A pushed content's descriptor."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        begun = self.call("POST", f"/v2/{repository}/blobs/uploads/", b"")
        place = begun.headers["Location"]
        place += ("&" if "?" in place else "?") + f"digest={digest}"
        self.call("PUT", place, content, {"Content-Type": "application/octet-stream"})
        described = {"mediaType": media_type, "digest": digest, "size": len(content)}
        return described | ({"annotations": annotations} if annotations else {})

    def manifest(self, repository, tag, manifest):
        """A pushed manifest's descriptor."""
        body = json.dumps({"schemaVersion": 2} | manifest).encode()
        media_type = manifest["mediaType"]
        put = self.call(
            "PUT", f"/v2/{repository}/manifests/{tag}", body, {"Content-Type": media_type}
        )
        digest = put.headers["Docker-Content-Digest"]
        return {"mediaType": media_type, "digest": digest, "size": len(body)}

    def artifact(self, repository, tag, layers, config=None):
        config = config or self.blob(repository, b"{}", EMPTY)
        manifest = {"mediaType": MANIFEST, "config": config, "layers": layers}
        return self.manifest(repository, tag, manifest)

    def model_pack(self, repository, tag, files, archives=()):
        """Files as they are, and archives of files, as ModelPack's tools push them."""
        layers = [
            self.blob(
                repository, content, f"{MODEL}weight.v1.raw", {"org.cncf.model.filepath": path}
            )
            for path, content in files.items()
        ]
        for packing, members in archives:
            packed = PACKINGS[packing](tar(members))
            layers.append(self.blob(repository, packed, f"{MODEL}weight.config.v1.{packing}"))
        config = self.blob(repository, b"{}", f"{MODEL}config.v1+json")
        return self.artifact(repository, tag, layers, config)

    def image(self, repository, tag, layers):
        """An image of these layers, each a list of members."""
        packed = [
            self.blob(repository, gzip.compress(tar(layer)), IMAGE_LAYER) for layer in layers
        ]
        settings = {"os": "linux", "architecture": "amd64", "config": {}}
        config = self.blob(repository, json.dumps(settings).encode(), IMAGE_CONFIG)
        return self.artifact(repository, tag, packed, config)

    def spoil(self, digest):
        """Turns a bit of a content on the registry's disk."""
        name = digest.removeprefix("sha256:")
        (file,) = self.folder.glob(f"data/docker/registry/v2/blobs/sha256/*/{name}/data")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


def tar(members):
    """An archive of members: a path to its content, to `None` of a folder, or to what a link points at."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in members.items():
            member = tarfile.TarInfo(path)
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return packed.getvalue()
