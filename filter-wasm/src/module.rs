//! The core module: a C ABI for hosts without support for components.
//!
//! All functions are exported with the prefix `virt_usb_`; the module imports nothing. A text
//! parameter is a pointer to UTF-8 in the module's memory, allocated by `alloc`, and its length in
//! bytes. Parameters are `i32`, except `received` and `device`, which are `i64`. A function whose
//! result is a text writes it to a buffer: `answer` returns its address, `answer_len` its length in
//! bytes. The next call overwrites the buffer. The formats are those of the interface `text` in
//! `wit/`.
//!
//! | function | parameters | returns |
//! |---|---|---|
//! | `abi` | | 1, the version of this table |
//! | `alloc` | size | pointer, to free with the same size; never 0, even for size 0 |
//! | `free` | pointer, size | |
//! | `answer`, `answer_len` | | pointer, length |
//! | `new` | | handle of a new inventory, from 1 |
//! | `drop` | handle | |
//! | `load` | handle, lines, length, received | status; the answer is the report |
//! | `remove` | handle, host, length | status; 1 if there is no such host |
//! | `touch` | handle, host, length, received | status; 1 if there is no such host |
//! | `set_status` | handle, host, length, device, status, length | status; 1 if nothing changes |
//! | `select` | handle, question, length, candidates, length, limit | status; the answer is JSON |
//! | `select_names` | as `select` | status; the answer is one name per line |
//! | `explain` | handle, question, length, hosts, length | status; the answer is JSON lines |
//! | `statistics` | handle | status; the answer is JSON |
//!
//! Status: 0 done, 1 done without a change, −1 refused (the answer is the reason). If the pointer
//! to the candidates or hosts is 0, they are the whole fleet.

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

/// Calls `act` with an inventory, stores the answer, and returns the status.
fn with(handle: u32, act: impl FnOnce(&mut Inventory) -> Result<Outcome, Refusal>) -> i32 {
    STATE.with_borrow_mut(|state| {
        let slot = (handle as usize).checked_sub(1).and_then(|at| state.inventories.get_mut(at));
        let result = match slot.and_then(Option::as_mut) {
            Some(inventory) => act(inventory),
            None => Err(Refusal::Question(format!("there is no inventory {handle}"))),
        };
        let (answer, status) = match result {
            Ok(Outcome::Text(text)) => (text, DONE),
            Ok(Outcome::Changed(true)) => (String::new(), DONE),
            Ok(Outcome::Changed(false)) => (String::new(), UNCHANGED),
            Err(refusal) => (refusal.to_string(), REFUSED),
        };
        state.answer = answer;
        status
    })
}

/// Reads a text parameter.
///
/// # Safety
/// The caller allocated `len` bytes at `pointer` with [`virt_usb_alloc`], and has written them.
unsafe fn read<'a>(pointer: *const u8, len: usize) -> Result<&'a str, Refusal> {
    if pointer.is_null() || len == 0 {
        return Ok("");
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(pointer, len) };
    std::str::from_utf8(bytes)
        .map_err(|e| Refusal::Question(format!("found text that is not UTF-8 ({e})")))
}

/// Reads an optional text parameter; a null pointer is `None`, the whole fleet.
///
/// # Safety
/// The same as for [`read`].
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
        // The pointer to an empty list must not be 0, which means the whole fleet.
        None => std::ptr::without_provenance_mut(ALIGN),
    }
}

/// Frees memory that was allocated by [`virt_usb_alloc`].
///
/// # Safety
/// The pointer came from [`virt_usb_alloc`] with this size, and was not freed before.
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
        // Handles are not reused, so that an old handle cannot access a newer inventory.
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

/// Loads host documents, one per line.
///
/// # Safety
/// The text parameter must be valid for [`read`]. The same applies to all functions below.
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
