//! Live updates: an open page receives an event with a short text for each change that its user
//! may see.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use virt_usb_model::DeviceId;
use virt_usb_store::Record;

use super::super::Api;
use super::super::authorize::Authorized;
use super::super::error::ApiError;
use super::super::identity::{AuthError, Caller, Freshness};
use super::super::inventory::Snapshot;
use super::pages::{name, words};
use super::session::Signed;

/// Maximum number of pages with live updates.
const MOST: usize = 128;
/// Maximum number of such pages per caller; browsers open at most six connections to a host.
const MOST_EACH: usize = 8;
/// Interval between two checks for changes; SQLite reports a change without a read.
const LOOK: Duration = Duration::from_millis(500);
/// Maximum number of changes that a text names.
const TOLD: usize = 3;

/// Name and state of each device, as displayed.
type Shown = BTreeMap<DeviceId, (String, String)>;

/// The devices of `snapshot` that differ from `other`. Unchanged parts of the fleet are skipped.
fn shown(snapshot: &Snapshot, other: &Snapshot, caller: &Caller) -> Shown {
    let one = |record: &Record| {
        let device = snapshot.shown(record, caller);
        let holder = device.held_by.as_deref().map(|by| format!(" by {by}")).unwrap_or_default();
        (record.entry.id, (name(&device), format!("{}{holder}", words(&device).0)))
    };
    snapshot.changed_since(other).filter(|record| snapshot.sees(caller, record)).map(one).collect()
}

/// Text that describes the changes; `None` if nothing changed.
fn difference(before: &Shown, now: &Shown) -> Option<String> {
    let changed = now.iter().filter(|(id, what)| before.get(*id) != Some(*what));
    let mut told: Vec<String> =
        changed.map(|(_, (name, state))| format!("{name}: {state}")).collect();
    told.extend(
        before
            .iter()
            .filter(|(id, _)| !now.contains_key(*id))
            .map(|(_, (name, _))| format!("{name}: gone")),
    );
    let more = told.len().saturating_sub(TOLD);
    told.truncate(TOLD);
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    (!told.is_empty()).then(|| told.join("; "))
}

/// Number of open pages by the name of their caller.
#[derive(Clone, Default)]
pub(super) struct Watchers(Arc<Mutex<BTreeMap<String, usize>>>);

/// Reservation for an open page, released on drop.
struct Place(Watchers, String);

impl Watchers {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, caller: &str) -> Option<Place> {
        let mut all = self.all();
        if all.values().sum::<usize>() >= MOST {
            return None;
        }
        let own = all.entry(caller.to_owned()).or_default();
        if *own >= MOST_EACH {
            return None;
        }
        *own += 1;
        Some(Place(self.clone(), caller.to_owned()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.0.all();
        if let Some(own) = all.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                all.remove(&self.1);
            }
        }
    }
}

/// An open page that receives updates.
struct Watch {
    api: Arc<Api>,
    /// Id of the page's session.
    id: String,
    last: Arc<Snapshot>,
    _place: Place,
}

impl Watch {
    /// Waits for the next visible change; `None` if the session or its token has ended.
    async fn next(&mut self) -> Option<String> {
        let mut ending = self.api.ending.subscribe();
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = ending.wait_for(|ending| *ending) => return None,
            }
            let token = self.api.portal.sessions.token(&self.id)?;
            let caller = match self.api.identity.caller(&token, Freshness::Cached).await {
                Ok(caller) => caller,
                Err(AuthError::InvalidToken | AuthError::Unusable(_)) => return None,
                // Send nothing while the token cannot be validated.
                Err(AuthError::Unavailable(_)) => continue,
            };
            // Retry if the inventory cannot be read now.
            let Ok(now) = self.api.inventory.now() else { continue };
            if Arc::ptr_eq(&now, &self.last) {
                continue;
            }
            let told =
                difference(&shown(&self.last, &now, &caller), &shown(&now, &self.last, &caller));
            self.last = now;
            if told.is_some() {
                return told;
            }
        }
    }
}

pub(super) async fn live(auth: Authorized, signed: Signed) -> Result<impl IntoResponse, ApiError> {
    let api = auth.api.clone();
    let place = api.portal.watchers.place(&auth.caller().name);
    let place = place.ok_or_else(|| {
        ApiError::unavailable("Too many pages are open: this one does not refresh automatically.")
    })?;
    let last = api.inventory.now()?;
    let watch = Watch { api, id: signed.id, last, _place: place };
    let events = futures_util::stream::unfold(watch, |mut watch| async move {
        let told = watch.next().await?;
        Some((Ok::<_, Infallible>(Event::default().event("change").data(told)), watch))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_with_too_many_pages_does_not_block_other_callers() {
        let watchers = Watchers::default();
        let mut loud: Vec<Place> = (0..MOST).filter_map(|_| watchers.place("loud")).collect();
        assert_eq!(loud.len(), MOST_EACH);
        let others: Vec<Place> = (0..MOST).filter_map(|n| watchers.place(&n.to_string())).collect();
        assert_eq!(others.len(), MOST - MOST_EACH);
        assert!(watchers.place("late").is_none());
        loud.pop();
        assert!(watchers.place("late").is_some());
        drop((loud, others));
        assert!(watchers.all().is_empty());
    }

    #[test]
    fn changes_are_described_in_a_short_text() {
        let shown = |all: &[(u64, &str)]| -> Shown {
            let one = |(id, state): &(u64, &str)| {
                (DeviceId::new(*id).unwrap(), (format!("key {id}"), (*state).to_owned()))
            };
            all.iter().map(one).collect()
        };
        let before = shown(&[(1, "free"), (2, "free")]);
        assert_eq!(difference(&before, &before), None);
        let now = shown(&[(2, "in use by erp"), (3, "free")]);
        assert_eq!(
            difference(&before, &now).unwrap(),
            "key 2: in use by erp; key 3: free; key 1: gone"
        );
        let many: Vec<(u64, &str)> = (1..=9).map(|n| (n, "unplugged")).collect();
        assert!(difference(&before, &shown(&many)).unwrap().ends_with("; and 6 more"));
    }
}
