"""What whoever starts the server chooses, and the limits that hold without a choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vl2.errors import VL2Error


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and of all together.

    body_bytes: of one request and of one fetched or read image. pending_bytes: bodies and images of all requests that
    are read, wait or run; `room_for_requests` is what holds. pixels: of all images of one request. new_tokens: the most
    that `max_tokens` may be. queued: requests that wait; queued_per_client: of one client. request_seconds: of the
    body, and from there to the last token. stall_seconds: a client that neither sends nor reads is given up after them.
    connections: open at once.
    """

    body_bytes: int = 20_000_000
    pending_bytes: int = 100_000_000
    pixels: int = 50_000_000
    images: int = 8
    new_tokens: int = 2048
    queued: int = 32
    queued_per_client: int = 8
    request_seconds: float = 600.0
    stall_seconds: float = 30.0
    connections: int = 128

    @property
    def room_for_requests(self) -> int:
        """pending_bytes, or what one largest request takes with its images, which is less than twice its body."""
        return max(self.pending_bytes, 2 * self.body_bytes)

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise VL2Error(f"the limit {name} is {value}, expected more than 0")


@dataclass(frozen=True)
class ServeSettings:
    """How a bundle is served.

    name: what clients call the model. tokens: bearer tokens, each a client of its own; none admits everybody, on
    loopback only. image_hosts: from which `https` images are fetched. image_root: below which local files are read.
    host_names: that the Host header may hold besides loopback's own, where no token guards. batch: answers at once.
    """

    name: str
    tokens: tuple[str, ...] = ()
    image_hosts: frozenset[str] = frozenset()
    image_root: Path | None = None
    host_names: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    batch: int = 4

    def __post_init__(self):
        if self.batch < 1:
            raise VL2Error(f"the batch is {self.batch} answers, expected 1 or more")
        for host in self.image_hosts:
            if not host or any(sign in host for sign in "/@:* "):
                raise VL2Error(f"{host!r} is no host to fetch images from", "give a bare name, such as example.org")
        if self.image_root is not None and not self.image_root.is_dir():
            raise VL2Error(f"the image root `{self.image_root}` is no folder", "give the folder that holds the images")
