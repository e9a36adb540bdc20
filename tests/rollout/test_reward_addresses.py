"""Where responses may be sent: URLs and addresses that are refused, and those that are meant."""

import asyncio
import socket
from typing import Any

import pytest

from hone.rollout.errors import RewardError
from hone.rollout.rewards.address import check_url
from hone.rollout.rewards.resolver import CheckedResolver, RefusedAddress


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "scheme 'ftp'"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("http://me:sekret@host/x", "HONE_REWARD_TOKEN"),
        ("http://", "no host"),
        ("http://ho st/x", "no host"),
        ("http://host:port/x", "cannot be read"),
        ("http://169.254.169.254/latest", "link-local"),
        ("http://[::ffff:169.254.169.254]/latest", "link-local"),
        ("http://[fe80::1]/x", "link-local"),
        ("http://0.0.0.0/x", "unspecified"),
        ("http://2852039166/x", "a number that hides an address"),
        ("http://0xa9fea9fe/x", "a number that hides an address"),
        ("http://0251.0376.0251.0376/x", "a number that hides an address"),
        ("http://127.1/x", "a number that hides an address"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        check_url(url, allowed_hosts=None)
    assert "sekret" not in str(caught.value)


def test_hosts_that_are_allowed() -> None:
    for url in ("http://127.0.0.1:5000/get_reward", "https://judge.example.org/r?k=1", "http://[::1]:80/r", "http://node-7/r"):
        check_url(url, allowed_hosts=None)
    check_url("http://169.254.1.2/x", allowed_hosts="other, 169.254.1.2")
    with pytest.raises(RewardError, match=r"goes to host 'b', which reward.allowed_hosts \(a\) does not name"):
        check_url("http://b/x", allowed_hosts="a")


class Lookup:
    """Names to addresses, in turn."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[dict[str, Any]]:
        address = self.addresses.pop(0)
        return [{"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    async def close(self) -> None: ...


def resolved(resolver: CheckedResolver, times: int) -> None:
    async def scenario() -> None:
        for _ in range(times):
            await resolver.resolve("judge.example.org", 80)

    asyncio.run(scenario())


def test_a_name_that_changes_its_mind_is_refused() -> None:
    with pytest.raises(RefusedAddress, match=r"was a public address and is now 127.0.0.1"):
        resolved(CheckedResolver(allowed_hosts=None, lookup=Lookup("93.184.216.34", "127.0.0.1")), 2)
    with pytest.raises(RefusedAddress, match=r"169.254.169.254"):
        resolved(CheckedResolver(allowed_hosts=None, lookup=Lookup("169.254.169.254")), 1)
    resolved(CheckedResolver(allowed_hosts=None, lookup=Lookup("10.0.0.1", "10.0.0.2")), 2)
    resolved(CheckedResolver(allowed_hosts="judge.example.org", lookup=Lookup("93.184.216.34", "127.0.0.1")), 2)
