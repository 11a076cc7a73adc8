//! The core module: a C ABI for hosts that know no components.
//!
//! Every function is exported by the name `virt_usb_…`; the module imports nothing. Texts go in as
//! a pointer and a length in bytes into the module's memory, at a place that `virt_usb_alloc` gave;
//! they are UTF-8. A function that answers with a text leaves it in one buffer, which the next call
//! overwrites: `virt_usb_answer` is where it is, `virt_usb_answer_len` how long. The formats are
//! those of the interface `text` in `wit/`.
//!
//! | function | takes | returns |
//! |---|---|---|
//! | `virt_usb_abi` | | 1, the version of this table |
//! | `virt_usb_alloc` | size | pointer, to be given back with the same size; never 0, for no size neither |
//! | `virt_usb_free` | pointer, size | |
//! | `virt_usb_answer`, `virt_usb_answer_len` | | pointer, length |
//! | `virt_usb_new` | | an inventory's handle, from 1 |
//! | `virt_usb_drop` | handle | |
//! | `virt_usb_load` | handle, lines, length, received (i64) | status; the answer is the report |
//! | `virt_usb_remove` | handle, host, length | status 0, or 1 when there was none |
//! | `virt_usb_touch` | handle, host, length, received (i64) | status 0, or 1 when there is none |
//! | `virt_usb_set_status` | handle, host, length, device (i64), status, length | status 0, or 1 when it makes no difference |
//! | `virt_usb_select` | handle, question, length, candidates, length, limit | status; the answer is JSON |
//! | `virt_usb_select_names` | the same | status; the answer is names, one a line |
//! | `virt_usb_explain` | handle, question, length, hosts, length | status; the answer is JSON lines |
//! | `virt_usb_statistics` | handle | status; the answer is JSON |
//!
//! Status: 0 done, 1 done and nothing changed, −1 refused, and the answer says why. Candidates and
//! hosts at pointer 0 mean the whole fleet.

#![allow(
    unsafe_code,
    reason = "a C ABI: texts come as pointers, and exported names are unsafe attributes"
)]

use std::cell::RefCell;

use virt_usb_filter_core::{Inventory, Refusal, text};

const DONE: i32 = 0;
const UNCHANGED: i32 = 1;
const REFUSED: i32 = -1;

#[derive(Default)]
struct State {
    inventories: Vec<Option<Inventory>>,
    answer: String,
}

thread_local! {
    // A module has one thread.
    static STATE: RefCell<State> = RefCell::default();
}

/// Result of a call.
enum Outcome {
    Text(String),
    Changed(bool),
}

type Done = Result<Outcome, Refusal>;

/// Does something with an inventory, and leaves the answer.
fn with(handle: u32, act: impl FnOnce(&mut Inventory) -> Done) -> i32 {
    STATE.with_borrow_mut(|state| {
        let slot = (handle as usize).checked_sub(1).and_then(|at| state.inventories.get_mut(at));
        let done = match slot.and_then(Option::as_mut) {
            Some(inventory) => act(inventory),
            None => Err(Refusal::Question(format!("there is no inventory {handle}"))),
        };
        let (answer, status) = match done {
            Ok(Outcome::Text(text)) => (text, DONE),
            Ok(Outcome::Changed(true)) => (String::new(), DONE),
            Ok(Outcome::Changed(false)) => (String::new(), UNCHANGED),
            Err(refusal) => (refusal.to_string(), REFUSED),
        };
        state.answer = answer;
        status
    })
}

/// A text that the caller has put into memory.
///
/// # Safety
/// `len` bytes at `pointer` came from [`virt_usb_alloc`] and were written by the caller.
unsafe fn read<'a>(pointer: *const u8, len: usize) -> Result<&'a str, Refusal> {
    if pointer.is_null() || len == 0 {
        return Ok("");
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(pointer, len) };
    std::str::from_utf8(bytes)
        .map_err(|e| Refusal::Question(format!("found text that is not UTF-8 ({e})")))
}

/// The same where no text means the whole fleet.
///
/// # Safety
/// As [`read`].
unsafe fn read_some<'a>(pointer: *const u8, len: usize) -> Result<Option<&'a str>, Refusal> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { read(pointer, len) }.map(Some)
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_abi() -> u32 {
    1
}

const ALIGN: usize = 8;

fn layout(size: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(size, ALIGN).ok().filter(|layout| layout.size() > 0)
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_alloc(size: usize) -> *mut u8 {
    match layout(size) {
        // SAFETY: the layout has a size.
        Some(layout) => match unsafe { std::alloc::alloc(layout) } {
            pointer if pointer.is_null() => std::alloc::handle_alloc_error(layout),
            pointer => pointer,
        },
        // An empty list has a pointer that is not 0: 0 would mean the whole fleet.
        None => std::ptr::without_provenance_mut(ALIGN),
    }
}

/// # Safety
/// The pointer came from [`virt_usb_alloc`] with this size, and was not given back.
#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_free(pointer: *mut u8, size: usize) {
    if let Some(layout) = layout(size).filter(|_| !pointer.is_null()) {
        // SAFETY: the caller's promise.
        unsafe { std::alloc::dealloc(pointer, layout) }
    }
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_answer() -> *const u8 {
    STATE.with_borrow(|state| state.answer.as_ptr())
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_answer_len() -> usize {
    STATE.with_borrow(|state| state.answer.len())
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_new() -> u32 {
    STATE.with_borrow_mut(|state| {
        // No handle is used again: an old one must not speak to another's inventory.
        state.inventories.push(Some(Inventory::new()));
        u32::try_from(state.inventories.len()).unwrap_or(u32::MAX)
    })
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_drop(handle: u32) {
    STATE.with_borrow_mut(|state| {
        if let Some(slot) =
            (handle as usize).checked_sub(1).and_then(|at| state.inventories.get_mut(at))
        {
            *slot = None;
        }
    });
}

/// # Safety
/// The text is as [`read`] wants it; the same holds for all below.
#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_load(
    handle: u32,
    lines: *const u8,
    len: usize,
    received: u64,
) -> i32 {
    // SAFETY: the caller's promise.
    let lines = unsafe { read(lines, len) };
    with(handle, |inventory| Ok(Outcome::Text(text::loaded(&inventory.load(lines?, received)))))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_remove(handle: u32, host: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise.
    let host = unsafe { read(host, len) };
    with(handle, |inventory| Ok(Outcome::Changed(inventory.remove(host?))))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_touch(
    handle: u32,
    host: *const u8,
    len: usize,
    received: u64,
) -> i32 {
    // SAFETY: the caller's promise.
    let host = unsafe { read(host, len) };
    with(handle, |inventory| Ok(Outcome::Changed(inventory.touch(host?, received))))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_set_status(
    handle: u32,
    host: *const u8,
    len: usize,
    device: u64,
    status: *const u8,
    status_len: usize,
) -> i32 {
    // SAFETY: the caller's promise.
    let (host, status) = unsafe { (read(host, len), read(status, status_len)) };
    with(handle, |inventory| {
        Ok(Outcome::Changed(inventory.set_status_text(host?, device, status?)?))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_select(
    handle: u32,
    question: *const u8,
    len: usize,
    candidates: *const u8,
    candidates_len: usize,
    limit: u32,
) -> i32 {
    // SAFETY: the caller's promise.
    let (question, candidates) =
        unsafe { (read(question, len), read_some(candidates, candidates_len)) };
    with(handle, |inventory| {
        Ok(Outcome::Text(inventory.select_text(question?, candidates?, limit)?))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_select_names(
    handle: u32,
    question: *const u8,
    len: usize,
    candidates: *const u8,
    candidates_len: usize,
    limit: u32,
) -> i32 {
    // SAFETY: the caller's promise.
    let (question, candidates) =
        unsafe { (read(question, len), read_some(candidates, candidates_len)) };
    with(handle, |inventory| {
        Ok(Outcome::Text(inventory.select_names(question?, candidates?, limit)?))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn virt_usb_explain(
    handle: u32,
    question: *const u8,
    len: usize,
    hosts: *const u8,
    hosts_len: usize,
) -> i32 {
    // SAFETY: the caller's promise.
    let (question, hosts) = unsafe { (read(question, len), read_some(hosts, hosts_len)) };
    with(handle, |inventory| Ok(Outcome::Text(inventory.explain_text(question?, hosts?)?)))
}

#[unsafe(no_mangle)]
extern "C" fn virt_usb_statistics(handle: u32) -> i32 {
    with(handle, |inventory| Ok(Outcome::Text(inventory.statistics_text())))
}
