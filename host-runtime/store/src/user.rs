//! Root does not work in a folder that belongs to another user: it becomes that user first.
//!
//! `state_dir` belongs to the agent's user, who is unprivileged and can replace any name in it by a
//! link, at any moment. What follows such a link with root's rights reads, overwrites or deletes
//! files for that user. No check of a name prevents that, because the name can change after the
//! check. So the kernel decides, by the rights of the user who could have changed the name:
//!
//! ```text
//!  User::of(folder) ─► User::enter ─► AsUser: this thread has that user's rights alone
//!                                        └── dropped ─► root again
//! ```
//! The effective user, the effective group and the supplementary groups of *one thread* change
//! (setresuid(2), "C library/kernel differences"); the real and the saved user stay root, so that
//! the agent's user can neither signal nor trace the process. Nothing changes where the folder
//! belongs to root, and where the process is not root's.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::{fs, path};

use rustix::process::{Gid, Uid, getegid, geteuid, getgroups, getuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Symbolic links on one path before it is taken for a loop, as in the kernel (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// The user with whose rights a folder is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User(Option<Ids>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ids {
    user: Uid,
    group: Gid,
}

impl User {
    /// The user with whose rights this process uses `folder`: the first on the path to it, the
    /// folder included, who is not root. A folder that is missing counts as the one above it.
    ///
    /// If root owns every folder on the path, no other user can have redirected it.
    ///
    /// # Errors
    /// If a folder on the path cannot be read.
    pub fn of(folder: &Path) -> io::Result<Self> {
        // The real user: a thread that has become another one already can do so only as root.
        Ok(Self(if getuid().is_root() { first_stranger(folder)? } else { None }))
    }

    /// The user with whose rights this process uses the folder that `file` lies in.
    ///
    /// # Errors
    /// If a folder on the path cannot be read.
    pub fn of_folder_of(file: &Path) -> io::Result<Self> {
        let file = path::absolute(file)?;
        Self::of(file.parent().unwrap_or(Path::new("/")))
    }

    /// Becomes this user, for this thread and until the guard is dropped. A thread that is not
    /// root at the moment stays who it is.
    ///
    /// # Errors
    /// If the kernel refuses it: a container whose root lacks `CAP_SETUID` or `CAP_SETGID`.
    pub fn enter(self) -> io::Result<AsUser> {
        let left = match self.0 {
            Some(ids) if geteuid().is_root() => Some(become_other(ids)?),
            _ => None,
        };
        Ok(AsUser { left, thread: PhantomData })
    }

    /// The user with whose rights this thread works in root's place, if it does.
    pub(crate) fn in_place_of_root() -> Option<u32> {
        let user = geteuid();
        (getuid().is_root() && !user.is_root()).then(|| user.as_raw())
    }

    /// User and group, where this is not root.
    pub(crate) fn ids(self) -> Option<(Uid, Gid)> {
        self.0.map(|ids| (ids.user, ids.group))
    }
}

/// As long as this lives, the thread has the rights of a [`User`].
#[must_use = "the thread is root again as soon as this is dropped"]
#[derive(Debug)]
pub struct AsUser {
    left: Option<Left>,
    /// The guard belongs to the thread that it changed.
    thread: PhantomData<*const ()>,
}

impl AsUser {
    /// Returns the state that makes the thread root again, for a type that may move between threads
    /// while it is not in use.
    pub(crate) fn into_left(self) -> Option<Left> {
        self.left
    }
}

/// The former rights of root.
#[derive(Debug)]
pub(crate) struct Left {
    group: Gid,
    groups: Vec<Gid>,
}

impl Drop for Left {
    fn drop(&mut self) {
        // If the kernel refuses one of them, the thread keeps fewer rights, and what needs root's
        // fails and says so. The user comes first: only root may change the groups.
        let root = set_thread_res_uid(None, Uid::ROOT, None);
        let group = root.and_then(|()| set_thread_res_gid(None, self.group, None));
        let _done = group.and_then(|()| set_thread_groups(&self.groups));
    }
}

fn become_other(ids: Ids) -> io::Result<Left> {
    let left = Left { group: getegid(), groups: getgroups()? };
    let become_them = || {
        set_thread_groups(&[ids.group])?;
        set_thread_res_gid(None, ids.group, None)?;
        set_thread_res_uid(None, ids.user, None)
    };
    become_them().map_err(|e| {
        let (user, why) = (ids.user.as_raw(), io::Error::from(e));
        let what = format!("root cannot become user {user}, the owner of the folder: {why}");
        io::Error::new(why.kind(), what)
    })?;
    // No error is not yet a success: see setuid(2), "BUGS".
    match geteuid() == ids.user && getegid() == ids.group {
        true => Ok(left),
        false => Err(io::Error::other("the kernel did not change the user of this thread")),
    }
}

/// The first owner on the path to `folder` who is not root, with the group of `folder` if that user
/// owns it. Each name is looked up in folders of root, which no other user can change.
fn first_stranger(folder: &Path) -> io::Result<Option<Ids>> {
    let mut names = parts(&path::absolute(folder)?);
    let (mut at, mut links) = (PathBuf::from("/"), 0);
    while let Some(name) = names.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&name);
        let found = match fs::symlink_metadata(&next) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if found.uid() != 0 && is_mapped(found.uid()) {
            let end = fs::metadata(folder).ok().filter(|end| end.uid() == found.uid());
            let group = end.map_or(found.gid(), |end| end.gid());
            return Ok(Some(Ids { user: Uid::from_raw(found.uid()), group: Gid::from_raw(group) }));
        }
        if !found.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(ErrorKind::InvalidInput.into());
        }
        let target = fs::read_link(&next)?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        let rest = std::mem::replace(&mut names, parts(&target));
        names.extend(rest);
    }
    Ok(None)
}

/// The names on a path, `..` among them.
fn parts(path: &Path) -> VecDeque<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// Whether a user exists in this user namespace. A file of a user who does not exist there is shown
/// with the owner `nobody`, and is as foreign to the namespace's root as to all other users.
fn is_mapped(user: u32) -> bool {
    /// Shown for users who do not exist (`/proc/sys/kernel/overflowuid`).
    const OVERFLOW: u32 = 65534;
    let maps = |line: &str| {
        let mut numbers = line.split_whitespace().map_while(|number| number.parse::<u32>().ok());
        let (first, count) = (numbers.next(), numbers.nth(1));
        matches!((first, count), (Some(first), Some(count)) if user.wrapping_sub(first) < count)
    };
    let is_in = |map: String| map.lines().any(maps);
    user != OVERFLOW || fs::read_to_string("/proc/self/uid_map").map_or(true, is_in)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    const AGENT: u32 = 4711;
    const OTHER: u32 = 4712;

    /// A folder of root's that others may enter; none where the tests do not run as root.
    fn folder(test: &str) -> Option<tempfile::TempDir> {
        if !geteuid().is_root() {
            eprintln!("{test}: not root: no other user's rights can be taken, this is not tested");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Some(dir)
    }

    fn make(dir: &Path, name: &str, owner: u32) -> PathBuf {
        let path = dir.join(name);
        fs::create_dir(&path).unwrap();
        chown(&path, Some(owner), Some(owner + 1)).unwrap();
        path
    }

    fn ids(path: &Path) -> Option<(u32, u32)> {
        User::of(path).unwrap().ids().map(|(user, group)| (user.as_raw(), group.as_raw()))
    }

    #[test]
    fn the_first_on_the_way_who_is_not_root() {
        let Some(dir) = folder("the first on the way") else { return };
        let dir = dir.path();
        let (own, theirs) = (make(dir, "own", 0), make(dir, "theirs", AGENT));
        assert_eq!(ids(&own), None);
        assert_eq!(ids(&theirs), Some((AGENT, AGENT + 1)));
        // A folder in theirs that is root's or another's: they can put one of their own in its
        // place.
        make(&theirs, "root", 0);
        let deep = make(&theirs, "deep", AGENT);
        chown(&deep, None, Some(0)).unwrap();
        assert_eq!(ids(&theirs.join("root/missing")), Some((AGENT, AGENT + 1)));
        assert_eq!(ids(&deep), Some((AGENT, 0)), "the folder's own group");
        assert_eq!(ids(&make(&own, "agent", OTHER).join("missing")), Some((OTHER, OTHER + 1)));
        assert_eq!(ids(&own.join("missing")), None);
        // A link counts as its target, with the owner of the target.
        symlink(&theirs, dir.join("to-theirs")).unwrap();
        symlink("../own/../theirs/deep", own.join("relative")).unwrap();
        symlink(&own, theirs.join("to-own")).unwrap();
        symlink(&own, dir.join("of-others")).unwrap();
        std::os::unix::fs::lchown(dir.join("of-others"), Some(OTHER), Some(OTHER)).unwrap();
        assert_eq!(ids(&dir.join("to-theirs")), Some((AGENT, AGENT + 1)));
        assert_eq!(ids(&own.join("relative")).map(|(user, _)| user), Some(AGENT));
        assert_eq!(ids(&theirs.join("to-own")).map(|(user, _)| user), Some(AGENT));
        assert_eq!(ids(&dir.join("of-others")).map(|(user, _)| user), Some(OTHER));
        assert_eq!(ids(&theirs.join("../own")).map(|(user, _)| user), Some(AGENT));
        symlink("loop", dir.join("loop")).unwrap();
        assert!(User::of(&dir.join("loop")).is_err());
        assert_eq!(User::of_folder_of(&theirs.join("file")).unwrap(), User::of(&theirs).unwrap());
    }

    #[test]
    fn a_thread_has_their_rights_until_the_guard_is_dropped() {
        let Some(dir) = folder("a thread has their rights") else { return };
        let theirs = make(dir.path(), "theirs", AGENT);
        let secret = dir.path().join("secret");
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o660)).unwrap();
        let user = User::of(&theirs).unwrap();
        let before = getgroups().unwrap();
        {
            let _they = user.enter().unwrap();
            assert_eq!((geteuid().as_raw(), getegid().as_raw()), (AGENT, AGENT + 1));
            assert_eq!(getgroups().unwrap(), [Gid::from_raw(AGENT + 1)]);
            assert!(fs::read(&secret).is_err(), "neither root's file nor its group's");
            fs::write(theirs.join("made"), "").unwrap();
            // A nested guard: the thread becomes root again only when the outer guard is dropped.
            // The user stays the same.
            drop(user.enter().unwrap());
            assert_eq!((geteuid().as_raw(), User::of(&theirs).unwrap()), (AGENT, user));
            let other = std::thread::scope(|scope| {
                let child = scope.spawn(|| geteuid().as_raw());
                child.join().unwrap()
            });
            assert_eq!(other, AGENT, "a thread begins with the rights of the one that made it");
        }
        assert!(geteuid().is_root() && getegid().is_root() && getgroups().unwrap() == before);
        let made = fs::metadata(theirs.join("made")).unwrap();
        assert_eq!((made.uid(), made.gid()), (AGENT, AGENT + 1));
        let (ask, asked) = std::sync::mpsc::channel();
        let (answer, answered) = std::sync::mpsc::channel();
        let running = std::thread::spawn(move || {
            asked.recv().unwrap();
            answer.send(geteuid().as_raw()).unwrap();
        });
        let _they = user.enter().unwrap();
        ask.send(()).unwrap();
        assert_eq!(answered.recv().unwrap(), 0, "one that runs already keeps its own");
        running.join().unwrap();
    }

    #[test]
    fn nothing_changes_for_root_s_own_folder() {
        let Some(dir) = folder("root's own folder") else { return };
        let _they = User::of(dir.path()).unwrap().enter().unwrap();
        assert!(geteuid().is_root());
    }
}
