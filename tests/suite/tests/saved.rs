//! Guests that are saved and restored, again and again, with devices of every origin.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs::{self, File};
use std::process::{Output, Stdio};

use virt_usb::agent::observe::View;
use virt_usb::agent::plan::{Seen, Step};
use virt_usb_domxml::Domain;
use virt_usb_model::{DeviceRequest, Flavor};
use virt_usb_store::ClaimRow;
use virt_usb_suite::{Host, device, domain, feed, text};

const KEY: &str = r#"{"vendor_id":"0529","product_id":"0001"}"#;

/// A guest: its definition, and what is hot-plugged.
struct Guest<'a> {
    host: &'a Host,
    name: &'static str,
}

impl Guest<'_> {
    fn call(&self, operation: &str, extra: &str, xml: &str) -> Output {
        let sub = if ["stopped", "release"].contains(&operation) { "end" } else { "begin" };
        self.host.call(&[self.name, operation, sub, extra], xml.as_bytes())
    }

    /// The call succeeds; what it prints, or else what it was given.
    fn filter(&self, operation: &str, xml: &str) -> String {
        let output = self.call(operation, "-", xml);
        assert_eq!(output.status.code(), Some(0), "{operation}: {}", text(&output.stderr));
        if output.stdout.is_empty() { xml.to_owned() } else { text(&output.stdout) }
    }

    fn starts(&self, xml: &str) {
        let output = self.call("prepare", "-", xml);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        self.filter("started", xml);
    }

    fn ends(&self, reason: &str, xml: &str) {
        self.filter("stopped", xml);
        assert_eq!(self.call("release", reason, xml).status.code(), Some(0));
    }

    /// As libvirt does it; the XML that the guest runs with then.
    fn restores(&self, image: &str) -> String {
        let xml = self.filter("restore", image);
        self.starts(&xml);
        xml
    }
}

fn claims(host: &Host) -> Vec<ClaimRow> {
    host.store().claims().unwrap()
}

/// Device, hold, request, by hand.
fn held(host: &Host) -> Vec<(u64, String, Option<u32>, bool)> {
    claims(host).into_iter().map(|c| (c.device_id.get(), c.hold, c.request, c.by_hand)).collect()
}

fn hostdev(product: &str, number: u8, attributes: &str, alias: &str) -> String {
    format!(
        "    <hostdev mode='subsystem' type='usb'>\n      <source{attributes}>\n        <vendor \
            id='0x0529'/>\n        <product id='0x{product}'/>\n        \
         <address bus='1' device='{number}'/>\n      </source>\n      <alias name='{alias}'/>\n    \
         </hostdev>\n"
    )
}

/// The domain with devices added.
fn with(xml: &str, devices: &str) -> String {
    xml.replace("  </devices>", &format!("{devices}  </devices>"))
}

fn request(json: &str) -> DeviceRequest {
    Flavor::parse_lists(Some(json), None).unwrap().usb_devices.remove(0)
}

fn assign(host: &Host, xml: &str, json: &str) {
    let read = read(xml);
    let mut store = host.store();
    let context = virt_usb_config::host_env::context(&host.config(), "test assign").unwrap();
    let whom = virt_usb_hook::verify::claimant(&store, &read, read.uuid.unwrap()).unwrap();
    store.assign_more(&whom, &[request(json)], &context).unwrap().unwrap();
}

fn read(xml: &str) -> Domain {
    virt_usb_domxml::read(xml.as_bytes()).unwrap()
}

/// Device 1 for a flavor, device 2 assigned, device 3 by hand; numbers from `first` on.
fn three(first: u8) -> String {
    [
        device("0001", "1-1", first, ""),
        device("0002", "1-2", first + 1, "serial = \"A\""),
        device("0003", "1-3", first + 2, ""),
    ]
    .concat()
}

#[test]
fn every_device_keeps_its_origin_through_saves_and_restores() {
    for hold in ["running", "instance"] {
        let host = Host::new(&format!("hold = \"{hold}\"\n"));
        host.discover(&three(10));
        host.flavor(
            "erp",
            &format!(
                r#"{{"usb_devices":[{KEY}],"usb_redirection_devices":[{{"bus":"usb","type":"spicevmc"}}]}}"#
            ),
        );
        let guest = Guest { host: &host, name: "erp-1" };
        let spice = "    <graphics type='spice' autoport='yes'/>\n";
        let hand = hostdev("0003", 12, "", "hostdev0");
        let defined = with(&domain("erp-1", 1, "@erp"), &(spice.to_owned() + &hand));
        assign(&host, &defined, r#"{"id":2}"#);

        // A start; the agent attaches the rest.
        guest.starts(&defined);
        let redirdev = "    <redirdev bus='usb' type='spicevmc'>\n      <alias \
            name='ua-usb-redir-0'/>\n    </redirdev>\n";
        let injected = hostdev("0001", 10, "", "ua-usb-1") + &hostdev("0002", 11, "", "ua-usb-2");
        let mut live = with(&defined, &(injected + redirdev));
        guest.filter("started", &live);
        let both = vec![
            (1, hold.to_owned(), Some(0), false),
            (2, "instance".to_owned(), Some(1), false),
            (3, "running".to_owned(), None, true),
        ];
        assert_eq!(held(&host), both);

        for round in 1..=4u8 {
            guest.ends("saved", &live);
            let kept = if hold == "instance" { &both[..2] } else { &both[1..2] };
            assert_eq!(held(&host), kept, "{hold}, round {round}");
            // Meanwhile all devices get other numbers, and the rules change: the device of the
            // handwritten hostdev is no longer offered, or only to another project.
            if round == 2 {
                let rules = "usb_white_list_switch = \"on\"\nusb_white_list = [{ product \
                    = \"0001\", vendor = \"0529\" }, { vendor = \"0529\", product = \"0002\" }]\n";
                let config = fs::read_to_string(host.config_file()).unwrap();
                fs::write(host.config_file(), config + rules).unwrap();
            }
            let first = 10 + 10 * round;
            host.discover(&three(first));
            let restored = guest.restores(&live);
            let numbers: Vec<_> =
                read(&restored).hostdevs.iter().map(|h| h.address.unwrap().device()).collect();
            assert_eq!(
                numbers,
                [first + 2, first, first + 1],
                "{hold}, round {round}: by hand, flavor, assignment"
            );
            // Nothing else changes.
            let old = first - 10;
            let same = [(old, first), (old + 1, first + 1), (old + 2, first + 2)]
                .iter()
                .fold(live.clone(), |xml, (was, is)| {
                    xml.replace(&format!("device='{was}'"), &format!("device='{is}'"))
                });
            assert_eq!(restored, same, "{hold}, round {round}");
            assert_eq!(held(&host), both, "{hold}, round {round}");
            assert!(
                claims(&host).iter().all(|c| c.needs_reattach && !c.pending),
                "all must be reattached"
            );
            live = restored;
        }

        guest.ends("shutdown", &live);
        assert_eq!(held(&host), if hold == "instance" { &both[..2] } else { &both[1..2] });
        // And a cold start is as the first.
        let now = defined.replace("device='12'", "device='52'");
        guest.starts(&now);
        assert_eq!(held(&host), both);
        assert!(claims(&host).iter().all(|c| !c.needs_reattach));
    }
}

#[test]
fn a_flavor_that_changed_or_went_strands_no_saved_guest() {
    for hold in ["running", "instance"] {
        for change in [Some(r#"{"usb_devices":[{"vendor_id":"0951"}]}"#), None] {
            let host = Host::new(&format!("hold = \"{hold}\"\n"));
            host.discover(&device("0001", "1-1", 5, ""));
            host.flavor("erp", &format!(r#"{{"usb_devices":[{KEY}]}}"#));
            let guest = Guest { host: &host, name: "erp-1" };
            let xml = domain("erp-1", 1, "@erp");
            let live = with(&xml, &hostdev("0001", 5, "", "ua-usb-1"));
            guest.starts(&xml);
            guest.filter("started", &live);
            guest.ends("saved", &live);
            match change {
                Some(flavor) => host.flavor("erp", flavor),
                None => {
                    let context =
                        virt_usb_config::host_env::context(&host.config(), "test").unwrap();
                    assert!(host.store().remove_flavor("erp", &context).unwrap());
                }
            }
            host.discover(&device("0001", "1-1", 6, ""));
            let restored = guest.restores(&live);
            assert_eq!(restored, live.replace("device='5'", "device='6'"));
            let claim = claims(&host).remove(0);
            assert_eq!(
                (claim.hold.as_str(), claim.pending, claim.needs_reattach),
                (hold, false, true)
            );
        }
    }
}

#[test]
fn a_guest_that_was_saved_without_one_of_its_devices_gets_it_after_the_restore() {
    for (hold, is_back) in [("running", true), ("instance", true), ("running", false)] {
        let host = Host::new(&format!("hold = \"{hold}\"\n"));
        let first = device("0001", "1-1", 5, "serial = \"A\"");
        let both = first.clone() + &device("0001", "1-2", 6, "serial = \"B\"");
        host.discover(&both);
        let guest = Guest { host: &host, name: "erp-1" };
        let flavor = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001","count":2}]}"#;
        let xml = domain("erp-1", 1, flavor);
        guest.starts(&xml);
        assert_eq!(claims(&host).len(), 2);
        // The second is unplugged, and the agent takes it out of the guest before that is saved.
        host.discover(&first);
        let live = with(&xml, &hostdev("0001", 5, "", "ua-usb-1"));
        guest.ends("saved", &live);
        host.discover(if is_back { &both } else { &first });
        let restored = guest.filter("restore", &live);
        let prepared = guest.call("prepare", "-", &restored);
        assert_eq!(prepared.status.code(), Some(0));
        let said = text(&prepared.stderr);
        let words = "erp-1 was restored or migrated without some of its USB devices: erp-1 asks \
            for usb_devices[0]";
        assert_eq!(said.contains(words), !is_back, "{said}");
        let mut ids: Vec<(u64, bool)> =
            claims(&host).iter().map(|c| (c.device_id.get(), c.needs_reattach)).collect();
        ids.sort_unstable();
        let expected: &[(u64, bool)] =
            if is_back { &[(1, true), (2, false)] } else { &[(1, true)] };
        assert_eq!(ids, expected, "{hold}");
        // Once more is not one more.
        assert_eq!(guest.call("prepare", "-", &restored).status.code(), Some(0));
        assert_eq!(claims(&host).len(), expected.len());
    }
}

#[test]
fn an_optional_device_may_be_away_and_come_back() {
    let host = Host::new("");
    let plugged = device("0003", "1-3", 7, "");
    host.discover(&plugged);
    let guest = Guest { host: &host, name: "erp-1" };
    let optional = hostdev("0003", 7, " startupPolicy='optional'", "hostdev0");
    let xml = with(&domain("erp-1", 1, "[]").replace("[]", ""), &optional);
    guest.starts(&xml);
    assert_eq!(claims(&host).len(), 1);
    guest.ends("saved", &xml);
    // Unplugged, and recorded or not.
    for recorded in [false, true] {
        match recorded {
            true => host.discover(""),
            false => drop(host.plug("")),
        }
        assert_eq!(guest.restores(&xml), xml);
        assert_eq!(claims(&host), []);
        guest.ends("saved", &xml);
        guest.starts(&xml);
        guest.ends("shutdown", &xml);
    }
    host.discover(&device("0003", "1-3", 8, ""));
    let restored = guest.restores(&xml);
    assert_eq!(restored, xml.replace("device='7'", "device='8'"), "the policy stays too");
    assert!(claims(&host)[0].by_hand);
}

/// All that is known of the claims.
fn table(host: &Host) -> Vec<String> {
    claims(host).iter().map(|c| format!("{c:?}")).collect()
}

#[test]
fn a_restore_of_a_guest_that_runs_changes_nothing_of_it() {
    for hold in ["running", "instance"] {
        let host = Host::new(&format!("hold = \"{hold}\"\n"));
        host.discover(&three(10));
        let guest = Guest { host: &host, name: "erp-1" };
        let xml = domain("erp-1", 1, &format!(r#"{{"usb_devices":[{KEY}]}}"#));
        let ours = hostdev("0001", 10, "", "ua-usb-1");
        let live = with(&xml, &ours);
        guest.starts(&xml);
        guest.filter("started", &live);
        let before = table(&host);
        // Its own image, one with more devices, one with a device that another guest has.
        let more = with(
            &live,
            &(hostdev("0002", 11, "", "ua-usb-2") + &hostdev("0003", 12, "", "hostdev1")),
        );
        for image in [&live, &more] {
            for _ in 0..3 {
                guest.filter("restore", image);
                assert_eq!(table(&host), before);
            }
        }
        // Nor do the looks that follow.
        guest.filter("reconnect", &live);
        assert_eq!(table(&host), before);
        guest.ends("shutdown", &live);
        guest.starts(&xml);
        assert!(claims(&host).iter().all(|c| !c.needs_reattach), "no start takes it for a restore");
    }
}

#[test]
fn only_a_start_confirms_what_came_in() {
    let host = Host::new("");
    host.discover(&three(10));
    let guest = Guest { host: &host, name: "erp-1" };
    // It runs and asks for nothing, so no claim tells that it runs.
    let live = domain("erp-1", 1, "[]").replace("[]", "");
    let image = with(&live, &hostdev("0003", 12, "", "hostdev0"));
    guest.filter("restore", &image);
    for xml in [&live, &image] {
        guest.filter("reconnect", xml);
        let claim = claims(&host).remove(0);
        assert!(claim.pending && claim.state == "claimed", "{claim:?}");
    }
    guest.starts(&image);
    assert!(!claims(&host)[0].pending);
}

#[test]
fn a_restore_never_fails_whatever_becomes_of_its_output() {
    let host = Host::new("migration = \"reclaim\"\n");
    host.discover(&device("0003", "1-3", 7, ""));
    host.plug(&device("0003", "1-3", 8, ""));
    let image =
        with(&domain("erp-1", 1, "[]").replace("[]", ""), &hostdev("0003", 7, "", "hostdev0"));
    for (operation, status) in [("restore", 0), ("migrate", 1)] {
        let mut command = host.hook(&["erp-1", operation, "begin", "-"]);
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.stdout(File::create("/dev/full").unwrap()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), image.as_bytes()).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status), "{operation}");
    }
    assert!(
        fs::read_to_string(host.path("log"))
            .unwrap()
            .contains("cannot write the domain XML to stdout")
    );
}

#[test]
fn a_domain_that_is_too_long_migrates_only_without_a_hostdev() {
    let host = Host::new("");
    let long = |inside: &str| {
        let padding = "<!--".to_owned() + &"x".repeat(virt_usb_domxml::MAX_XML) + "-->\n";
        with(&domain("erp-1", 1, "").replace("usb:flavor", "other:flavor"), &(padding + inside))
            .replace("urn:virt-usb:flavor:1", "urn:other")
    };
    let call = |operation: &str, xml: &str| {
        feed(host.hook(&["erp-1", operation, "begin", "-"]), xml.as_bytes()).status.code()
    };
    let (with_one, without) = (long(&hostdev("0003", 7, "", "hostdev0")), long(""));
    assert_eq!(call("migrate", &with_one), Some(1));
    assert_eq!(call("migrate", &without), Some(0));
    for operation in ["prepare", "restore", "reconnect"] {
        assert_eq!(call(operation, &with_one), Some(0), "{operation}");
    }
}

#[test]
fn a_refusal_names_the_assignment_that_cannot_be_served() {
    let host = Host::new("");
    host.discover(&three(10));
    let xml = domain("erp-1", 1, &format!(r#"{{"usb_devices":[{KEY}]}}"#));
    assign(&host, &xml, r#"{"id":2}"#);
    host.plug(&device("0001", "1-1", 10, ""));
    let guest = Guest { host: &host, name: "erp-1" };
    let refused = guest.call("prepare", "-", &xml);
    assert_eq!(refused.status.code(), Some(1));
    let words = text(&refused.stderr);
    assert!(words.contains(r#"erp-1 has {"id":2} assigned to it by an operator"#), "{words}");
    assert!(
        words.contains("'virt-usb detach erp-1 2' removes it")
            && words.contains("'virt-usb discover'"),
        "{words}"
    );
    // Where an agent runs, it has looked already.
    let lock = File::create(host.path("state/agent.lock")).unwrap();
    lock.lock().unwrap();
    let words = text(&guest.call("prepare", "-", &xml).stderr);
    assert!(
        !words.contains("discover") && words.contains("the agent records it automatically"),
        "{words}"
    );
}

/// The agent's plan for this guest, which runs with this XML.
fn planned(host: &Host, live: &str) -> Vec<Step> {
    let domain = read(live);
    let instance = domain.uuid.unwrap();
    let guest = virt_usb::agent::plan::Guest { domain, redirections: 0, moving: false };
    let whole = View::read(&host.store()).unwrap();
    let few = View::read_about(&host.store(), instance, Some(&guest)).unwrap();
    let plan = |view: &View| view.plan(instance, Seen::Running(&guest), &host.config());
    assert_eq!(plan(&whole), plan(&few), "the same, however much was read");
    plan(&whole)
}

#[test]
fn the_agent_leaves_alone_what_no_claim_says_is_ours() {
    let host = Host::new("");
    host.discover(&three(10));
    let guest = Guest { host: &host, name: "erp-1" };
    let plain = domain("erp-1", 1, "[]").replace("[]", "");
    // A restore in the name of a guest that runs: its device is not given to that guest.
    guest.filter("restore", &with(&plain, &hostdev("0003", 12, "", "hostdev0")));
    assert_eq!(planned(&host, &plain), []);
    assert_eq!(planned(&host, &with(&plain, &hostdev("0003", 12, "", "hostdev0"))), []);
    // An alias of our form on a device that the inventory does not have, or has by another id.
    let foreign = hostdev("0009", 99, "", "ua-usb-77");
    assert_eq!(planned(&host, &with(&plain, &foreign)), []);
    let steps = planned(&host, &with(&plain, &hostdev("0002", 11, "", "ua-usb-1")));
    assert!(matches!(&steps[..], [Step::Adopt { device, .. }] if device.get() == 2), "{steps:?}");
    // A device that another instance holds: this is reported, and not undone.
    let other = Guest { host: &host, name: "erp-2" };
    other.starts(&domain("erp-2", 2, &format!(r#"{{"usb_devices":[{KEY}]}}"#)));
    let steps = planned(&host, &with(&plain, &hostdev("0001", 10, "", "ua-usb-1")));
    assert!(
        matches!(&steps[..], [Step::Note { what, .. }] if what.contains("by hand")),
        "{steps:?}"
    );
}

#[test]
fn what_qemu_was_given_on_its_command_line_stays_there() {
    for argument in ["hostbus=1,hostport=3", "vendorid=0x0529,productid=3", "hostbus=1,hostaddr=12"]
    {
        let host = Host::new("");
        host.discover(&three(10));
        let guest = Guest { host: &host, name: "erp-1" };
        let arguments = format!(
            "  <q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg \
                value='-device'/><q:arg value='usb-host,{argument}'/></q:commandline>\n</domain>"
        );
        let xml = domain("erp-1", 1, "[]").replace("[]", "").replace("</domain>", &arguments);
        guest.starts(&xml);
        let claim = claims(&host).remove(0);
        assert_eq!(
            (claim.device_id.get(), claim.state.as_str(), claim.by_hand),
            (3, "allocated", true),
            "{argument}"
        );
        assert_eq!(planned(&host, &xml), [], "{argument}: neither attached nor given back");
        guest.filter("reconnect", &xml);
        guest.ends("saved", &xml);
        assert_eq!(claims(&host), []);
        assert_eq!(guest.restores(&xml), xml, "arguments are not edited");
        assert!(claims(&host)[0].by_hand);
    }
}

#[test]
fn a_quarantined_device_arrives_with_no_guest() {
    let host = Host::new("");
    host.discover(&three(10));
    let guest = Guest { host: &host, name: "erp-1" };
    let image =
        with(&domain("erp-1", 1, "[]").replace("[]", ""), &hostdev("0003", 12, "", "hostdev0"));
    let context = virt_usb_config::host_env::context(&host.config(), "test").unwrap();
    let id = host.store().devices().unwrap()[2].entry.id;
    host.store().set_disabled(id, Some("it smokes"), &context).unwrap();
    let refused = guest.filter("restore", &image);
    assert_eq!(claims(&host), []);
    let refused = guest.call("prepare", "-", &refused);
    assert_eq!(refused.status.code(), Some(1));
    let words = text(&refused.stderr);
    let command = format!("'virt-usb enable {id}'");
    assert!(words.contains("it smokes") && words.contains(&command), "{words}");
    host.store().set_disabled(id, None, &context).unwrap();
    assert_eq!(guest.restores(&image), image);
    assert!(claims(&host)[0].by_hand);
}

/// libvirt calls `restore` first, and `prepare` right behind it, if at all.
#[test]
fn a_restore_that_went_no_further_is_forgotten() {
    let host = Host::new("hold = \"instance\"\n");
    host.discover(&three(10));
    let guest = Guest { host: &host, name: "erp-1" };
    let xml = domain("erp-1", 1, &format!(r#"{{"usb_devices":[{KEY}]}}"#));
    let by_hand = with(&xml, &hostdev("0001", 10, "", "hostdev0"));
    guest.starts(&by_hand);
    guest.ends("saved", &by_hand);
    guest.filter("restore", &by_hand);
    host.boot("11111111-1111-4111-8111-111111111111", 5000.0);
    guest.starts(&by_hand);
    let claim = claims(&host).remove(0);
    assert_eq!(
        (claim.needs_reattach, claim.state.as_str()),
        (false, "allocated"),
        "a start from nothing"
    );
}
