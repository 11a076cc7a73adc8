//! One call, against what libvirt's virCommandRun does.
use std::path::Path;
use std::time::{Duration, Instant};

use super::common::{folder, raw_script, script};
use virt_usb_harness::{Answer, Call, Exit, Hang, Settings, call};
use virt_usb_suite::until;

fn made<'a>(hook: &Path, stdin: &'a [u8]) -> Call<'a> {
    Call {
        hook: hook.into(),
        before: Vec::new(),
        name: "a guest".into(),
        op: "prepare".into(),
        subop: "begin".into(),
        extra: String::new(),
        stdin,
    }
}

fn answer(body: &str, stdin: &[u8], seconds: f64) -> (Answer, Option<String>) {
    let dir = folder();
    let hook = script(&dir.path().join("qemu"), body);
    let settings = Settings { timeout: Duration::from_secs_f64(seconds), ..Settings::default() };
    let made = made(&hook, stdin);
    let answer = call(&made, &settings).unwrap();
    let message = answer.message(&made, &settings);
    (answer, message)
}

fn printed(answer: &Answer) -> String {
    String::from_utf8(answer.stdout.clone()).unwrap()
}

#[test]
fn the_environment_is_libvirts() {
    let (answer, _) = answer("tr '\\0' '\\n' < /proc/$$/environ", b"", 10.0);
    let names: Vec<_> =
        printed(&answer).lines().map(|line| line.split('=').next().unwrap().to_owned()).collect();
    let allowed = ["LC_ALL", "PATH", "HOME", "USER", "LOGNAME", "TMPDIR"];
    assert!(names.iter().all(|name| allowed.contains(&name.as_str())), "{names:?}");
    assert!(names.contains(&"PATH".to_owned()), "{names:?}");
    assert!(printed(&answer).contains("LC_ALL=C\n"));
    assert!(!printed(&answer).contains("cargo"), "our PATH leaked: {}", printed(&answer));
}

#[test]
fn a_named_variable_is_kept() {
    let dir = folder();
    let hook = script(&dir.path().join("qemu"), "echo \"$CARGO_PKG_NAME\"");
    let settings = Settings { keep_env: vec!["CARGO_PKG_NAME".into()], ..Settings::default() };
    assert_eq!(
        printed(&call(&made(&hook, b""), &settings).unwrap()),
        concat!(env!("CARGO_PKG_NAME"), "\n")
    );
}

#[test]
fn four_arguments_and_the_root_as_working_directory() {
    let (answer, _) = answer("pwd; echo $#; printf '<%s>' \"$@\"", b"", 10.0);
    assert_eq!(printed(&answer), "/\n4\n<a guest><prepare><begin><->");
    assert!(answer.succeeded());
}

#[test]
fn nothing_but_the_three_standard_descriptors() {
    let (answer, _) = answer("ls /proc/$$/fd", b"", 10.0);
    // The shell itself opens the script as 10; `differences` reports what the test's own parent
    // left open.
    let own: Vec<_> = virt_usb_harness::differences();
    let extra = printed(&answer).lines().filter(|fd| !["0", "1", "2", "10"].contains(fd)).count();
    assert_eq!(extra, own.len(), "{}", printed(&answer));
}

#[test]
fn a_megabyte_both_ways() {
    let xml = vec![b'x'; 1_000_000];
    let body = "head -c 1000000 /dev/zero | tr '\\0' e >&2; cat";
    let (answer, _) = answer(body, &xml, 30.0);
    assert_eq!(answer.stdout.len(), 1_000_000);
    assert_eq!(answer.stderr.len(), 1_000_000);
    assert!(answer.succeeded());
}

#[test]
fn a_hook_need_not_read() {
    let xml = vec![b'x'; 1_000_000];
    assert!(answer("exit 0", &xml, 10.0).0.succeeded());
    assert!(answer("exec 0<&-; sleep 0.2", &xml, 10.0).0.succeeded());
}

#[test]
fn the_message_is_the_one_that_virsh_shows() {
    let (answer, message) = answer("echo 'key 0529:0001 is taken' >&2; exit 3", b"", 10.0);
    assert_eq!(answer.exit, Exit::Code(3));
    let message = message.unwrap();
    let begin = "Hook script execution failed: internal error: Child process (LC_ALL=C PATH=";
    assert!(message.starts_with(begin), "{message}");
    let end = "/qemu 'a guest' prepare begin -) unexpected exit status 3: key 0529:0001 is taken";
    assert!(message.ends_with(end), "{message}");
}

#[test]
fn a_signal_is_named() {
    let (answer, message) = answer("kill -SEGV $$", b"", 10.0);
    assert_eq!(answer.exit, Exit::Signal(11));
    assert!(message.unwrap().ends_with("prepare begin -) unexpected fatal signal 11"));
}

#[test]
fn a_hook_that_does_not_end_is_ended() {
    let begun = Instant::now();
    let (answer, message) = answer("echo begun; sleep 600", b"", 10.0);
    assert_eq!((answer.exit, answer.hang), (Exit::Signal(9), Some(Hang::StillRunning)));
    assert_eq!(printed(&answer), "begun\n");
    assert!(begun.elapsed() < Duration::from_secs(500));
    assert!(message.unwrap().contains("libvirt would wait for ever"));
}

#[test]
fn a_hook_that_closes_its_outputs_and_goes_on_is_waited_for() {
    assert_eq!(answer("exec >&- 2>&-; sleep 0.2; exit 4", b"", 10.0).0.exit, Exit::Code(4));
    let (answer, _) = answer("exec >&- 2>&-; sleep 60", b"", 0.3);
    assert_eq!(answer.hang, Some(Hang::StillRunning));
}

#[test]
fn a_grandchild_that_holds_the_pipes_is_found_out() {
    let begun = Instant::now();
    let (answer, message) = answer("sleep 600 & echo $!; exit 0", b"", 10.0);
    assert_eq!((answer.exit, answer.hang), (Exit::Code(0), Some(Hang::PipesHeld)));
    assert!(!answer.succeeded());
    assert!(
        message.unwrap().contains(
            "a child of the hook still holds stdout/stderr open: libvirt would hang here"
        )
    );
    assert!(begun.elapsed() < Duration::from_secs(500));
    let pid = printed(&answer).trim().to_owned();
    let gone = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.contains("(sleep)") || stat.contains(") Z ")
    };
    until("the grandchild to be gone", || gone().then_some(()));
}

#[test]
fn what_cannot_be_executed_fails_as_under_libvirt() {
    let dir = folder();
    let fails = |text: &str| {
        let hook = raw_script(&dir.path().join("hook"), text);
        let answer = call(&made(&hook, b"<domain/>"), &Settings::default()).unwrap();
        assert!(answer.stderr.contains("cannot execute binary"), "{}", answer.stderr);
        answer.exit
    };
    assert_eq!(fails("no interpreter line\n"), Exit::Code(126));
    assert_eq!(fails("#!/nowhere/sh\n"), Exit::Code(127));
}
