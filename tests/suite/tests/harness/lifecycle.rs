//! Order of the calls, compared with libvirt's qemu driver.
use super::common::{domain, folder, recorded, recorder};
use virt_usb_harness::{
    Cycle, Domain, Hooks, Initiator, Outcome, OutputFate, Played, Player, Script, Settings,
};

const HOSTDEV: &str = "<hostdev mode='subsystem' type='usb'/>";

fn play(cycle: Cycle, caller: Initiator, more: &str) -> (Played, Vec<String>) {
    let dir = folder();
    let log = dir.path().join("log");
    let path = recorder(&dir.path().join("hook"), &log, more);
    let hooks = Hooks::find(Some(Script { path, before: Vec::new() }), None).unwrap();
    let settings = Settings::default();
    let player = Player { hooks: &hooks, settings: &settings, caller };
    let guest = Domain::parse(domain("vm", HOSTDEV).into_bytes()).unwrap();
    let mut seen = 0;
    let played = player.play(cycle, &guest, &mut |_| seen += 1).unwrap();
    assert_eq!(seen, played.calls.len(), "every call is reported");
    (played, recorded(&log))
}

fn fails(op: &str) -> String {
    format!("[ \"$2\" != {op} ] || {{ echo no >&2; exit 1; }}")
}

fn refused_at(played: &Played) -> Option<&str> {
    match &played.outcome {
        Outcome::Refused { op, .. } => Some(op),
        Outcome::Done => None,
    }
}

#[test]
fn a_start_and_its_aborts() {
    let start = |more: &str| play(Cycle::Start, Initiator::Libvirt, more);
    let (played, calls) = start("");
    assert_eq!(calls, ["prepare -", "start -", "started -"]);
    assert!(played.live.is_some());
    let cleanup = ["stopped -", "release failed"];
    for (op, before) in [("prepare", 1), ("start", 2), ("started", 3)] {
        let (played, calls) = start(&fails(op));
        let expected = [&["prepare -", "start -", "started -"][..before], &cleanup].concat();
        assert_eq!(calls, expected, "{op}");
        assert_eq!(refused_at(&played), Some(op));
        assert!(played.live.is_none());
    }
}

#[test]
fn ends_and_their_reasons() {
    let ends = [
        (Cycle::Stop, "shutdown"),
        (Cycle::Destroy, "destroyed"),
        (Cycle::Crash, "crashed"),
        (Cycle::Save, "saved"),
        (Cycle::MigrateAway, "migrated"),
    ];
    for (cycle, reason) in ends {
        let (_, calls) = play(cycle, Initiator::Libvirt, "");
        assert_eq!(calls, ["stopped -".to_owned(), format!("release {reason}")]);
    }
    let (played, calls) = play(Cycle::Stop, Initiator::Libvirt, &fails("stopped"));
    assert_eq!(calls, ["stopped -", "release shutdown"], "libvirt goes on");
    assert_eq!(refused_at(&played), None);
    assert!(played.remarks[0].contains("ignores"));
}

#[test]
fn nothing_follows_a_refused_filter() {
    for (cycle, op) in [(Cycle::Restore, "restore"), (Cycle::Migrate, "migrate")] {
        let (played, calls) = play(cycle, Initiator::Libvirt, "");
        assert_eq!(calls, [&format!("{op} -"), "prepare -", "start -", "started -"]);
        assert!(played.live.is_some());
        let (played, calls) = play(cycle, Initiator::Libvirt, &fails(op));
        assert_eq!(calls, [format!("{op} -")]);
        assert_eq!(refused_at(&played), Some(op));
        let (_, calls) = play(cycle, Initiator::Libvirt, &fails("start"));
        assert_eq!(
            calls[3..],
            ["stopped -", "release failed"],
            "once it is on the list, the usual clean-up"
        );
    }
}

#[test]
fn a_filter_may_change_a_source_but_not_the_number_of_devices() {
    let rewrite = |to: &str| format!("[ \"$2\" = migrate ] && sed \"s|<hostdev .*/>|{to}|\"; true");
    let (played, _) = play(Cycle::Migrate, Initiator::Libvirt, &rewrite("<hostdev new='1'/>"));
    assert_eq!(played.calls[0].output, OutputFate::Used);
    assert!(played.calls[1].stdin.contains("new='1'"), "prepare gets what the filter printed");
    assert!(String::from_utf8(played.live.unwrap().xml).unwrap().contains("new='1'"));
    let (played, calls) =
        play(Cycle::Migrate, Initiator::Libvirt, &rewrite("<hostdev/><hostdev/>"));
    assert_eq!(calls, ["migrate -"]);
    assert_eq!(played.calls[0].output, OutputFate::Refused);
    let Outcome::Refused { message, .. } = played.outcome else { panic!("it went through") };
    assert!(
        message.contains("Target domain host device count 2 does not match source 1"),
        "{message}"
    );
    let (_, calls) = play(Cycle::Restore, Initiator::Libvirt, "echo '<domain>'");
    assert_eq!(calls, ["restore -"], "what is not well-formed is refused, too");
}

#[test]
fn what_prepare_prints_is_for_a_filter_caller_only() {
    let more = "[ \"$2\" = prepare ] && sed \"s|</devices>|<hostdev added='1'/></devices>|\"; true";
    let (played, _) = play(Cycle::Start, Initiator::Libvirt, more);
    assert_eq!(played.calls[0].output, OutputFate::Discarded);
    assert!(!played.calls[1].stdin.contains("added"));
    let (played, _) = play(Cycle::Start, Initiator::Filter, more);
    assert_eq!(played.calls[0].output, OutputFate::Used);
    assert!(
        played.calls[1].stdin.contains("added"),
        "devices may be added where the caller starts what is printed"
    );
    let (played, calls) =
        play(Cycle::Start, Initiator::Filter, "[ \"$2\" = prepare ] && echo nonsense; true");
    assert_eq!(calls, ["prepare -", "stopped -", "release failed"]);
    assert_eq!(played.calls[0].output, OutputFate::Refused);
}

#[test]
fn a_failing_reconnect_kills_the_guest() {
    let (played, calls) = play(Cycle::RestartDaemon, Initiator::Libvirt, "");
    assert_eq!(calls, ["reconnect -"]);
    assert!(played.live.is_some());
    let (played, calls) = play(Cycle::RestartDaemon, Initiator::Libvirt, &fails("reconnect"));
    assert_eq!(calls, ["reconnect -", "stopped -", "release daemon"]);
    assert!(played.remarks[0].contains("KILLS the running guest vm"));
    assert!(played.live.is_none());
}
