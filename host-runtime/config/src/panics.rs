//! Panic hooks that end the program.
//!
//! A program that lost a thread must not continue. systemd restarts the agent; libvirt treats the
//! hook's abort as a veto. The release build does not set `panic = "abort"`, because dependencies
//! would then be compiled a second time for tests.

/// Makes every panic end this process by SIGABRT, after its message was printed. Each installed
/// program calls this first in `main`.
pub fn abort() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// Makes every panic end this process with exit status 0, after its message was printed. The hook
/// uses this for operations that must not fail.
pub fn succeed() {
    drop(std::panic::take_hook());
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::exit(0);
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Child process of a test below, not a test itself.
    #[test]
    #[ignore = "it aborts: it is run by 'a_panic_of_any_thread_ends_the_program'"]
    fn child() {
        super::abort();
        drop(std::thread::spawn(|| panic!("on purpose")).join());
        println!("it continues");
    }

    /// Child process of a test below, not a test itself.
    #[test]
    #[ignore = "it exits: it is run by 'a_panic_of_a_call_that_never_fails_is_a_success'"]
    fn careful_child() {
        super::abort();
        super::succeed();
        drop(std::thread::spawn(|| panic!("on purpose")).join());
        println!("it continues");
        std::process::exit(3);
    }

    #[test]
    fn a_panic_of_a_call_that_never_fails_is_a_success() {
        let this = std::env::current_exe().unwrap();
        let child = ["--exact", "panics::tests::careful_child", "--ignored", "--nocapture"];
        let output = Command::new(this).args(child).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&output.stderr).contains("on purpose"));
        assert!(!String::from_utf8_lossy(&output.stdout).contains("it continues"));
    }

    #[test]
    fn a_panic_of_any_thread_ends_the_program() {
        let this = std::env::current_exe().unwrap();
        let output = Command::new(this)
            .args(["--exact", "panics::tests::child", "--ignored", "--nocapture"])
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGABRT));
        assert!(String::from_utf8_lossy(&output.stderr).contains("on purpose"));
        assert!(!String::from_utf8_lossy(&output.stdout).contains("it continues"));
    }
}
