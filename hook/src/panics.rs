//! A panic ends the program.
//!
//! Half of a program that goes on without one of its threads would be worse: systemd starts the agent again, and libvirt
//! takes the hook's end for a veto. The release build does not say `panic = "abort"`, because dependencies would then be
//! compiled a second time for the tests.

/// Makes every panic of this process end it by SIGABRT, once its message is printed. Called first in each `main`.
pub fn abort() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Not a test by itself: what the test below starts.
    #[test]
    #[ignore = "it aborts: it is run by 'a_panic_of_any_thread_ends_the_program'"]
    fn child() {
        super::abort();
        drop(std::thread::spawn(|| panic!("on purpose")).join());
        println!("it goes on");
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
        assert!(!String::from_utf8_lossy(&output.stdout).contains("it goes on"));
    }
}
