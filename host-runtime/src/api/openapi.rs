//! OpenAPI 3.1 description of the API. The [table of routes](super::routes) describes each call
//! once; the description lists it under each prefix. `openapi.json` beside this file is a copy of
//! the served description; a test compares the two.

use std::sync::LazyLock;

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, ObjectBuilder, Paths, Ref, RefOr, Required, ResponseBuilder, Type,
};

use super::{devices, request_schemas, routes};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "virt-usb",
        description = "USB devices for libvirt guests, in OpenStack's style.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(
        devices::SortKey,
        devices::SortDir,
        request_schemas::UsbDeviceRequest,
        request_schemas::UsbDeviceDetachRequest,
        request_schemas::UsbDeviceSelector,
        request_schemas::UsbRedirectionRequest,
    ))
)]
struct Described;

/// Prefixes of all calls: path, name in operation ids, whether the path names the tenant.
const PREFIXES: [(&str, &str, bool); 4] = [
    ("/v2/{tenant_id}", "v2", true),
    ("/v2.1/{tenant_id}", "v2_1_tenant", true),
    ("/v2.1", "v2_1", false),
    ("/v3", "v3", false),
];
const TOKEN: &str = "token";
const FAULT: &str = "Fault";
/// Error responses that any call may return.
const FAULTS: [(&str, &str); 12] = [
    ("400", "The request is invalid; the message says where"),
    ("401", "No valid token"),
    ("403", "The token's role does not allow this"),
    ("404", "Not found, or not in the token's project"),
    ("408", "The body did not arrive in time"),
    ("409", "Not available now; the message says why"),
    ("413", "The body is too large"),
    ("415", "The body is not JSON"),
    ("429", "Rate limit exceeded; Retry-After says when to retry"),
    ("500", "Internal error; the host's log says why"),
    ("503", "Temporarily unavailable: retry"),
    ("default", "A fault"),
];

/// Builds the OpenAPI description.
pub(super) fn document() -> utoipa::openapi::OpenApi {
    let mut document = Described::openapi();
    for route in routes::table() {
        document.merge(route.description);
    }
    let calls = std::mem::take(&mut document.paths);
    let mut paths = Paths::new();
    for (prefix, version, tenant) in PREFIXES {
        for (path, item) in &calls.paths {
            let mut item = item.clone();
            for (_, operation) in routes::operations(&mut item) {
                complete(operation, version, tenant);
            }
            paths.paths.insert(format!("{prefix}{path}"), item);
        }
    }
    document.paths = paths;
    document.security = Some(vec![SecurityRequirement::new(TOKEN, Vec::<String>::new())]);
    let components = document.components.get_or_insert_default();
    let scheme = ApiKeyValue::with_description(
        "X-Auth-Token",
        "Issued by 'virt-usb token add' or by Keystone",
    );
    components
        .security_schemes
        .insert(TOKEN.into(), SecurityScheme::ApiKey(ApiKey::Header(scheme)).into());
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let fault = ObjectBuilder::new()
        .property("code", ObjectBuilder::new().schema_type(Type::Integer))
        .property("message", text())
        .required("code")
        .required("message");
    let named = ObjectBuilder::new()
        .description(Some("Keyed by Nova's name of the error, such as itemNotFound"))
        .additional_properties(Some(fault));
    components.schemas.insert(FAULT.into(), named.build().into());
    for (status, description) in FAULTS {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(FAULT))).build();
        let response =
            ResponseBuilder::new().description(description).content("application/json", content);
        components.responses.insert(fault_name(status), response.build().into());
    }
    document
}

/// Adds the parts that all calls have in common.
fn complete(operation: &mut Operation, version: &str, tenant: bool) {
    operation.operation_id = operation.operation_id.take().map(|id| format!("{version}_{id}"));
    if tenant {
        operation.parameters.get_or_insert_default().insert(0, tenant_id().into());
    }
    for parameter in operation.parameters.iter_mut().flatten() {
        if let RefOr::T(parameter) = parameter {
            let known = request_schemas::parameter(&parameter.name);
            parameter.schema = known.or(parameter.schema.take());
        }
    }
    for (status, _) in FAULTS {
        let response = || Ref::from_response_name(fault_name(status)).into();
        operation.responses.responses.entry(status.into()).or_insert_with(response);
    }
}

fn fault_name(status: &str) -> String {
    format!("{FAULT}_{status}")
}

fn tenant_id() -> Parameter {
    ParameterBuilder::new()
        .name("tenant_id")
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .description(Some("The token's project"))
        .build()
}

/// Text of the description, as it is served.
fn text() -> String {
    // The description consists of text and numbers, so it can always be serialized.
    document().to_pretty_json().unwrap_or_default() + "\n"
}

/// Serves `GET /openapi.json` without authentication.
pub(super) async fn show() -> impl IntoResponse {
    static TEXT: LazyLock<String> = LazyLock::new(text);
    ([(CONTENT_TYPE, "application/json")], TEXT.as_str())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn what_is_served_is_what_is_kept() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/openapi.json");
        let made = super::text();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&file, &made).unwrap();
        }
        let kept = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            kept == made,
            "{} is out of date: run the test with BLESS=1 to write it, then review the changes",
            file.display()
        );
    }
}
