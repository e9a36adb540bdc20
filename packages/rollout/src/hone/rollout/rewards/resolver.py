"""Looking up the reward servers' names, with the addresses judged each time: a name may change its mind after the check."""

from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from hone.rollout.errors import RewardError
from hone.rollout.rewards.address import hosts, literal, never, refusal


class RefusedAddress(RewardError):
    """A name that points where responses must not go."""


class CheckedResolver(AbstractResolver):
    """Looks names up and refuses, unless a host is allow-listed, link-local addresses and a public name that turns local."""

    def __init__(self, *, allowed_hosts: str | None, lookup: Any = None) -> None:
        self._allowed = hosts(allowed_hosts) or frozenset()
        self._lookup = lookup or ThreadedResolver()
        self._public: set[str] = set()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        """The addresses of `host`; RefusedAddress if one of them must not be asked."""
        found = await self._lookup.resolve(host, port, family)
        if host.lower() in self._allowed:
            return found
        addresses = [address for one in found if (address := literal(one["host"])) is not None]
        for address in addresses:
            if never(address):
                raise RefusedAddress(refusal(host, address))
            if host in self._public and not address.is_global:
                raise RefusedAddress(
                    f"reward host {host!r} was a public address and is now {address}, a local one; if that is meant, name it in "
                    "reward.allowed_hosts"
                )
        if addresses and all(address.is_global for address in addresses):
            self._public.add(host)
        return found

    async def close(self) -> None:
        """Nothing is held but the lookup's."""
        await self._lookup.close()
