"""Questions of a scheduler and the answers, for the component and the core module alike."""

from pathlib import Path

NOON = 1_700_000_000_000
MINUTE = 60_000
PROJECT = "9a1f3c526c1b4c6e9b1c2b6c3a7d8e9f"

LICENCE_KEY = {"vendor_id": "0529", "product_id": "0001"}
ONE_KEY = {"flavor": {"usb_devices": [LICENCE_KEY]}}
TWO_KEYS = {"flavor": {"usb_devices": [{**LICENCE_KEY, "count": 2}]}}


def fleet():
    """The documents of the hosts. The last host has sent no update for ten minutes."""
    hosts = Path(__file__).with_name("fleet.jsonl").read_text().splitlines(keepends=True)
    return [("".join(hosts[:4]), NOON), (hosts[4], NOON - 10 * MINUTE)]


def tell(Filter, Refused, Broken, *file):
    # Deadlines are in real time. A busy machine must not fail the story.
    filter = Filter(*file, feed=fleet, deadline=10)

    say(
        "Which hosts have a free licence key? The best host is first: it has a spare key and few "
        "other devices."
    )
    answer = filter.select(ONE_KEY)
    check(answer["matched"], 3)
    placements = [(placement["host"], placement["score"]) for placement in answer["placements"]]
    check(placements, [("compute-5", 4), ("compute-1", 3), ("compute-2", -1)])

    say("Which of three candidates have two? An unknown candidate cannot serve.")
    check(filter.select_names(TWO_KEYS, ["compute-1", "compute-2", "elsewhere"]), ["compute-1"])
    check(filter.select_names(TWO_KEYS, []), [])

    say("Why can the others not serve?")
    verdicts = filter.explain(TWO_KEYS)
    check(verdicts["compute-5"], {"accepted": True, "score": 0, "devices": [5_000_001, 5_000_002]})
    check(
        reasons(verdicts),
        {"compute-2": "too-few-free", "compute-3": "not-allowed", "compute-4": "no-such-device"},
    )
    check(
        [verdicts["compute-2"][count] for count in ("wanted", "matching", "allowed", "free")],
        [2, 2, 2, 1],
    )

    say("The keys of compute-3 are for one project.")
    check(filter.select_names({**TWO_KEYS, "project": PROJECT}, limit=1), ["compute-3"])

    say("Two keys and a device with the tag 'erp': on compute-1, only the keys have the tag.")
    greedy = {"flavor": {"usb_devices": [{**LICENCE_KEY, "count": 2}, {"tags": ["erp"]}]}}
    check(reasons(filter.explain(greedy, ["compute-1"])), {"compute-1": "contention"})

    say("Hosts without an update for two minutes are left out until their next update.")
    now = {**TWO_KEYS, "now": NOON + MINUTE, "max_age": 2 * MINUTE}
    check(reasons(filter.explain(now, ["compute-5"])), {"compute-5": "host-stale"})
    check(filter.touch("compute-5", NOON + MINUTE), True)
    check(filter.select_names(now), ["compute-5", "compute-1"])

    say("A guest takes a key of compute-1. A new document returns it. compute-5 leaves the fleet.")
    check(filter.set_status("compute-1", 1_000_001, "claimed"), True)
    check(filter.set_status("compute-1", 1_000_001, "claimed"), False)
    check(filter.select_names(TWO_KEYS), ["compute-5"])
    report = filter.load(fleet()[0][0] + "no document\n", NOON + MINUTE)
    check((report["hosts"], report["devices"], report["refused"]), (4, 12, 1))
    check(report["problems"][0]["line"], 5)
    check(filter.remove("compute-5"), True)
    check(filter.remove("compute-5"), False)
    check(filter.touch("compute-5", NOON), False)
    check(filter.select_names(TWO_KEYS), ["compute-1"])

    say("All hosts can serve a request without devices.")
    nothing = {"flavor": {"usb_devices": []}}
    check(
        sorted(filter.select_names(nothing, ["compute-1", "elsewhere"])), ["compute-1", "elsewhere"]
    )

    say("An invalid question is refused. That is no verdict, and changes nothing.")
    check_raises(
        Refused, filter.select_names, {"flavor": {"usb_devices": [{"product_id": "0001"}]}}
    )
    check_raises(Refused, filter.set_status, "compute-1", 1_000_001, "lost")
    check_raises(Refused, filter.set_status, "elsewhere", 1_000_001, "claimed")
    check(filter.select_names(TWO_KEYS), ["compute-1"])

    say(
        "A filter that needs too much memory fails. The next call gets a fresh one, fed again: "
        "compute-5 is back."
    )
    small = Filter(*file, feed=fleet, memory=16 << 20, deadline=10)
    check_raises(Broken, small.load, " " * (32 << 20), NOON)
    check(small.select_names(TWO_KEYS), ["compute-5", "compute-1"])

    say("A filter that takes too long fails, too.")
    hasty = Filter(*file, feed=fleet, deadline=0.5)
    # Reading documents in another format than the hosts' takes longer.
    check_raises(Broken, hasty.load, fleet()[0][0].replace(",", ", ") * 50_000, NOON)
    check(hasty.select_names(TWO_KEYS), ["compute-5", "compute-1"])

    for one in (filter, small, hasty):
        one.close()


def reasons(verdicts):
    return {
        host: verdict["reason"] for host, verdict in verdicts.items() if not verdict["accepted"]
    }


def say(text):
    print(f"\n{text}")


def check(found, wanted):
    print(f"  {found}")
    if found != wanted:
        raise AssertionError(f"found {found}, wanted {wanted}")


def check_raises(kind, call, *arguments):
    try:
        found = call(*arguments)
    except kind as error:
        print(f"  {kind.__name__}: {error}")
    else:
        raise AssertionError(f"found {found}, wanted {kind.__name__}")
