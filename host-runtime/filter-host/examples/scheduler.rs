//! A scheduler in Rust: loads a filter, feeds it two hosts, and selects a host.
#![allow(clippy::print_stdout, reason = "an example that shows what it does")]

use virt_usb_filter_host::{Error, Filter, Fleet, Moment, Options, Question, Verdict};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file =
        std::env::args().nth(1).unwrap_or("/usr/lib/virt-usb/virt-usb-filter.wasm".to_owned());
    let filter = Filter::load(&file, &Options::default())?;

    // The published documents of the hosts, each with the time at which it was received.
    let fleet = Fleet::new();
    fleet.put_text(
        r#"{"version":1,"host":"alpha","compute_node_id":2,"revision":7,"devices":[]}"#,
        1_000,
    )?;
    fleet.put_text(
        r#"{"version":1,"host":"beta","compute_node_id":3,"revision":4,"devices":[{
            "id":2000001,"compute_node_id":3,"address":"usb_1_5","vendor_id":"0529",
            "product_id":"0001","status":"available","port_path":"1-1.4","serial_kind":"missing",
            "class":"00"}]}"#,
        1_500,
    )?;

    // A flavor requests a license key. Hosts without news for a minute are rejected.
    let flavor = r#"{"usb_devices":[{"vendor_id":"0529","product_id":"0001"}]}"#.parse()?;
    let moment = Some(Moment { now: 2_000, max_age: 60_000 });
    let question = Question { moment, ..Question::new(flavor) };
    let mut session = filter.session(&fleet);
    match session.select(&question, None, 10) {
        Ok(selection) => {
            for placement in &selection.placements {
                println!("{} scores {}", placement.host, placement.score);
            }
            assert_eq!(selection.placements[0].host, "beta");
        }
        Err(Error::Refused(why)) => println!("the flavor is wrong: {why}"),
        Err(broken @ Error::Broken { .. }) => println!("placed without the filter: {broken}"),
    }
    if let Verdict::Rejected(why) = session.explain(&question, "alpha")? {
        println!("alpha: {why}");
    }
    Ok(())
}
