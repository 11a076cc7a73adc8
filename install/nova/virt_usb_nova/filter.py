"""The hosts that have the USB devices that a flavor asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import nova.conf
from nova.scheduler import filters
from oslo_log import log as logging

from virt_usb_nova import asked, conf, oracle
from virt_usb_nova.wasm import Broken, Refused

LOG = logging.getLogger(__name__)
OPTIONS = conf.register(nova.conf.CONF)


def names(host_states: Iterable[Any]) -> list[str]:
    """What the hosts are called in their documents. The option is read once: that takes as long as a host."""
    if OPTIONS.host_name == "node":
        return [host_state.nodename for host_state in host_states]
    return [host_state.host for host_state in host_states]


def question(spec_obj: Any, who: oracle.Oracle) -> dict[str, Any] | None:
    """What is asked of the filter; None: the request asks for no USB device."""
    remote = isinstance(who, oracle.Remote)
    # A `virt-usb scheduler` knows the fleet's flavors itself.
    named = asked.at_name(spec_obj) if remote else None
    wanted: Any = named or asked.flavor(spec_obj, who.flavor, OPTIONS.flavor_names)
    if wanted is None:
        return None
    found: dict[str, Any] = {"flavor": wanted}
    if spec_obj.project_id:
        found["project"] = spec_obj.project_id
    return found


class UsbDevicesFilter(filters.BaseHostFilter):  # type: ignore[misc]
    """Asks once for all hosts. A request that asks for no USB device passes without a question."""

    # The instance has its devices already, and its host.
    RUN_ON_REBUILD = False

    def filter_all(self, filter_obj_list: Iterable[Any], spec_obj: Any) -> Iterator[Any]:
        hosts = list(filter_obj_list)
        yield from self._able(hosts, spec_obj)

    def host_passes(self, host_state: Any, filter_properties: Any) -> bool:
        """Nova asks `filter_all`; whoever asks for one host gets the same answer."""
        return bool(self._able([host_state], filter_properties))

    def _able(self, hosts: list[Any], spec_obj: Any) -> list[Any]:
        try:
            who = oracle.get(OPTIONS)
            wanted = question(spec_obj, who)
            if wanted is None or not hosts:
                return hosts
            called = names(hosts)
            able = who.able(wanted, called)
            left = [host_state for host_state, host in zip(hosts, called) if host in able]
            self._tell(who, wanted, called, able, len(left))
        except oracle.Stale as why:
            if OPTIONS.on_stale_inventory == "pass":
                LOG.warning("USB devices: not known which host has them, so all pass: %s", why)
                return hosts
            LOG.error("USB devices: no host can be chosen: %s", why)
            return []
        except (asked.Wrong, Refused) as why:
            LOG.error("USB devices: no host can be chosen, for what is asked is wrong: %s", why)
            return []
        except Broken as why:
            LOG.error("USB devices: no host can be chosen, for the filter is broken: %s", why)
            return []
        return left

    @staticmethod
    def _tell(who: oracle.Oracle, wanted: dict[str, Any], called: list[str], able: set[str], chosen: int) -> None:
        counts = ""
        if LOG.isEnabledFor(logging.DEBUG) or chosen == 0:
            reasons = who.reasons(wanted, [host for host in called if host not in able])
            for host, why in reasons.items():
                LOG.debug("USB devices: host %s cannot serve: %s", host, words(why))
            total = Counter(str(why["reason"]) for why in reasons.values())
            counts = " (" + ", ".join(f"{reason} {count}" for reason, count in total.most_common()) + ")" if total else ""
        others = "" if chosen else elsewhere(who.best(wanted, 3))
        LOG.info("USB devices: %d of %d hosts can serve%s: %s%s", chosen, len(called), counts, wanted["flavor"], others)


def elsewhere(hosts: list[str]) -> str:
    """What is said of hosts that could serve, where Nova has asked about others only."""
    if not hosts:
        return ""
    return (
        f"; not asked about were {', '.join(hosts)}, which could: left out by a filter before this one, "
        f"or by Placement, which hands over [scheduler] max_placement_results = {nova.conf.CONF.scheduler.max_placement_results} hosts at most"
    )


def words(why: dict[str, Any]) -> str:
    """A verdict in words."""
    reason = str(why["reason"])
    if "wanted" not in why:
        return reason
    return f"{reason}: wanted {why['wanted']}, {why['matching']} match, {why['allowed']} are for the project, {why['free']} of these are free"
