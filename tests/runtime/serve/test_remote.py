"""Fetching images with a resolver and a transport that only the test knows."""

import pytest

from vl2.runtime.serve.api_error import ApiError
from vl2.runtime.serve.remote import MOST_REDIRECTS, RemoteImages, Reply, Request, is_public

PUBLIC, HOSTS = "93.184.216.34", frozenset({"example.org", "cdn.example.org"})


class Net:
    """addresses: by host, a list or a function; replies: by host and path."""

    def __init__(self, addresses: dict, replies: dict):
        self.addresses, self.replies, self.asked = addresses, replies, []

    def resolve(self, host: str) -> list[str]:
        found = self.addresses[host]
        return found.pop(0) if isinstance(found[0], list) else found

    def get(self, request: Request) -> Reply:
        self.asked.append((request.address, request.host, request.target))
        return self.replies[request.host + request.target]

    def images(self, limit: int = 100) -> RemoteImages:
        return RemoteImages(HOSTS, limit, self.resolve, self.get)


def test_an_image_comes_from_the_checked_address_in_the_name_of_the_host() -> None:
    net = Net({"example.org": [PUBLIC]}, {"example.org/a.png?w=1": Reply(200, None, b"image")})
    assert net.images()("https://EXAMPLE.org/a.png?w=1#part") == b"image"
    assert net.asked == [(PUBLIC, "example.org", "/a.png?w=1")]


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "192.0.2.1", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "2002:7f00:1::", "2001:0:7f00:1::", "fec0::1", "name",
])
def test_addresses_that_are_not_public_are_never_asked(address: str) -> None:
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address]):
        net = Net({"example.org": addresses}, {})
        with pytest.raises(ApiError, match="not public"):
            net.images()("https://example.org/")
        assert net.asked == []


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("url, reason", [
    ("https://evil.org/", "not fetched from 'evil.org'"), ("https://example.org.evil.org/", "not fetched from"),
    ("https://example.org@evil.org/", "without a user"), ("https://u:p@example.org/", "without a user"),
    ("https://example.org:8443/", "on port 443"), ("http://example.org/", "by https"),
    ("ftp://example.org/", "by https"),
    ("https://[::1/", "cannot be read"), ("https://example.org:x/", "cannot be read"),
    ("https://example.org/a b", "percent-encoded"), ("https://", "not fetched from"),
])
def test_urls_beyond_the_list_are_refused(url: str, reason: str) -> None:
    net = Net({}, {})
    with pytest.raises(ApiError, match=reason):
        net.images()(url)


def test_a_redirect_is_checked_as_the_first_url_is() -> None:
    leads_to = {"/": (302, "https://cdn.example.org/b"), "/near": (308, "/"), "/out": (302, "https://evil.org/"),
                "/in": (301, "//127.0.0.1/"), "/plain": (307, "http://example.org/"), "/nowhere": (302, None)}
    replies = {f"example.org{path}": Reply(*answer, b"") for path, answer in leads_to.items()}
    replies["cdn.example.org/b"] = Reply(200, None, b"b")
    net = Net({"example.org": [PUBLIC], "cdn.example.org": [PUBLIC]}, replies)
    assert net.images()("https://example.org/near") == b"b"
    for path, reason in (("out", "'evil.org'"), ("in", "'127.0.0.1'"), ("plain", "by https"), ("nowhere", "302")):
        with pytest.raises(ApiError, match=reason):
            net.images()(f"https://example.org/{path}")


def test_a_redirect_into_the_private_network_is_not_followed() -> None:
    net = Net({"example.org": [PUBLIC], "cdn.example.org": ["10.0.0.5"]},
              {"example.org/": Reply(302, "https://cdn.example.org/", b"")})
    with pytest.raises(ApiError, match="not public"):
        net.images()("https://example.org/")
    assert [host for _, host, _ in net.asked] == ["example.org"]


def test_a_name_that_changes_its_address_between_requests_is_caught_each_time() -> None:
    net = Net({"example.org": [[PUBLIC], ["127.0.0.1"]]}, {"example.org/": Reply(302, "/again", b"")})
    with pytest.raises(ApiError, match="not public"):
        net.images()("https://example.org/")
    assert net.asked == [(PUBLIC, "example.org", "/")]


def test_redirects_end() -> None:
    net = Net({"example.org": [PUBLIC]}, {"example.org/": Reply(302, "/", b"")})
    with pytest.raises(ApiError, match="answered 302"):
        net.images()("https://example.org/")
    assert len(net.asked) == MOST_REDIRECTS + 1


def test_too_much_nothing_and_failures_are_told() -> None:
    def fails(request: Request) -> Reply:
        raise ConnectionResetError

    net = Net({"example.org": [PUBLIC]}, {"example.org/large": Reply(200, None, b"x" * 101),
                                          "example.org/none": Reply(404, None, b"")})
    with pytest.raises(ApiError, match="more than 100 bytes") as large:
        net.images()("https://example.org/large")
    assert large.value.status == 413
    with pytest.raises(ApiError, match="answered 404"):
        net.images()("https://example.org/none")
    with pytest.raises(ApiError, match="cannot be reached for an image: ConnectionResetError"):
        RemoteImages(HOSTS, 9, net.resolve, fails)("https://example.org/")
