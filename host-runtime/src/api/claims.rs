//! API call for claims: which instance has which device, and which problems keep instances from
//! their devices.

use axum::Json;
use virt_usb_store::ClaimRow;

use super::authorize::Authorized;
use super::error::ApiError;
use super::policy::may_know_holder;
use super::responses::{Claims, UsbClaim, UsbProblem};

/// Claims and problems: all of them for administrators, otherwise those of the caller's project
#[utoipa::path(get, path = "/os-usb-claims", tag = "devices", operation_id = "list_usb_claims",
    responses((status = 200, description = "The claims", body = Claims)))]
pub(super) async fn list(auth: Authorized, (): ()) -> Result<Json<Claims>, ApiError> {
    let (snapshot, caller) = (auth.api.inventory.now()?, auth.caller());
    let known: Vec<&ClaimRow> =
        snapshot.claims().filter(|claim| may_know_holder(caller, claim)).collect();
    let is_known =
        |instance| caller.is_admin() || known.iter().any(|claim| claim.instance_uuid == instance);
    let problems = snapshot.own.problems.iter().filter(|problem| is_known(problem.instance_uuid));
    Ok(Json(Claims {
        usb_claims: known.iter().map(|claim| UsbClaim::from(*claim)).collect(),
        usb_problems: problems.map(UsbProblem::from).collect(),
    }))
}
