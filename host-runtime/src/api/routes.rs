//! The routes of the API. Each is registered once in [`table`], with its handler and its policy.
//! The handler's `#[utoipa::path]` states the method, the path and the description. The router, the
//! OpenAPI description and the role check are made from this table.

use std::sync::Arc;

use axum::Router;
use axum::extract::FromRequest;
use axum::routing::{MethodFilter, MethodRouter};
use utoipa::OpenApi;
use utoipa::openapi::PathItem;
use utoipa::openapi::path::Operation;

use super::authorize::Policy::{Always, ByCase};
use super::authorize::{Handler, Policy, guard};
use super::identity::Role;
use super::policy::Call;
use super::policy::Call::{
    Attach, ChangeDevice, ChangeFlavor, ChangeOwner, Detach, Grants, Look, LookAt,
};
use super::request::Authenticated;
use super::{Api, claims, devices, events, flavors, grants, hypervisors, servers};

/// A route with its description.
pub(super) struct Route {
    /// Description of the operation, and of the schemas that it uses.
    pub(super) description: utoipa::openapi::OpenApi,
    /// Method routers by path.
    served: Vec<(String, MethodRouter<Arc<Api>>)>,
}

impl Route {
    fn new<I, M>(
        mut description: utoipa::openapi::OpenApi,
        policy: Policy<I>,
        handler: &impl Handler<I>,
    ) -> Self
    where
        I: FromRequest<Arc<Api>, M> + Send + 'static,
    {
        let role = required_role(&policy.calls());
        let mut served = Vec::new();
        for (path, item) in &mut description.paths.paths {
            for (method, operation) in operations(item) {
                let text = operation.description.get_or_insert_default();
                let gap = if text.is_empty() { "" } else { "\n\n" };
                *text = format!("{text}{gap}{role}");
                let methods = guard::<Authenticated, I, M>(method, policy, handler.clone());
                served.push((path.clone(), methods));
            }
        }
        Self { description, served }
    }
}

/// Registers a handler with its policy.
macro_rules! route {
    ($($handler:ident)::+, $policy:expr) => {{
        #[derive(OpenApi)]
        #[openapi(paths($($handler)::+))]
        struct Described;

        Route::new(Described::openapi(), $policy, &$($handler)::+)
    }};
}

/// All routes, in the order of the description.
pub(super) fn table() -> Vec<Route> {
    vec![
        route!(hypervisors::list, Always(Look)),
        route!(hypervisors::show, Always(Look)),
        route!(servers::list, Always(LookAt)),
        route!(servers::owners, Always(ChangeOwner)),
        route!(servers::act, ByCase { cases: SERVER_ACTIONS, case: servers::action_name }),
        route!(servers::show, Always(LookAt)),
        route!(events::of_server, Always(LookAt)),
        route!(devices::list, ByCase { cases: DEVICE_LISTS, case: devices::kind_of_list }),
        route!(devices::show, Always(LookAt)),
        route!(devices::act, Always(ChangeDevice)),
        route!(devices::forget, Always(ChangeDevice)),
        route!(events::of_device, Always(LookAt)),
        route!(events::list, Always(LookAt)),
        route!(claims::list, Always(LookAt)),
        route!(flavors::list, Always(Look)),
        route!(flavors::show, Always(Look)),
        route!(flavors::set, Always(ChangeFlavor)),
        route!(flavors::remove, Always(ChangeFlavor)),
        route!(grants::list, Always(Grants)),
        route!(grants::show, Always(Grants)),
        route!(grants::set, Always(Grants)),
        route!(grants::remove, Always(Grants)),
    ]
}

/// Actions on a server, by their key in the body.
const SERVER_ACTIONS: &[(&str, Call)] = &[
    ("attach_usb_devices", Attach),
    ("detach_usb_devices", Detach),
    ("set_usb_owner", ChangeOwner),
    ("clear_usb_owner", ChangeOwner),
];

/// Lists of devices, by the parameter that selects them.
const DEVICE_LISTS: &[(&str, Call)] = &[("", Look), (devices::DELETED, ChangeDevice)];

/// Router of all routes, without their prefixes.
pub(super) fn router() -> Router<Arc<Api>> {
    table()
        .into_iter()
        .flat_map(|route| route.served)
        .fold(Router::new(), |router, (path, methods)| router.route(&path, methods))
}

/// Operations of a path, with their methods.
pub(super) fn operations(
    item: &mut PathItem,
) -> impl Iterator<Item = (MethodFilter, &mut Operation)> {
    let all = [
        (MethodFilter::GET, &mut item.get),
        (MethodFilter::POST, &mut item.post),
        (MethodFilter::PUT, &mut item.put),
        (MethodFilter::DELETE, &mut item.delete),
    ];
    all.into_iter().filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Sentence that names the role that each case requires.
fn required_role(calls: &[(&str, Call)]) -> String {
    let mut roles = Vec::new();
    for role in Role::ALL {
        let cases: Vec<&str> =
            calls.iter().filter(|(_, call)| call.least() == role).map(|(case, _)| *case).collect();
        if cases.is_empty() {
            continue;
        }
        let named: Vec<String> =
            cases.iter().filter(|case| !case.is_empty()).map(|case| format!("`{case}`")).collect();
        let gap = if named.is_empty() { "" } else { " for " };
        roles.push(format!("{role}{gap}{}", named.join(" and ")));
    }
    format!("Required role: {}.", roles.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Method, path and role of each row in the table of calls of `docs/src/api.md`.
    fn documented(page: &str) -> BTreeSet<(String, String, String)> {
        let (_, section) = page.split_once("\n## Calls\n").unwrap();
        let (section, _) = section.split_once("\n## ").unwrap();
        let mut rows = BTreeSet::new();
        for row in section.lines().filter(|line| line.starts_with("| `")) {
            let mut cells = row.split('|').skip(1).map(str::trim);
            let (calls, role) = (cells.next().unwrap(), cells.next().unwrap());
            let mut methods = Vec::new();
            for call in calls.split('`').skip(1).step_by(2) {
                let mut words = call.split_whitespace();
                methods.extend(words.next());
                // Methods without a path have the path that follows them.
                let Some(path) = words.next() else { continue };
                let path = path.split('?').next().unwrap_or(path);
                for method in methods.drain(..) {
                    rows.insert((method.to_owned(), format!("/{path}"), role.to_owned()));
                }
            }
            assert!(methods.is_empty(), "a method without a path: {row}");
        }
        rows
    }

    const METHODS: [(&str, MethodFilter); 4] = [
        ("GET", MethodFilter::GET),
        ("POST", MethodFilter::POST),
        ("PUT", MethodFilter::PUT),
        ("DELETE", MethodFilter::DELETE),
    ];

    /// Method, path and role of each route, as the description names them.
    fn registered() -> BTreeSet<(String, String, String)> {
        let mut rows = BTreeSet::new();
        for mut route in table() {
            for (path, item) in &mut route.description.paths.paths {
                for (filter, operation) in operations(item) {
                    let (method, _) = METHODS.iter().find(|(_, known)| *known == filter).unwrap();
                    let text = operation.description.clone().unwrap();
                    let (_, roles) = text.split_once("Required role: ").unwrap();
                    for role in Role::ALL.iter().filter(|role| roles.contains(role.name())) {
                        rows.insert(((*method).to_owned(), path.clone(), role.to_string()));
                    }
                }
            }
        }
        rows
    }

    #[test]
    fn the_documented_roles_are_those_of_the_table() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/api.md");
        let documented = documented(&std::fs::read_to_string(page).unwrap());
        assert_eq!(documented, registered(), "left: docs/src/api.md, right: routes.rs");
    }

    #[test]
    fn a_description_names_the_role_of_each_case() {
        assert_eq!(required_role(&[("", Call::Look)]), "Required role: reader.");
        assert_eq!(
            required_role(SERVER_ACTIONS),
            "Required role: member for `attach_usb_devices` and `detach_usb_devices`, admin for \
             `set_usb_owner` and `clear_usb_owner`."
        );
        assert_eq!(required_role(DEVICE_LISTS), "Required role: reader, admin for `deleted=true`.");
    }
}
