"""A weigher that prefers the better ones of the hosts that can serve."""

from __future__ import annotations

from typing import Any

from nova.scheduler import weights
from oslo_log import log as logging

from virt_usb_nova import filter, oracle

LOG = logging.getLogger(__name__)


class UsbDevicesWeigher(weights.BaseHostWeigher):  # type: ignore[misc]
    """Weigh hosts by the filter's score.

    A host scores better with more spare devices, and with fewer devices that other requests need.
    A request without USB devices weighs all hosts equally.
    """

    def weight_multiplier(self, host_state: Any) -> float:
        return float(filter.OPTIONS.weight_multiplier)

    def weigh_objects(self, weighed_obj_list: list[Any], weight_properties: Any) -> list[float]:
        called = filter.names(weighed.obj for weighed in weighed_obj_list)
        scores = self._scores(called, weight_properties)
        return [float(scores.get(host, 0)) for host in called]

    def _weigh_object(self, obj: Any, weight_properties: Any) -> float:
        called = filter.names([obj])
        return float(self._scores(called, weight_properties).get(called[0], 0))

    @staticmethod
    def _scores(called: list[str], spec_obj: Any) -> dict[str, int]:
        if not called or not filter.OPTIONS.weight_multiplier:
            return {}
        try:
            wanted = filter.question(spec_obj)
            return {} if wanted is None else oracle.get(filter.OPTIONS).scores(wanted, called)
        except oracle.NO_ANSWER as why:
            # The filter has logged the error already, and has accepted these hosts.
            LOG.debug("USB devices: all hosts weigh the same: %s", why)
            return {}
