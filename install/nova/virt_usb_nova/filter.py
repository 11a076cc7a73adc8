"""A scheduler filter that passes the hosts with the USB devices that a flavor requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress
from operator import attrgetter
from typing import Any

import nova.conf
from nova.scheduler import filters
from oslo_log import log as logging

from virt_usb_nova import asked, conf, oracle
from virt_usb_nova.inventory import Misconfigured, Stale
from virt_usb_nova.wasm import Broken, Refused

LOG = logging.getLogger(__name__)
OPTIONS = conf.register(nova.conf.CONF)
HOST, NODENAME = attrgetter("host"), attrgetter("nodename")


def names(host_states: Iterable[Any]) -> list[str]:
    """The hosts' names in their documents.

    The option is read once for all hosts, because that takes as long as a host.
    """
    return list(map(NODENAME if OPTIONS.host_name == "node" else HOST, host_states))


def question(spec_obj: Any) -> dict[str, Any] | None:
    """The question for the filter; None if the request needs no USB device.

    Raises the errors of an oracle, which knows the stored flavors.
    """
    said = asked.extra_spec(spec_obj)
    if said is not None:
        wanted = asked.flavor(*said, lambda name: oracle.get(OPTIONS).named(name))
    elif OPTIONS.flavor_names and spec_obj.flavor is not None:
        wanted = by_name(spec_obj.flavor.name)
    else:
        return None
    if wanted is None:
        return None
    found: dict[str, Any] = {"flavor": wanted}
    if spec_obj.project_id:
        found["project"] = spec_obj.project_id
    return found


def by_name(name: str) -> Any:
    """The devices that the stored flavor of that name requests.

    None if the oracle cannot answer: most flavors request no USB device, and must not be delayed.
    """
    try:
        return asked.devices(oracle.get(OPTIONS).flavor(name))
    except oracle.NO_ANSWER as why:
        LOG.warning(
            "USB devices: cannot tell whether the flavor %s requests any, so all hosts pass: %s",
            name,
            why,
        )
        return None


class UsbDevicesFilter(filters.BaseHostFilter):  # type: ignore[misc]
    """Ask one question for all hosts, and none for a request without USB devices."""

    # A rebuilt instance keeps its devices and its host.
    RUN_ON_REBUILD = False

    def filter_all(self, filter_obj_list: Iterable[Any], spec_obj: Any) -> Iterator[Any]:
        hosts = list(filter_obj_list)
        yield from self._able(hosts, spec_obj)

    def host_passes(self, host_state: Any, filter_properties: Any) -> bool:
        """Check one host. Nova calls `filter_all`, which gives the same answer."""
        return bool(self._able([host_state], filter_properties))

    def _able(self, hosts: list[Any], spec_obj: Any) -> list[Any]:
        try:
            wanted = question(spec_obj)
            if wanted is None or not hosts:
                return hosts
            called = names(hosts)
            able = oracle.get(OPTIONS).able(wanted, called)
        except Stale as why:
            if OPTIONS.on_stale_inventory == "pass":
                LOG.warning(
                    "USB devices: cannot tell which host has them, so all hosts pass: %s", why
                )
                return hosts
            LOG.error("USB devices: no host passes: %s", why)
            return []
        except (asked.Wrong, Refused) as why:
            LOG.error("USB devices: no host passes, because the request is invalid: %s", why)
            return []
        except Misconfigured as why:
            LOG.error(
                "USB devices: no host passes, because the configuration is invalid: [virt_usb] %s",
                why,
            )
            return []
        except Broken as why:
            LOG.error("USB devices: no host passes, because the filter failed: %s", why)
            return []
        left = list(compress(hosts, map(able.__contains__, called)))
        tell(wanted, called, able, len(left))
        return left


def tell(wanted: dict[str, Any], called: list[str], able: set[str], chosen: int) -> None:
    """Log the result. An error here does not change the answer."""
    more, others = "", ""
    if LOG.isEnabledFor(logging.DEBUG) or not chosen:
        try:
            who, unable = oracle.get(OPTIONS), [host for host in called if host not in able]
            reasons = who.reasons(wanted, unable)
            for host, why in reasons.items():
                LOG.debug("USB devices: host %s cannot serve: %s", host, words(why))
            total = Counter(str(why["reason"]) for why in reasons.values())
            more = (
                " (" + ", ".join(f"{reason} {count}" for reason, count in total.most_common()) + ")"
                if total
                else ""
            )
            if not chosen:
                others = elsewhere(
                    [host for host in who.best(wanted, 3) if host not in unable],
                    total.keys() == {"unknown-host"},
                )
        except oracle.NO_ANSWER as why:
            more = f" (reason unknown: {why})"
    LOG.info(
        "USB devices: %d of %d hosts can serve%s: %s%s",
        chosen,
        len(called),
        more,
        wanted["flavor"],
        others,
    )


def elsewhere(hosts: list[str], strangers: bool) -> str:
    """Name hosts that could serve although Nova did not ask about them.

    `strangers`: all hosts that Nova asked about are unknown.
    """
    if not hosts:
        return ""
    found = ", ".join(hosts)
    if strangers:
        return (
            f"; {found} could: if these are the same hosts, set [virt_usb] host_name "
            f"(now {OPTIONS.host_name!r}) to the name that they publish"
        )
    most = nova.conf.CONF.scheduler.max_placement_results
    return (
        f"; {found} could, but Nova did not ask about them: the request restricts its hosts, an "
        "earlier filter removed them, or Placement returns at most [scheduler] "
        f"max_placement_results = {most} hosts"
    )


def words(why: dict[str, Any]) -> str:
    """A verdict in words."""
    reason = str(why["reason"])
    if reason == "unknown-host":
        return f"{reason}: no host publishes under this name"
    if "wanted" not in why:
        return reason
    return (
        f"{reason}: wanted {why['wanted']}, {why['matching']} match, "
        f"{why['allowed']} are for the project, {why['free']} of these are free"
    )
