"""The cloud that the network's cases run against: `OS_CLOUD` and its configuration say which."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request


class Cloud:
    """`folder` keeps the token for curl, readable by its owner alone: a command line can be read by everybody, and is in the report."""

    def __init__(self, folder):
        self.token = self.openstack("token", "issue", "-f", "value", "-c", "id")
        self.headers = folder / "headers"
        self.headers.unlink(missing_ok=True)
        with open(os.open(self.headers, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"X-Auth-Token: {self.token}\n")
        catalog = json.loads(self.openstack("catalog", "show", "image", "-f", "json"))
        self.glance = next(end["url"] for end in catalog["endpoints"] if end["interface"] == "public").rstrip("/")

    @staticmethod
    def available():
        return bool(os.environ.get("OS_CLOUD"))

    @staticmethod
    def openstack(*words):
        return subprocess.run(["openstack", *words], check=True, capture_output=True, text=True).stdout.strip()

    def call(self, method, path, body=None):
        request = urllib.request.Request(self.glance + path, method=method, data=None if body is None else json.dumps(body).encode())
        request.add_header("X-Auth-Token", self.token)
        request.add_header("Content-Type", "application/json")
        for _ in range(8):
            try:
                with urllib.request.urlopen(request) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # a test cloud keeps its records in SQLite, which is "locked" now and then
                if error.code < 500:
                    raise
                time.sleep(0.5)
        raise RuntimeError(f"{method} {path} failed")

    def new(self, name, disk_format):
        body = {"name": name, "disk_format": disk_format, "container_format": "bare", "visibility": "private"}
        return self.call("POST", "/v2/images", body)["id"]

    def images(self, name):
        return [image["id"] for image in self.call("GET", f"/v2/images?name={name}&limit=100")["images"]]

    def delete(self, prefix):
        """All images whose name begins so. Lists come in pages; one of a thousand is enough here."""
        for image in self.call("GET", "/v2/images?limit=1000")["images"]:
            if (image["name"] or "").startswith(prefix):
                self.call("DELETE", f"/v2/images/{image['id']}")

    def keep(self, name, disk_format, path):
        """The id of the image of this name, which is made of a file if it is not there. It stays, so that the next run begins at once."""
        for image in self.images(name):
            found = self.call("GET", f"/v2/images/{image}")
            if found["status"] == "active" and found["size"] == path.stat().st_size:
                return image
        image = self.new(name, disk_format)
        subprocess.run(["sh", "-ec", self.put(image, path)], check=True)
        return image

    def get(self, image, path):
        return f"curl -sS --fail -H @{self.headers} -o {path} {self.glance}/v2/images/{image}/file"

    def put(self, image, path):
        """`Expect:` off: curl would wait a second for a "100 Continue", which Glance's own WSGI server never sends."""
        return (
            f"curl -sS --fail -X PUT -H @{self.headers} -H 'Content-Type: application/octet-stream' -H Expect:"
            f" -T {path} {self.glance}/v2/images/{image}/file"
        )
