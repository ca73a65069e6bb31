"""The notice that a cloud's machine is about to be taken away, which not every platform gives as a SIGTERM.

Google's machines (also TPU VMs) have it at their metadata server as `instance/preempted`, about 30 s ahead,
and Amazon's spot instances as `spot/instance-action`, about two minutes ahead. Slurm and Kubernetes send
SIGTERM.
"""

import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0  # between looks


class Platform(NamedTuple):
    """Where a cloud's machines are told of their end.

    Attributes:
      vendor: how its name in the machine's firmware begins.
      variable: of the environment; the server's host or address, where it is not `address`.
      notice: looks at the server and returns what it says, "" for nothing.
    """

    vendor: str
    variable: str
    address: str
    notice: Callable[[str], str]


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    with opener.open(request, timeout=SECONDS) as answer:
        return str(answer.read().decode(errors="replace")).strip()


def _google(address: str) -> str:
    url = f"{address}/computeMetadata/v1/instance/preempted"
    return "preempted" if _get(url, {"Metadata-Flavor": "Google"}) == "TRUE" else ""


def _amazon(address: str) -> str:
    life = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _get(f"{address}/latest/api/token", life, "PUT")
    try:
        return _get(
            f"{address}/latest/meta-data/spot/instance-action",
            {"X-aws-ec2-metadata-token": token},
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no action is planned
            return ""
        raise


PLATFORMS = (
    Platform("Google", "GCE_METADATA_HOST", "http://metadata.google.internal", _google),
    Platform("Amazon", "AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254", _amazon),
)


def here() -> tuple[Platform, str] | None:
    """Return the platform of this machine and its server's address; None on any other machine."""
    vendor_file = Path("/sys/class/dmi/id/sys_vendor")
    try:
        vendor = vendor_file.read_text()
    except OSError:
        vendor = ""
    for platform in PLATFORMS:
        given = os.environ.get(platform.variable, "")
        if given or vendor.startswith(platform.vendor):
            address = given or platform.address
            return platform, address if "://" in address else f"http://{address}"
    return None


def watch(told: Callable[[str], None], closed: threading.Event) -> None:
    """Call `told` once with the notice, on a thread of its own, if this machine gets one before `closed`."""
    found = here()
    if found is None:
        return
    platform, address = found

    def look() -> None:
        while not closed.wait(SECONDS):
            try:
                notice = platform.notice(address)
            except (OSError, http.client.HTTPException):
                continue  # the server is busy, answers in part, or there is none
            if notice:
                told(notice)
                return

    threading.Thread(target=look, daemon=True).start()
