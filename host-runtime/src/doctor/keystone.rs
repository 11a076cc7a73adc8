//! Checks Keystone, which validates tokens for the API.

use std::sync::Arc;

use super::process::check_secret;
use super::{Host, Report};
use crate::api::keystone::Keystone;
use crate::client;

/// Checks Keystone. No finding of this check keeps a guest from getting its devices.
pub(super) fn check(host: &Host, report: &Report) {
    const ROLES: [&str; 2] = ["service", "admin"];
    let Some(keystone) = &host.config.keystone else { return };
    match Keystone::new(keystone.clone(), Arc::default()).check() {
        Err(why) => report.warn(
            why,
            "fix the error above; until then Keystone tokens are rejected; tokens of 'virt-usb \
             token' still work",
        ),
        Ok(roles) if !roles.iter().any(|role| ROLES.contains(&role.as_str())) => report.warn(
            format!(
                "the user {} has the roles {}: by default Keystone does not let it validate tokens",
                keystone.user,
                roles.join(", ")
            ),
            format!(
                "'openstack role add --user {} --project {} \
                service'",
                keystone.user, keystone.project
            ),
        ),
        Ok(_) => report.ok(format!("{} answers", keystone.url)),
    }
    check_secret("the password in", &keystone.password_file, &host.config, report);
    if keystone.url.parse().is_ok_and(|address| client::is_open(&address)) {
        report.warn(
            format!(
                "{} is not encrypted: anyone on the network path can read the password and the \
                    tokens",
                keystone.url
            ),
            "an https:// address, unless it is on this host or on a network of your own",
        );
    }
}
