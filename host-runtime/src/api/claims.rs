//! Claims: who has which device, and what keeps one out of a guest.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use virt_usb_store::ClaimRow;

use super::Api;
use super::error::ApiError;
use super::policy::{Call, may, may_know_holder};
use super::request::Asks;
use super::responses::{Claims, UsbClaim, UsbProblem};

/// Claims and problems: all of them for administrators, otherwise those of the caller's project
#[utoipa::path(get, path = "/os-usb-claims", tag = "devices", operation_id = "list_usb_claims",
    responses((status = 200, description = "The claims", body = Claims)))]
pub(super) async fn list(
    State(api): State<Arc<Api>>,
    Asks(caller): Asks,
) -> Result<Json<Claims>, ApiError> {
    ApiError::unless(may(&caller, Call::LookAt), ApiError::forbidden)?;
    let snapshot = api.inventory.now()?;
    let known: Vec<&ClaimRow> =
        snapshot.claims().filter(|claim| may_know_holder(&caller, claim)).collect();
    let is_known =
        |instance| caller.is_admin() || known.iter().any(|claim| claim.instance_uuid == instance);
    let problems = snapshot.own.problems.iter().filter(|problem| is_known(problem.instance_uuid));
    Ok(Json(Claims {
        usb_claims: known.iter().map(|claim| UsbClaim::from(*claim)).collect(),
        usb_problems: problems.map(UsbProblem::from).collect(),
    }))
}
