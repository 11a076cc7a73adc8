//! Live: whoever looks on is told that something has changed that he may see, and in a few words what.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use virt_usb_model::DeviceId;
use virt_usb_store::Record;

use super::super::Api;
use super::super::fault::Fault;
use super::super::identity::Caller;
use super::super::inventory::Snapshot;
use super::pages::{name, words};
use super::session::Signed;

/// So many look on at once.
pub(super) const MOST: usize = 64;
/// How often it is looked whether something has changed; SQLite tells without reading anything.
const LOOK: Duration = Duration::from_millis(500);
/// So many changes are told in words.
const TOLD: usize = 3;

/// What is shown of each device, in words.
type Shown = BTreeMap<DeviceId, (String, String)>;

/// What of a snapshot is not as it was, or will not be as it is: the rest of the fleet is not looked at again.
fn shown(snapshot: &Snapshot, other: &Snapshot, caller: &Caller) -> Shown {
    let one = |record: &Record| {
        let device = snapshot.shown(record, caller);
        let holder = device.held_by.as_deref().map(|by| format!(" by {by}")).unwrap_or_default();
        (record.entry.id, (name(&device), format!("{}{holder}", words(&device).0)))
    };
    snapshot.changed_since(other).filter(|record| snapshot.sees(caller, record)).map(one).collect()
}

/// What is different, in words; none where it is nothing.
fn difference(before: &Shown, now: &Shown) -> Option<String> {
    let changed = now.iter().filter(|(id, what)| before.get(*id) != Some(*what));
    let mut told: Vec<String> = changed.map(|(_, (name, state))| format!("{name}: {state}")).collect();
    told.extend(
        before.iter().filter(|(id, _)| !now.contains_key(*id)).map(|(_, (name, _))| format!("{name}: gone")),
    );
    let more = told.len().saturating_sub(TOLD);
    told.truncate(TOLD);
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    (!told.is_empty()).then(|| told.join("; "))
}

pub(super) async fn live(State(api): State<Arc<Api>>, signed: Signed) -> Result<impl IntoResponse, Fault> {
    let place = api.portal.watchers.clone().try_acquire_owned();
    let place =
        place.map_err(|_| Fault::unavailable("Too many pages are open: this one does not update itself."))?;
    let first = api.inventory.now()?;
    let state = (api, signed.caller, first, place);
    let events = futures_util::stream::unfold(state, |(api, caller, mut last, place)| async move {
        let mut ending = api.ending.subscribe();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = ending.wait_for(|ending| *ending) => return None,
            }
            // What cannot be read now is looked at again.
            let Ok(now) = api.inventory.now() else { continue };
            if Arc::ptr_eq(&now, &last) {
                continue;
            }
            let told = difference(&shown(&last, &now, &caller), &shown(&now, &last, &caller));
            last = now;
            if let Some(told) = told {
                let event = Event::default().event("change").data(told);
                return Some((Ok::<_, Infallible>(event), (api, caller, last, place)));
            }
        }
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_is_told_in_a_few_words() {
        let shown = |all: &[(u64, &str)]| -> Shown {
            let one = |(id, state): &(u64, &str)| {
                (DeviceId::new(*id).unwrap(), (format!("key {id}"), (*state).to_owned()))
            };
            all.iter().map(one).collect()
        };
        let before = shown(&[(1, "free"), (2, "free")]);
        assert_eq!(difference(&before, &before), None);
        let now = shown(&[(2, "in use by erp"), (3, "free")]);
        assert_eq!(difference(&before, &now).unwrap(), "key 2: in use by erp; key 3: free; key 1: gone");
        let many: Vec<(u64, &str)> = (1..=9).map(|n| (n, "unplugged")).collect();
        assert!(difference(&before, &shown(&many)).unwrap().ends_with("; and 6 more"));
    }
}
