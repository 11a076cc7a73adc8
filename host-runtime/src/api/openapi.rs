//! The API's description, OpenAPI 3.1, made of what stands at the calls: each is described once, and spread over the paths at which it
//! is answered. `openapi.json` beside this file is what is served; a test keeps the two alike.

use std::sync::LazyLock;

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, ObjectBuilder, Paths, Ref, Required, ResponseBuilder, Type};
use utoipa::{OpenApi, ToSchema};

use super::{claims, devices, events, flavors, hypervisors, servers};

/// One entry of what a server or a flavor asks for; what it names must all match.
#[derive(ToSchema)]
#[schema(example = json!({ "id": 1 }))]
#[expect(dead_code, reason = "a description of what the model reads")]
pub(super) struct UsbDeviceRequest {
    /// The device's id.
    #[schema(minimum = 1)]
    id: Option<u64>,
    /// One to four hexadecimal digits.
    #[schema(pattern = "^(0[xX])?[0-9a-fA-F]{1,4}$")]
    vendor_id: Option<String>,
    /// One to four hexadecimal digits; only beside a vendor_id.
    #[schema(pattern = "^(0[xX])?[0-9a-fA-F]{1,4}$")]
    product_id: Option<String>,
    #[schema(min_length = 1, max_length = 126)]
    serial: Option<String>,
    /// A port path.
    #[schema(pattern = r"^[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}$")]
    port: Option<String>,
    /// Two hexadecimal digits.
    class: Option<String>,
    tags: Option<Vec<String>>,
    /// How many; 1 when absent.
    #[schema(minimum = 1)]
    count: Option<u32>,
}

/// A USB port that a SPICE client fills.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description of what the model reads")]
pub(super) struct UsbRedirectionRequest {
    /// `usb`.
    bus: String,
    /// `spicevmc`.
    r#type: String,
}

/// What a flavor asks for.
#[derive(ToSchema)]
#[schema(example = json!({ "usb_devices": [{ "vendor_id": "0529", "product_id": "0001" }] }))]
#[expect(dead_code, reason = "a description of what the model reads")]
pub(super) struct FlavorRequest {
    usb_devices: Option<Vec<UsbDeviceRequest>>,
    usb_redirection_devices: Option<Vec<UsbRedirectionRequest>>,
}

/// The devices of an action.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description of what is read")]
pub(super) struct UsbDevicesRequests {
    #[schema(min_items = 1)]
    usb_devices_requests: Vec<UsbDeviceRequest>,
}

/// One of them.
#[derive(ToSchema)]
#[schema(example = json!({ "attach_usb_devices": { "usb_devices_requests": [{ "id": 1 }] } }))]
#[expect(dead_code, reason = "a description of what is read")]
pub(super) struct ServerActionRequest {
    attach_usb_devices: Option<UsbDevicesRequests>,
    detach_usb_devices: Option<UsbDevicesRequests>,
    set_usb_owner: Option<NewOwner>,
    /// `null`.
    clear_usb_owner: Option<()>,
}

/// Whose a server is.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description of what is read")]
pub(super) struct NewOwner {
    #[schema(min_length = 1)]
    project_id: String,
}

/// One of them.
#[derive(ToSchema)]
#[schema(example = json!({ "disable": { "reason": "lent" } }))]
#[expect(dead_code, reason = "a description of what is read")]
pub(super) struct DeviceActionRequest {
    /// `null`.
    enable: Option<()>,
    disable: Option<Disable>,
    /// `null`.
    clear_quarantine: Option<()>,
    add_tags: Option<TagList>,
    remove_tags: Option<TagList>,
}

/// Why.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description of what is read")]
pub(super) struct Disable {
    #[schema(max_length = 255)]
    reason: Option<String>,
}

/// Tags.
#[derive(ToSchema)]
#[expect(dead_code, reason = "a description of what is read")]
pub(super) struct TagList {
    tags: Vec<String>,
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "virt-usb",
        description = "USB devices for libvirt guests, in OpenStack's style.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        hypervisors::list,
        hypervisors::show,
        servers::list,
        servers::owners,
        servers::act,
        servers::show,
        events::of_server,
        devices::list,
        devices::show,
        devices::act,
        events::of_device,
        events::list,
        claims::list,
        flavors::list,
        flavors::show,
        flavors::set,
        flavors::remove,
    ),
    components(schemas(devices::SortKey, devices::SortDir))
)]
struct Described;

/// Where the calls are answered, and whether the path names the tenant.
const PREFIXES: [(&str, &str, bool); 4] = [
    ("/v2/{tenant_id}", "v2", true),
    ("/v2.1/{tenant_id}", "v2_1_tenant", true),
    ("/v2.1", "v2_1", false),
    ("/v3", "v3", false),
];
const TOKEN: &str = "token";
const FAULT: &str = "Fault";
/// What any call may be answered instead.
const FAULTS: [(&str, &str); 12] = [
    ("400", "The request is wrong; the message says where"),
    ("401", "No token, or none that counts"),
    ("403", "The token's role may not"),
    ("404", "There is no such thing, or it is not the project's"),
    ("408", "The body did not arrive in time"),
    ("409", "It cannot be had now; the message says why"),
    ("413", "The body is too large"),
    ("415", "The body is no JSON"),
    ("429", "Asked for too often; Retry-After says when to try again"),
    ("500", "A fault of the host; its log says which"),
    ("503", "Not now: try again"),
    ("default", "A fault"),
];

/// The description.
pub(super) fn document() -> utoipa::openapi::OpenApi {
    let mut document = Described::openapi();
    let calls = std::mem::take(&mut document.paths);
    let mut paths = Paths::new();
    for (prefix, version, tenant) in PREFIXES {
        for (path, item) in &calls.paths {
            let mut item = item.clone();
            for operation in
                [&mut item.get, &mut item.post, &mut item.put, &mut item.delete].into_iter().flatten()
            {
                complete(operation, version, tenant);
            }
            paths.paths.insert(format!("{prefix}{path}"), item);
        }
    }
    document.paths = paths;
    document.security = Some(vec![SecurityRequirement::new(TOKEN, Vec::<String>::new())]);
    let components = document.components.get_or_insert_default();
    let scheme = ApiKeyValue::with_description("X-Auth-Token", "Made by 'virt-usb token add'");
    components.security_schemes.insert(TOKEN.into(), SecurityScheme::ApiKey(ApiKey::Header(scheme)).into());
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let fault = ObjectBuilder::new()
        .property("code", ObjectBuilder::new().schema_type(Type::Integer))
        .property("message", text())
        .required("code")
        .required("message");
    let named = ObjectBuilder::new()
        .description(Some("Under its name in Nova, such as itemNotFound"))
        .additional_properties(Some(fault));
    components.schemas.insert(FAULT.into(), named.build().into());
    for (status, description) in FAULTS {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(FAULT))).build();
        let response = ResponseBuilder::new().description(description).content("application/json", content);
        components.responses.insert(fault_name(status), response.build().into());
    }
    document
}

/// What holds for every call.
fn complete(operation: &mut Operation, version: &str, tenant: bool) {
    operation.operation_id = operation.operation_id.take().map(|id| format!("{version}_{id}"));
    if tenant {
        operation.parameters.get_or_insert_default().insert(0, tenant_id().into());
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
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .build()
}

fn text() -> String {
    // It is made of text and numbers alone: it can be written.
    document().to_pretty_json().unwrap_or_default() + "\n"
}

/// `GET /openapi.json`, for everybody.
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
            "{} is not what is served: BLESS=1 writes it anew; then look at what has changed",
            file.display()
        );
    }
}
